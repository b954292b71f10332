"""Losses over terms, and over sums of rollouts that are compared."""

from .comparisons import Compared, Comparisons, Groups, Siblings
from .sums import DpoLoss, GvpoLoss, SumLoss, Sums
from .terms import (
    AGGREGATIONS,
    CispoLoss,
    ClippedLoss,
    GeometricLoss,
    MaskedRatios,
    PolicyLoss,
    ReinforceLoss,
    SapoLoss,
    TruncatedImportance,
    WithEntropy,
    WithKL,
    kl,
)

__all__ = [
    "AGGREGATIONS",
    "CispoLoss",
    "ClippedLoss",
    "Compared",
    "Comparisons",
    "DpoLoss",
    "GeometricLoss",
    "Groups",
    "GvpoLoss",
    "MaskedRatios",
    "PolicyLoss",
    "ReinforceLoss",
    "SapoLoss",
    "Siblings",
    "SumLoss",
    "Sums",
    "TruncatedImportance",
    "WithEntropy",
    "WithKL",
    "kl",
]
