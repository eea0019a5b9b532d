"""What a mask is good for: smaller files, smaller networks, faster ones."""
