"""Inference: attention on trees, keys and values, forward passes."""
