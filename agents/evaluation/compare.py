"""Comparison of two policies on the same tasks: who is better, where, and whether the difference is noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..tree import SLACK
from .figures import Evaluation, by_difficulty, pass_curve, pass_rows
from .outcomes import Difficulty, TaskOutcome
from .statistics import (
    LEVEL,
    Interval,
    Z,
    detectable,
    deviation,
    difference_interval,
    holm,
    mcnemar,
    noise_floor,
    paired_proportions,
    powers_of_two,
    sign_flips,
    success_interval,
)

Verdict = Literal["better", "worse", "within noise"]


@dataclass(frozen=True, slots=True)
class PairedResult:
    """B's success against A's, over the same tasks."""

    tasks: int
    samples: tuple[int, int]  # tries a task, of A and of B
    a: Interval
    b: Interval
    difference: Interval  # B - A
    p: float  # of no difference
    test: str
    noise: float  # what chance makes in 95 of 100 comparisons at most; of several tries, chance in the tries alone
    detectable: float  # one that a comparison of this size finds in 80 of 100 cases

    @property
    def verdict(self) -> Verdict:
        """What B is, at the level of 5%."""
        return judged(self.difference.mean, self.p)


def judged(difference: float, p: float) -> Verdict:
    if p > LEVEL:
        return "within noise"
    return "better" if difference > 0 else "worse"


def paired(a: Sequence[TaskOutcome], b: Sequence[TaskOutcome]) -> PairedResult:
    """The comparison of outcomes of the same tasks in the same order.

    One try each: McNemar's exact test and the adjusted Wald interval. More: tries of one task are a cluster; random
    signs of the tasks' differences, and a bootstrap over tasks. Tries of one number have one seed, so that the mean
    difference is also that of the pairs by task and seed.
    """
    n = len(a)
    samples = min(task.tries for task in a), min(task.tries for task in b)
    differences = [after.share - before.share for before, after in zip(a, b, strict=True)]
    spread = deviation(differences) or math.sqrt(2 / (n + 2))  # nothing differs: one pair each way that might
    once = all(len(task.rollouts) == 1 for task in (*a, *b))
    if once:
        only_b, only_a = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        difference, p = paired_proportions(only_b, only_a, n), mcnemar(only_b, only_a)
    else:
        difference, p = difference_interval(differences), sign_flips(differences)
    noise = Z * spread / math.sqrt(n)
    if min(samples) > 1:
        noise = noise_floor([[(task.successes, len(task.rollouts)) for task in side] for side in (a, b)])
    return PairedResult(
        tasks=n,
        samples=samples,
        a=success_interval([task.share for task in a], samples[0]),
        b=success_interval([task.share for task in b], samples[1]),
        difference=difference,
        p=p,
        test="McNemar, exact" if once else "random signs of tasks",
        noise=noise,
        detectable=detectable(spread, n),
    )


@dataclass(frozen=True, slots=True)
class Flip:
    """A task that came out otherwise."""

    seed: int
    difficulty: Difficulty | None
    a: tuple[int, int]  # successes and tries
    b: tuple[int, int]
    episodes: tuple[str, str]  # TREE.ROLLOUT of A and of B: tries of one seed that differ

    @property
    def change(self) -> float:
        return self.b[0] / self.b[1] - self.a[0] / self.a[1]


def flips(a: Sequence[TaskOutcome], b: Sequence[TaskOutcome]) -> list[Flip]:
    """Tasks whose share of successes moved by half or more, the greatest gains of B first."""
    found = [
        Flip(
            seed=before.task.seed,
            difficulty=before.difficulty,
            a=(before.successes, len(before.rollouts)),
            b=(after.successes, len(after.rollouts)),
            episodes=_episodes(before, after),
        )
        for before, after in zip(a, b, strict=True)
        if abs(after.share - before.share) >= 0.5 - SLACK
    ]
    return sorted(found, key=lambda flip: -flip.change)


def _episodes(a: TaskOutcome, b: TaskOutcome) -> tuple[str, str]:
    """The first tries of the same number that differ the way the task does."""
    up = b.share > a.share
    pairs = zip(a.rollouts, b.rollouts, strict=False)  # one may have more tries
    number = next((i for i, (x, y) in enumerate(pairs) if y.success == up and x.success != up), 0)
    return a.rollouts[number].episode, b.rollouts[number].episode


@dataclass(frozen=True, slots=True)
class Curves:
    """pass@k of both at every k, and what they say of training that made B of A (Yue et al. 2025, arXiv:2504.13837)."""

    ks: list[int]
    a: list[Interval]
    b: list[Interval]
    difference: list[Interval]  # B - A
    p: tuple[float, float]  # of no difference at the first k and at the last, together (Holm)
    crossing: int | None  # the first k at which the one is ahead that is behind at one try
    only_a: list[str]  # trees of tasks that only A solved
    only_b: list[str]

    @property
    def verdict(self) -> str:
        last = self.ks[-1]
        ends = tuple(judged(self.difference[i].mean, self.p[i]) for i in (0, -1))
        one, many = "at one try", f"at {last} tries"
        match ends:
            case ("better", "better"):
                return f"found something new: B is ahead {one} and still {many}"
            case ("better", "within noise"):
                return f"sharpened, as far as these tasks tell: B is ahead {one}, within noise {many}"
            case ("better", "worse"):
                return f"sharpened, and narrowed: B is ahead {one}, A {many}"
            case ("within noise", "better"):
                return f"found something new: B is ahead {many}, though not {one}"
            case ("worse", "better"):
                return f"broadened: B is behind {one}, ahead {many}"
            case ("within noise", "worse"):
                return f"narrowed: B is behind {many}, within noise {one}"
            case ("within noise", "within noise"):
                return f"within noise {one} and {many}"
        return f"worse: B is behind {one}, {'and' if ends[1] == 'worse' else 'within noise'} {many}"


def curves(a: Sequence[TaskOutcome], b: Sequence[TaskOutcome]) -> Curves:
    """Of outcomes of the same tasks in the same order; k goes as far as both have tries."""
    ks = powers_of_two(min(len(task.rollouts) for task in (*a, *b)))
    differences = pass_rows(b, ks) - pass_rows(a, ks)
    means = differences.mean(axis=1)
    first, last = holm([sign_flips(differences[0]), sign_flips(differences[-1])])
    return Curves(
        ks=ks,
        a=pass_curve(a, ks),
        b=pass_curve(b, ks),
        difference=[difference_interval(row) for row in differences],
        p=(first, last),
        crossing=next((k for k, mean in zip(ks, means, strict=True) if mean * means[0] < 0), None),
        only_a=[str(x.tree) for x, y in zip(a, b, strict=True) if x.successes and not y.successes],
        only_b=[str(y.tree) for x, y in zip(a, b, strict=True) if y.successes and not x.successes],
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A on the tasks of both."""

    a: str  # their names
    b: str
    result: PairedResult
    groups: dict[str, PairedResult]  # by difficulty
    adjusted: list[float]  # p of the groups, together (Holm)
    flips: list[Flip]
    curves: Curves | None = None

    def to_json(self) -> dict[str, Any]:
        groups = {
            name: {**_row(group), "p": p, "verdict": judged(group.difference.mean, p)}
            for (name, group), p in zip(self.groups.items(), self.adjusted, strict=True)
        }
        curve = None
        if self.curves:
            curve = {**asdict(self.curves), "verdict": self.curves.verdict}
            curve |= {key: [i._asdict() for i in getattr(self.curves, key)] for key in ("a", "b", "difference")}
        return {
            "a": self.a,
            "b": self.b,
            **{key: value for key, value in _row(self.result).items() if key not in ("a", "b")},
            "success": {"a": self.result.a._asdict(), "b": self.result.b._asdict()},
            "by_difficulty": groups,
            "flips": [{**asdict(flip), "change": flip.change} for flip in self.flips],
            "curve": curve,
        }


def _row(result: PairedResult) -> dict[str, Any]:
    intervals = {key: getattr(result, key)._asdict() for key in ("a", "b", "difference")}
    return {**asdict(result), **intervals, "verdict": result.verdict}


def compare(
    a: Evaluation,
    b: Evaluation,
    *,
    names: tuple[str, str] = ("A", "B"),
    shared: bool = False,
    curve: bool = False,
) -> Comparison:
    """B against A. `shared` leaves out the tasks that only one of them has; `curve` compares pass@k at every k.

    ValueError where the tasks are not the same and `shared` is not set, or where a curve is asked for of single tries.
    """
    ours, theirs = _matched(a, b, names, shared)
    if curve and min(len(task.rollouts) for task in (*ours, *theirs)) < 2:
        raise ValueError("a curve needs several tries a task: treegym eval … --samples 64")
    groups: dict[str, PairedResult] = {}
    levels = by_difficulty(ours)
    for level in levels if len(levels) > 1 else ():
        places = [i for i, task in enumerate(ours) if task.difficulty == level]
        groups[str(level)] = paired([ours[i] for i in places], [theirs[i] for i in places])
    return Comparison(
        a=names[0],
        b=names[1],
        result=paired(ours, theirs),
        groups=groups,
        adjusted=holm([group.p for group in groups.values()]),
        flips=flips(ours, theirs),
        curves=curves(ours, theirs) if curve else None,
    )


def _matched(
    a: Evaluation, b: Evaluation, names: tuple[str, str], shared: bool
) -> tuple[list[TaskOutcome], list[TaskOutcome]]:
    """The distinct problems of both, in A's order."""
    problems = a.problems, b.problems
    ours, theirs = ({task.key: task for task in side} for side in problems)
    keys = [key for key in ours if key in theirs]
    if not keys or (len(keys) < max(len(ours), len(theirs)) and not shared):
        hint = "; --shared compares these" if keys else _difference(problems[0][0], problems[1][0])
        raise ValueError(f"{names[0]} has {len(ours)} tasks, {names[1]} {len(theirs)}, {len(keys)} are shared{hint}")
    return [ours[key] for key in keys], [theirs[key] for key in keys]


def _difference(a: TaskOutcome, b: TaskOutcome) -> str:
    """In what two tasks differ."""
    for name in ("env", "settings", "wrappers", "options", "seed"):
        one, other = getattr(a.task, name), getattr(b.task, name)
        if one != other:
            return f"; the first differ in {name}: {one!r} and {other!r}"
    return ""
