"""Evaluation: what a policy did on tasks, rollout by rollout, and the figures that follow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np

from ...envs import Action, Task, TextEnv, ToolEnv
from ..tree import RolloutTree, is_success, tool_results
from .statistics import Interval, bootstrap_rows, pass_at, pass_hat, powers_of_two, success_interval, unique_rate

Difficulty = int | float | str
_DIFFICULTY = ("difficulty", "hops", "steps")  # keys of reset's info, the first that is there


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one rollout."""

    success: bool
    total: float  # the return
    terms: Mapping[str, float]  # reward terms, summed over its turns
    turns: int
    tool_calls: int
    failed_calls: int
    malformed: int  # turns that were no action
    cut: int  # replies that reached the limit of their tokens
    sampled_tokens: int
    sent_tokens: int  # contexts of all its turns, as a server that is asked turn by turn counts its prompts
    cause: str | None  # of truncation
    answer: str | None = None  # None: it gave none, or nobody asked
    episode: str = ""  # TREE.ROLLOUT in the store


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """What came of a task, rollout by rollout."""

    tree: int  # its number in the store
    task: Task
    split: str
    difficulty: Difficulty | None
    rollouts: tuple[Outcome, ...]
    problem: str = ""  # equal: seeds drew the same problem; empty: it is like no other
    drawn: int = 1  # tasks that drew the problem, whose rollouts these are

    @classmethod
    def of(
        cls, number: int, tree: RolloutTree, term: str, answer: Callable[[Task, str], str | None] | None = None
    ) -> TaskOutcome:
        """`term` is the reward term that is 1 (or more) where a rollout succeeded; `answer` reads that of an action."""
        return cls(
            tree=number,
            task=tree.task,
            split=str(tree.info.get("split", tree.task.options.get("split", ""))),
            difficulty=difficulty(tree.info),
            rollouts=tuple(
                replace(_outcome(tree, path, term, answer), episode=f"{number}.{rollout}")
                for rollout, path in enumerate(tree.paths)
            ),
            problem=_problem(tree),
        )

    @property
    def successes(self) -> int:
        return sum(rollout.success for rollout in self.rollouts)

    @property
    def share(self) -> float:
        """Of its rollouts that succeeded."""
        return self.successes / len(self.rollouts)

    @property
    def tries(self) -> int:
        """Rollouts of a task; those that drew the same problem do not add to it."""
        return len(self.rollouts) // self.drawn

    @property
    def key(self) -> str:
        """Equal keys: the same task, in whatever format its actions are written and whatever wrappers are around it."""
        task = asdict(self.task)
        task["settings"].pop("format", None)
        del task["wrappers"]
        return json.dumps(task, sort_keys=True, ensure_ascii=False)


def _problem(tree: RolloutTree) -> str:
    """Names the problem that a task's seed drew: by the state after reset and what the agent was told of it."""
    task = tree.task
    told = [message.text for message in tree.messages]
    named = [task.env, dict(task.settings), dict(task.options), task.wrappers, tree.state_key, told]
    return json.dumps(named, sort_keys=True, ensure_ascii=False) if tree.state_key else ""


def distinct(tasks: Sequence[TaskOutcome]) -> list[TaskOutcome]:
    """Every problem once. An environment with a list of problems draws them again and again; tasks that drew the same
    one are one task with the rollouts of all."""
    groups: dict[int, list[TaskOutcome]] = {}
    for number, task in zip(_numbered(tasks), tasks, strict=True):
        groups.setdefault(number, []).append(task)
    return [
        replace(group[0], rollouts=tuple(chain(*(task.rollouts for task in group))), drawn=sum(t.drawn for t in group))
        for group in groups.values()
    ]


def _numbered(tasks: Sequence[TaskOutcome]) -> list[int]:
    """A number for each task, equal where two drew the same problem."""
    first: dict[str, int] = {}
    return [first.setdefault(task.problem, n) if task.problem else n for n, task in enumerate(tasks)]


def _outcome(
    tree: RolloutTree, path: tuple[int, ...], term: str, read: Callable[[Task, str], str | None] | None
) -> Outcome:
    nodes = [tree.nodes[i] for i in path]
    names = sorted({name for node in nodes for name in node.reward_terms})
    terms = {name: sum(node.reward_terms.get(name) or 0.0 for node in nodes) for name in names}
    sent, context = 0, len(tree.prompt)
    for node in nodes:
        sent += context
        context += len(node.action.token_ids) + len(node.observation)
    last = nodes[-1] if nodes else None
    return Outcome(
        success=is_success(terms.get(term, 0.0)),
        total=sum(node.reward for node in nodes),
        terms=terms,
        turns=len(nodes),
        tool_calls=sum(tool_results(node.messages) for node in nodes),
        failed_calls=sum(int(node.info.get("failed_calls", 0)) for node in nodes),
        malformed=sum(int(node.info.get("malformed", 0)) for node in nodes),
        cut=sum(node.action.stop_reason == "length" for node in nodes),
        sampled_tokens=sum(len(node.action.token_ids) for node in nodes),
        sent_tokens=sent,
        cause=str(last.info.get("cause")) if last and last.truncated else None,
        answer=read(tree.task, last.action.text) if read and last and last.terminated else None,
    )


def difficulty(info: Mapping[str, Any]) -> Difficulty | None:
    """What reset's info tells of how hard a task is."""
    return next((info[key] for key in _DIFFICULTY if isinstance(info.get(key), int | float | str)), None)


class AnswerReader:
    """The answer in the action that ended an episode, blanks and case aside. Close it: it makes environments."""

    def __init__(self) -> None:
        self._envs: dict[str, TextEnv] = {}

    def __call__(self, task: Task, action: str) -> str:
        key = json.dumps([task.env, dict(task.settings)], sort_keys=True)
        env = (self._envs.get(key) or self._envs.setdefault(key, replace(task, wrappers=()).make())).unwrapped
        parsed = env.format.parse(action, env.tools) if isinstance(env, ToolEnv) else None
        text = parsed.answer if isinstance(parsed, Action) and parsed.answer is not None else action
        return " ".join(text.split()).casefold()

    def close(self) -> None:
        for env in self._envs.values():
            env.close()


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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy did on a list of tasks. The lists have one entry per task, in the tasks' order."""

    success: list[float]  # share of the task's rollouts that succeeded
    hops: list[int]  # the task's difficulty as its reset info tells it, 0 where it does not
    rollouts: int  # in all
    turns: float  # means per rollout
    tool_calls: float
    sampled_tokens: float
    seconds: float = 0.0  # of the whole evaluation
    problems: list[int] = field(default_factory=list)  # equal numbers: the same problem; empty: all differ

    @classmethod
    def of(cls, trees: Sequence[RolloutTree], term: str, seconds: float = 0.0) -> Evaluation:
        """`term` is the reward term that is 1 (or more) where a rollout succeeded."""
        tasks = [TaskOutcome.of(number, tree, term) for number, tree in enumerate(trees)]
        return cls.over(tasks, [int(tree.info.get("hops", 0)) for tree in trees], seconds)

    @classmethod
    def over(cls, tasks: Sequence[TaskOutcome], hops: list[int], seconds: float = 0.0) -> Evaluation:
        rollouts = [rollout for task in tasks for rollout in task.rollouts]
        return cls(
            success=[task.share for task in tasks],
            hops=hops,
            rollouts=len(rollouts),
            turns=fmean(rollout.turns for rollout in rollouts),
            tool_calls=fmean(rollout.tool_calls for rollout in rollouts),
            sampled_tokens=fmean(rollout.sampled_tokens for rollout in rollouts),
            seconds=seconds,
            problems=_numbered(tasks),
        )

    @property
    def shares(self) -> list[float]:
        """Mean success of every distinct problem, in the order in which they were drawn first."""
        return self._shares(range(len(self.success)))

    @property
    def interval(self) -> Interval:
        """Mean success over distinct problems: Wilson's interval for one rollout a task, else bootstrapped."""
        return self._interval(self.shares)

    def by_hops(self) -> dict[int, Interval]:
        groups: dict[int, list[int]] = {}
        for place, hops in enumerate(self.hops):
            groups.setdefault(hops, []).append(place)
        return {hops: self._interval(self._shares(group)) for hops, group in sorted(groups.items())}

    def _shares(self, places: Iterable[int]) -> list[float]:
        groups: dict[int, list[float]] = {}
        for place in places:
            groups.setdefault(self.problems[place] if self.problems else place, []).append(self.success[place])
        return [fmean(group) for group in groups.values()]

    def _interval(self, shares: Sequence[float]) -> Interval:
        return success_interval(shares, 1 if self.rollouts == len(self.success) else 2)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def succeeded(tree: RolloutTree, term: str) -> list[bool]:
    """Whether each rollout reached 1 in a reward term, as `is_success` tells."""
    return [is_success(value) for value in tree.term(term)]
