"""The commands, one a module: its flags, and a function that does it and returns the exit status.

Nothing here imports torch before its command's flags have been read.
"""

EXIT_OK, EXIT_ERROR, EXIT_DIVERGED, EXIT_INTERRUPTED = 0, 2, 3, 130
