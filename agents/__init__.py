"""Policies, rollout trees and the engine that grows them."""

from .chat import ChatRenderer
from .evaluation.compare import Curves, Flip, PairedResult, curves, flips, paired
from .evaluation.outcomes import (
    AnswerReader,
    Evaluation,
    Outcome,
    TaskOutcome,
    by_difficulty,
    distinct,
    figures,
    succeeded,
)
from .evaluation.statistics import Interval, paired_difference
from .inference.acceptance import bring_attention
from .inference.attention import BLOCK, Block, block_attention, block_gradients, causal_attention, tree_logits
from .inference.forward import is_plain_llama, native_dtype, positions, rotate
from .loop import run_to_end
from .models.lora import add_lora, has_lora, merged_state, save_adapter
from .policies.openai import ChatPlayer, OpenAIPolicy, Server, ServerError
from .policies.players import OraclePlayer, RandomPlayer
from .policies.sampler import TransformersPolicy
from .policies.scripted import ScriptedPolicy
from .policy import (
    Completion,
    Context,
    ContextLengthExceeded,
    Lockstep,
    Policy,
    Sample,
    Sampling,
    TextPolicy,
    TokenPolicy,
    WeightSync,
    derive_seed,
)
from .rollouts.engine import GrowingTree, Turn, grow, grow_trees
from .rollouts.failure import Failure, FailureCause, TooManyFailures, failure_cause
from .rollouts.replay import Continuation, Divergence, Episode, RewardTerm, played, rescore, verify
from .rollouts.response import (
    LENIENT,
    STRICT,
    Answer,
    Comparison,
    Difference,
    EpisodeError,
    OutsideSource,
    ReplayMismatch,
)
from .rollouts.strategies import (
    Budgeted,
    Chains,
    EntropyBranching,
    FollowOracle,
    RolloutStrategy,
    SomeChains,
    TreeExpansion,
    normalized_entropy,
)
from .store.folder import Run
from .store.frames import DamagedStore, StoreError
from .store.index import Range, TreeSummary, Where
from .store.records import Record
from .store.salvage import migrate, salvage
from .store.store import EpisodeStore, Loss, StoreLocked, append_line, read_lines
from .tree import ROOT, Cost, Node, RolloutTree, joined

__all__ = [
    "BLOCK",
    "LENIENT",
    "ROOT",
    "STRICT",
    "Answer",
    "AnswerReader",
    "Block",
    "Budgeted",
    "Chains",
    "ChatPlayer",
    "ChatRenderer",
    "Comparison",
    "Completion",
    "Context",
    "ContextLengthExceeded",
    "Continuation",
    "Cost",
    "Curves",
    "DamagedStore",
    "Difference",
    "Divergence",
    "EntropyBranching",
    "Episode",
    "EpisodeError",
    "EpisodeStore",
    "Evaluation",
    "Failure",
    "FailureCause",
    "Flip",
    "FollowOracle",
    "GrowingTree",
    "Interval",
    "Lockstep",
    "Loss",
    "Node",
    "OpenAIPolicy",
    "OraclePlayer",
    "Outcome",
    "OutsideSource",
    "PairedResult",
    "Policy",
    "RandomPlayer",
    "Range",
    "Record",
    "ReplayMismatch",
    "RewardTerm",
    "RolloutStrategy",
    "RolloutTree",
    "Run",
    "Sample",
    "Sampling",
    "ScriptedPolicy",
    "Server",
    "ServerError",
    "SomeChains",
    "StoreError",
    "StoreLocked",
    "TaskOutcome",
    "TextPolicy",
    "TokenPolicy",
    "TooManyFailures",
    "TransformersPolicy",
    "TreeExpansion",
    "TreeSummary",
    "Turn",
    "WeightSync",
    "Where",
    "add_lora",
    "append_line",
    "block_attention",
    "block_gradients",
    "bring_attention",
    "by_difficulty",
    "causal_attention",
    "curves",
    "derive_seed",
    "distinct",
    "failure_cause",
    "figures",
    "flips",
    "grow",
    "grow_trees",
    "has_lora",
    "is_plain_llama",
    "joined",
    "merged_state",
    "migrate",
    "native_dtype",
    "normalized_entropy",
    "paired",
    "paired_difference",
    "played",
    "positions",
    "read_lines",
    "rescore",
    "rotate",
    "run_to_end",
    "salvage",
    "save_adapter",
    "succeeded",
    "tree_logits",
    "verify",
]
