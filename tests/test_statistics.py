"""Statistics: the numbers of scipy and statsmodels, closed forms, and intervals that cover as often as they say.

Coverage is summed over all outcomes where there are few enough; else simulated, with 400 experiments of a fixed seed:
an observed 95% is then within 0.03 of the true share, with near certainty.
"""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from treegym.agents.evaluation.statistics import (
    Interval,
    bootstrap,
    bootstrap_rows,
    detectable,
    deviation,
    difference_interval,
    holm,
    mcnemar,
    noise_floor,
    paired_difference,
    paired_proportions,
    pass_at,
    pass_hat,
    powers_of_two,
    sign_flips,
    success_interval,
    unique_rate,
    wilson,
)

EXPERIMENTS = 400


def covered(intervals: list[Interval], truth: float) -> float:
    return fmean(low <= truth <= high for _, low, high in intervals)


# proportions


@pytest.mark.parametrize("n", [1, 2, 7, 50, 200])
def test_wilson_is_that_of_scipy_and_statsmodels(n: int) -> None:
    for successes in sorted({0, 1, n // 3, n - 1, n}):
        reference = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson(successes, n) == pytest.approx((successes / n, reference.low, reference.high), abs=1e-12)
        assert wilson(successes, n)[1:] == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize("n", [20, 100])
def test_wilson_covers(n: int) -> None:
    """Exactly: over all numbers of successes."""
    intervals = [wilson(successes, n) for successes in range(n + 1)]
    shares = np.linspace(0.02, 0.98, 97)
    chances = [stats.binom.pmf(range(n + 1), n, share) for share in shares]
    coverage = [
        sum(p for (_, low, high), p in zip(intervals, row, strict=True) if low <= share <= high)
        for share, row in zip(shares, chances, strict=True)
    ]
    assert fmean(coverage) == pytest.approx(0.95, abs=0.01) and min(coverage) > 0.83


def test_paired_proportions_are_those_of_the_literature() -> None:
    """Fagerland, Lydersen and Laake 2014: airway hyper-responsiveness, 7 and 1 of 21 pairs disagree."""
    mean, low, high = paired_proportions(1, 7, 21)
    assert (mean, low, high) == pytest.approx((-6 / 21, -0.508, -0.013), abs=5e-4)
    assert paired_proportions(7, 1, 21) == pytest.approx((-mean, -high, -low))


@pytest.mark.parametrize(("up", "down"), [(0.05, 0.05), (0.1, 0.02), (0.3, 0.1), (0.0, 0.02), (0.5, 0.2)])
def test_paired_proportions_cover(up: float, down: float, n: int = 60) -> None:
    """Exactly: over all numbers of pairs that disagree."""
    pairs = [(c, b) for c in range(n + 1) for b in range(n + 1 - c)]
    chances = stats.multinomial.pmf([(c, b, n - c - b) for c, b in pairs], n, (up, down, 1 - up - down))
    hits = [low <= up - down <= high for _, low, high in (paired_proportions(c, b, n) for c, b in pairs)]
    assert 0.935 < float(np.dot(hits, chances)) <= 1


# resampling


def tries(tasks: int, samples: int) -> tuple[NDArray[np.int64], float]:
    """Successes [experiment, task] of tasks whose chances are Beta(0.5, 0.8), and the mean chance."""
    generator = np.random.default_rng(0)
    chances = generator.beta(0.5, 0.8, size=(EXPERIMENTS, tasks))
    return generator.binomial(samples, chances), 0.5 / 1.3


def test_the_bootstrap_is_scipy_s() -> None:
    values = np.random.default_rng(1).random(40) ** 2
    mean, low, high = bootstrap(values)
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx(reference, abs=0.005)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap_rows(np.stack([values, 1 - values]))[1][1:] == pytest.approx((1 - high, 1 - low))


def test_the_clustered_bootstrap_covers_and_ignoring_clusters_does_not() -> None:
    successes, truth = tries(tasks=50, samples=8)
    intervals = [bootstrap(row / 8, resamples=500) for row in successes]
    assert 0.92 <= covered(intervals, truth) <= 0.98
    assert covered([wilson(int(row.sum()), 8 * len(row)) for row in successes], truth) < 0.7


def test_intervals_of_pass_at_k_cover() -> None:
    successes, _ = tries(tasks=50, samples=8)
    for k in (2, 4):
        table = np.array([pass_at(k, c, 8) for c in range(9)])
        truth = 1 - math.prod((0.8 + i) / (1.3 + i) for i in range(k))  # 1 - E (1 - p)^k
        assert table[successes].mean() == pytest.approx(truth, abs=0.01)
        assert 0.92 <= covered([bootstrap(row, resamples=500) for row in table[successes]], truth) <= 0.98


def test_paired_differences_cover() -> None:
    """Paired differences of 60 tasks with a known mean."""
    generator = np.random.default_rng(0)
    easy = generator.random((EXPERIMENTS, 60))  # each task's chance before
    before = generator.random((EXPERIMENTS, 60)) < easy
    after = generator.random((EXPERIMENTS, 60)) < np.minimum(easy + 0.2, 1)
    gain = 0.2 - 0.2**2 / 2  # the mean of min(x + 0.2, 1) - x
    intervals = [bootstrap((a - b).astype(float), resamples=500) for a, b in zip(after * 1, before * 1, strict=True)]
    assert 0.92 <= covered(intervals, gain) <= 0.98
    assert fmean(interval.mean for interval in intervals) == pytest.approx(gain, abs=0.01)


def test_intervals_shrink_with_the_root_of_the_number() -> None:
    values = [float(x) for x in np.random.default_rng(1).random(2000)]
    small, large = bootstrap(values[:125]), bootstrap(values)
    assert (small.high - small.low) / (large.high - large.low) == pytest.approx(4, rel=0.2)
    assert large.mean == pytest.approx(fmean(values)) and large.low < large.mean < large.high


def test_pairing_takes_out_what_the_tasks_share() -> None:
    hard_and_easy = [0.0] * 50 + [1.0] * 50
    assert paired_difference(hard_and_easy, hard_and_easy) == (0, 0, 0)
    better = [1.0] * 10 + hard_and_easy[10:]
    mean, low, high = paired_difference(better, hard_and_easy)
    assert mean == pytest.approx(0.1) and 0 < low < mean < high
    shuffled = [float(x) for x in np.random.default_rng(0).permutation(better)]
    loose = paired_difference(shuffled, hard_and_easy)
    assert loose.mean == pytest.approx(mean) and loose.low < 0  # the pairs matter, not the two means
    assert paired_difference(hard_and_easy, better) == pytest.approx((-mean, -high, -low))
    with pytest.raises(ValueError, match="same tasks, got 2 and 1"):
        paired_difference([1.0, 0.0], [1.0])


def test_where_nothing_varies_the_interval_is_not_a_point() -> None:
    assert success_interval([1.0] * 10, 8) == wilson(10, 10) and success_interval([0.5], 8) == wilson(0.5, 1)
    assert success_interval([1.0, 0.5], 8) == bootstrap([1.0, 0.5])
    assert success_interval([1.0, 0.0], 1) == wilson(1, 2)
    assert difference_interval([0.0] * 50) == paired_proportions(0, 0, 50)
    assert difference_interval([-1.0] * 50) == paired_proportions(0, 50, 50)


# tests


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 61), (0, 300)])
def test_mcnemar_is_that_of_statsmodels(b: int, c: int) -> None:
    assert mcnemar(c, b) == pytest.approx(statsmodels_mcnemar([[9, b], [c, 9]], exact=True).pvalue, rel=1e-9)
    assert mcnemar(c, b) == mcnemar(b, c)
    if b + c:
        assert mcnemar(c, b) == pytest.approx(stats.binomtest(c, b + c).pvalue, rel=1e-9)
    least = stats.binom(b + c, 0.5)
    assert mcnemar(c, b, "mid-p") == pytest.approx(2 * least.cdf(min(b, c)) - least.pmf(min(b, c)), rel=1e-9)


@pytest.mark.parametrize("n", [10, 30, 101])
def test_mcnemar_keeps_its_level(n: int) -> None:
    """Exactly, given so many pairs that disagree."""
    chances = stats.binom.pmf(range(n + 1), n, 0.5)
    exact, mid = (
        sum(p for c, p in enumerate(chances) if mcnemar(c, n - c, method) <= 0.05) for method in ("exact", "mid-p")
    )
    assert exact <= 0.05 and exact <= mid <= 0.065


def test_random_signs_are_scipy_s_permutations() -> None:
    for shift in (0.0, 0.3, 0.6):
        values = np.random.default_rng(3).normal(shift, 1, 11)
        exact = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert sign_flips(values) == pytest.approx(exact, abs=0.015)
    assert sign_flips([0.0] * 9) == 1 and sign_flips([0.0] * 9 + [0.5]) == 1
    assert sign_flips([1.0] * 40) == pytest.approx(1 / 10_001)


def test_random_signs_keep_their_level_on_few_ties() -> None:
    generator = np.random.default_rng(0)
    differences = (generator.binomial(4, 0.3, (EXPERIMENTS, 40)) - generator.binomial(4, 0.3, (EXPERIMENTS, 40))) / 4
    assert 0.02 <= fmean(sign_flips(row, resamples=500) <= 0.05 for row in differences) <= 0.08


def test_holm_is_that_of_statsmodels() -> None:
    generator = np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        p = [float(x) for x in generator.random(n) ** 3]
        assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert holm([]) == []


# several tries


def test_pass_at_k_is_the_share_of_draws_that_succeed() -> None:
    """Over all ways to draw k of n tries."""
    for n, c in itertools.product(range(1, 8), range(8)):
        outcomes = [True] * min(c, n) + [False] * (n - min(c, n))
        for k in range(1, n + 1):
            draws = list(itertools.combinations(outcomes, k))
            assert pass_at(k, min(c, n), n) == pytest.approx(fmean(any(draw) for draw in draws))
            assert pass_hat(k, min(c, n), n) == pytest.approx(fmean(all(draw) for draw in draws))


def test_pass_at_k_is_the_paper_s_product() -> None:
    """1 - prod (1 - k / i) for i from n - c + 1 to n, as Chen et al. compute it."""
    for n, c, k in ((256, 1, 128), (256, 100, 3), (200, 13, 100), (64, 64, 1), (64, 0, 64)):
        product = 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0
        assert pass_at(k, c, n) == pytest.approx(product, abs=1e-12)
    with pytest.raises(ValueError, match="k=9: expected 1 to 8"):
        pass_at(9, 1, 8)


@pytest.mark.parametrize("estimate", [pass_at, pass_hat])
def test_estimates_from_more_tries_than_k_are_unbiased(estimate: object) -> None:
    n, k, chance = 12, 5, 0.3
    truth = 1 - (1 - chance) ** k if estimate is pass_at else chance**k
    expected = sum(stats.binom.pmf(c, n, chance) * estimate(k, c, n) for c in range(n + 1))  # type: ignore[operator]
    assert expected == pytest.approx(truth)


def test_small_things() -> None:
    assert powers_of_two(1) == [1] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(6) == [1, 2, 4, 6]
    assert unique_rate(["a", "b", "a", "a"]) == 0.5 and math.isnan(unique_rate([]))
    assert deviation([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1)) and deviation([3.0]) == 0


# noise


def test_the_noise_floor_is_what_a_policy_differs_from_itself() -> None:
    """Two evaluations of one policy stay below it 95 times of 100."""
    generator = np.random.default_rng(0)
    chances = generator.beta(0.5, 0.8, 60)
    one, two = generator.binomial(4, chances, (2, EXPERIMENTS, 60))
    floors = [noise_floor([[(c, 4) for c in side] for side in sides]) for sides in zip(one, two, strict=True)]
    below = [abs((b - a).mean() / 4) <= floor for a, b, floor in zip(one, two, floors, strict=True)]
    assert 0.92 <= fmean(below) <= 0.98
    assert noise_floor([[(4, 4), (1, 2)]] * 2) == pytest.approx(1.96 * math.sqrt(2 * 0.25) / 2, rel=1e-4)  # uneven


def test_the_detectable_difference_is_detected_in_four_of_five_cases() -> None:
    generator = np.random.default_rng(0)
    gain = detectable(0.5, 60)
    assert gain == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * 0.5 / math.sqrt(60))
    found = [sign_flips(row, resamples=500) <= 0.05 for row in generator.normal(gain, 0.5, (EXPERIMENTS, 60))]
    assert 0.75 <= fmean(found) <= 0.85
