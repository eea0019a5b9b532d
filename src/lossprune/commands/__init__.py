"""The commands: for each its flags, and what it does with them."""
