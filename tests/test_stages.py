"""Stages and task sources: what a run does and which tasks it draws, as data that a scenario writes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from treegym.agents import Run
from treegym.envs import Task
from treegym.scenarios import ScenarioError, load_scenario, train
from treegym.trainers import Curriculum, Mixture, Part, Stopped, TaskSet, Uniform
from treegym.trainers.learner import Checkpoints

LOOKUP, MAZE = TaskSet("treegym/Lookup-v0"), TaskSet("treegym/Maze-v0")
SCENARIO = """
environment: {id: treegym/Lookup-v0, settings: {hops: [1]}}
model: {name: nano, dtype: float32}
algorithm: {parameters: {n: 2}}
sampling: {max_tokens: 4}
warmup: {demonstrations: 8}
improvement: {steps: 3, tasks_per_step: 4}
heldout: {tasks: 2}
checkpoint_every: 1.0e-9
threads: 1
"""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def written(folder: Path, more: str = "") -> Path:
    (folder / "some.yaml").write_text(SCENARIO + more)
    return folder / "some.yaml"


# stages


def test_a_scenario_without_stages_has_the_usual_ones(tmp_path: Path) -> None:
    plan = load_scenario(written(tmp_path)).plan()
    assert [stage.name for stage in plan.stages] == ["untrained", "warm-up", "warmed up", "improvement", "trained"]
    assert plan.stages[1] == plan.warmup and plan.stages[3] == plan.improvement


STAGES = """
stages:
- Improvement
- {Evaluate: {name: halfway, tasks: 2}}
- {Improvement: {name: once more, steps: 1, tasks_per_step: 2, optimization: {learning_rate: 1.0e-3}}}
- {"stages_of_mine.py:Count": {name: counted, above: 0.5}}
"""
MINE = '''
from dataclasses import dataclass

@dataclass(frozen=True)
class Count:
    """Counts the rollouts with a return above a number."""
    name: str
    above: float

    async def run(self, trainer):
        returns = [value for _, tree in trainer.run.trees for value in tree.returns]
        trainer.run.log(stage=self.name, step=0, above=sum(value > self.above for value in returns))
'''


def test_stages_are_run_in_the_order_in_which_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages_of_mine.py").write_text(MINE)
    results = train(load_scenario(written(tmp_path, STAGES)), tmp_path / "run")
    rows = Run(tmp_path / "run").metrics()
    assert [row["stage"] for row in rows] == ["improvement"] * 3 + ["halfway", "once more", "counted"]
    assert set(results) == {"halfway"} and rows[-1]["above"] == 0
    grown = Counter(labels["stage"] for labels, _ in Run(tmp_path / "run").trees)
    assert grown == {"improvement": 12, "halfway": 2, "once more": 2}


def test_a_run_with_stages_of_one_s_own_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages_of_mine.py").write_text(MINE)
    file = written(tmp_path, STAGES)
    train(load_scenario(file), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Stopped, match="saved after step 1 of once more"):
        steps = iter([False, False, False, True])
        patched.setattr("treegym.scenarios.watch.ProgressBars.should_stop", lambda bars: next(steps))
        train(load_scenario(file), tmp_path / "parted")
    train(load_scenario(tmp_path / "parted"), tmp_path / "parted", resume=True)
    whole, parted = (Run(tmp_path / name) for name in ("whole", "parted"))
    assert [*whole.trees] == [*parted.trees]

    def without_times(run: Run) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in run.metrics()]

    assert without_times(whole) == without_times(parted)


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        (
            "[Improvement, {Improvement: {steps: 1}}]",
            "stages: two stages are named 'improvement': give one",
        ),
        ("[Evaluate]", "stages.0.Evaluate: "),
        ("[{Evaluate: {name: x, tasks: -1}}]", "stages.0.Evaluate: tasks must be at least 0, got -1"),
        ("[Warmup, Polish]", "stages.1: no Stage 'Polish'; "),
        ("['json:dumps']", "stages.0"),
    ],
)
def test_what_is_no_stage_is_refused(stages: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as refusal:
        load_scenario(written(tmp_path), [f"stages={stages}"])
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


# task sources


def drawn(source: Any, steps: int, count: int = 8) -> list[Task]:
    return [task for step in range(steps) for task in source.draw(step, count, 5, {})]


def test_tasks_of_one_environment_are_those_that_its_seeds_name() -> None:
    assert drawn(Uniform(LOOKUP), 2, 3) == [LOOKUP.task("train", 5, step, i) for step in range(2) for i in range(3)]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.7, 0.3), (5.0, 1.0)], ids=str)
def test_a_mixture_keeps_its_shares_after_any_number_of_tasks(shares: tuple[float, float]) -> None:
    mixture = Mixture((Part(LOOKUP, shares[0]), Part(MAZE, shares[1])))
    tasks = drawn(mixture, 50)
    for end in range(1, len(tasks) + 1):
        have = Counter(task.env for task in tasks[:end])
        assert abs(have[LOOKUP.id] - end * shares[0] / sum(shares)) < 3
    assert drawn(mixture, 50) == tasks and len({task.seed for task in tasks}) == len(tasks)


def test_a_curriculum_goes_through_its_parts_in_order() -> None:
    curriculum = Curriculum((Part(LOOKUP, steps=2), Part(MAZE, steps=1), Part(LOOKUP)))
    assert [curriculum.draw(step, 1, 5, {})[0].env for step in range(5)] == [
        LOOKUP.id, LOOKUP.id, MAZE.id, LOOKUP.id, LOOKUP.id,
    ]  # fmt: skip


MIXED = """
stages: [Improvement]
improvement:
  steps: 3
  tasks_per_step: 4
  source:
    Mixture:
      parts:
      - {environment: {id: treegym/Lookup-v0}, share: 1}
      - {environment: {id: treegym/Maze-v0, success: exact}, share: 1}
"""


def test_a_run_trains_on_a_mixture_of_environments(tmp_path: Path) -> None:
    head = SCENARIO.replace("improvement: {steps: 3, tasks_per_step: 4}\n", "")
    (tmp_path / "mixed.yaml").write_text(head + MIXED)
    train(load_scenario(tmp_path / "mixed.yaml"), tmp_path / "run")
    run = Run(tmp_path / "run")
    assert Counter(tree.task.env for _, tree in run.trees) == {LOOKUP.id: 6, MAZE.id: 6}
    for row in run.metrics():
        assert sum(each["tasks"] for each in row["by_environment"].values()) == 4


EASIER = '''
from dataclasses import dataclass
from treegym.trainers import TaskSet

@dataclass(frozen=True)
class Easier:
    """One more hop each time that all was solved, one less where nothing was."""
    environment: TaskSet
    limit: int = 3

    @property
    def environments(self):
        return [self.environment]

    def draw(self, step, count, seed, state):
        hops = state.get("hops", 1)
        return [self.environment.task("train", seed, step, i, hops=[hops]) for i in range(count)]

    def report(self, step, trees, state):
        return {"hops": min(state.get("hops", 1) + 1, self.limit), "seen": state.get("seen", 0) + len(trees)}
'''


def test_a_source_with_a_state_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "easier.py").write_text(EASIER)
    change = ["improvement.source={'easier.py:Easier': {environment: {id: treegym/Lookup-v0}, limit: 2}}"]
    train(load_scenario(written(tmp_path), change), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        steps = iter([False, False, True])  # of warm-up one
        patched.setattr("treegym.scenarios.watch.ProgressBars.should_stop", lambda bars: next(steps))
        train(load_scenario(written(tmp_path), change), tmp_path / "parted")
    assert Checkpoints(Run(tmp_path / "parted")).progress().states == {"improvement": {"hops": 2, "seen": 8}}
    train(load_scenario(tmp_path / "parted"), tmp_path / "parted", resume=True)
    whole, parted = (list(Run(tmp_path / name).trees) for name in ("whole", "parted"))
    hops = [tree.task.settings["hops"] for labels, tree in whole if labels["stage"] == "improvement"]
    assert whole == parted and hops == [[1]] * 4 + [[2]] * 8


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{Mixture: {parts: [{environment: {id: treegym/Lookup-v0}}]}}", "needs a share above 0"),
        ("{Curriculum: {parts: []}}", "needs steps, 1 or more"),
        ("{Mixture: {parts: [{environment: {id: treegym/Lokup-v0}, share: 1}]}}", "did you mean 'treegym/Lookup-v0'?"),
        ("{Mixture: {parts: [{environment: {id: x, sucess: y}, share: 1}]}}", "improvement.source.Mixture.parts"),
        ("Endless", "improvement.source: no TaskSource 'Endless'; "),
    ],
)
def test_what_is_no_source_is_refused(source: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as refusal:
        load_scenario(written(tmp_path), [f"improvement.source={source}"])
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_source_s_code_environments_share_the_installation_s_secret(tmp_path: Path) -> None:
    source = "{Mixture: {parts: [{environment: {id: treegym/PythonMath-v0}, share: 1}]}}"
    loaded = load_scenario(written(tmp_path), [f"improvement.source={source}"])
    [part] = loaded.plan().improvement.source.parts
    assert part.environment.secret and part.environment.secret == load_scenario("pythonmath").environment.secret
