"""What a mask leaves of a network's graph, and the smaller networks that compute the same."""
