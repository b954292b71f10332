"""Comparisons: which rollouts of a tree a loss compares with each other, and how good each of them was.

A pair is a tree with two leaves, and a leaf may be an inner turn: then the sum of its log-probabilities ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar, Literal, Protocol, runtime_checkable

from ...agents import Advantages, RolloutTree
from ..advantages.node_values import values_below

Coupling = Literal["group", "pair"]


@dataclass(frozen=True, slots=True)
class Compared:
    """What is compared in a tree. The tree's leaves are the compared rollouts; one that is compared twice is there
    twice."""

    tree: RolloutTree
    coefficients: Advantages  # [leaf][turn], of log-probabilities in the leaf's sum; 0: the turn is not trained
    scores: Sequence[float]  # [leaf], the better the higher
    groups: Sequence[int]  # [leaf], from 0 on; leaves with equal numbers are compared with each other


@runtime_checkable
class Comparisons(Protocol):
    """Says what is compared in the trees of a step. It stands where an AdvantageEstimator would, for a SumLoss."""

    @property
    def makes(self) -> Coupling:
        """What leaves with equal numbers are: a pair, whose scores differ, or a group of any size."""
        ...

    def compare(self, trees: Sequence[RolloutTree]) -> list[Compared]:
        """One entry for each tree, without leaves where nothing in the tree can be compared."""
        ...


@dataclass(frozen=True, slots=True)
class Groups:
    """All rollouts of a task, by their returns; every sampled token counts."""

    makes: ClassVar[Coupling] = "group"

    def compare(self, trees: Sequence[RolloutTree]) -> list[Compared]:
        return [
            Compared(tree, [[1.0] * len(path) for path in tree.paths], tree.returns, [0] * len(tree.leaves))
            for tree in trees
        ]


@dataclass(frozen=True, slots=True)
class Siblings:
    """The best and the worst of the turns that follow the same turn, at every fork.

    A turn's score is the mean return of the rollouts through it, or with `term` the mean of this reward term. Turns
    that say the same, sampled by different weights, count as one. The two make a pair if their scores are at least
    `gap` apart. Only the turn itself is trained: turns before the fork, which both share, have the coefficient 0.
    """

    term: str = ""
    gap: float = 1e-6
    makes: ClassVar[Coupling] = "pair"

    def __post_init__(self) -> None:
        if self.gap <= 0:
            raise ValueError(f"gap must be above 0, got {self.gap}: turns of equal scores are no pair")

    def compare(self, trees: Sequence[RolloutTree]) -> list[Compared]:
        return [self._compare(tree) for tree in trees]

    def _compare(self, tree: RolloutTree) -> Compared:
        below = values_below(tree, tree.term(self.term) if self.term else tree.returns)
        said: dict[tuple[int, tuple[int, ...] | str], int] = {}  # the first turn, by parent and reply
        for node in sorted(below.keys() & range(len(tree.nodes))):  # without ROOT
            action = tree.nodes[node].action
            first = said.setdefault((tree.nodes[node].parent, action.token_ids or action.text), node)
            if first != node:  # other weights said the same
                below[first] += below[node]
        scores = {node: fmean(below[node]) for node in said.values()}
        siblings: dict[int, list[int]] = {}  # by the turn that they follow
        for node in scores:
            siblings.setdefault(tree.nodes[node].parent, []).append(node)
        leaves = []
        for turns in siblings.values():
            best, worst = max(turns, key=scores.__getitem__), min(turns, key=scores.__getitem__)  # the first of equals
            if scores[best] - scores[worst] >= self.gap:
                leaves += [best, worst]
        pairs = replace(tree, leaves=tuple(leaves), origins=())
        coefficients = [[0.0] * (len(path) - 1) + [1.0] for path in pairs.paths]
        return Compared(pairs, coefficients, [scores[leaf] for leaf in leaves], [i // 2 for i in range(len(leaves))])
