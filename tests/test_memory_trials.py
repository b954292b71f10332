"""Trials tell lessons that help from those that do harm, however often one looks."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from test_memory_reflect import ENV, group

from treegym.agents import RolloutTree
from treegym.agents.memory import Evidence, Lesson, LessonStore, Memory, lessons_of, suspects
from treegym.agents.memory.trials import Trial, Verdict, effect_of
from treegym.agents.rollouts import Recall, Response
from treegym.envs import HouseRulesEnv, Message, Task
from treegym.scenarios import Scenario
from treegym.scenarios.memory import Measured, measured
from treegym.trainers import TaskSet

RETURNS = (0.0, 0.0, 0.5, 1.0, 1.5)


def looked_at(effect: float, pairs: int, dice: random.Random) -> list[float]:
    """Differences of two policies of which one returns so much more, and is as random."""
    return [dice.choice(RETURNS) + effect - dice.choice(RETURNS) for _ in range(pairs)]


@pytest.mark.parametrize("effect", [0.0, 0.4])
def test_the_interval_holds_at_all_times_at_once(effect: float) -> None:
    """Who looks after every pair, and stops where it seems to say something, is wrong in at most one of twenty."""
    dice, missed = random.Random(0), 0
    for _ in range(200):
        seen = looked_at(effect, 100, dice)
        found = (effect_of(seen[:n]) for n in range(2, 100, 8))
        missed += not all(each.low <= effect <= each.high for each in found)
    assert missed <= 0.05 * 200 + 2 * math.sqrt(0.05 * 200)


def test_an_interval_that_is_not_made_for_looking_often_does_not_hold() -> None:
    """The test above would see it."""
    dice, missed = random.Random(0), 0
    for _ in range(200):
        seen = looked_at(0.0, 100, dice)
        sums, squares = accumulate(seen), accumulate(x * x for x in seen)
        pairs = enumerate(zip(sums, squares, strict=True), 1)
        missed += any(abs(total) > 1.96 * math.sqrt(square) for n, (total, square) in pairs if n >= 10)
    assert missed > 0.15 * 200


def test_the_interval_narrows_with_the_pairs_and_is_without_end_at_first() -> None:
    few, many = (effect_of([0.0, 1.0] * n) for n in (50, 1_000))
    assert few.mean == many.mean == 0.5
    assert 3 < (few.high - few.low) / (many.high - many.low) < 5  # the root of 20 is 4.5
    assert effect_of([]).low == -math.inf and effect_of([1.0]).low < 0 < effect_of([1.0] * 20).low
    same = effect_of([0.0] * 100)
    assert -0.05 < same.low < 0 < same.high < 0.05


class Played:
    """What groups return: more by `gain` where they are told lesson 1; and what was played."""

    def __init__(self, gain: float) -> None:
        self.gain, self.told, self.dice = gain, list[tuple[str, ...]](), random.Random(1)

    async def __call__(self, tasks: Sequence[Task], recall: Recall) -> list[RolloutTree]:
        trees = []
        for task in tasks:
            wrappers = recall(task, HouseRulesEnv(), Response((Message("user", "?"),), ""))
            self.told.append(lessons_of(Task(ENV, task.seed, wrappers=wrappers)))
            noise = random.Random(task.seed).choice((0.0, 0.1))  # the same on both sides
            total = noise + self.gain * ("1" in self.told[-1]) + 0.05 * self.dice.random()
            trees.append(group(("left", "on", total)))
        return trees


@pytest.mark.parametrize(("gain", "verdict"), [(0.3, "kept"), (-0.3, "retired"), (0.0, "open")])
def test_a_lesson_is_compared_on_equal_tasks_with_all_others_told(
    gain: float, verdict: Verdict, tmp_path: Path
) -> None:
    with LessonStore(tmp_path / "lessons.sqlite") as store:
        lesson, _ = store.add(Lesson("Hurry.", ENV)), store.add(Lesson("Look first.", ENV))
        played, trial = Played(gain), Trial(most=40)
        found, effect = asyncio.run(trial.measure(Memory(store), lesson, (Task(ENV, i) for i in range(1000)), played))
        assert found == verdict and effect.mean == pytest.approx(gain, abs=0.03)
        assert {frozenset(ids) for ids in played.told} == {frozenset("12"), frozenset("2")}
        assert effect.pairs == 40 if verdict == "open" else effect.pairs in (16, 24)  # no more than it takes
        assert store.revision == 2


def test_few_tasks_leave_it_open(tmp_path: Path) -> None:
    with LessonStore(tmp_path / "lessons.sqlite") as store:
        lesson = store.add(Lesson("Hurry.", ENV))
        found, effect = asyncio.run(Trial().measure(Memory(store), lesson, [Task(ENV, 0)], Played(0.5)))
        assert found == "open" and effect.pairs == 1


@pytest.mark.parametrize(("pairs", "state"), [(3, "proposed"), (40, "active")])
def test_what_a_trial_finds_is_written_down_once_it_is_bounded(pairs: int, state: str, tmp_path: Path) -> None:
    async def found() -> list[Measured]:
        scenario = Scenario(TaskSet("treegym/HouseRules-v0"))
        return [one async for one in measured(scenario, Memory(store), Played(0.3), [1], Trial(most=pairs))]

    with LessonStore(tmp_path / "lessons.sqlite") as store:
        store.add(Lesson("Hurry.", "treegym/HouseRules-v0"))
        [one] = asyncio.run(found())
        assert one.lesson == store.get(1) and one.lesson.state == state
        assert (one.lesson.effect is None) == (state == "proposed") == (store.revision == 1)


def drawn(text: str, *in_force: Sequence[int]) -> Lesson:
    """A lesson with a piece of evidence for each list of lessons that were told."""
    pieces = (Evidence("a", i, (0,), (1.0, 0.0), (2, 2), in_force=tuple(ids)) for i, ids in enumerate(in_force))
    return Lesson(text, ENV, evidence=tuple(pieces))


def test_a_lesson_is_suspect_if_all_its_evidence_was_made_under_retired_ones() -> None:
    lessons = [drawn("a", [1, 2]), drawn("b", [2], [1, 3]), drawn("c", [1], []), drawn("d")]
    assert [each.text for each in suspects(lessons, {1})] == ["a"]
    assert [each.text for each in suspects(lessons, {1, 2})] == ["a", "b"]


def test_suspects_are_doubted_first(tmp_path: Path) -> None:
    """Of twenty lessons the one that was learned under a retired one is left out, whatever the task."""
    with LessonStore(tmp_path / "lessons.sqlite") as store:
        wrong = store.add(Lesson("Hurry.", ENV))
        suspect = store.add(drawn("Skip the gate.", [wrong.id]))
        others = {store.add(Lesson(f"Look at door {i}.", ENV)).id for i in range(19)}
        memory, nothing = Memory(store, doubt=1.0), Response((), "")

        def left_out() -> set[int]:
            found: set[int] = set()
            for task in (Task(ENV, seed) for seed in range(8)):
                told = lessons_of(replace(task, wrappers=memory.recall(task, HouseRulesEnv(), nothing)))
                found |= {suspect.id, *others} - {*map(int, told)}
            return found

        assert len(left_out()) > 1
        store.retire(wrong.id, "it does harm")
        assert left_out() == {suspect.id}


def test_the_lesson_under_which_rollouts_returned_least_is_left_out_most(tmp_path: Path) -> None:
    """Of ten lessons, three of which were met: by 0.8 less, 0.4 less and none, on the average 0.4."""
    with LessonStore(tmp_path / "lessons.sqlite") as store:
        ids = [store.add(Lesson(f"Look at door {i}.", ENV)).id for i in range(10)]
        returned = {ids[0]: (0.9, 4), ids[1]: (0.1, 4), ids[2]: (0.5, 1)}
        memory, nothing = Memory(store, doubt=0.4, returns={ENV: returned}), Response((), "")
        left_out: Counter[int] = Counter()
        for task in (Task(ENV, seed) for seed in range(1000)):
            told = lessons_of(replace(task, wrappers=memory.recall(task, HouseRulesEnv(), nothing)))
            left_out.update(set(ids) - {*map(int, told)})
    least = left_out.pop(ids[1])
    assert 380 <= least <= 460  # 0.2 of doubt, twice as much as on the average, and a tenth of the others
    assert 90 <= left_out.total() <= 160 and len(left_out) == 9 and max(left_out.values()) < 40


def test_those_learned_under_a_harmful_lesson_are_measured_next(tmp_path: Path) -> None:
    async def order(gain: float) -> list[int]:
        scenario = Scenario(TaskSet("treegym/HouseRules-v0"))
        return [one.lesson.id async for one in measured(scenario, Memory(store), Played(gain), [1, 2, 3], Trial())]

    for gain, expected in ((-0.3, [1, 3, 2]), (0.3, [1, 2, 3])):
        with LessonStore(tmp_path / f"{gain}.sqlite") as store:
            for lesson in (drawn("Hurry."), drawn("Look first."), drawn("Skip the gate.", [1])):
                store.add(replace(lesson, env="treegym/HouseRules-v0"))
            assert asyncio.run(order(gain)) == expected
