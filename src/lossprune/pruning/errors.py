"""What the library raises beyond ``ValueError`` for a wrong argument."""


class PruningError(ValueError):
    """A network or its data cannot be measured or pruned as asked; the message says why."""
