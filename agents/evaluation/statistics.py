"""Statistics of success: intervals, paired tests, pass@k, and what a number of tasks can tell.

All intervals are at 95%. Tasks are the units that are resampled: a task's rollouts are one cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.float64]

LEVEL = 0.05  # of tests; intervals hold the truth with probability 1 - LEVEL
Z = NormalDist().inv_cdf(1 - LEVEL / 2)
RESAMPLES = 10_000
_BLOCK = 1 << 22  # numbers drawn at a time


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    mean: float
    low: float
    high: float


# proportions


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927):
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    p, z2 = successes / n, Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def success_interval(shares: Values, samples: int) -> Interval:
    """Mean success of tasks that were tried `samples` times each, from the share of each that succeeded.

    One try a task: Wilson's interval. More: a bootstrap over tasks. Where all shares are equal, resampling shows no
    spread; then it is Wilson's over the tasks, as if the tries of a task were one.
    """
    if samples == 1 or min(shares) == max(shares):
        return wilson(float(sum(shares)), len(shares))
    return bootstrap(shares)


# resampling


def bootstrap(values: Values, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean with its percentile interval (Efron 1979); the values, one a task, are the units that are resampled."""
    [interval] = bootstrap_rows(np.asarray(values, dtype=float)[None], seed=seed, resamples=resamples)
    return interval


def bootstrap_rows(rows: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES) -> list[Interval]:
    """`bootstrap` of every row [figures, tasks]; all figures see the same draws of tasks."""
    n = rows.shape[1]
    generator = np.random.default_rng(seed)
    size = max(1, _BLOCK // n)
    blocks = []
    for start in range(0, resamples, size):
        drawn = generator.integers(n, size=(min(size, resamples - start), n))
        blocks.append(np.stack([row[drawn].mean(axis=1) for row in rows]))
    lows, highs = np.quantile(np.concatenate(blocks, axis=1), [LEVEL / 2, 1 - LEVEL / 2], axis=1)
    return [
        Interval(float(row.mean()), float(low), float(high)) for row, low, high in zip(rows, lows, highs, strict=True)
    ]


def paired_difference(after: Values, before: Values) -> Interval:
    """Mean of after - before over the same tasks, bootstrapped over tasks."""
    if len(after) != len(before):
        raise ValueError(f"pairs need the same tasks, got {len(after)} and {len(before)}")
    return bootstrap([float(a) - float(b) for a, b in zip(after, before, strict=True)])


def difference_interval(differences: Values) -> Interval:
    """Mean difference of paired shares, bootstrapped over tasks; where all are equal, `paired_proportions`."""
    n, mean = len(differences), float(np.mean(differences))
    if min(differences) < max(differences):
        return bootstrap(differences)
    return paired_proportions(max(mean, 0.0) * n, max(-mean, 0.0) * n, n)


def sign_flips(differences: Values, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p of a mean difference of zero: how often random signs give one as large (Fisher 1935).

    The observed signs count as one draw, so that p is never 0 and the test keeps its level.
    """
    data = np.asarray(differences, dtype=float)
    data = data[data != 0]
    generator = np.random.default_rng(seed)
    observed = abs(data.sum()) - 1e-9  # sums of the same numbers in another order differ in the last bits
    as_large, size = 0, max(1, _BLOCK // max(1, len(data)))
    for start in range(0, resamples, size):
        signs = generator.integers(2, size=(min(size, resamples - start), len(data))) * 2 - 1
        as_large += int((np.abs(signs @ data) >= observed).sum())
    return (1 + as_large) / (1 + resamples)


# pairs of one try each


def mcnemar(only_after: int, only_before: int, method: Literal["exact", "mid-p"] = "exact") -> float:
    """Two-sided p for pairs that disagree: of n = b + c, c is Binomial(n, 1/2) where neither side is better.

    exact: min(1, 2 P(X <= min(b, c))) (McNemar 1947, exact as in Fagerland et al. 2013); mid-p counts the observed
    outcome half: 2 P(X <= min(b, c)) - P(X = min(b, c)), less strict and in practice still at its level.
    """
    n, least = only_after + only_before, min(only_after, only_before)
    tail = 2 * sum(math.comb(n, i) for i in range(least + 1))
    if method == "mid-p":
        tail -= math.comb(n, least)
    return min(1.0, float(tail / 2**n))


def paired_proportions(only_after: float, only_before: float, n: int) -> Interval:
    """Difference of two proportions over the same n tasks, by the adjusted Wald interval (Bonett and Price 2012).

    With p = (count + 1) / (n + 2) of both kinds of disagreement: p1 - p2 +- z sqrt((p1 + p2 - (p1 - p2)^2) / (n + 2)).
    """
    p1, p2 = (only_after + 1) / (n + 2), (only_before + 1) / (n + 2)
    half = Z * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    return Interval((only_after - only_before) / n, max(-1.0, p1 - p2 - half), min(1.0, p1 - p2 + half))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that hold for all comparisons together (Holm 1979): the i-th smallest, from 0, times m - i, and
    at least those before it."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


# several tries a task


def pass_at(k: int, successes: int, n: int) -> float:
    """The chance that one of k tries succeeds, unbiased from n >= k: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021)."""
    _check_tries(k, n)
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def pass_hat(k: int, successes: int, n: int) -> float:
    """The chance that all of k tries succeed, unbiased from n >= k: C(c, k) / C(n, k) (pass^k, Yao et al. 2024)."""
    _check_tries(k, n)
    return math.comb(successes, k) / math.comb(n, k)


def _check_tries(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: expected 1 to {n}, the number of tries")


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return sorted({n, *(1 << i for i in range(n.bit_length()))})


def unique_rate(answers: Sequence[str]) -> float:
    """Distinct answers of a task's tries over their number; NaN where there are none."""
    return len(set(answers)) / len(answers) if answers else math.nan


# what can be told apart


def detectable(deviation: float, n: int, power: float = 0.8) -> float:
    """The least difference that a two-sided test of n tasks finds with this probability (Cohen 1988):
    (z_0.975 + z_power) s / sqrt(n), s being the standard deviation of a task's difference."""
    return (Z + NormalDist().inv_cdf(power)) * deviation / math.sqrt(n)


def noise_floor(policies: Sequence[Sequence[tuple[int, int]]]) -> float:
    """The difference between equal policies that chance in the tries stays below in 95 of 100 comparisons, tasks fixed.

    `policies[policy][task]` is (successes, tries), 2 or more. A task's mean of n tries has the variance
    c (n - c) / (n^2 (n - 1)), unbiased; the floor is z sqrt(sum of these over policies and tasks) / tasks.
    """
    variance = sum(c * (n - c) / (n * n * (n - 1)) for tasks in policies for c, n in tasks)
    return Z * math.sqrt(variance) / len(policies[0])


def deviation(values: Iterable[float]) -> float:
    """Standard deviation with n - 1; 0 of a single value."""
    data = list(values)
    mean = fmean(data)
    return math.sqrt(sum((x - mean) ** 2 for x in data) / (len(data) - 1)) if len(data) > 1 else 0.0
