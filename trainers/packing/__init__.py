"""Packing: the trees of a batch as one sequence of unique tokens, how these attend, and the terms of their loss."""

from .attention import TreeAttend, blocks_of, last_seers, tree_mask
from .layout import Pack, Segment, pack, split
from .terms import Aggregation, ScoredTree, Terms, check_recorded, score

__all__ = [
    "Aggregation",
    "Pack",
    "ScoredTree",
    "Segment",
    "Terms",
    "TreeAttend",
    "blocks_of",
    "check_recorded",
    "last_seers",
    "pack",
    "score",
    "split",
    "tree_mask",
]
