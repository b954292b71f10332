"""Policies, rollout trees and the engine that grows them."""

from .attention import bring_attention, causal_mask, grouped_attention, tree_logits
from .chat import ChatRenderer
from .compare import Curves, Flip, PairedResult, curves, flips, paired
from .evaluate import AnswerReader, Evaluation, Outcome, TaskOutcome, by_difficulty, figures, succeeded
from .forward import is_plain_llama, native_dtype, rotate
from .lora import add_lora, merged_state
from .openai_policy import ChatPlayer, OpenAIPolicy, Server, ServerError
from .players import OraclePlayer, RandomPlayer
from .policy import Completion, Context, Player, Policy, Sample, Sampling, derive_seed
from .rollout import GrowingTree, ReplayMismatch, Turn, grow_trees
from .sampler import TransformersPolicy
from .scripted import ScriptedPolicy
from .statistics import Interval, paired_difference
from .store import EpisodeStore, TreeSummary, append_line, read_lines
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
    "AnswerReader",
    "Budgeted",
    "Chains",
    "ChatPlayer",
    "ChatRenderer",
    "Completion",
    "Context",
    "Cost",
    "Curves",
    "EntropyBranching",
    "EpisodeStore",
    "Evaluation",
    "Flip",
    "FollowOracle",
    "GrowingTree",
    "Interval",
    "Node",
    "OpenAIPolicy",
    "OraclePlayer",
    "Outcome",
    "PairedResult",
    "Player",
    "Policy",
    "RandomPlayer",
    "ReplayMismatch",
    "RolloutStrategy",
    "RolloutTree",
    "Sample",
    "Sampling",
    "ScriptedPolicy",
    "Server",
    "ServerError",
    "TaskOutcome",
    "TransformersPolicy",
    "TreeExpansion",
    "TreeSummary",
    "Turn",
    "add_lora",
    "append_line",
    "bring_attention",
    "by_difficulty",
    "causal_mask",
    "curves",
    "derive_seed",
    "figures",
    "flips",
    "grouped_attention",
    "grow_trees",
    "is_plain_llama",
    "merged_state",
    "native_dtype",
    "normalized_entropy",
    "paired",
    "paired_difference",
    "read_lines",
    "rotate",
    "succeeded",
    "tree_logits",
]
