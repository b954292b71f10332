"""Advantage estimators: how much better each turn of each rollout was than expected.

A tree is the group of one task, its rollouts are compared with each other. An estimator sees all trees of a step,
because some take their scale from the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ...agents import Advantages, Node, RolloutTree
from ...agents.tree import TurnAdvantage


class AdvantageEstimator(Protocol):
    """Scores every turn of the trees of a step, each tree being the group of its task."""

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        """[tree][rollout][turn]."""
        ...


def advantages_of(estimator: AdvantageEstimator, trees: Sequence[RolloutTree]) -> list[Advantages]:
    """What an estimator gives for the trees. ValueError, with its name, where that is not [tree][rollout][turn]."""
    name = getattr(getattr(estimator, "func", estimator), "__name__", type(estimator).__name__)  # of a function, bound
    given = estimator(trees)
    if not isinstance(given, Sequence) or len(given) != len(trees):
        told = f"{len(given)}" if isinstance(given, Sequence) else f"a {type(given).__name__}"
        raise ValueError(f"{name} gave {told} for {len(trees)} trees; advantages are [tree][rollout][turn]")
    for number, (tree, rollouts) in enumerate(zip(trees, given, strict=True)):
        wanted = [*map(len, tree.paths)]
        try:
            lengths = [*map(len, rollouts)]
        except TypeError:
            lengths = []
        if lengths != wanted:
            turns = f"{len(lengths)} rollouts of {lengths} turns" if lengths else "something else than lists of turns"
            raise ValueError(f"{name} gave {turns} for tree {number}, which has rollouts of {wanted} turns")
        if not all(np.isfinite(turn).all() for turns_ in rollouts for turn in turns_):
            raise ValueError(f"{name} gave an advantage that is not finite, for tree {number}")
    return list(given)


@dataclass(frozen=True, slots=True)
class Norm:
    """From the values of a group to advantages: mean 0 and, with `divide`, deviation 1.

    GRPO divides (arXiv:2402.03300 sec. 4.1.2), Dr.GRPO does not (arXiv:2503.20783). A group of one has nothing to
    compare with: "zero" as in TRL, or its "raw" value as in verl. Equal values give zeros.
    """

    divide: bool = True
    ddof: Literal[0, 1] = 1
    eps: float = 1e-6  # added to the deviation
    alone: Literal["zero", "raw"] = "zero"

    def __call__(self, values: Sequence[float], weights: Sequence[float] = ()) -> list[float]:
        """One advantage for each value; with `weights` the mean that is subtracted, not the deviation, is weighted."""
        if len(values) == 1:
            return [values[0] if self.alone == "raw" else 0.0]
        if min(values) == max(values):  # their mean may be off by a rounding
            return [0.0] * len(values)
        mean = baseline = math.fsum(values) / len(values)
        if weights:
            baseline = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / math.fsum(weights)
        scale = 1.0
        if self.divide:
            scale = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - self.ddof)) + self.eps
        return [(x - baseline) / scale for x in values]


@dataclass(frozen=True, slots=True)
class GroupRelative:
    """A rollout's return against its group's, the same for all its turns (GRPO, arXiv:2402.03300 sec. 4.1.2).

    The group is the task's rollouts, or those that grew from one of the strategy's starts (Tree-GRPO's trees,
    arXiv:2509.21240). The baseline is the mean of all its rollouts, of the others (RLOO, arXiv:2402.14740), or the
    mean weighted by sampled tokens (OPO, arXiv:2505.23585). `per="turn"`: a rollout counts once for each of its turns,
    as in GiGPO's code.
    """

    norm: Norm = Norm()
    within: Literal["task", "origin"] = "task"
    baseline: Literal["mean", "others", "length"] = "mean"
    per: Literal["rollout", "turn"] = "rollout"
    invalid_penalty: float = 0.0  # with per="turn": taken off the return of a turn with a malformed or failed call

    @classmethod
    def verl(cls) -> GroupRelative:
        return cls(Norm(alone="raw"))

    @classmethod
    def trl(cls) -> GroupRelative:
        return cls(Norm(eps=1e-4))

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [self._score(tree) for tree in trees]

    def _score(self, tree: RolloutTree) -> Advantages:
        scores = [[0.0] * len(path) for path in tree.paths]
        for members in alike(_origins(tree) if self.within == "origin" else [0] * len(scores)):
            if self.per == "turn":
                rows = [(rollout, turn) for rollout in members for turn in range(len(scores[rollout]))]
                invalid = [is_invalid(tree.nodes[tree.paths[rollout][turn]]) for rollout, turn in rows]
                values = [tree.returns[r] - self.invalid_penalty * x for (r, _), x in zip(rows, invalid, strict=True)]
                for (rollout, turn), score in zip(rows, self.norm(values), strict=True):
                    scores[rollout][turn] = score
            else:
                for rollout, score in zip(members, self._compare(tree, members), strict=True):
                    scores[rollout] = [score] * len(scores[rollout])
        return scores

    def _compare(self, tree: RolloutTree, members: Sequence[int]) -> list[float]:
        weights = [num_sampled_tokens(tree, r) for r in members] if self.baseline == "length" else ()
        scores = self.norm([tree.returns[r] for r in members], weights)
        n = len(members)
        return [x * n / (n - 1) for x in scores] if self.baseline == "others" and n > 1 else scores


@dataclass(frozen=True, slots=True)
class BestOnly:
    """Only the best rollout is trained, by how far it is above the second best (verl's GRPO for pass@k).

    This is its share of the group's best-of-k reward. Ties and groups of one give zero.
    """

    norm: Norm = Norm()

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [spread(tree, self._score(tree.returns)) for tree in trees]

    def _score(self, returns: Sequence[float]) -> list[float]:
        if len(returns) < 2:
            return [0.0] * len(returns)
        best, second = sorted(range(len(returns)), key=lambda i: -returns[i])[:2]
        scores = self.norm(returns)
        return [scores[best] - scores[second] if i == best else 0.0 for i in range(len(returns))]


@dataclass(frozen=True, slots=True)
class TokenReturns:
    """The discounted sum of the rewards from each sampled token on; observations do not count as steps.

    A turn's reward comes with its last token. REINFORCE++ (arXiv:2501.03262) is `Whitened(TokenReturns())`, its
    variant with a baseline `Whitened(GroupRelative(Norm(divide=False, alone="raw")))`.
    """

    discount: float = 1.0

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [[self._score([tree.nodes[i] for i in path]) for path in tree.paths] for tree in trees]

    def _score(self, path: Sequence[Node]) -> list[TurnAdvantage]:
        scores: list[TurnAdvantage] = []
        after = 0.0  # of the next turn's first token
        for node in reversed(path):
            left = len(node.action.token_ids) - 1 - np.arange(len(node.action.token_ids))  # tokens after each
            turn = self.discount ** left.astype(float) * (node.reward + self.discount * after)
            scores.append(turn)
            after = float(turn[0]) if len(turn) else node.reward + after
        return scores[::-1]


@dataclass(frozen=True, slots=True)
class Whitened:
    """Another estimator's advantages with mean 0 and deviation 1 over the sampled tokens of the whole step."""

    of: AdvantageEstimator
    eps: float = 1e-8  # added to the variance

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        scored = self.of(trees)
        sizes = [
            (tree.nodes[i], rollout[t])
            for tree, rollouts in zip(trees, scored, strict=True)
            for path, rollout in zip(tree.paths, rollouts, strict=True)
            for t, i in enumerate(path)
        ]
        tokens = np.concatenate([np.broadcast_to(a, len(node.action.token_ids)) for node, a in sizes])
        if len(tokens) < 2:
            return scored
        scale = 1 / math.sqrt(tokens.var(ddof=1) + self.eps)
        return [[[(a - tokens.mean()) * scale for a in turns] for turns in rollouts] for rollouts in scored]


@dataclass(frozen=True, slots=True)
class SharedMean:
    """A turn that several rollouts share gets the mean of their advantages: ARPO's hard assignment, arXiv:2507.19849
    sec. 3.3. Without this, in ARPO's soft assignment, every rollout trains the turn with its own advantage; the two
    agree while nothing is clipped and rollouts weigh alike."""

    of: AdvantageEstimator

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [self._share(tree, rollouts) for tree, rollouts in zip(trees, self.of(trees), strict=True)]

    def _share(self, tree: RolloutTree, advantages: Advantages) -> Advantages:
        by_node: dict[int, list[TurnAdvantage]] = {}
        for path, turns in zip(tree.paths, advantages, strict=True):
            for node, advantage in zip(path, turns, strict=True):
                by_node.setdefault(node, []).append(advantage)
        means = {node: sum(values) / len(values) for node, values in by_node.items()}
        return [[means[node] for node in path] for path in tree.paths]


@dataclass(frozen=True, slots=True, init=False)
class Sum:
    """Weighted sum of estimators: `Sum((1.0, GroupRelative()), (1.0, AnchorStates()))` is GiGPO."""

    parts: tuple[tuple[float, AdvantageEstimator], ...]

    def __init__(self, *parts: tuple[float, AdvantageEstimator]) -> None:
        object.__setattr__(self, "parts", parts)

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        weights, parts = zip(*((weight, estimator(trees)) for weight, estimator in self.parts), strict=True)

        def add(*turn: TurnAdvantage) -> TurnAdvantage:
            total: TurnAdvantage = sum(weight * advantage for weight, advantage in zip(weights, turn, strict=True))
            return total

        return [
            [[add(*turn) for turn in zip(*turns, strict=True)] for turns in zip(*rollouts, strict=True)]
            for rollouts in zip(*parts, strict=True)
        ]


def spread(tree: RolloutTree, scores: Sequence[float]) -> Advantages:
    """A number for each rollout, given to all of its turns."""
    return [[score] * len(path) for path, score in zip(tree.paths, scores, strict=True)]


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, group by group, in order of appearance."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def num_sampled_tokens(tree: RolloutTree, rollout: int) -> int:
    """Tokens the policy sampled in a rollout."""
    return sum(len(tree.nodes[i].action.token_ids) for i in tree.paths[rollout])


def is_invalid(node: Node) -> bool:
    """Whether a turn was malformed, or one of its calls failed."""
    return bool(node.info.get("malformed") or node.info.get("failed_calls"))


def _origins(tree: RolloutTree) -> Sequence[int]:
    return tree.origins or range(len(tree.leaves))
