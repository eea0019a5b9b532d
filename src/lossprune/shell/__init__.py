"""Commands on a network of one's own and on a finished run: ``prune`` and ``deploy``."""
