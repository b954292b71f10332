"""Evaluation: rollouts counted, policies compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from treegym.agents import (
    ROOT,
    ChatRenderer,
    Completion,
    EpisodeStore,
    Evaluation,
    Node,
    RolloutTree,
    Sampling,
    Stopped,
    Watcher,
)
from treegym.agents.evaluation import Budget, Outcome, TaskOutcome, evaluate, figures, flips, succeeded
from treegym.agents.evaluation.statistics import bootstrap, wilson
from treegym.agents.loop import SILENT, Silent
from treegym.agents.models.registry import load_tokenizer
from treegym.agents.policies import RandomPlayer
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
    assert [task.share for task in result.tasks] == [0.5, 1.0, 0.0] and len(result.rollouts) == 6
    assert [task.difficulty for task in result.tasks] == [1, 2, 2]
    assert [*map(result.mean, ("turns", "tool_calls", "sampled_tokens")), result.seconds] == [2, 1, 5, 3.0]
    assert result.success == bootstrap([0.5, 1.0, 0.0])
    assert result.by_difficulty() == {1: wilson(0.5, 1), 2: bootstrap([1.0, 0.0])}
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
    assert Evaluation.of([some], "exact").success.mean == won / 2
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
    assert result.success == wilson(3, 4)
    assert result.by_difficulty() == {1: wilson(1, 1), 3: wilson(1, 2)}  # the last tells no difficulty
    assert list(result.by_difficulty()) == [1, 3]


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
    assert [problem.share for problem in result.problems] == [0.25, 1.0] and len(result.tasks) == 40
    assert result.success == wilson(1.25, 2) and result.by_difficulty() == {1: wilson(1.25, 2)}
    found = result.figures()
    assert (found["tasks"], found["drawn"], found["samples"], found["rollouts"]) == (2, 40, 1, 40)
    assert found["success"] == wilson(1.25, 2)._asdict()
    other = figures([TaskOutcome.of(n, replace(each, state_key=str(n)), "exact") for n, each in enumerate(trees)])
    assert other["tasks"] == other["drawn"] == 40 and other["success"] == wilson(25, 40)._asdict()


def test_evaluations_survive_json() -> None:
    trees = [tree(1, 1.0, 0.0), replace(tree(2, math.inf, 1.0), task=Task("none", 1, {"a": [1]}, {"b": None}))]
    result = Evaluation.of(trees, "exact", seconds=0.25)
    assert Evaluation.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_an_evaluation_of_an_older_run_keeps_its_means() -> None:
    row = {"success": [0.5, 1.0, 0.0], "hops": [1, 2, 2], "rollouts": 6, "seconds": 3.0, "problems": [0, 1, 1]}
    result = Evaluation.from_json(row | {"turns": 2.5, "tool_calls": 1.25, "sampled_tokens": 7.0})
    assert [task.share for task in result.tasks] == row["success"] and result.success.mean == 0.5
    assert [*map(result.mean, ("turns", "tool_calls", "sampled_tokens")), result.seconds] == [2.5, 1.25, 7.0, 3.0]
    assert {level: interval.mean for level, interval in result.by_difficulty().items()} == {1: 0.5, 2: 0.5}


PAGE = Path(__file__).parents[1] / "docs" / "episodes.md"


def test_the_evaluation_of_the_page_says_who_is_better_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "evaluate(" in block
    ]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert capsys.readouterr().out == "better\n"
    worst, best = names["sides"]
    assert best.success == wilson(20, 20) and worst.success.mean < 1 and len(best.rollouts) == 40
    files = [*tmp_path.rglob("trees.jsonl.zst"), *tmp_path.rglob("results.json")]
    before = [file.read_bytes() for file in files]
    exec(code, names)  # nothing is left to play
    assert [file.read_bytes() for file in files] == before and len(files) == 4


def test_an_evaluation_in_parts_is_the_whole_one(tmp_path: Path) -> None:
    """One that its budget ends, then a watcher, then nothing: the trees are those of one that ran through."""
    tasks = [Task("treegym/Lookup-v0", seed) for seed in range(6)]
    renderer = ChatRenderer(load_tokenizer("nano"))

    def played(out: str, tokens: int | None = None, watcher: Watcher = SILENT) -> Evaluation:
        how, budget = Sampling(), Budget(tokens)
        return evaluate(
            tasks, RandomPlayer(), renderer, how, budget, tmp_path / out, samples=2, at_once=4, watcher=watcher
        )

    class Stops(Silent):
        def should_stop(self) -> bool:
            return True

    whole = played("whole")
    first = played("parts", whole.rollouts[0].sent_tokens * 8)
    assert 0 < len(first.tasks) < 6 and first.stopped_by.startswith("the budget of")
    with pytest.raises(Stopped, match="of 6 tasks"):
        played("parts", watcher=Stops())
    again = played("parts")
    assert replace(again, seconds=0) == replace(whole, seconds=0)
    files = [tmp_path / out / "trees.jsonl.zst" for out in ("whole", "parts")]
    assert [*EpisodeStore(files[0])] == [*EpisodeStore(files[1])]
    with pytest.raises(ValueError, match="holds an evaluation of other tasks"):
        evaluate(tasks[:5], RandomPlayer(), renderer, Sampling(), Budget(), tmp_path / "whole", samples=2)
    with pytest.raises(ValueError, match="a number of samples or a share such as 10%, got 'many'"):
        Budget(max_failures="many")
