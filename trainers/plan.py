"""Plan: all that a run does, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..agents import Sampling
from .algorithms import Algorithm
from .checks import STRICT, at_least
from .stages import Evaluate, Improvement, Stage, Warmup
from .tasks import TaskSet


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How held-out success is measured; the tasks are the same for every stage, run and seed."""

    __pydantic_config__ = STRICT
    tasks: int = 200
    rollouts: int = 1  # a task
    temperature: float = 1.0  # 1: the policy itself; 0: its most likely tokens
    untrained: int = 64  # tasks, the first ones, on which the untouched model is measured

    def __post_init__(self) -> None:
        at_least(0, tasks=self.tasks, temperature=self.temperature, untrained=self.untrained)
        at_least(1, rollouts=self.rollouts)


@dataclass(frozen=True, slots=True)
class Keep:
    """Which models stay in the run's directory besides the trained one, the last."""

    __pydantic_config__ = STRICT
    best: bool = False  # models/best: of the evaluation on all held-out tasks with the highest success, the first one
    every: int = 0  # models/step-N after every so many steps of the improvement; 0: none

    def __post_init__(self) -> None:
        at_least(0, every=self.every)


OnFailure = Literal["stop", "skip"]  # where an environment's code raises an error: end the run, or leave its task out


@dataclass(frozen=True, slots=True)
class Plan:
    """All a run does."""

    environment: TaskSet
    algorithm: Algorithm
    sampling: Sampling = Sampling()
    warmup: Warmup = Warmup()
    improvement: Improvement = Improvement()
    heldout: HeldOut = HeldOut()
    seed: int = 0
    checkpoint_every: float = 120.0  # seconds between checkpoints
    keep: Keep = Keep()
    on_failure: OnFailure = "stop"  # of an environment's code; a failure of the world always costs its task alone
    max_failures: float = 0.5  # share of the tasks of a step or an evaluation; where more fail, the run stops
    environment_threads: int = 32  # in which environments' calls, which block, run at the same time
    stages: Sequence[Stage] = ()  # by default `usual_stages`

    def __post_init__(self) -> None:
        at_least(1, environment_threads=self.environment_threads)
        at_least(0, max_failures=self.max_failures)
        object.__setattr__(self, "stages", tuple(self.stages) or usual_stages(self))
        names = [stage.name for stage in self.stages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two stages are named {twice.pop()!r}: give one of them another name")


def usual_stages(plan: Plan) -> tuple[Stage, ...]:
    """Evaluate the untouched model, warm it up, evaluate, improve it, evaluate."""
    first = Evaluate("untrained", plan.heldout.untrained)
    return first, plan.warmup, Evaluate("warmed up"), plan.improvement, Evaluate("trained")
