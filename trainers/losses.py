"""Policy losses: per-term losses of sampled tokens, and the aggregations that weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .packing import Aggregation, Terms


def token_mean(lengths: Sequence[int]) -> list[float]:
    """All sampled tokens of the batch count alike (DAPO, arXiv:2503.14476 eq. 8; verl's default)."""
    return [1.0 / sum(lengths)] * len(lengths)


def seq_mean_token_mean(lengths: Sequence[int]) -> list[float]:
    """All rollouts count alike, whatever their length (GRPO, arXiv:2402.03300 eq. 3)."""
    return [1.0 / (len(lengths) * max(n, 1)) for n in lengths]


def seq_mean_token_sum(lengths: Sequence[int]) -> list[float]:
    """Sum over a rollout's tokens, mean over rollouts (Dr.GRPO, arXiv:2503.20783, up to a constant)."""
    return [1.0 / len(lengths)] * len(lengths)


def token_sum(lengths: Sequence[int]) -> list[float]:
    """The plain sum."""
    return [1.0] * len(lengths)


AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": token_mean,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "token-sum": token_sum,
}
AggregationName = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum"]


class PolicyLoss(Protocol):
    """Turns log-probabilities into a loss per term; the batch loss is the sum of weight times that."""

    @property
    def aggregation(self) -> AggregationName: ...

    @property
    def needs_zeros(self) -> bool:
        """Whether terms with advantage 0 have a gradient (a KL or entropy term)."""
        ...

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        """logprobs [N], nats, of the terms under the present weights -> losses [N]."""
        ...


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """PPO's clipped surrogate with separate bounds and an optional dual clip.

    arXiv:1707.06347 eq. 7; separate bounds: DAPO, arXiv:2503.14476; dual clip: arXiv:1912.09729 eq. 5.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # bound of the loss where the advantage is negative, in multiples of it; above 1
    aggregation: AggregationName = "seq-mean-token-mean"
    needs_zeros: bool = False

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        ratio = (logprobs - terms.old_logprob).clamp(-20, 20).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = -torch.minimum(ratio * terms.advantage, clipped * terms.advantage)
        if self.dual_clip is not None:
            bounded = torch.minimum(losses, -self.dual_clip * terms.advantage)
            losses = torch.where(terms.advantage < 0, bounded, losses)
        return losses


@dataclass(frozen=True, slots=True)
class ImitationLoss:
    """Negative log-likelihood times the advantage: supervised fine-tuning where that is 1."""

    aggregation: AggregationName = "token-mean"
    needs_zeros: bool = False

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        return -logprobs * terms.advantage
