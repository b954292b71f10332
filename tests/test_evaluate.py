"""Evaluation: rollouts counted, policies compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from treegym.agents import ROOT, Completion, EpisodeStore, Evaluation, Node, RolloutTree
from treegym.agents.evaluation import Outcome, TaskOutcome, figures, flips, succeeded
from treegym.agents.evaluation.statistics import bootstrap, wilson
from treegym.agents.store import Where
from treegym.envs import Message, Task
from treegym.scenarios.viewer.shelf import Shelf


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


@pytest.mark.parametrize(
    ("exact", "won"),
    [
        ([0.5, 0.5], 0),
        ([1.5, 0.5], 1),  # whose mean is 1
        ([sum([0.1] * 10), 1.0], 2),
        ([1 - 1e-5, math.nextafter(1, 0)], 1),
        ([0.3 + 0.6 + 0.1, -0.0], 1),
        ([math.nan, math.inf], 1),
    ],
)
def test_a_success_is_one_wherever_it_is_counted(exact: list[float], won: int, tmp_path: Path) -> None:
    some = tree(1, *exact)
    store = EpisodeStore(tmp_path / "trees.jsonl.zst")
    store.append(some)
    [summary] = store.summaries()
    [volume] = Shelf(tmp_path, lambda path: EpisodeStore(path / "trees.jsonl.zst")).volumes().values()
    [row] = volume.listing(Where())["rows"]
    assert TaskOutcome.of(0, some, "exact").successes == sum(succeeded(some, "exact")) == won
    assert summary.successes == {"exact": won} and row["success"] == won / 2
    assert volume.tree(0)["succeeded"] == succeeded(some, "exact")
    assert Evaluation.of([some], "exact").success == [won / 2]
    wheres = {name: Where(success=name, success_term="exact") for name in ("all", "some", "mixed", "none")}
    chosen = {name for name, where in wheres.items() if volume.numbers(where)}
    assert chosen == {name for name, where in wheres.items() if store.matching(where)}
    assert chosen == [{"none"}, {"some", "mixed"}, {"some", "all"}][won]


def test_a_range_of_a_term_holds_what_rounding_put_beside_its_ends(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path / "trees.jsonl.zst")
    store.append(tree(1, sum([0.1] * 10)))
    store.append(tree(1, 0.999))
    assert [s.number for s in store.summaries(Where(terms={"exact": (1, None)}))] == [0]
    assert [s.number for s in store.summaries(Where(terms={"exact": (None, sum([0.333] * 3))}))] == [1]


def test_a_task_that_moved_by_half_has_flipped_whatever_its_shares_round_to() -> None:
    a, b = (TaskOutcome.of(0, tree(1, *[1.0] * n, *[0.0] * (10 - n)), "exact") for n in (2, 7))
    assert b.share - a.share < 0.5 and len(flips([a], [b])) == 1


def test_one_rollout_a_task_is_a_proportion() -> None:
    result = Evaluation.of([tree(1, 1.0), tree(3, 0.0), tree(3, 1.0), tree(0, 1.0)], "exact")
    assert result.interval == wilson(3, 4)
    assert result.by_hops() == {0: wilson(1, 1), 1: wilson(1, 1), 3: wilson(1, 2)}
    assert list(result.by_hops()) == [0, 1, 3]


def test_one_answer_is_not_a_unique_one() -> None:
    def answered(*answers: str | None) -> TaskOutcome:
        tries = tuple(Outcome(False, 0.0, {}, 1, 0, 0, 0, 0, 1, 1, None, answer) for answer in answers)
        return TaskOutcome(0, Task("none", 0), "", None, tries)

    assert figures([answered("a", "a"), answered("b", None)])["unique_answers"] == 0.5
    assert figures([answered("b", None)])["unique_answers"] is None


def test_seeds_that_draw_one_problem_are_one_task() -> None:
    def drawn(seed: int, problem: str, exact: float) -> RolloutTree:
        return replace(tree(1, exact), task=Task("none", seed), state_key=problem)

    trees = [drawn(seed, "ab"[seed % 2], float(seed % 2 or seed < 10)) for seed in range(40)]
    result = Evaluation.of(trees, "exact")
    assert result.shares == [0.25, 1.0] and len(result.success) == 40
    assert result.interval == wilson(1.25, 2) and result.by_hops() == {1: wilson(1.25, 2)}
    tasks = [TaskOutcome.of(number, each, "exact") for number, each in enumerate(trees)]
    found = figures(tasks)
    assert (found["tasks"], found["drawn"], found["samples"], found["rollouts"]) == (2, 40, 1, 40)
    assert found["success"] == wilson(1.25, 2)._asdict()
    other = figures([TaskOutcome.of(n, replace(each, state_key=str(n)), "exact") for n, each in enumerate(trees)])
    assert other["tasks"] == other["drawn"] == 40 and other["success"] == wilson(25, 40)._asdict()


def test_evaluations_survive_json() -> None:
    result = Evaluation.of([tree(1, 1.0, 0.0), tree(2, 1.0, 1.0)], "exact", seconds=0.25)
    assert Evaluation(**json.loads(json.dumps(result.to_json()))) == result
