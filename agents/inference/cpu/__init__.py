"""The sampler's forward pass in C, for CPUs."""
