"""Networks in folders of ``save_pretrained``: read, pruned and written a block at a time."""
