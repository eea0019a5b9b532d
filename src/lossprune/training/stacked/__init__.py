"""Many networks of one architecture, trained together."""
