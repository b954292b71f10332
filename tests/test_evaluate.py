"""Evaluation: intervals that cover, differences that pair."""

from __future__ import annotations

import json
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import binomtest

from treegym.agents import ROOT, Completion, Evaluation, Node, RolloutTree, paired_difference, succeeded
from treegym.agents.statistics import bootstrap, wilson
from treegym.envs import Message, Task


@pytest.mark.parametrize("n", [1, 2, 7, 50, 200])
def test_wilson_is_scipy_s(n: int) -> None:
    for successes in sorted({0, 1, n // 3, n - 1, n}):
        reference = binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson(successes, n) == pytest.approx((successes / n, reference.low, reference.high), abs=1e-12)


def test_the_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    """Paired differences of 60 tasks with a known mean: the interval holds it in about 95 of 100 experiments."""
    generator = np.random.default_rng(0)
    easy = generator.random((400, 60))  # each task's chance before
    before = generator.random((400, 60)) < easy
    after = generator.random((400, 60)) < np.minimum(easy + 0.2, 1)
    gain = 0.2 - 0.2**2 / 2  # the mean of min(x + 0.2, 1) - x
    intervals = [bootstrap((a - b).astype(float), resamples=500) for a, b in zip(after * 1, before * 1, strict=True)]
    covered = fmean(low <= gain <= high for _, low, high in intervals)
    assert 0.91 < covered < 0.98
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


def test_the_same_values_give_the_same_interval() -> None:
    values = [float(x) for x in np.random.default_rng(2).random(40)]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)


def tree(hops: int, *exact: float) -> RolloutTree:
    """Every rollout calls a tool, then answers."""
    call = Node(ROOT, Completion("", (1, 2)), (9,), (Message("tool", "x"),))
    ends = tuple(Node(0, Completion("", (n, 4, 5)), reward_terms={"exact": x}) for n, x in enumerate(exact))
    leaves = tuple(range(1, 1 + len(exact)))
    return RolloutTree(Task("none", 0), (0,), (), (call, *ends), leaves, info={"hops": hops} if hops else {})


def test_an_evaluation_counts_rollouts() -> None:
    result = Evaluation.of([tree(1, 1.0, 0.5), tree(2, 1.0, 1.0), tree(2, 0.0, 0.0)], "exact", seconds=3.0)
    assert result.success == [0.5, 1.0, 0.0] and result.hops == [1, 2, 2] and result.rollouts == 6
    assert (result.turns, result.tool_calls, result.sampled_tokens, result.seconds) == (2, 1, 5, 3.0)
    assert result.interval == bootstrap(result.success)
    assert result.by_hops() == {1: wilson(0.5, 1), 2: bootstrap([1.0, 0.0])}
    assert succeeded(tree(1, 1.0, 0.5, 1.5), "exact") == [True, False, True]
    assert succeeded(tree(1, 1.0), "format") == [False]


def test_one_rollout_a_task_is_a_proportion() -> None:
    result = Evaluation.of([tree(1, 1.0), tree(3, 0.0), tree(3, 1.0), tree(0, 1.0)], "exact")
    assert result.interval == wilson(3, 4)
    assert result.by_hops() == {0: wilson(1, 1), 1: wilson(1, 1), 3: wilson(1, 2)}
    assert list(result.by_hops()) == [0, 1, 3]


def test_evaluations_survive_json() -> None:
    result = Evaluation.of([tree(1, 1.0, 0.0), tree(2, 1.0, 1.0)], "exact", seconds=0.25)
    assert Evaluation(**json.loads(json.dumps(result.to_json()))) == result
