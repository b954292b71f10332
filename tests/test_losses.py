"""Advantages, losses and aggregations: their laws, and numbers worked by hand."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treegym.scenarios import ScenarioError, load_scenario
from treegym.trainers import PolicyLoss, Terms, grpo
from treegym.trainers.advantages import GroupRelative, Norm
from treegym.trainers.losses import (
    AGGREGATIONS,
    CispoLoss,
    ClippedLoss,
    GeometricLoss,
    MaskedRatios,
    ReinforceLoss,
    SapoLoss,
    SumLoss,
    TruncatedImportance,
    WithEntropy,
    WithKL,
)

TRAINING = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
RETURNS = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=12)
NORMS = [Norm(), GroupRelative.verl().norm, GroupRelative.trl().norm, Norm(divide=False), Norm(ddof=0)]


def terms(old: list[float], advantages: list[float]) -> Terms:
    index = torch.arange(len(old))
    values = torch.tensor(advantages, dtype=torch.float64)
    return Terms(index, index, index, values, torch.tensor(old, dtype=torch.float64), torch.ones_like(values))


def losses(loss: ClippedLoss, ratios: list[float], advantages: list[float]) -> list[float]:
    logprobs = torch.tensor(ratios, dtype=torch.float64).log()
    found: list[float] = loss(logprobs - 2, terms([-2.0] * len(ratios), advantages)).tolist()
    return found


# group-relative advantages


@pytest.mark.parametrize("norm", NORMS, ids=str)
@settings(max_examples=50, deadline=None)
@given(returns=RETURNS, seed=st.integers(0, 100))
def test_advantages_of_a_group(norm: Norm, returns: list[float], seed: int) -> None:
    """They sum to nothing, follow their rollouts, keep the returns' order, and do not see a common shift."""
    scores = norm(returns)
    assert math.fsum(scores) == pytest.approx(0, abs=1e-6 * (1 + max(map(abs, scores))) * len(scores))
    order = random.Random(seed).sample(range(len(returns)), len(returns))
    assert norm([returns[i] for i in order]) == pytest.approx([scores[i] for i in order], abs=1e-9)
    ranked = [score for _, score in sorted(zip(returns, scores, strict=True))]
    assert all(a <= b + 1e-9 for a, b in pairwise(ranked))
    if max(returns) - min(returns) > 1e-3:
        assert norm([x + 3 for x in returns]) == pytest.approx(scores, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, 1.1, -3.0, 1 / 3])
@pytest.mark.parametrize("n", [2, 3, 7, 8])
def test_equal_returns_give_exact_zeros(norm: Norm, value: float, n: int) -> None:
    """Exact, because zeros are left out of training."""
    assert norm([value] * n) == [0.0] * n


def test_a_group_of_one() -> None:
    assert Norm()([0.7]) == [0.0]
    assert GroupRelative.trl().norm([0.7]) == [0.0]
    assert GroupRelative.verl().norm([0.7]) == [0.7]


def test_ddof_and_eps() -> None:
    half = math.sqrt(0.5)  # the deviation of 0, 1 with ddof 1; 0.5 with ddof 0
    assert Norm(eps=0)([0, 1]) == pytest.approx([-0.5 / half, 0.5 / half])
    assert Norm(ddof=0, eps=0)([0, 1]) == pytest.approx([-1, 1])
    assert Norm(ddof=0, eps=0.5)([0, 1]) == pytest.approx([-0.5, 0.5])
    assert Norm(divide=False, eps=9)([0, 1, 5]) == [-2, -1, 3]


# losses


def test_clipping_by_hand() -> None:
    """arXiv:1707.06347 eq. 7 with bounds 0.8 and 1.28."""
    loss = ClippedLoss(0.2, 0.28)
    ratios = [0.5, 0.9, 1.0, 1.2, 1.5]
    assert losses(loss, ratios, [2.0] * 5) == pytest.approx([-1.0, -1.8, -2.0, -2.4, -2.56])
    assert losses(loss, ratios, [-2.0] * 5) == pytest.approx([1.6, 1.8, 2.0, 2.4, 3.0])


def test_a_dual_clip_bounds_the_loss_of_bad_tokens_only() -> None:
    """arXiv:1912.09729 eq. 5 with c = 3."""
    loss = ClippedLoss(0.2, 0.2, dual_clip=3.0)
    assert losses(loss, [2.0, 3.0, 10.0], [-0.5] * 3) == pytest.approx([1.0, 1.5, 1.5])
    assert losses(loss, [2.0, 3.0, 10.0], [0.5] * 3) == pytest.approx([-0.6] * 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(0.5, 1.0, True), (1.5, 1.0, False), (1.1, 1.0, True), (0.5, -1.0, False), (1.5, -1.0, True), (4.0, -1.0, False)],
)
def test_clipped_terms_have_no_gradient(ratio: float, advantage: float, moves: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    ClippedLoss(0.2, 0.2, dual_clip=3.0)(logprobs, terms([0.0], [advantage])).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0)


def test_the_gradient_at_the_sampling_policy_is_the_policy_gradient() -> None:
    advantages = [0.3, -1.2, 0.0]
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ClippedLoss()(logprobs, terms([-1.0, -2.0, -0.5], advantages)).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-a for a in advantages])


def test_a_vanishing_old_probability_does_not_overflow() -> None:
    logprobs = torch.tensor([0.0], requires_grad=True)
    value = ClippedLoss()(logprobs, terms([-1e4], [-1.0])).sum()
    value.backward()
    assert math.isfinite(value.item()) and logprobs.grad is not None and math.isfinite(logprobs.grad.item())


def test_imitation_is_weighted_likelihood() -> None:
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    assert ReinforceLoss()(logprobs, terms([0.0, 0.0], [1.0, 0.5])).tolist() == [1.0, 1.0]


EVERY_LOSS = [
    ClippedLoss(),
    ClippedLoss(level="turn"),
    ClippedLoss(level="sequence", dual_clip=3.0),
    GeometricLoss(),
    CispoLoss(),
    SapoLoss(),
    ReinforceLoss(),
    TruncatedImportance(ClippedLoss(level="turn")),
    TruncatedImportance(WithKL(ReinforceLoss())),
    TruncatedImportance(ReinforceLoss(), 9.0, ratio="product"),
    TruncatedImportance(ClippedLoss(level="turn"), ratio="geometric"),
    MaskedRatios(CispoLoss()),
    MaskedRatios(ClippedLoss(old="learner"), ratio="geometric"),
    MaskedRatios(TruncatedImportance(ReinforceLoss()), ratio="product"),
    WithKL(ClippedLoss(level="sequence")),
    WithEntropy(ReinforceLoss()),
]


def many_terms(advantage: float) -> tuple[torch.Tensor, Terms]:
    """Three rollouts of two turns of two tokens, none of which is clipped."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, reference = (
        (0.03 * torch.randn(12, generator=generator, dtype=torch.float64) - 1).requires_grad_() for _ in range(3)
    )
    index = torch.arange(12)
    ones = torch.ones(12, dtype=torch.float64)
    extras = {"reference": reference.detach(), "entropy": -logprobs * logprobs.exp()}
    return logprobs, Terms(index, index // 4, index // 2 % 2, advantage * ones, old.detach(), ones, extras)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=str)
def test_a_loss_couples_what_it_says(loss: PolicyLoss) -> None:
    """A term's loss, or its gradient, depends on the log-probabilities of all terms of its token, turn or rollout, and
    on no others."""
    logprobs, its = many_terms(1.0)
    losses = loss(logprobs, its)
    found = torch.stack([torch.autograd.grad(each, logprobs, retain_graph=True)[0] != 0 for each in losses])
    for other in range(len(logprobs)):
        far = torch.where(torch.arange(len(logprobs)) == other, logprobs - 4, logprobs)
        found[:, other] |= loss(far, its) != losses
    part = {"token": its.logprob, "turn": its.rollout * 2 + its.turn, "rollout": its.rollout}[loss.couples]
    assert torch.equal(found, part[:, None] == part)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=str)
def test_a_loss_keeps_zeros_if_they_have_a_gradient(loss: PolicyLoss) -> None:
    logprobs, its = many_terms(0.0)
    [gradient] = torch.autograd.grad(loss(logprobs, its).sum(), logprobs)
    assert bool((gradient != 0).all()) == bool((gradient != 0).any()) == loss.keeps_zeros


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=str)
def test_a_loss_says_that_it_reads_what_was_sampled(loss: PolicyLoss) -> None:
    logprobs, its = many_terms(1.0)
    unknown = replace(its, old_logprob=torch.full_like(its.old_logprob, math.nan))
    assert torch.equal(loss(logprobs, unknown), loss(logprobs, its)) != bool(loss.needs & {"sampled", "old"})


def corrected(loss: PolicyLoss) -> list[float]:
    """Losses of two rollouts, whose tokens the learner finds 0.4, 2, 1 and 3, 3 times as likely as the sampler did."""
    ratios = torch.tensor([0.4, 2.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64)
    its = replace(terms(old.tolist(), [1.0] * 5), rollout=torch.tensor([0, 0, 0, 1, 1]))
    found: list[float] = loss(old + ratios.log(), its).tolist()
    return found


def test_truncated_importance_by_hand() -> None:
    """The loss inside is -1 for every token: its own ratios are 1."""
    clipped = ClippedLoss(0.01, 0.01)
    assert corrected(TruncatedImportance(clipped)) == pytest.approx([-0.4, -2, -1, -2, -2])
    assert corrected(TruncatedImportance(clipped, ratio="product")) == pytest.approx([-0.8] * 3 + [-2] * 2)
    geometric = TruncatedImportance(clipped, 2.5, ratio="geometric")
    assert corrected(geometric) == pytest.approx([-(0.8 ** (1 / 3))] * 3 + [-2.5] * 2)


def test_masked_ratios_by_hand() -> None:
    """Around a loss that clips, whose ratios stay what they were, and around truncated importance (IcePop)."""
    clipped = ClippedLoss(0.2, 0.2)
    assert corrected(clipped) == pytest.approx([-0.4, -1.2, -1, -1.2, -1.2])
    assert corrected(MaskedRatios(clipped, 0.5, 2.5)) == pytest.approx([0, -1.2, -1, 0, 0])
    assert corrected(MaskedRatios(clipped, 0, 2.5)) == pytest.approx([-0.4, -1.2, -1, 0, 0])
    assert corrected(MaskedRatios(clipped, ratio="product")) == pytest.approx([-0.4, -1.2, -1, 0, 0])
    assert corrected(MaskedRatios(clipped, 0.95, ratio="geometric")) == pytest.approx([0, 0, 0, -1.2, -1.2])
    assert corrected(MaskedRatios(clipped, 0.9, 2.9, ratio="geometric")) == pytest.approx([-0.4, -1.2, -1, 0, 0])
    icepop = MaskedRatios(TruncatedImportance(clipped, 5.0), 0.5, 5.0)
    assert corrected(icepop) == pytest.approx([0, -2, -1, -3, -3])
    by_sequence = MaskedRatios(TruncatedImportance(clipped, ratio="product"), 0.5, 2.0, ratio="product")
    assert corrected(by_sequence) == pytest.approx([-0.8] * 3 + [0] * 2)
    at_itself = MaskedRatios(ClippedLoss(0.2, 0.2, old="learner"), 0.5, 2.5)
    assert corrected(at_itself) == pytest.approx([0, -1, -1, 0, 0])
    assert at_itself.needs == {"sampled"}


@pytest.mark.parametrize(("low", "high"), [(1.1, 2.0), (-0.1, 2.0), (0.5, 0.9)])
def test_masked_ratios_keep_what_sampler_and_learner_agree_on(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"got {low} and {high}"):
        MaskedRatios(ClippedLoss(), low, high)


def test_scenarios_name_corrections(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"

    def loss(text: str) -> PolicyLoss | SumLoss:
        file.write_text(f"environment: {{id: treegym/Lookup-v0}}\n{text}\n")
        return load_scenario(file).plan().algorithm.loss

    section = TRAINING.partition("### Where sampler and learner differ")[2].partition("\n### ")[0]
    [example] = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert loss(example) == MaskedRatios(TruncatedImportance(ClippedLoss(), 5.0), 0.5, 5.0)
    inner = "{TruncatedImportance: {loss: ReinforceLoss, ratio: product}}"
    chosen = loss(f"algorithm: {{loss: {{MaskedRatios: {{loss: {inner}, low: 0, high: 2, ratio: product}}}}}}")
    truncated = TruncatedImportance(ReinforceLoss(), ratio="product")
    assert chosen == MaskedRatios(truncated, 0, 2, ratio="product")
    for fields, reason in (
        ("low: 2", "algorithm.loss.MaskedRatios.*low must be from 0 to 1 and high at least 1, got 2.0 and 5.0"),
        ("ratio: turn", "algorithm.loss.MaskedRatios.ratio"),
    ):
        with pytest.raises(ScenarioError, match=reason):
            loss(f"algorithm: {{loss: {{MaskedRatios: {{loss: ClippedLoss, {fields}}}}}}}")


def test_masked_tokens_have_no_gradient_and_ratios_none_either() -> None:
    """The ratio is a weight: the gradient is that of the loss inside."""
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    its = replace(terms([-1.0, -1.5], [1.0, 1.0]), rollout=torch.tensor([0, 0]))
    for ratio, weights in (("token", [1, math.exp(0.5)]), ("product", [math.exp(0.5)] * 2)):
        loss = TruncatedImportance(ReinforceLoss(), ratio=ratio)
        [gradient] = torch.autograd.grad(loss(logprobs, its).sum(), logprobs)
        assert gradient.tolist() == pytest.approx([-w for w in weights])
    [gradient] = torch.autograd.grad(MaskedRatios(ReinforceLoss(), high=1.5)(logprobs, its).sum(), logprobs)
    assert gradient.tolist() == [-1, 0]


def test_aggregations_by_hand() -> None:
    """Rollouts of 4, 2 and 1 sampled tokens with losses 1 2 3 4, 5 7, 9."""
    tokens = [[1.0, 2.0, 3.0, 4.0], [5.0, 7.0], [9.0]]
    found = {
        name: sum(w * sum(row) for w, row in zip(aggregate([4, 2, 1]), tokens, strict=True))
        for name, aggregate in AGGREGATIONS.items()
    }
    assert found == pytest.approx(
        {
            "token-mean": 31 / 7,
            "seq-mean-token-mean": (2.5 + 6 + 9) / 3,
            "seq-mean-token-sum": 31 / 3,
            "seq-mean-token-sum-norm": 31 / 3 / 4,
            "token-sum": 31,
        }
    )


def test_grpo_s_bounds() -> None:
    assert grpo(clip=0.1).loss == ClippedLoss(0.1, 0.1)
    assert grpo(clip=0.1, clip_high=0.3).loss == ClippedLoss(0.1, 0.3)
    with pytest.raises(ValueError, match="n must be at least 2"):
        grpo(0)
