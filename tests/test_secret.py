"""Seeds of tasks in which agents run code: derived from a secret that is drawn once, given and recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest

from treegym.agents import derive_seed
from treegym.envs import CodeEnv, LookupEnv, PythonMathEnv
from treegym.scenarios import ScenarioError, load_scenario
from treegym.scenarios.schema import BUNDLED, dump_scenario
from treegym.trainers import TaskSet


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TREEGYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def environment(name: str, *changes: str) -> TaskSet:
    return load_scenario(BUNDLED / f"{name}.yaml", changes).environment


def question(environment: TaskSet, seed: int) -> str:
    env = replace(environment.task("heldout", 0), seed=seed).make()
    text: str = env.reset(seed=seed, options=dict(environment.heldout))[0]
    return text


@pytest.mark.parametrize("name", ["code", "pythonmath"])
def test_an_agent_that_knows_the_generator_cannot_search_for_its_task(name: str) -> None:
    known, hidden = environment(name, "environment.secret=''"), environment(name)
    searched = {question(known, derive_seed("heldout", i)) for i in range(50)} | {question(known, i) for i in range(50)}
    found, by_chance = (
        [question(each, each.task("heldout", i).seed) in searched for i in range(8)] for each in (known, hidden)
    )
    assert all(found) and sum(by_chance) <= 3  # there are not so many problems that none is drawn twice


def test_it_is_drawn_once_for_an_installation(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = environment("code"), environment("code")
    assert first == second and environment("pythonmath").secret == first.secret
    assert first.secret and len(bytes.fromhex(first.secret)) == 16
    assert (cache / "secret").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("TREEGYM_CACHE", str(cache / "elsewhere"))
    assert environment("code").secret != first.secret


def test_a_run_records_it_so_that_its_tasks_are_the_same_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = load_scenario(BUNDLED / "code.yaml")
    file = tmp_path / "scenario.yaml"
    file.write_text(dump_scenario(scenario))
    monkeypatch.setenv("TREEGYM_CACHE", str(tmp_path / "elsewhere"))
    again = load_scenario(file)
    assert again == scenario
    assert again.environment.task("heldout", 3) == scenario.environment.task("heldout", 3)


def test_one_that_is_given_is_taken_and_none_is_drawn_where_agents_run_no_code(cache: Path) -> None:
    given = environment("code", "environment.secret=ours")
    assert given.secret == "ours" and given.task("train", 1) != environment("quickstart").task("train", 1)
    assert environment("quickstart").secret is None
    assert environment("quickstart").task("train", 1).seed == derive_seed("train", 1)
    assert not cache.exists()


def test_environments_in_which_agents_run_code_say_so() -> None:
    assert CodeEnv.runs_code and PythonMathEnv.runs_code and not LookupEnv.runs_code
    gymnasium.register("tests/Function-v0", lambda: LookupEnv())
    assert TaskSet("tests/Function-v0").secret is None


def test_where_it_cannot_be_kept_the_scenario_has_to_give_one(cache: Path) -> None:
    cache.write_text("no folder")
    with pytest.raises(ScenarioError, match=r"environment\.secret: .* give one in the scenario"):
        environment("code")
