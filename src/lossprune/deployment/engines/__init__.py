"""Deployed networks beside other packages' inference engines, each in a process of its own."""
