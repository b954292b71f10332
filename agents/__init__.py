"""Policies, rollout trees and the engine that grows them."""

from .answer import LENIENT, STRICT, Answer, Comparison, Difference, OutsideSource, ReplayMismatch
from .attention import bring_attention, causal_mask, grouped_attention, tree_logits
from .chat import ChatRenderer
from .evaluate import Evaluation, Interval, paired_difference, succeeded
from .forward import is_plain_llama, native_dtype, rotate
from .frames import DamagedStore, StoreError
from .index import Range, TreeSummary, Where
from .lora import add_lora, merged_state
from .policy import Completion, Context, Policy, Sample, Sampling, derive_seed
from .records import Record
from .replay import Continuation, Divergence, Episode, RewardTerm, played, rescore, verify
from .rollout import GrowingTree, Turn, grow_trees
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
    "LENIENT",
    "ROOT",
    "STRICT",
    "Answer",
    "Budgeted",
    "Chains",
    "ChatRenderer",
    "Comparison",
    "Completion",
    "Context",
    "Continuation",
    "Cost",
    "DamagedStore",
    "Difference",
    "Divergence",
    "EntropyBranching",
    "Episode",
    "EpisodeStore",
    "Evaluation",
    "FollowOracle",
    "GrowingTree",
    "Interval",
    "Loss",
    "Node",
    "OutsideSource",
    "Policy",
    "Range",
    "Record",
    "ReplayMismatch",
    "RewardTerm",
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
    "played",
    "read_lines",
    "rescore",
    "rotate",
    "salvage",
    "succeeded",
    "tree_logits",
    "verify",
]
