"""Evaluation: what a policy did on a list of tasks, and the figures that follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from ...envs import Task
from ..tree import RolloutTree
from .outcomes import Difficulty, Outcome, TaskOutcome, distinct
from .statistics import Interval, bootstrap_rows, pass_at, pass_hat, powers_of_two, success_interval, unique_rate


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy did on a list of tasks, in the order in which they were drawn."""

    tasks: tuple[TaskOutcome, ...]
    seconds: float = 0.0  # of playing
    failures: tuple[Mapping[str, Any], ...] = ()  # samples that failed, which are no rollouts of the tasks
    stopped_by: str = ""  # the budget that ended it before all tasks were played

    @classmethod
    def of(cls, trees: Sequence[RolloutTree], term: str, seconds: float = 0.0) -> Evaluation:
        """`term` is the reward term that is 1 (or more) where a rollout succeeded."""
        return cls(tuple(TaskOutcome.of(number, tree, term) for number, tree in enumerate(trees)), seconds)

    @property
    def problems(self) -> list[TaskOutcome]:
        """Every distinct problem once, in the order in which the tasks first drew it."""
        return distinct(self.tasks)

    @property
    def success(self) -> Interval:
        """Mean success over distinct problems: Wilson's interval for one rollout a task, else bootstrapped."""
        return _success(self.problems)

    def by_difficulty(self) -> dict[Difficulty, Interval]:
        problems = self.problems
        return {level: _success([p for p in problems if p.difficulty == level]) for level in by_difficulty(problems)}

    @property
    def rollouts(self) -> list[Outcome]:
        return [rollout for task in self.tasks for rollout in task.rollouts]

    def mean(self, name: str) -> float:
        """Mean over rollouts of a number of theirs, such as "turns"."""
        return fmean(getattr(rollout, name) for rollout in self.rollouts)

    def figures(self) -> dict[str, Any]:
        """All that it says of its tasks, as `figures` has it."""
        return figures(self.tasks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Evaluation:
        """What `to_json` gave. Rows of older runs, which have means in place of tasks, are read as well."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(row) if "tasks" in row else _of_means(row)


def _of_means(row: Mapping[str, Any]) -> Evaluation:
    """From lists of success and difficulty, and means over rollouts: every rollout gets the means."""
    tries = max(1, round(row["rollouts"] / max(1, len(row["success"]))))
    problems = row.get("problems") or range(len(row["success"]))
    rollout = Outcome(False, 0.0, {}, row["turns"], row["tool_calls"], 0, 0, 0, row["sampled_tokens"], 0, None)
    tasks = [
        TaskOutcome(
            tree=number,
            task=Task("", number),
            split="",
            difficulty=hops or None,
            rollouts=tuple(replace(rollout, success=n < round(share * tries)) for n in range(tries)),
            problem=str(problem),
        )
        for number, (share, hops, problem) in enumerate(zip(row["success"], row["hops"], problems, strict=True))
    ]
    return Evaluation(tuple(tasks), row["seconds"])


def _success(problems: Sequence[TaskOutcome]) -> Interval:
    once = all(len(problem.rollouts) <= problem.drawn for problem in problems)
    return success_interval([problem.share for problem in problems], 1 if once else 2)


def figures(tasks: Sequence[TaskOutcome]) -> dict[str, Any]:
    """All that an evaluation says, as JSON; means are per rollout. Groups have the same figures.

    `tasks` counts problems, each of which weighs the same in the success; `drawn` the tasks that drew them.
    """
    tasks = distinct(tasks)
    return _figures(tasks) | {
        "by_split": _by(tasks, lambda task: task.split),
        "by_difficulty": _by([task for task in tasks if task.difficulty is not None], lambda task: task.difficulty),
    }


def by_difficulty(tasks: Iterable[TaskOutcome]) -> list[Difficulty]:
    """The difficulties there are, in order."""
    found = {task.difficulty for task in tasks if task.difficulty is not None}
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def _by(tasks: Sequence[TaskOutcome], key: Callable[[TaskOutcome], Any]) -> dict[str, Any]:
    groups: dict[Any, list[TaskOutcome]] = {}
    for task in tasks:
        groups.setdefault(key(task), []).append(task)
    ordered = sorted(groups, key=lambda value: (isinstance(value, str), value))
    return {str(value): _figures(groups[value]) for value in ordered}


def _figures(tasks: Sequence[TaskOutcome]) -> dict[str, Any]:
    rollouts = [rollout for task in tasks for rollout in task.rollouts]
    samples = min(task.tries for task in tasks)
    names = sorted({name for rollout in rollouts for name in rollout.terms})
    answers = [[r.answer for r in task.rollouts if r.answer is not None] for task in tasks]
    unique = [unique_rate(given) for given in answers if len(given) > 1]
    causes = Counter(rollout.cause for rollout in rollouts if rollout.cause)
    ks = powers_of_two(samples)
    return {
        "tasks": len(tasks),
        "drawn": sum(task.drawn for task in tasks),
        "samples": samples,
        "rollouts": len(rollouts),
        "success": success_interval([task.share for task in tasks], samples)._asdict(),
        "pass_at": {str(k): i._asdict() for k, i in zip(ks, pass_curve(tasks, ks), strict=True)},
        "pass_hat": {str(k): i._asdict() for k, i in zip(ks, pass_curve(tasks, ks, pass_hat), strict=True)},
        "unique_answers": fmean(unique) if unique else None,
        "return": fmean(rollout.total for rollout in rollouts),
        "terms": {name: fmean(rollout.terms.get(name, 0.0) for rollout in rollouts) for name in names},
        "means": {name: fmean(getattr(rollout, name) for rollout in rollouts) for name in _MEANS},
        "tokens": {
            "sent": sum(rollout.sent_tokens for rollout in rollouts),
            "sampled": sum(rollout.sampled_tokens for rollout in rollouts),
        },
        "truncated": {cause: causes[cause] / len(rollouts) for cause in sorted(causes)},
    }


_MEANS = ("turns", "tool_calls", "failed_calls", "malformed", "cut", "sampled_tokens", "sent_tokens")


def pass_curve(
    tasks: Sequence[TaskOutcome], ks: Sequence[int], estimate: Callable[[int, int, int], float] = pass_at
) -> list[Interval]:
    """pass@k (or pass^k) at every k. At k = 1 it is the success, with its interval; else bootstrapped over tasks."""
    rows = pass_rows(tasks, ks, estimate)
    intervals = bootstrap_rows(rows)
    samples = min(task.tries for task in tasks)
    return [
        success_interval(row.tolist(), samples) if k == 1 or row.min() == row.max() else interval
        for k, row, interval in zip(ks, rows, intervals, strict=True)
    ]


def pass_rows(
    tasks: Sequence[TaskOutcome], ks: Sequence[int], estimate: Callable[[int, int, int], float] = pass_at
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Estimates [k, task]."""
    return np.array([[estimate(k, task.successes, len(task.rollouts)) for task in tasks] for k in ks])
