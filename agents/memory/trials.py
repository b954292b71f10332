"""Trials: whether a lesson helps, from groups of rollouts of the same tasks with it and without it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Literal

from ...envs import Task, TextEnv
from ...envs.task import Wrappers
from ..rollouts import Recall, Response
from ..tree import RolloutTree
from .lesson import Effect, Lesson
from .memory import Memory
from .telling import told

Verdict = Literal["kept", "retired", "open"]
Play = Callable[[Sequence[Task], Recall], Awaitable[Sequence[RolloutTree]]]  # a group of rollouts for each task


@dataclass(frozen=True, slots=True)
class Trial:
    """How a lesson is measured: in batches of pairs, until its interval says so or `most` pairs were played."""

    most: int = 200  # pairs of groups
    batch: int = 8  # pairs that are played at a time
    alpha: float = 0.05  # the probability that the interval ever leaves the true effect out
    least: int = 10  # pairs before a verdict
    worth: float = 0.01  # an effect that is surely smaller than this, either way, needs no more pairs

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or min(self.most, self.batch, self.least) < 1:
            raise ValueError(f"alpha is between 0 and 1, and most, batch and least are 1 or more, got {self}")

    async def measure(
        self, memory: Memory, lesson: Lesson, tasks: Iterable[Task], play: Play
    ) -> tuple[Verdict, Effect]:
        """Plays tasks twice, with all lessons and with all but this one, with the same random numbers.

        `tasks` are those that are told the lesson. "kept": it helps; "retired": it does harm; "open": neither is sure.
        Nothing is written.
        """
        differences: list[float] = []
        left = iter(tasks)
        while batch := list(islice(left, min(self.batch, self.most - len(differences)))):
            with_it = await play(batch, memory.recall_all)
            without = await play(batch, all_but(memory, lesson))
            differences += [_mean(one) - _mean(other) for one, other in zip(with_it, without, strict=True)]
            if self.decided(effect := effect_of(differences, self.alpha)):
                break
        effect = effect_of(differences, self.alpha)
        return self.verdict(effect), effect

    def verdict(self, effect: Effect) -> Verdict:
        if effect.pairs < self.least:
            return "open"
        return "kept" if effect.low > 0 else "retired" if effect.high < 0 else "open"

    def decided(self, effect: Effect) -> bool:
        """Whether more pairs are not worth their cost."""
        small = effect.pairs >= self.least and -self.worth < effect.low <= effect.high < self.worth
        return small or self.verdict(effect) != "open"


def all_but(memory: Memory, lesson: Lesson) -> Recall:
    """Recalls what `memory` does, without one lesson and with nothing in its place."""

    def recall(task: Task, env: TextEnv, response: Response) -> Wrappers:
        return told([one for one in memory.lessons(task, response) if one.id != lesson.id], memory.place)

    return recall


def effect_of(differences: Sequence[float], alpha: float = 0.05) -> Effect:
    """The mean of paired differences, with an interval that holds at every number of pairs at once: one may look after
    every pair, and stop when one likes.

    It holds those effects m for which the differences less m are not surely other than symmetric about 0, as those of
    two equal policies are. For such x, exp(l S - l^2 V / 2) with S = sum x and V = sum x^2 is a supermartingale (de la
    Pena, Annals of Probability 1999, Lemma 6.1), and so is its mean over l ~ N(0, 1/SCALE), which exceeds 1/alpha with
    probability alpha at most (Ville). Returns differ by about 1 at most where the interval is to be narrow.
    """
    if not differences:
        return Effect(0.0, -math.inf, math.inf, 0)
    mean = fmean(differences)
    low, high = (_end(differences, mean, side, alpha) for side in (-1, 1))
    return Effect(mean, low, high, len(differences))


SCALE = 2.0  # the V for which the interval is about as narrow as it can be: 20 pairs that differ by 0.3, say


def _end(differences: Sequence[float], mean: float, side: int, alpha: float) -> float:
    """The last effect to one side of the mean that is not ruled out."""

    def ruled_out(effect: float) -> bool:
        total = sum(differences) - len(differences) * effect
        ratio = 1 + sum((x - effect) ** 2 for x in differences) / SCALE
        return total**2 / (2 * SCALE * ratio) - math.log(ratio) / 2 >= math.log(1 / alpha)

    step = 1e-3
    while step < _FARTHEST and not ruled_out(mean + side * step):
        step *= 2
    if step >= _FARTHEST:
        return side * math.inf
    inside, outside = step / 2, step
    for _ in range(30):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if ruled_out(mean + side * middle) else (middle, outside)
    return mean + side * outside


_FARTHEST = 1e6  # few pairs rule nothing out


def _mean(tree: RolloutTree) -> float:
    return fmean(tree.returns)
