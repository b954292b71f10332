"""Policies, rollout trees and the engine that grows them."""

from .attention import bring_attention, causal_mask, grouped_attention, tree_logits
from .chat import ChatRenderer
from .evaluate import Evaluation, Interval, paired_difference, succeeded
from .forward import is_plain_llama, native_dtype, rotate
from .frames import DamagedStore, StoreError
from .index import Range, TreeSummary, Where
from .lora import add_lora, merged_state
from .policy import Completion, Context, Policy, Sample, Sampling, derive_seed
from .records import Record
from .rollout import GrowingTree, ReplayMismatch, Turn, grow_trees
from .salvage import migrate, salvage
from .sampler import TransformersPolicy
from .scripted import ScriptedPolicy
from .store import EpisodeStore, Loss, StoreLocked, append_line, read_lines
from .strategies import (
    Budgeted,
    Chains,
    EntropyBranching,
    FollowOracle,
    RolloutStrategy,
    TreeExpansion,
    normalized_entropy,
)
from .tree import ROOT, Cost, Node, RolloutTree

__all__ = [
    "ROOT",
    "Budgeted",
    "Chains",
    "ChatRenderer",
    "Completion",
    "Context",
    "Cost",
    "DamagedStore",
    "EntropyBranching",
    "EpisodeStore",
    "Evaluation",
    "FollowOracle",
    "GrowingTree",
    "Interval",
    "Loss",
    "Node",
    "Policy",
    "Range",
    "Record",
    "ReplayMismatch",
    "RolloutStrategy",
    "RolloutTree",
    "Sample",
    "Sampling",
    "ScriptedPolicy",
    "StoreError",
    "StoreLocked",
    "TransformersPolicy",
    "TreeExpansion",
    "TreeSummary",
    "Turn",
    "Where",
    "add_lora",
    "append_line",
    "bring_attention",
    "causal_mask",
    "derive_seed",
    "grouped_attention",
    "grow_trees",
    "is_plain_llama",
    "merged_state",
    "migrate",
    "native_dtype",
    "normalized_entropy",
    "paired_difference",
    "read_lines",
    "rotate",
    "salvage",
    "succeeded",
    "tree_logits",
]
