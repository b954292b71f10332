"""Credit by node: what the leaves below a turn say about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ...agents import ROOT, Advantages, RolloutTree
from .estimators import Norm, alike, spread


@dataclass(frozen=True, slots=True)
class BackedUp:
    """Leaf returns backed up to the turns above them, which are credited with a value or a difference (AT2PO,
    arXiv:2601.04767 sec. 3.2).

    A turn's value is the mean of its children's, weighted by the softmax of their uncertainties (mean surprise of
    the sampled tokens, nats), the plain mean, or the mean of the leaves below. Credit is that value, or how much it
    is above the parent's, the root's, or both added up.
    """

    backup: Literal["softmax", "children", "leaves"] = "softmax"
    credit: Literal["value", "parent", "root", "both"] = "value"
    norm: Norm = Norm(ddof=0)

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [self._score(tree) for tree in trees]

    def _score(self, tree: RolloutTree) -> Advantages:
        values = self._values(tree)
        scores = []
        for node in range(len(tree.nodes)):
            up, top = values[node] - values[tree.nodes[node].parent], values[node] - values[ROOT]
            scores.append({"value": values[node], "parent": up, "root": top, "both": up + top}[self.credit])
        return [[scores[node] for node in path] for path in tree.paths]

    def _values(self, tree: RolloutTree) -> dict[int, float]:
        """By node, ROOT included; unused nodes get 0."""
        leaves = values_below(tree, self.norm(tree.returns))
        children: dict[int, list[int]] = {}
        for node in leaves.keys() - {ROOT}:
            children.setdefault(tree.nodes[node].parent, []).append(node)
        values = dict.fromkeys(range(ROOT, len(tree.nodes)), 0.0)
        for node in sorted(leaves, reverse=True):  # children come after their parents
            below = sorted(children.get(node, ()))
            if not below or self.backup == "leaves":
                values[node] = fmean(leaves[node])
            elif self.backup == "children":
                values[node] = fmean(values[child] for child in below)
            else:
                weights = [math.exp(surprise(tree, child)) for child in below]
                values[node] = math.fsum(w * values[c] for w, c in zip(weights, below, strict=True)) / sum(weights)
        return values


@dataclass(frozen=True, slots=True)
class SummedLeaves:
    """A leaf counts by how much its return is above the mean of the others. A turn is credited with the sum over the
    leaves below it, less the tree's mean, divided by the square root of the number of these leaves (TreeRL, ACL 2025,
    as its code has it; the paper's formula is another).

    `level`: the mean is over "token"s, over "step"s (turns), or not subtracted. `shrink`: the divisor is the square
    root of the number of leaves, the number itself ("uniform"), or 1.
    """

    level: Literal["token", "step", "none"] = "token"
    shrink: Literal["sqrt", "uniform", "none"] = "sqrt"

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [self._score(tree) for tree in trees]

    def _score(self, tree: RolloutTree) -> Advantages:
        n, total = len(tree.returns), math.fsum(tree.returns)
        if n < 2:
            return spread(tree, [0.0] * n)
        above = [r - (total - r) / (n - 1) for r in tree.returns]
        values, leaves = dict.fromkeys(range(len(tree.nodes)), 0.0), dict.fromkeys(range(len(tree.nodes)), 0)
        for path, value in zip(tree.paths, above, strict=True):
            for node in path:
                values[node] += value
                leaves[node] += 1
        sizes = {i: len(node.action.token_ids) if self.level == "token" else 1 for i, node in enumerate(tree.nodes)}
        counted = math.fsum(leaves[i] * sizes[i] for i in leaves) + (n if self.level == "step" else 0)  # the prompt
        mean = 0.0 if self.level == "none" else math.fsum(values[i] * sizes[i] for i in values) / counted
        power = {"sqrt": 0.5, "uniform": 1.0, "none": 0.0}[self.shrink]
        scores = {i: (values[i] - mean * leaves[i]) / max(leaves[i], 1) ** power for i in values}
        return [[scores[node] for node in path] for path in tree.paths]


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """A rollout's return against the mean of every group that shares a prefix with it, averaged over the prefixes
    (TreePO, arXiv:2508.17445; whiten it to have the paper's scale).

    Groups weigh by their size, or alike; groups of one are left out, except that a lone rollout keeps its return.
    """

    weights: Literal["size", "equal"] = "size"

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [spread(tree, self._score(tree)) for tree in trees]

    def _score(self, tree: RolloutTree) -> list[float]:
        sums, counts = [0.0] * len(tree.paths), [0.0] * len(tree.paths)
        for depth in range(max(map(len, tree.paths))):
            deep = [rollout for rollout, path in enumerate(tree.paths) if len(path) > depth]
            for group in alike([tree.paths[rollout][:depth] for rollout in deep]):
                members = [deep[i] for i in group]
                if len(members) > 1 or depth == 0:
                    mean = fmean(tree.returns[i] for i in members) if len(members) > 1 else 0.0
                    weight = float(len(members)) if self.weights == "size" else 1.0
                    for i in members:
                        sums[i] += weight * (tree.returns[i] - mean)
                        counts[i] += weight
        return [s / c for s, c in zip(sums, counts, strict=True)]


def values_below(tree: RolloutTree, values: Sequence[float]) -> dict[int, list[float]]:
    """By node, ROOT included: the values of the rollouts that go through it. Nodes without rollouts are left out."""
    below: dict[int, list[float]] = {}
    for path, value in zip(tree.paths, values, strict=True):
        for node in (ROOT, *path):
            below.setdefault(node, []).append(value)
    return below


def surprise(tree: RolloutTree, node: int) -> float:
    """Mean of -log p over the sampled tokens of a turn, nats."""
    logprobs = tree.nodes[node].action.logprobs
    return -fmean(logprobs) if logprobs else 0.0
