"""A deployed network as a C library: the kernels' own source, and its plan and weights as data."""
