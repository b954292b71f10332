"""Evaluation: outcomes, figures, statistics, comparisons."""
