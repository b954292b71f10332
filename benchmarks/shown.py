"""Shares as the results pages show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from scipy.stats import t as student


def mean_interval(values: Sequence[float], sign: str = "") -> str:
    """The mean, and its 95% interval (Student's t) where there are three values or more."""
    mean = fmean(values)
    if len(values) < 3:
        return f"{mean:{sign}.1%}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean:{sign}.1%} ({mean - half:{sign}.1%} to {mean + half:{sign}.1%})"


def one(value: Mapping[str, float]) -> str:
    """A success with its interval."""
    return f"{value['mean']:.1%} ({value['low']:.1%} to {value['high']:.1%})"
