"""Evaluation: a policy's success on tasks, with honest intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import numpy as np

from .tree import RolloutTree, tool_results

_Z95 = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    mean: float
    low: float
    high: float


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

    @classmethod
    def of(cls, trees: Sequence[RolloutTree], term: str, seconds: float = 0.0) -> Evaluation:
        """`term` is the reward term that is 1 (or more) where a rollout succeeded."""
        paths = [[tree.nodes[i] for i in path] for tree in trees for path in tree.paths]
        return cls(
            success=[fmean(succeeded(tree, term)) for tree in trees],
            hops=[int(tree.info.get("hops", 0)) for tree in trees],
            rollouts=len(paths),
            turns=fmean(len(path) for path in paths),
            tool_calls=fmean(tool_calls(path) for path in paths),
            sampled_tokens=fmean(sum(len(node.action.token_ids) for node in path) for path in paths),
            seconds=seconds,
        )

    @property
    def interval(self) -> Interval:
        """Mean success: Wilson's interval for one rollout a task, else bootstrapped over tasks."""
        if self.rollouts == len(self.success):
            return wilson(round(sum(self.success)), len(self.success))
        return bootstrap(self.success)

    def by_hops(self) -> dict[int, Interval]:
        groups: dict[int, list[float]] = {}
        for hops, success in zip(self.hops, self.success, strict=True):
            groups.setdefault(hops, []).append(success)
        return {
            hops: bootstrap(group) if self.rollouts > len(self.success) else wilson(round(sum(group)), len(group))
            for hops, group in sorted(groups.items())
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def succeeded(tree: RolloutTree, term: str) -> list[bool]:
    """Whether each rollout reached 1 in a reward term."""
    return [value >= 1 for value in tree.term(term)]


def tool_calls(path: Sequence[Any]) -> int:
    """Tool results along a path of nodes."""
    return sum(tool_results(node.messages) for node in path)


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion at 95% (Wilson 1927)."""
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """Mean with its percentile bootstrap interval at 95%; the values are the units that are resampled."""
    data = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = data[generator.integers(len(data), size=(resamples, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Interval:
    """Mean of after - before over the same tasks, bootstrapped over tasks."""
    if len(after) != len(before):
        raise ValueError(f"pairs need the same tasks, got {len(after)} and {len(before)}")
    return bootstrap([a - b for a, b in zip(after, before, strict=True)])
