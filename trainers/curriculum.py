"""Where a step's tasks come from: one set of tasks, a mixture of several, or one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from ..agents import RolloutTree
from ..envs import Task
from .checks import STRICT
from .tasks import TaskSet

State = Mapping[str, Any]  # JSON
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill [0, 1) more evenly than those of any other number


class TaskSource(Protocol):
    """Says which tasks the policy is improved on.

    A source is a value. What its draws depend on beside the number of the step is its state, which a checkpoint keeps:
    a run that is resumed draws what it would have drawn.
    """

    @property
    def environments(self) -> Sequence[TaskSet]:
        """The task sets that its tasks may be of."""
        ...

    def draw(self, step: int, count: int, seed: int, state: State) -> Sequence[Task]:
        """The `count` tasks of a step; equal arguments give equal tasks. `seed` is the run's.

        `state` is of the reports of all steps before this one. With `max_lag` the last `max_lag` steps before it are
        missing: they are not trained yet when the tasks are drawn.
        """
        ...

    def report(self, step: int, trees: Sequence[RolloutTree], state: State) -> State:
        """The state after a step whose tasks grew these trees; unchanged where draws depend on the step alone. Steps
        report in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """New tasks of one environment at every step."""

    environment: TaskSet

    @property
    def environments(self) -> Sequence[TaskSet]:
        return (self.environment,)

    def draw(self, step: int, count: int, seed: int, state: State) -> Sequence[Task]:
        return [self.environment.task("train", seed, step, i) for i in range(count)]

    def report(self, step: int, trees: Sequence[RolloutTree], state: State) -> State:
        return state


@dataclass(frozen=True, slots=True)
class Part:
    """An environment of a mixture, with its share of the tasks, or of a curriculum, with the number of its steps."""

    __pydantic_config__ = STRICT
    environment: TaskSet
    share: float | None = None  # relative to those of the other parts
    steps: int | None = None  # of the last part: all that are left


@dataclass(frozen=True, slots=True)
class Mixture:
    """Tasks of several environments in the same step.

    The tasks of a run are numbered through, and the multiple of the golden ratio with its number chooses the
    environment of each: after any number of tasks the shares are kept as well as a few tasks allow.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts or not all(part.share is not None and part.share > 0 for part in self.parts):
            raise ValueError("every part of a mixture needs a share above 0")

    @property
    def environments(self) -> Sequence[TaskSet]:
        return [part.environment for part in self.parts]

    def draw(self, step: int, count: int, seed: int, state: State) -> Sequence[Task]:
        return [self._environment(step * count + i).task("train", seed, step, i) for i in range(count)]

    def _environment(self, number: int) -> TaskSet:
        ends = [*accumulate(part.share or 0.0 for part in self.parts)]
        place = ends[-1] * ((number + 1) * GOLDEN % 1)
        return next(part.environment for part, end in zip(self.parts, ends, strict=True) if place < end)

    def report(self, step: int, trees: Sequence[RolloutTree], state: State) -> State:
        return state


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Tasks of one environment for so many steps, then of the next: a curriculum in a fixed order."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts or not all(part.steps is not None and part.steps > 0 for part in self.parts[:-1]):
            raise ValueError("every part of a curriculum but the last needs steps, 1 or more")

    @property
    def environments(self) -> Sequence[TaskSet]:
        return [part.environment for part in self.parts]

    def draw(self, step: int, count: int, seed: int, state: State) -> Sequence[Task]:
        return Uniform(self._at(step)).draw(step, count, seed, state)

    def _at(self, step: int) -> TaskSet:
        end = 0
        for part in self.parts[:-1]:
            end += part.steps or 0
            if step < end:
                return part.environment
        return self.parts[-1].environment

    def report(self, step: int, trees: Sequence[RolloutTree], state: State) -> State:
        return state
