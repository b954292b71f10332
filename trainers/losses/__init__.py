"""Losses over terms, and over sums of rollouts that are compared."""
