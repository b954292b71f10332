"""Credit by state: turns of a group's rollouts that were taken in the same situation are compared."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ...agents import Advantages, RolloutTree
from .estimators import Norm, alike, is_invalid

Row = tuple[int, int]  # (rollout, turn)


@dataclass(frozen=True, slots=True)
class AnchorStates:
    """A turn's discounted return against the group's turns in the same state (GiGPO, arXiv:2505.10978 sec. 3.2).

    States are the same when their keys are equal or, with `similarity` below 1, when the texts that describe
    them resemble the first text of a cluster by at least that difflib ratio. A state visited once gives zero.
    """

    discount: float = 0.95
    norm: Norm = Norm()
    similarity: float = 1.0
    invalid_penalty: float = 0.0  # taken off the return of a turn that was malformed or whose call failed

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [self._score(tree) for tree in trees]

    def _score(self, tree: RolloutTree) -> Advantages:
        returns = step_returns(tree, self.discount)
        advantages = [[0.0] * len(turns) for turns in returns]
        rows = [(rollout, turn) for rollout, turns in enumerate(returns) for turn in range(len(turns))]
        values = [returns[r][t] - self.invalid_penalty * is_invalid(tree.nodes[tree.paths[r][t]]) for r, t in rows]
        for members in alike(self._anchors(tree, rows)):
            for i, advantage in zip(members, self.norm([values[i] for i in members]), strict=True):
                rollout, turn = rows[i]
                advantages[rollout][turn] = advantage
        return advantages

    def _anchors(self, tree: RolloutTree, rows: Sequence[Row]) -> Sequence[Hashable]:
        if self.similarity >= 1:
            return [state(tree, rollout, turn) for rollout, turn in rows]
        return similar([situation(tree, rollout, turn) for rollout, turn in rows], self.similarity)


@dataclass(frozen=True, slots=True)
class HistoryAnchors:
    """Anchors with their history: for every k, a turn is compared with the turns that share its last k states, and
    longer shared histories weigh more, (k + 1) ** alpha (HGPO, arXiv:2602.22817 and its code).

    `keep_zeros=False` leaves comparisons that came out exactly zero out of the weighted mean, as most copies of that
    code do.
    """

    discount: float = 0.95
    history: int = 2  # earlier states that may have to be equal too
    alpha: float = 1.0
    norm: Norm = Norm(ddof=0)
    keep_zeros: bool = True

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [self._score(tree) for tree in trees]

    def _score(self, tree: RolloutTree) -> Advantages:
        returns = step_returns(tree, self.discount)
        sums = [[0.0] * len(turns) for turns in returns]
        weights = [[1e-6] * len(turns) for turns in returns]
        for k in range(1, self.history + 2):
            rows = [(rollout, turn) for rollout, turns in enumerate(returns) for turn in range(k - 1, len(turns))]
            keys = [tuple(state(tree, r, t - back) for back in range(k)) for r, t in rows]
            for members in (group for group in alike(keys) if len(group) > 1):
                values = self.norm([returns[rows[i][0]][rows[i][1]] for i in members])
                for i, value in zip(members, values, strict=True):
                    if value or self.keep_zeros:
                        rollout, turn = rows[i]
                        sums[rollout][turn] += (k + 1) ** self.alpha * value
                        weights[rollout][turn] += (k + 1) ** self.alpha
        return [[s / w for s, w in zip(*turns, strict=True)] for turns in zip(sums, weights, strict=True)]


def step_returns(tree: RolloutTree, discount: float) -> list[list[float]]:
    """[rollout][turn]: discounted sum of the rewards from the turn on."""
    returns = []
    for path in tree.paths:
        after, turns = 0.0, []
        for i in reversed(path):
            after = tree.nodes[i].reward + discount * after
            turns.append(after)
        returns.append(turns[::-1])
    return returns


def state(tree: RolloutTree, rollout: int, turn: int) -> str:
    """Key of the state in which a turn was taken."""
    return tree.nodes[tree.paths[rollout][turn - 1]].state_key if turn else tree.state_key


def situation(tree: RolloutTree, rollout: int, turn: int) -> str:
    """What the policy was last told before a turn."""
    messages = tree.nodes[tree.paths[rollout][turn - 1]].messages if turn else tree.messages
    return "\n".join(message.text for message in messages)


def similar(texts: Sequence[str], threshold: float) -> list[int]:
    """The cluster of each text, as a number: the first one whose first text it resembles, by difflib's ratio."""
    firsts: list[str] = []
    clusters = []
    for text in texts:
        likeness = (difflib.SequenceMatcher(None, text, first).ratio() for first in firsts)
        cluster = next((i for i, ratio in enumerate(likeness) if ratio >= threshold), len(firsts))
        if cluster == len(firsts):
            firsts.append(text)
        clusters.append(cluster)
    return clusters
