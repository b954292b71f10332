"""Policies, rollout trees and the engine that grows them. What needs torch is imported when it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any

from .chat import ChatRenderer
from .evaluation.figures import Evaluation
from .loop import Stopped, Watcher, run_to_end
from .policy import (
    Completion,
    Context,
    ContextLengthExceeded,
    Lockstep,
    OwnWeights,
    Policy,
    Sample,
    Sampling,
    Served,
    TextPolicy,
    TokenPolicy,
    WeightSync,
    derive_seed,
)
from .rollouts.engine import GrowingTree, grow, grow_trees
from .rollouts.failure import Failure
from .rollouts.strategies import RolloutStrategy
from .store.folder import Run
from .store.store import EpisodeStore
from .tree import ROOT, Advantages, Cost, Node, RolloutTree, joined

if TYPE_CHECKING:
    from .policies.sampler import TransformersPolicy

__all__ = [
    "ROOT",
    "Advantages",
    "ChatRenderer",
    "Completion",
    "Context",
    "ContextLengthExceeded",
    "Cost",
    "EpisodeStore",
    "Evaluation",
    "Failure",
    "GrowingTree",
    "Lockstep",
    "Node",
    "OwnWeights",
    "Policy",
    "RolloutStrategy",
    "RolloutTree",
    "Run",
    "Sample",
    "Sampling",
    "Served",
    "Stopped",
    "TextPolicy",
    "TokenPolicy",
    "TransformersPolicy",
    "Watcher",
    "WeightSync",
    "derive_seed",
    "grow",
    "grow_trees",
    "joined",
    "run_to_end",
]


def __getattr__(name: str) -> Any:
    if name == "TransformersPolicy":
        return importlib.import_module(".policies.sampler", __name__).TransformersPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
