"""The memory of a scenario: what a run begins with, what is refused, and what measuring writes down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_memory_reflect import group

from treegym.agents import ChatRenderer, RolloutTree, Run
from treegym.agents.memory import AskModel, Contrast, Lesson, LessonStore
from treegym.agents.memory.trials import Trial
from treegym.agents.models.nano import build_nano
from treegym.agents.rollouts import Recall
from treegym.agents.rollouts.response import open_task
from treegym.envs import Task
from treegym.scenarios import ScenarioError, load_scenario
from treegym.scenarios.folders import LESSONS
from treegym.scenarios.memory import begun_store, load_memory, measured, memory_of
from treegym.trainers.learner import Checkpoints, Progress
from treegym.trainers.training import MEMORY

ENV = "treegym/HouseRules-v0"


def renderer() -> ChatRenderer:
    return ChatRenderer(build_nano(["choose red"], 0)[1])


def scenario(**memory: Any) -> Any:
    changes = [f"memory.{name}={value}" for name, value in memory.items()]
    return load_scenario("training-free", ["environment.settings={sites: 2, world: 1}", *changes])


def texts(store: LessonStore) -> list[str]:
    return [lesson.text for lesson in store.lessons()]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A run's directory with two lessons."""
    (tmp_path / "given").mkdir()
    with LessonStore(tmp_path / "given" / LESSONS) as store:
        store.add(Lesson("Look first.", ENV))
        store.add(Lesson("choose red", ENV, "You are at elm gate.", ("site:elm",)))
        store.export(tmp_path / "lessons.jsonl")
    return tmp_path / "given"


def test_a_memory_is_made_as_its_scenario_says(tmp_path: Path) -> None:
    made = load_memory(scenario(tokens=50, doubt=0.3, place="prompt"), Run(tmp_path), renderer())
    assert made and isinstance(made.reflector, Contrast)
    assert (made.tokens, made.doubt, made.place) == (50, 0.3, "prompt")
    with_model = load_memory(scenario(reflector="{AskModel: {tries: 1}}"), Run(tmp_path), renderer())
    assert with_model and with_model.reflector == AskModel(tries=1)
    silent = load_memory(scenario(reflector="null"), Run(tmp_path), renderer())
    assert silent and silent.reflector is None
    assert load_memory(load_scenario("maze"), Run(tmp_path), renderer()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doubt": 2}, "memory.doubt"),
        ({"place": "nowhere"}, "memory.place"),
        ({"stroe": "x"}, "memory.stroe"),
        ({"reflector": "Contrats"}, "did you mean 'Contrast'"),
        ({"reflector": "{Contrast: {treshold: 1}}"}, "memory.reflector.Contrast.treshold"),
        ({"reflector": "{Contrast: {threshold: -1}}"}, "a threshold is more than 0"),
        ({"store": "missing.jsonl"}, "memory.store: .*missing.jsonl"),
        ({"store": "missing"}, "memory.store: .*missing"),
    ],
)
def test_what_is_wrong_with_it_names_the_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=message):
        load_memory(scenario(**changes), Run(tmp_path), renderer())


def test_a_run_begins_with_the_lessons_of_a_run_a_store_or_a_file(given: Path, tmp_path: Path) -> None:
    for number, source in enumerate((given, given / LESSONS, tmp_path / "lessons.jsonl")):
        (tmp_path / str(number)).mkdir()
        with begun_store(Run(tmp_path / str(number)), source) as store:
            assert texts(store) == ["Look first.", "choose red"]


def test_a_run_without_a_checkpoint_of_its_lessons_begins_anew(given: Path, tmp_path: Path) -> None:
    """What was learned before a kill goes where the trees go that it was learned from."""
    run = Run(tmp_path / "run")
    with begun_store(run, given) as store:
        store.add(Lesson("Of a step that is lost.", ENV))
    with begun_store(run, given) as store:
        assert texts(store) == ["Look first.", "choose red"]
        store.add(Lesson("Of a step that is kept.", ENV))
        Checkpoints(run).save(Progress(states={MEMORY: {"revision": store.revision}}), {})
    with begun_store(run, given) as store:
        assert texts(store)[2:] == ["Of a step that is kept."]


def test_measuring_writes_down_what_came_of_it(given: Path) -> None:
    """The one lesson helps, the other does harm, and the third is told in no task."""

    async def play(tasks: Sequence[Task], recall: Recall) -> Sequence[RolloutTree]:
        trees = []
        for task in tasks:
            ids = {id for name, told in recall(task, *open_task(task)) for note in told["notes"] if (id := note["id"])}
            trees.append(group(("left", "on", 0.4 * ("1" in ids) - 0.4 * ("2" in ids))))
        return trees

    async def results(store: LessonStore) -> list[str]:
        memory = memory_of(scenario(), store, renderer())
        return [each.verdict async for each in measured(scenario(), memory, play, [1, 2, 3], Trial(40))]

    with LessonStore(given / LESSONS) as store:
        store.change(2, reason="a site that is asked for", when="You are at alder gate.", tags=("site:alder",))
        store.add(Lesson("Never told.", ENV, "", ("site:nowhere",)))
        assert asyncio.run(results(store)) == ["kept", "retired", "open"]
        kept, harmful, never = (store.get(id) for id in (1, 2, 3))
        assert kept.state == "active" and kept.effect and kept.effect.mean == pytest.approx(0.4)
        assert harmful.state == "retired" and "does harm" in store.history(2)[-1].reason
        assert never.effect is None and never.state == "proposed"
