"""Deployed networks in files: the steps, the kept weights and how they were tuned, as data."""
