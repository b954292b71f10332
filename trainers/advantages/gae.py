"""Generalised advantage estimation for multi-turn rollouts: over turns with the group as critic, and, for those who
bring values of their own, over tokens or both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from ...agents import Advantages, RolloutTree
from .anchors import state, step_returns
from .estimators import Norm, alike


def gae(
    rewards: Sequence[float], values: Sequence[float], discount: float = 1.0, lam: float = 1.0
) -> tuple[list[float], list[float]]:
    """Advantages and returns (the critic's targets) of a rollout's sampled tokens, or turns, in order (arXiv:1506.02438
    eq. 16). Observations are left out: what is carried back from one turn goes on in the turn before it."""
    return _carry(rewards, values, range(len(values) - 1, len(values)), discount, lam)


def bi_level_gae(
    rewards: Sequence[float],
    values: Sequence[float],
    ends: Sequence[int],
    discount: float = 1.0,
    lam: float = 1.0,
    turn_discount: float = 0.95,
) -> tuple[list[float], list[float]]:
    """First over turns, which earn the rewards at their last tokens `ends`, then over the tokens of each turn, which
    earns the turn's return (RAGEN, arXiv:2504.20073 sec. 3; its code finds ends by rewards that are not zero)."""
    _, turns = gae([rewards[i] for i in ends], [values[i] for i in ends], turn_discount, lam)
    earned = dict(zip(ends, turns, strict=True))
    return _carry([earned.get(i, 0.0) for i in range(len(values))], values, ends, discount, lam)


def _carry(
    rewards: Sequence[float], values: Sequence[float], ends: Collection[int], discount: float, lam: float
) -> tuple[list[float], list[float]]:
    """The recursion of GAE from the last entry to the first; nothing is carried over an end."""
    advantages = [0.0] * len(values)
    after = carried = 0.0
    for i in reversed(range(len(values))):
        if i in ends:
            after = carried = 0.0
        carried = rewards[i] + discount * after - values[i] + discount * lam * carried
        advantages[i], after = carried, values[i]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@dataclass(frozen=True, slots=True)
class GroupedGAE:
    """GAE over turns whose critic is the group: a state is worth the mean of what rollouts earned from it on (GAGPO,
    arXiv:2605.13217). With `lam=1` and a norm that does not divide it is AnchorStates."""

    discount: float = 0.99
    lam: float = 0.9
    norm: Norm = Norm()  # over the turns of the task

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        return [self._score(tree) for tree in trees]

    def _score(self, tree: RolloutTree) -> Advantages:
        returns = step_returns(tree, self.discount)
        rows = [(rollout, turn) for rollout, turns in enumerate(returns) for turn in range(len(turns))]
        values = [[0.0] * len(turns) for turns in returns]
        for members in alike([state(tree, rollout, turn) for rollout, turn in rows]):
            value = fmean(returns[rows[i][0]][rows[i][1]] for i in members)
            for rollout, turn in (rows[i] for i in members):
                values[rollout][turn] = value
        raw = [
            gae([tree.nodes[i].reward for i in path], worth, self.discount, self.lam)[0]
            for path, worth in zip(tree.paths, values, strict=True)
        ]
        scores = iter(self.norm([x for turns in raw for x in turns]))
        return [[next(scores) for _ in turns] for turns in raw]
