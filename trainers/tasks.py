"""TaskSet: a set of tasks, split into those to train on and those held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..agents import derive_seed
from ..envs import Task
from .checks import STRICT


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Which tasks there are: an environment, its settings, and the reset options of both splits."""

    __pydantic_config__ = STRICT
    id: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[Any, ...] = ()  # around every task, the first one innermost; a name, or {name: {arguments}}
    train: Mapping[str, Any] = field(default_factory=lambda: {"split": "train"})
    heldout: Mapping[str, Any] = field(default_factory=lambda: {"split": "heldout"})
    success: str = "exact"  # the reward term that is 1 where an episode succeeded
    secret: str | None = None  # what seeds derive from beside their names, so that agents cannot search for them

    def task(self, split: str, *parts: int | str, **settings: Any) -> Task:
        """The task that the parts (run seed, step, number …) name, for the secret."""
        options = self.train if split == "train" else self.heldout
        seed = derive_seed(*filter(None, [self.secret]), split, *parts)
        return Task(self.id, seed, dict(options), {**self.settings, **settings}, self.wrappers)
