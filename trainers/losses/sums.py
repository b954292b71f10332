"""Losses over sums of log-probabilities: of groups (GVPO) and of pairs (DPO).

Such a loss depends on the parameters through one number a rollout, S = Σ c · log π over its sampled tokens. So its
gradient is Σ slope · ∇S, where the slopes are its derivatives by these numbers: once they are known, rollouts can be
trained one by one, in as many packs as needed, and the gradient is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..packing import Terms
from .comparisons import Compared, Coupling
from .terms import segment_mean


@dataclass(frozen=True, slots=True)
class Sums:
    """One entry per compared rollout of the batch; all tensors are [k], floats are float64, nats.

    `extras` has what the loss `needs` by name, summed with the same coefficients as the log-probabilities.
    """

    logprob: Tensor  # under the present weights, with gradient
    score: Tensor  # float, the better the higher
    group: Tensor  # rollouts with equal numbers are compared with each other
    tokens: Tensor  # how many sampled tokens have a coefficient that is not 0
    extras: Mapping[str, Tensor]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Indices of the winners and of the losers, pair by pair. ValueError where a group is no pair."""
        for group, size in Counter(self.group.tolist()).items():
            if size != 2:
                raise ValueError(f"a pair is two rollouts, and comparison {group} has {size}")
        place = sorted(range(len(self.group)), key=lambda i: (int(self.group[i]), -float(self.score[i])))
        winners, losers = torch.tensor(place).view(-1, 2).unbind(1)
        return winners, losers


@runtime_checkable
class SumLoss(Protocol):
    """Turns the sums of all compared rollouts into the batch loss."""

    @property
    def needs(self) -> frozenset[str]:
        """What `Sums.extras` must have: "reference", the sum under the reference weights; "sampled", as the sampler
        recorded it; "old", as the learner had it before the step's first update; or a column that the learner was
        given."""
        ...

    @property
    def couples(self) -> Coupling:
        """What it compares."""
        ...

    def of_sums(self, sums: Sums) -> Tensor:
        """The loss, a scalar."""
        ...


@dataclass(frozen=True, slots=True)
class GvpoLoss:
    """How much likelier a rollout has become than the others of its group, against how much better it was: squared
    differences (GVPO, arXiv:2504.19599, as its code has it).

    Where d is `beta` times a rollout's log-ratio to the policy that sampled it, R its return, and n the size of its
    group, the loss is the sum over all rollouts of ½ [(d - mean d) - (R - mean R)]² / (n - 1). A group of one has
    nothing to compare with and gives 0.
    """

    beta: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"sampled"})
    couples: ClassVar[Coupling] = "group"

    def of_sums(self, sums: Sums) -> Tensor:
        change = self.beta * (sums.logprob - sums.extras["sampled"])
        apart = change - segment_mean(change.detach(), sums.group)
        better = sums.score - segment_mean(sums.score, sums.group)
        others = sums.group.bincount()[sums.group] - 1
        return ((apart - better) ** 2 / (2 * others.clamp(min=1)))[others > 0].sum()


@dataclass(frozen=True, slots=True)
class DpoLoss:
    """The winner of a pair is to become likelier than the loser, both measured from the reference: the mean over the
    pairs of -log sigmoid(beta [(S - S_ref) of the winner - (S - S_ref) of the loser]) (DPO, arXiv:2305.18290 eq. 7)."""

    beta: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    couples: ClassVar[Coupling] = "pair"

    def of_sums(self, sums: Sums) -> Tensor:
        change = sums.logprob - sums.extras["reference"]
        winners, losers = sums.pairs()
        return -logsigmoid(self.beta * (change[winners] - change[losers])).mean()


def slopes(
    loss: SumLoss, batch: Sequence[Compared], packs: Sequence[Terms], logprobs: Sequence[Tensor]
) -> tuple[float, Tensor]:
    """The batch loss, and its derivative [k] by the sum of every rollout; the terms of all packs and their
    log-probabilities [N] give the sums."""
    scores = torch.tensor([score for one in batch for score in one.scores], dtype=torch.float64)
    numbers = {place: number for number, place in enumerate(dict.fromkeys(_places(batch)))}

    rollout = torch.cat([terms.rollout for terms in packs]).cpu()
    coefficient = torch.cat([terms.advantage for terms in packs]).cpu().double()

    def total(columns: Sequence[Tensor]) -> Tensor:
        column = torch.cat([*columns]).detach().cpu().double()
        return torch.zeros_like(scores).index_add_(0, rollout, coefficient * column)

    sums = Sums(
        logprob=total(logprobs).requires_grad_(),
        score=scores,
        group=torch.tensor([numbers[place] for place in _places(batch)]),
        tokens=rollout[coefficient != 0].bincount(minlength=len(scores)),
        extras={name: total([terms.column(name) for terms in packs]) for name in loss.needs},
    )
    value = loss.of_sums(sums)
    [slope] = torch.autograd.grad(value, sums.logprob)
    return value.item(), slope


def _places(batch: Sequence[Compared]) -> list[tuple[int, int]]:
    """For every compared rollout: (number of its tree in the batch, number of its comparison in that tree)."""
    return [(tree, group) for tree, one in enumerate(batch) for group in one.groups]
