"""Sparse inference in compiled C: steps, lowered from a graph, laid out in memory, tuned, run."""
