"""Runs an evaluation: a policy on tasks, in a directory where it can be resumed, compared and looked at."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...envs import Task
from ..chat import ChatRenderer
from ..loop import SILENT, Stopped, Watcher, run_to_end
from ..policy import Policy, Sampling, derive_seed
from ..rollouts import Failure, Recall, SomeChains, TooManyFailures, grow
from ..store.folder import Run, write_json
from ..tree import RolloutTree, joined
from .figures import Evaluation
from .outcomes import AnswerReader, TaskOutcome

STAGE = "evaluation"  # label of its trees
TRIES = 2  # of a sample that fails; in each of them a server is asked several times


@dataclass(frozen=True, slots=True)
class Budget:
    """What an evaluation may take. Tokens are counted as a server bills them: every turn sends its whole context."""

    tokens: int | None = None  # sent and sampled
    cost: float | None = None
    sent_price: float = 0.0  # of a million tokens
    sampled_price: float = 0.0
    max_failures: str = "10%"  # samples that may fail before it stops, as `failure_limit` reads it

    def __post_init__(self) -> None:
        failure_limit(self.max_failures, 0)

    @property
    def limited(self) -> bool:
        return self.tokens is not None or self.cost is not None

    def cost_of(self, sent: float, sampled: float) -> float:
        return (sent * self.sent_price + sampled * self.sampled_price) / 1e6

    def refusal(self, sent: float, sampled: float, share: float) -> str:
        """Why no part that is likely to take `share` of what was spent so far can be begun; empty where it can."""
        tokens, cost = sent + sampled, self.cost_of(sent, sampled)
        if self.tokens is not None and tokens * (1 + share) > self.tokens:
            return f"the budget of {self.tokens:,} tokens ({tokens:,.0f} taken)"
        if self.cost is not None and cost * (1 + share) > self.cost:
            return f"the budget of {self.cost:g} ({cost:.4g} spent)"
        return ""


def evaluate(
    tasks: Sequence[Task],
    policy: Policy,
    renderer: ChatRenderer,
    sampling: Sampling,
    budget: Budget,
    out: str | Path,
    *,
    samples: int = 1,
    success: str = "exact",
    seed: int = 0,
    at_once: int = 32,
    watcher: Watcher = SILENT,
    recall: Recall | None = None,
) -> Evaluation:
    """Plays every task `samples` times and returns what came of it; goes on with what `out` holds.

    `success` is the reward term that is 1 where an episode succeeded. `seed` seeds the draws; the tasks have seeds of
    their own. `at_once` rollouts are played at a time. `recall` chooses the notes that a task is told. `out` becomes a
    run's directory, with trees and results.json, which `treegym compare`, `view` and `replay` read.

    Raises Stopped where the watcher asks for it, TooManyFailures, and ValueError where `out` holds another evaluation.
    """
    played = evaluate_async(
        tasks, policy, renderer, sampling, budget, out,
        samples=samples, success=success, seed=seed, at_once=at_once, watcher=watcher, recall=recall,
    )  # fmt: skip
    return run_to_end(played)


async def evaluate_async(
    tasks: Sequence[Task],
    policy: Policy,
    renderer: ChatRenderer,
    sampling: Sampling,
    budget: Budget,
    out: str | Path,
    *,
    samples: int = 1,
    success: str = "exact",
    seed: int = 0,
    at_once: int = 32,
    watcher: Watcher = SILENT,
    recall: Recall | None = None,
) -> Evaluation:
    """`evaluate` in the event loop that is running, such as the one in which the policy was opened."""
    run = Run(Path(out))
    playing = _Playing(run, tasks, policy, renderer, sampling, budget, samples, seed, at_once, watcher, recall)
    run.save_tokenizer(renderer.tokenizer)
    try:
        stopped_by = await playing.play()
    finally:
        playing.keep_partial()
        run.trees.close()
    evaluation = replace(read_evaluation(run, success, answers=samples > 1), stopped_by=stopped_by)
    if evaluation.tasks:
        write_json(run.path / "results.json", results(evaluation, len(tasks), budget))
    return evaluation


@dataclass(slots=True)
class _Playing:
    """An evaluation under way.

    Trees are written a part at a time, a part being the tasks that are played at once: what the policy takes, less
    where the budget is about to end. A part that was cut off is played again as a whole, so that an interruption
    changes nothing. Trees of tasks of which every sample came to its end are written part by part. A task with failed
    samples is played again when the evaluation is resumed, so what there is of it is written last, behind the size
    that is noted.
    """

    run: Run
    tasks: Sequence[Task]
    policy: Policy
    renderer: ChatRenderer
    sampling: Sampling
    budget: Budget
    samples: int
    seed: int
    at_once: int
    watcher: Watcher
    recall: Recall | None
    done: int = 0  # tasks
    seconds: float = 0.0  # that earlier sessions took
    failures: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by number of the task
    partial: dict[int, RolloutTree] = field(default_factory=dict)  # trees of these tasks
    sent: int = 0  # tokens so far
    sampled: int = 0
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        state = _progress(self.run.path)
        if state["digest"] not in (None, self.digest):
            raise ValueError(
                f"{self.run.path} holds an evaluation of other tasks, samples or seed; take another directory"
            )
        self.done, self.seconds = state["tasks"], state["seconds"]
        self.failures = {int(number): rows for number, rows in state["failures"].items()}
        self.partial = self._restore(state["trees_size"])
        for tree in (*(tree for _, tree in self.run.trees), *self.partial.values()):
            self._count(tree)

    @property
    def digest(self) -> str:
        """Names the evaluation: two that may go on in one directory have the same."""
        named = [[asdict(task) for task in self.tasks], self.samples, self.seed]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def rollout_seed(self) -> int:
        """For seed 0 that of the held-out stages of training runs."""
        return derive_seed("evaluation", self.seed) if self.seed else derive_seed("evaluation")

    def _count(self, tree: RolloutTree) -> None:
        """Adds the tokens that a tree's rollouts sent and sampled."""
        rollouts = TaskOutcome.of(0, tree, "").rollouts
        self.sent += sum(rollout.sent_tokens for rollout in rollouts)
        self.sampled += sum(rollout.sampled_tokens for rollout in rollouts)

    def _restore(self, size: int) -> dict[int, RolloutTree]:
        """What there is of tasks with failed samples; what was written of a part that was cut off is forgotten."""
        records = self.run.trees.records(self.done - len(self.failures)) if self.failures else ()
        trees = {record.labels.get("task"): record.tree for record in records}
        self.run.trees.truncate(size)
        return {number: trees[number] for number in self.failures if number in trees}

    async def play(self) -> str:
        """Why it ended early; empty where all was played."""
        self.watcher.begin("evaluating", len(self.tasks))
        for _ in range(self.done):
            self.watcher.advance()
        if retried := sorted(self.failures):
            if why := self._refusal(len(retried)):
                return why
            await self._part(retried)
        parts = -(-len(self.tasks) * self.samples // self.at_once)
        size = -(-len(self.tasks) // max(1, parts))
        while self.done < len(self.tasks):
            one = self.budget.limited and not self.done  # it tells what the others are likely to take
            part = range(self.done, min(self.done + (1 if one else size), len(self.tasks)))
            while self.done and (why := self._refusal(len(part))):
                if len(part) == 1:
                    return why
                part = part[: len(part) // 2]
            await self._part(part)
            if self.watcher.should_stop() and self.done < len(self.tasks):
                raise Stopped(f"saved after {self.done} of {len(self.tasks)} tasks")
        return ""

    def _refusal(self, tasks: int) -> str:
        return self.budget.refusal(self.sent, self.sampled, tasks / self.done)

    async def _part(self, numbers: Sequence[int]) -> None:
        """Plays the missing samples of tasks, those that fail TRIES times, and writes what is whole."""
        await self._try(numbers, self.watcher.advance if numbers[0] >= self.done else lambda: None)
        for _ in range(1, TRIES):
            await self._try(numbers)
        for number in numbers:
            if not self._missing(number):
                self.run.trees.append(self.partial.pop(number), stage=STAGE, step=0)
                del self.failures[number]
        self.done = max(self.done, numbers[-1] + 1)
        self._save()
        self._check_failures()

    async def _try(self, numbers: Sequence[int], advance: Callable[[], None] = lambda: None) -> None:
        """Plays the missing samples of these tasks once; those of tasks that lack the same ones grow together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number in numbers:
            if missing := self._missing(number):
                groups.setdefault(missing, []).append(number)
        for missing, members in groups.items():
            trees: dict[int, RolloutTree] = {}  # by number of the task
            failures: dict[int, list[Failure]] = {number: [] for number in members}
            outcomes = grow(
                [self.tasks[number] for number in members], SomeChains(missing),
                self.policy, self.renderer, self.sampling, seed=self.rollout_seed, cassette=self.run.cassette,
                recall=self.recall,
            )  # fmt: skip
            async with contextlib.aclosing(outcomes):
                async for place, outcome in outcomes:
                    number = members[place]
                    if isinstance(outcome, Failure):
                        failures[number].append(outcome)
                    else:
                        trees[number] = outcome
                        advance()
            for number in members:
                self._add(number, trees.get(number), failures[number])
                if number not in trees:
                    advance()

    def _add(self, number: int, tree: RolloutTree | None, failures: Sequence[Failure]) -> None:
        if tree:
            self._count(tree)
            before = self.partial.get(number)
            self.partial[number] = joined([before, tree]) if before else tree
        by_sample = {failure.rollout: failure for failure in failures}
        self.failures[number] = [
            _failure_row(sample, by_sample.get(sample) or by_sample[None]) for sample in self._missing(number)
        ]

    def _missing(self, number: int) -> tuple[int, ...]:
        """Samples of a task that did not come to their end so far."""
        tree = self.partial.get(number)
        return tuple(sample for sample in range(self.samples) if tree is None or sample not in tree.origins)

    def _save(self) -> None:
        write_json(
            self.run.path / "progress.json",
            {
                "tasks": self.done,
                "trees_size": self.run.trees.size,
                "seconds": self.seconds + time.monotonic() - self.begun,
                "failures": self.failures,
                "digest": self.digest,
            },
        )

    def _check_failures(self) -> None:
        rows = [row for rows in self.failures.values() for row in rows]
        planned = len(self.tasks) * self.samples
        if len(rows) > failure_limit(self.budget.max_failures, planned):
            raise TooManyFailures(
                f"{len(rows)} of {planned} samples failed, more than the {self.budget.max_failures} that may: "
                f"{by_cause(rows)}; the last: {rows[-1]['error']}"
            )

    def keep_partial(self) -> None:
        """Writes what there is of tasks with failed samples."""
        for number in sorted(self.failures):
            if number < self.done and (tree := self.partial.get(number)) and tree.leaves:
                self.run.trees.append(tree, stage=STAGE, step=0, task=number)


def _failure_row(sample: int, failure: Failure) -> dict[str, Any]:
    return {
        "env": failure.task.env,
        "seed": failure.task.seed,
        "sample": sample,
        "turn": failure.turn,
        "cause": failure.cause.value,
        "error": failure.error,
    }


def by_cause(failures: Sequence[Mapping[str, Any]]) -> str:
    """How many samples failed of which cause, in words."""
    counts = Counter(row["cause"] for row in failures)
    return ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items()))


def failure_limit(text: str, samples: int) -> int:
    """How many samples may fail: a number, or a share such as 10%, rounded up. ValueError for anything else."""
    share = text.endswith("%")
    try:
        number = float(text.rstrip("%")) if share else int(text)
    except ValueError:
        number = -1
    if not 0 <= number <= (100 if share else math.inf):
        raise ValueError(f"a number of samples or a share such as 10%, got {text!r}")
    return math.ceil(samples * number / 100) if share else int(number)


def _progress(folder: Path) -> dict[str, Any]:
    """How far an evaluation has come; what a part that was cut off wrote later does not count."""
    file = folder / "progress.json"
    begun = {"tasks": 0, "trees_size": 0, "seconds": 0.0, "failures": {}, "digest": None}
    return {**begun, **(json.loads(file.read_text()) if file.exists() else {})}


def read_evaluation(run: Run, term: str, *, stage: str = STAGE, answers: bool = False) -> Evaluation:
    """What a run's trees of a stage say, those of its last step where it was measured several times.

    `term` is the reward term that is 1 where a rollout succeeded. `answers` also reads what was answered, which makes
    the environments.
    """
    steps: dict[int, list[TaskOutcome]] = {}
    with contextlib.closing(AnswerReader()) as reader:
        for number, (labels, tree) in enumerate(run.trees):
            if labels.get("stage") == stage:
                outcome = TaskOutcome.of(number, tree, term, reader if answers else None)
                steps.setdefault(labels.get("step", 0), []).append(outcome)
    progress = _progress(run.path)
    failures = tuple(row for rows in progress["failures"].values() for row in rows)
    return Evaluation(tuple(steps[max(steps)]) if steps else (), progress["seconds"], failures)


def results(evaluation: Evaluation, planned: int, budget: Budget) -> dict[str, Any]:
    """The figures as results.json has them, free of times, so that the same evaluation is the same file.

    They are of the samples that did not fail; `planned` tasks were to be played.
    """
    figures = evaluation.figures()
    tokens = figures["tokens"]
    figures["cost"] = budget.cost_of(tokens["sent"], tokens["sampled"])
    figures["planned_tasks"] = planned
    figures["stopped_by"] = evaluation.stopped_by or None
    figures["failed"] = {
        "samples": len(evaluation.failures),
        "by_cause": dict(sorted(Counter(row["cause"] for row in evaluation.failures).items())),
        "each": list(evaluation.failures),
    }
    return figures
