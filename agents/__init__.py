"""Policies, rollout trees and the engine that grows them. What needs torch is imported when it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any

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
from .loop import run_to_end
from .policies.openai import ChatPlayer, OpenAIPolicy, Server, ServerError
from .policies.players import OraclePlayer, RandomPlayer
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

if TYPE_CHECKING:
    from .policies.sampler import TransformersPolicy

__all__ = [
    "LENIENT",
    "ROOT",
    "STRICT",
    "Answer",
    "AnswerReader",
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
    "append_line",
    "by_difficulty",
    "curves",
    "derive_seed",
    "distinct",
    "failure_cause",
    "figures",
    "flips",
    "grow",
    "grow_trees",
    "joined",
    "migrate",
    "normalized_entropy",
    "paired",
    "paired_difference",
    "played",
    "read_lines",
    "rescore",
    "run_to_end",
    "salvage",
    "succeeded",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "TransformersPolicy":
        return importlib.import_module(".policies.sampler", __name__).TransformersPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
