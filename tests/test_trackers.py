"""Trackers: numbers by stage, sample episodes as a table, and the same run there after a resume."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commands import refused
from test_memory_reflect import group
from test_scenarios import NANO

from treegym.agents import Run
from treegym.agents.store import Trackio, Wandb
from treegym.scenarios import load_scenario, train

TREE = group(("left", "on", 1.0), ("right", "off", 0.5))


class Library(ModuleType):
    """Stands in for wandb and trackio, and keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.runs: list[SimpleNamespace] = []

    def init(self, project: str, **options: Any) -> SimpleNamespace:
        run = SimpleNamespace(project=project, options=options, rows=[], finished=0)
        run.log, run.finish = run.rows.append, lambda: setattr(run, "finished", run.finished + 1)
        self.runs.append(run)
        return run

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data


@pytest.fixture(params=["wandb", "trackio"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def tracked(folder: Path, library: Library) -> Run:
    run = Run(folder)
    run.trackers = [Wandb("mine") if library.__name__ == "wandb" else Trackio("mine")]
    return run


def test_numbers_and_sample_episodes_are_shown(library: Library, tmp_path: Path) -> None:
    run = tracked(tmp_path / "first", library)
    run.log(stage="warm-up", step=3, loss=2.5, note="text", seconds={"update": 0.1})
    run.show("warmed up", 4, [TREE] * 20)
    run.close()
    [made] = library.runs
    assert made.project == "mine" and made.options["name"] == "first" and made.finished == 1
    numbers, episodes = made.rows
    assert numbers == {"warm-up/loss": 2.5, "warm-up/seconds/update": 0.1, "warm-up/step": 3}
    (columns, rows), step = episodes["warmed-up/episodes"], episodes["warmed-up/step"]
    assert columns == ["seed", "return", "turns", "episode"] and len(rows) == 8 and step == 4
    assert rows[0][:3] == ["0", 1.0, 2] and "[assistant]\nleft\n[tool]\n" in rows[0][3]


def test_a_resumed_run_is_the_same_there(library: Library, tmp_path: Path) -> None:
    for _ in range(2):
        run = tracked(tmp_path, library)
        run.log(stage="warm-up", step=0, loss=1.0)
        run.close()
    one, other = library.runs
    assert one.options == other.options and one.options["resume"] == "allow"
    assert one.rows == other.rows  # what stands there is not sent again


def test_a_scenario_names_them(library: Library, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(NANO)
    name = "Wandb" if library.__name__ == "wandb" else "Trackio"
    train(
        load_scenario(tmp_path / "some.yaml", [f"trackers=[{{{name}: {{project: mine, episodes: 2}}}}]"]),
        tmp_path / "run",
    )
    [made] = library.runs
    assert made.options["config"]["environment"]["id"] == "treegym/Lookup-v0" and made.finished
    names = {name for row in made.rows for name in row}
    assert {"warm-up/loss", "improvement/success", "trained/success"} <= names
    tables = [row["trained/episodes"] for row in made.rows if "trained/episodes" in row]
    assert len(tables) == 1 and len(tables[0][1]) == 2


def test_a_library_that_is_missing_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("treegym.agents.store.trackers.find_spec", lambda name: None)
    (tmp_path / "some.yaml").write_text(NANO + "trackers: [{Wandb: {project: mine}}]\n")
    out = tmp_path / "out"
    said = refused(capsys, "train", str(tmp_path / "some.yaml"), "--out", str(out))
    assert said == "trackers.0.Wandb: wandb is not installed: pip install wandb" and not out.exists()
    assert "did you mean 'Wandb'" in refused(
        capsys, "train", str(tmp_path / "some.yaml"), "--set", "trackers=[{Wand: {project: x}}]", "--out", str(out)
    )
