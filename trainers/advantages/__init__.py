"""Advantage estimators."""

from .anchors import AnchorStates, HistoryAnchors
from .estimators import (
    AdvantageEstimator,
    BestOnly,
    GroupRelative,
    Norm,
    SharedMean,
    Sum,
    TokenReturns,
    Whitened,
    spread,
)
from .gae import GroupedGAE, bi_level_gae, gae
from .node_values import BackedUp, PrefixGroups, SummedLeaves

__all__ = [
    "AdvantageEstimator",
    "AnchorStates",
    "BackedUp",
    "BestOnly",
    "GroupRelative",
    "GroupedGAE",
    "HistoryAnchors",
    "Norm",
    "PrefixGroups",
    "SharedMean",
    "Sum",
    "SummedLeaves",
    "TokenReturns",
    "Whitened",
    "bi_level_gae",
    "gae",
    "spread",
]
