"""Pipeline: with `max_lag`, trees of later steps grow before the learner has trained the earlier ones.

The trees of step s begin once the weights of step s - max_lag are in place, and not before. Therefore every tree is at
most `max_lag` versions old when it is trained, none is thrown away, and none is left out for being slow. Each step
trains the trees of its own tasks, in the order of the tasks.

A policy with weights of its own (`OwnWeights`), such as a server's, samples while the learner works in a thread. A
policy that shares the model's weights cannot. There all trees of step s grow under the weights of step s - max_lag,
before those move: the lag is the same, and the run is repeatable.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from ..agents import Failure, OwnWeights, RolloutTree, derive_seed
from ..agents.rollouts import FailureCause
from ..agents.rollouts.engine import in_thread
from ..agents.store.records import Record, from_json, json_line, read_record, write_record
from ..envs import Task

if TYPE_CHECKING:
    from .training import Trainer

T = TypeVar("T")


@dataclass(slots=True)
class Grown:
    """What has come of a step's tasks so far."""

    tasks: Sequence[Task]
    by_task: dict[int, RolloutTree] = field(default_factory=dict)  # by the task's place in `tasks`
    failures: list[Failure] = field(default_factory=list)
    over: bool = False  # whether every task has come to its end, and no more of them failed than may

    def add(self, outcome: RolloutTree | Failure) -> None:
        if isinstance(outcome, Failure):
            self.failures.append(outcome)
        else:
            self.by_task[self.place(outcome.task)] = outcome

    def place(self, task: Task) -> int:
        """Of the task itself; another one may be equal."""
        return next(i for i, one in enumerate(self.tasks) if one is task)

    @property
    def missing(self) -> list[Task]:
        """Tasks without a tree."""
        return [task for i, task in enumerate(self.tasks) if i not in self.by_task]

    @property
    def trees(self) -> list[RolloutTree]:
        """In the tasks' order, without those that failed as a whole."""
        return [self.by_task[i] for i in sorted(self.by_task)]

    @property
    def failed_tasks(self) -> int:
        return len(self.missing)

    def told(self) -> dict[str, Any]:
        """What a row of the metrics tells of failures."""
        texts = [f"{one.place}: {one.cause}: {one.error}" for one in self.failures]
        counts = {"failed_tasks": self.failed_tasks, "failed_rollouts": len(self.failures)}
        return {**counts, "failures": texts} if texts else {}

    def noted(self) -> str:
        """The same for a progress bar."""
        return f", {len(self.failures)} failed" if self.failures else ""


class Pipeline:
    """Grows the trees of a stage's steps, up to `max_lag` steps ahead of the learner."""

    def __init__(
        self,
        trainer: Trainer,
        steps: int,
        draw: Callable[[int], Sequence[Task]],  # the tasks of a step
        *,
        max_lag: int = 0,
        tree_seconds: float | None = None,
    ) -> None:
        self._trainer, self._steps, self._draw = trainer, steps, draw
        self._max_lag, self._tree_seconds = max_lag, tree_seconds
        self._growing: dict[int, asyncio.Task[None]] = {}  # by step
        self._own = trainer.policy if isinstance(trainer.policy, OwnWeights) else None
        self.overlaps = max_lag > 0 and self._own is not None

    async def take(self, step: int) -> Grown:
        """What came of a step's tasks. First the trees begin of all steps that may begin under the present weights."""
        await self._trainer.push()
        for begun in range(step, min(step + self._max_lag + 1, self._steps)):
            if begun not in self._growing:
                self._growing[begun] = self._begin(begun)
            if not self.overlaps:
                await self._growing[begun]
        await self._growing.pop(step)
        return self._trainer.ahead.pop(step)

    async def learn(self, work: Callable[[], T]) -> T:
        """What `work` returns, which moves the weights: in a thread where trees grow meanwhile."""
        if not self.overlaps:
            self._trainer.rest_policy()
        async with self._own.moving() if self._own else contextlib.nullcontext():
            return await in_thread(None, work) if self.overlaps else work()

    def lag(self, trees: Sequence[RolloutTree]) -> dict[str, float]:
        """How many versions older than the learner's the weights were that sampled the turns; empty at `max_lag` 0."""
        if not self._max_lag:
            return {}
        turns = [node.action for tree in trees for node in tree.nodes if node.action.token_ids]
        behind = [self._trainer.weights_version - turn.weights_version for turn in turns]
        return {"mean_lag": fmean(behind or [0]), "greatest_lag": max(behind, default=0)}

    async def aclose(self) -> None:
        """Ends what still grows. A checkpoint has the trees that are finished; the others grow again from their
        seeds."""
        for growing in self._growing.values():
            growing.cancel()
        await asyncio.gather(*self._growing.values(), return_exceptions=True)
        self._trainer.ahead.clear()

    def _begin(self, step: int) -> asyncio.Task[None]:
        """Grows the trees of a step, except those that the checkpoint had."""
        ahead = self._trainer.ahead
        if step not in ahead:
            ahead[step] = Grown(self._draw(step))
        return asyncio.create_task(self._fill(step, ahead[step]))

    async def _fill(self, step: int, grown: Grown) -> None:
        if not grown.over:
            plan = self._trainer.plan
            seed = derive_seed(plan.seed, "rollout", step)
            seconds = self._tree_seconds
            await self._trainer.fill(grown, plan.algorithm.rollout, plan.sampling, seed, tree_seconds=seconds)


# in a checkpoint: a line for each step, then one for each of its trees


def write_ahead(ahead: Mapping[int, Grown]) -> bytes:
    """The finished trees of steps to come, and their tasks. Nothing is kept of a task that is under way."""
    lines = []
    for step, grown in sorted(ahead.items()):
        kept = [(grown.place(one.task), one) for one in grown.failures]
        failures = [_failure_row(place, one) for place, one in kept if grown.over or place in grown.by_task]
        tasks = [asdict(task) for task in grown.tasks]
        lines.append(json_line({"step": step, "tasks": tasks, "failures": failures, "over": grown.over}))
        for place, tree in grown.by_task.items():
            lines.append(write_record(Record(0, {"step": step, "place": place}, tree), None))
    return b"".join(lines)


def read_ahead(lines: bytes) -> dict[int, Grown]:
    """What `write_ahead` wrote, by step."""
    ahead: dict[int, Grown] = {}
    for line in lines.split(b"\n")[:-1]:
        row = from_json(line)
        if "tasks" in row:
            tasks = [Task(**task) for task in row["tasks"]]
            failures = [_failure(tasks, **failure) for failure in row["failures"]]
            ahead[row["step"]] = Grown(tasks, {}, failures, row["over"])
        else:
            record = read_record(0, line, _no_opening)
            ahead[record.labels["step"]].by_task[record.labels["place"]] = record.tree
    return ahead


def _failure_row(place: int, failure: Failure) -> dict[str, Any]:
    named = {"rollout": failure.rollout, "turn": failure.turn, "cause": failure.cause, "error": failure.error}
    return {"place": place, **named}


def _failure(tasks: Sequence[Task], place: int, rollout: int | None, turn: int, cause: str, error: str) -> Failure:
    return Failure(tasks[place], rollout, turn, FailureCause(cause), error, RuntimeError(error))


def _no_opening(offset: int) -> Any:
    raise ValueError("a tree of a checkpoint shares no opening")
