"""The learner's lean forward and backward pass, for CPUs."""
