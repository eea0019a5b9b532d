"""Convolutional networks, trained over their kept weights alone."""
