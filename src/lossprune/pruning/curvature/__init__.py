"""Loss, gradient and diagonal of the generalised Gauss-Newton matrix of a network on data."""
