"""Multilayer perceptrons trained over their surviving weights alone, on the CPU and on GPUs."""
