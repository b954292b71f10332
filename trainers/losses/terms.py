"""Policy losses: per-term losses of sampled tokens, and the aggregations that weigh them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from ..packing import Aggregation, Terms

Level = Literal["token", "turn", "sequence"]
KL = Literal["k1", "abs", "k2", "k3", "k1+", "k3+"]
Coupling = Literal["token", "turn", "rollout"]
Ratio = Literal["token", "geometric", "product"]
NOTHING: frozenset[str] = frozenset()
SAMPLED = frozenset({"sampled"})
NEEDS = frozenset({"sampled", "old", "reference", "entropy"})  # what every learner has for losses


def token_mean(lengths: Sequence[int]) -> list[float]:
    """All sampled tokens of the batch count alike (DAPO, arXiv:2503.14476 eq. 8; verl's default)."""
    return [1.0 / max(sum(lengths), 1)] * len(lengths)


def seq_mean_token_mean(lengths: Sequence[int]) -> list[float]:
    """All rollouts count alike, whatever their length (GRPO, arXiv:2402.03300 eq. 3)."""
    return [1.0 / (_rollouts(lengths) * max(n, 1)) for n in lengths]


def seq_mean_token_sum(lengths: Sequence[int]) -> list[float]:
    """Sum over a rollout's tokens, mean over rollouts (Dr.GRPO, arXiv:2503.20783, up to a constant)."""
    return [1.0 / _rollouts(lengths)] * len(lengths)


def seq_mean_token_sum_norm(lengths: Sequence[int]) -> list[float]:
    """The same, divided by the tokens of the longest rollout (verl since August 2026)."""
    return [1.0 / (_rollouts(lengths) * max([*lengths, 1]))] * len(lengths)


def token_sum(lengths: Sequence[int]) -> list[float]:
    """The plain sum."""
    return [1.0] * len(lengths)


def _rollouts(lengths: Sequence[int]) -> int:
    """How many rollouts said anything; at least 1."""
    return max(sum(map(bool, lengths)), 1)


AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": token_mean,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
    "token-sum": token_sum,
}
AggregationName = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"
]


class PolicyLoss(Protocol):
    """Turns log-probabilities into a loss per term; the batch loss is the sum of weight times that."""

    @property
    def aggregation(self) -> AggregationName: ...

    @property
    def needs(self) -> frozenset[str]:
        """What it reads besides log-probabilities, advantages, and the numbers of rollouts and turns.

        "sampled": `old_logprob`, as the sampler recorded it. "old": `old_logprob`, as the learner had it before the
        step's first update. Every other name is a column in the terms' `extras`: "reference", "entropy", or one that
        the learner was given. The learner refuses a name that it does not know.
        """
        ...

    @property
    def couples(self) -> Coupling:
        """The smallest part of a batch, "token", "turn" or "rollout", whose loss depends on nothing outside of it."""
        ...

    @property
    def keeps_zeros(self) -> bool:
        """Whether a term has a gradient where its advantage is 0. If not, rollouts without any advantage are left out
        of the forward pass."""
        ...

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        """logprobs [N], nats, of the terms under the present weights -> losses [N]."""
        ...


def check_loss(loss: PolicyLoss) -> None:
    """ValueError where a loss has no such aggregation, or couples what there is not."""
    for name, value, known in (
        ("aggregation", loss.aggregation, tuple(AGGREGATIONS)),
        ("couples", loss.couples, get_args(Coupling)),
    ):
        if value not in known:
            raise ValueError(f"{type(loss).__name__}.{name} is {value!r}; it can be {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """PPO's clipped surrogate with separate bounds and an optional dual clip.

    arXiv:1707.06347 eq. 7; separate bounds: DAPO, arXiv:2503.14476; dual clip: arXiv:1912.09729 eq. 5.
    `level`: the ratio is the token's, or the geometric mean over the rollout (GSPO, arXiv:2507.18071 eq. 5) or over
    the turn (AT2PO, arXiv:2601.04767). `keep_gradient`: a ratio above its bound still has the gradient that it has
    at the bound (AEPO, arXiv:2510.14545 sec. 4.2).

    `old`: whose log-probabilities the ratio starts from: the sampler's, as recorded, or the learner's before the
    step's first update. Sampler and learner round differently, by thousandths of a nat a token in bfloat16; bounds as
    narrow as that need the learner's, which take one more forward pass.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # bound of the loss where the advantage is negative, in multiples of it; above 1
    level: Level = "token"
    keep_gradient: bool = False
    aggregation: AggregationName = "seq-mean-token-mean"
    old: Literal["sampler", "learner"] = "sampler"
    keeps_zeros: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old"}) if self.old == "learner" else SAMPLED

    @property
    def couples(self) -> Coupling:
        return "rollout" if self.level == "sequence" else self.level

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        ratio = log_ratio(logprobs, terms, self.level).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.keep_gradient:
            clipped = torch.where(ratio > 1 + self.clip_high, clipped.detach() * ratio / ratio.detach(), clipped)
        losses = -torch.minimum(ratio * terms.advantage, clipped * terms.advantage)
        if self.dual_clip is not None:
            bounded = torch.minimum(losses, -self.dual_clip * terms.advantage)
            losses = torch.where(terms.advantage < 0, bounded, losses)
        return losses


@dataclass(frozen=True, slots=True)
class GeometricLoss:
    """The rollout's mean log-ratio, clipped token by token on the pessimistic side (GMPO, arXiv:2507.20673)."""

    clip_low: float = 0.4  # of log-ratios
    clip_high: float = 0.4
    aggregation: AggregationName = "seq-mean-token-mean"
    needs: ClassVar[frozenset[str]] = SAMPLED
    couples: ClassVar[Coupling] = "rollout"
    keeps_zeros: ClassVar[bool] = False

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        change = logprobs - terms.old_logprob
        sign = terms.advantage.sign()
        clipped = sign * torch.minimum(sign * change, sign * change.clamp(-self.clip_low, self.clip_high))
        ratio = segment_mean(clipped, terms.rollout).exp()
        return -ratio * segment_mean(terms.advantage, terms.rollout)


@dataclass(frozen=True, slots=True)
class CispoLoss:
    """Clipped importance weights, and a gradient for every token (CISPO, arXiv:2506.13585 eq. 4).

    The defaults bound both sides, as verl does; `clip_low=None` leaves the lower one free as TRL does, whose
    epsilon_high is 1 + clip_high.
    """

    clip_low: float | None = 0.2
    clip_high: float = 0.28
    aggregation: AggregationName = "token-mean"
    needs: ClassVar[frozenset[str]] = SAMPLED
    couples: ClassVar[Coupling] = "token"
    keeps_zeros: ClassVar[bool] = False

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        low = None if self.clip_low is None else 1 - self.clip_low
        weight = log_ratio(logprobs, terms).exp().clamp(low, 1 + self.clip_high).detach()
        return -weight * terms.advantage * logprobs


@dataclass(frozen=True, slots=True)
class SapoLoss:
    """A soft gate in place of the clip: 4/t sigmoid(t(ratio - 1)), cooler for bad tokens (SAPO, arXiv:2511.20347)."""

    positive: float = 1.0  # temperature t where the advantage is positive
    negative: float = 1.05
    aggregation: AggregationName = "seq-mean-token-mean"
    needs: ClassVar[frozenset[str]] = SAMPLED
    couples: ClassVar[Coupling] = "token"
    keeps_zeros: ClassVar[bool] = False

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        ratio = log_ratio(logprobs, terms).exp()
        t = torch.where(terms.advantage > 0, self.positive, self.negative).to(ratio.dtype)
        return -4 / t * torch.sigmoid(t * (ratio - 1)) * terms.advantage


@dataclass(frozen=True, slots=True)
class ReinforceLoss:
    """Negative log-likelihood times the advantage: REINFORCE, GPG (arXiv:2504.02546) with its own scale of advantages,
    and supervised fine-tuning where the advantage is 1."""

    aggregation: AggregationName = "token-mean"
    needs: ClassVar[frozenset[str]] = NOTHING
    couples: ClassVar[Coupling] = "token"
    keeps_zeros: ClassVar[bool] = False

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        return -logprobs * terms.advantage


@dataclass(frozen=True, slots=True)
class LossAround:
    """What a loss around another one has in common with that one."""

    loss: PolicyLoss

    @property
    def aggregation(self) -> AggregationName:
        return self.loss.aggregation

    @property
    def couples(self) -> Coupling:
        return self.loss.couples

    @property
    def keeps_zeros(self) -> bool:
        return self.loss.keeps_zeros


@dataclass(frozen=True, slots=True)
class Correction(LossAround):
    """Another loss, corrected for samplers whose probabilities are not the learner's: another engine, another
    precision, older weights.

    `ratio`: how many times as likely as under the sampler the learner finds the token; or the rollout's sampled tokens,
    as the geometric mean of their ratios or as the product, which is the ratio of the whole rollout.
    """

    ratio: Ratio = field(default="token", kw_only=True)

    @property
    def couples(self) -> Coupling:
        return self.loss.couples if self.ratio == "token" else "rollout"

    @property
    def needs(self) -> frozenset[str]:
        return self.loss.needs - {"old"} | SAMPLED  # the correction provides the old log-probabilities


@dataclass(frozen=True, slots=True)
class TruncatedImportance(Correction):
    """Another loss times the ratio, at most `cap`. The other loss compares the learner with itself: its own ratios are
    1 and it clips nothing, so that there is no trust region under lag.

    Token by token this is TIS (https://fengyao.notion.site/off-policy-rl), with "product" its sequence-level variant
    (https://richardli.xyz/rl-collapse).
    """

    cap: float = 2.0

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        present = logprobs.detach()
        weight = log_importance(present, terms, self.ratio).exp().clamp(max=self.cap)
        return weight * self.loss(logprobs, replace(terms, old_logprob=present))


@dataclass(frozen=True, slots=True)
class MaskedRatios(Correction):
    """Another loss, 0 for every token whose ratio is below `low` or above `high`; rollouts weigh what they did before.

    Around a loss that clips, the clip stays what it was. Around TruncatedImportance with a `cap` of `high`, this is
    IcePop (arXiv:2510.18855); with "product" in both, masked importance sampling of sequences
    (https://richardli.xyz/rl-collapse). A loss with `old: learner` compares the learner with itself.
    """

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                f"low must be from 0 to 1 and high at least 1, got {self.low} and {self.high}: a token that sampler "
                "and learner agree on has the ratio 1"
            )

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        present = logprobs.detach()
        ratio = log_importance(present, terms, self.ratio)
        kept = (ratio >= (math.log(self.low) if self.low else -math.inf)) & (ratio <= math.log(self.high))
        if "old" in self.loss.needs:
            terms = replace(terms, old_logprob=present)
        return kept * self.loss(logprobs, terms)


@dataclass(frozen=True, slots=True)
class WithKL(LossAround):
    """Another loss plus how far a token's probability is from what it was when the Learner was made, as `kl` estimates
    it (arXiv:2402.03300 eq. 3 and 4)."""

    coefficient: float = 0.001
    estimator: KL = "k3"
    keeps_zeros: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return self.loss.needs | {"reference"}

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        return self.loss(logprobs, terms) + self.coefficient * kl(logprobs, terms.extras["reference"], self.estimator)


@dataclass(frozen=True, slots=True)
class WithEntropy(LossAround):
    """Another loss less the entropy of the distribution that each token was sampled from (arXiv:1602.01783 sec. 4)."""

    coefficient: float = 0.001
    keeps_zeros: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return self.loss.needs | {"entropy"}

    def __call__(self, logprobs: Tensor, terms: Terms) -> Tensor:
        return self.loss(logprobs, terms) - self.coefficient * terms.extras["entropy"]


def log_ratio(logprobs: Tensor, terms: Terms, level: Level = "token") -> Tensor:
    """log of present over old probability [N]: of the token (within 20 nats), or the mean over its turn or rollout."""
    change = logprobs - terms.old_logprob
    if level == "token":
        return change.clamp(-20, 20)
    segment = terms.rollout if level == "sequence" else terms.rollout * (terms.turn.max() + 1) + terms.turn
    return segment_mean(change, segment).clamp(max=10)


def log_importance(logprobs: Tensor, terms: Terms, ratio: Ratio) -> Tensor:
    """log of the ratio [N] that a Correction names, within 20 nats."""
    if ratio == "product":
        return segment_sums(logprobs - terms.old_logprob, terms.rollout)[terms.rollout].clamp(-20, 20)
    return log_ratio(logprobs, terms, "token" if ratio == "token" else "sequence").clamp(-20, 20)


def segment_sums(values: Tensor, segment: Tensor) -> Tensor:
    """[N] -> [S]: by segment, the sum of its entries."""
    return values.new_zeros(int(segment.max()) + 1).index_add(0, segment, values)


def segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """[N] -> [N]: the mean over all entries of the same segment."""
    return (segment_sums(values, segment) / segment_sums(torch.ones_like(values), segment))[segment]


def kl(logprobs: Tensor, reference: Tensor, estimator: KL = "k3") -> Tensor:
    """Estimates KL(policy || reference) from the sampled tokens [N], nats (Schulman 2020, as in verl).

    k3 is kept within 10, its exponent within 20. "+": the value of k1 or k3 with the gradient of k2, which is the
    gradient of the KL itself.
    """
    difference = logprobs - reference
    if estimator.endswith("+"):
        value, slope = kl(logprobs, reference, "k1" if estimator == "k1+" else "k3"), kl(logprobs, reference, "k2")
        return slope - slope.detach() + value.detach()
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return difference.abs()
    if estimator == "k2":
        return 0.5 * difference**2
    negative = (-difference).clamp(-20, 20)
    return (negative.exp() - negative - 1).clamp(-10, 10)
