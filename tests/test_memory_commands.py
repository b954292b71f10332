"""treegym lessons: what is said of lessons is what the store holds, and errors are one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import command

from treegym.agents import Run as Stored
from treegym.agents.memory import Effect, Evidence, Lesson, LessonStore, lessons_of
from treegym.scenarios.terminal import console

ENV = "treegym/HouseRules-v0"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lessons(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(console, "width", 160)
    return lambda *arguments: command(capsys, "lessons", *map(str, arguments))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two lessons in force and a retired one."""
    seen = Evidence("runs/first", 3, (1, 4), (0.9, 0.2), (3, 5))
    with LessonStore(tmp_path / "run" / "lessons.sqlite", "training") as store:
        effect = Effect(0.2, -0.1, 0.5, 9)
        store.add(Lesson("Choose [red] amber.", ENV, "the gate", ("site:elm",), "Contrast", (seen,), effect))
        store.add(Lesson("Look first.", ENV))
        store.retire(store.add(Lesson("Choose green.", ENV, "", ("site:oak",))).id, "it misleads")
    return tmp_path / "run"


def test_list_shows_what_is_in_force(lessons: Run, run: Path) -> None:
    status, out, _ = lessons("list", run)
    assert status == 0 and "green" not in out
    assert 'when "the gate": Choose [red] amber.' in out and "+0.20 (-0.10 … +0.50)" in out and "Look first." in out
    for options, ids in ((["--state", "all"], [1, 2, 3]), (["--tag", "site:elm"], [1])):
        rows = lessons("list", run, "--json", *options)[1].splitlines()
        assert [json.loads(row)["id"] for row in rows] == ids
    assert "no such lessons" in lessons("list", run, "--env", "other")[1]


def test_show_tells_evidence_and_history(lessons: Run, run: Path) -> None:
    out = lessons("show", run, 1)[1]
    assert "runs/first tree 3: 0.90 in 3 of 8 rollouts, 0.20 in the rest" in out and "training: add" in out
    assert "training: retire  it misleads" in lessons("show", run, 3)[1]


def test_a_lesson_s_life_by_hand(lessons: Run, tmp_path: Path) -> None:
    file = tmp_path / "new" / "house.sqlite"
    assert lessons("add", file, "Choose amber.", "--env", ENV, "--tag", "site:elm")[:2] == (0, "lesson 1\n")
    assert lessons("add", file, "choose amber", "--env", ENV, "--tag", "site:elm")[1] == "lesson 1 says so already\n"
    assert lessons("edit", file, 1, "--text", "Choose blue.", "--reason", "amber is of last year")[0] == 0
    lessons("add", file, "Choose red.", "--env", ENV, "--author", "ann")
    assert lessons("retire", file, 1, "--reason", "said better", "--replaced-by", 2)[0] == 0
    with LessonStore.read(file) as store:
        assert (store.get(1).text, store.get(1).replaced_by, store.get(2).author) == ("Choose blue.", 2, "ann")
        assert [change.author for change in store.history(1)] == ["by hand"] * 3
    assert lessons("forget", file, 1, "--reason", "it names a person")[0] == 0
    shown = lessons("show", file, 1)[1]
    assert "blue" not in shown and "forget" in shown and b"blue" not in file.read_bytes()


def test_what_is_exported_is_imported(lessons: Run, run: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out.jsonl", tmp_path / "other.sqlite"
    assert lessons("export", run, "--out", out, "--state", "in-force")[1].startswith("2 lessons in ")
    assert lessons("import", other, out, "--reason", "a friend's")[:2] == (0, "2 lessons taken\n")
    with LessonStore.read(other) as store:
        assert [each.text for each in store.lessons()] == ["Choose [red] amber.", "Look first."]


ERRORS: list[tuple[list[str], str]] = [
    (["list", "none.sqlite"], "there is no store of lessons"),
    (["retire", "none.sqlite", "1", "--reason", "x"], "there is no store of lessons"),
    (["edit", "none.sqlite", "1", "--text", "y", "--reason", "x"], "`treegym lessons add` makes one"),
    (["show", "RUN", "9"], "there is no lesson 9; there are 1 to 3"),
    (["add", "RUN", "", "--env", ENV], "text is empty"),
    (["add", "RUN", "a" * 500, "--env", ENV], "500 characters"),
    (["edit", "RUN", "1", "--reason", "x"], "nothing to change"),
    (["edit", "RUN", "1", "--text", "y", "--reason", " "], "reason is missing"),
    (["edit", "RUN", "1", "--state", "in-force", "--reason", "x"], "state"),
    (["retire", "RUN", "3", "--reason", "x"], "lesson 3 is retired already"),
    (["forget", "RUN", "7", "--reason", "x"], "there is no lesson 7"),
    (["import", "RUN", "bad.jsonl"], "line 1"),
    (["import", "RUN", "none.jsonl"], "none.jsonl"),
    (["list", "bad.jsonl"], "not a database"),
]


@pytest.mark.parametrize(("arguments", "why"), ERRORS, ids=range(len(ERRORS)))
def test_an_error_is_one_line_and_nothing_changes(
    lessons: Run, run: Path, arguments: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "bad.jsonl").write_text("garbage\n" * 9)
    status, out, told = lessons(*(str(run) if each == "RUN" else each for each in arguments))
    assert (status, out) == (2, "") and why in told and told.count("\n") == 1
    with LessonStore.read(run / "lessons.sqlite") as store:
        assert store.revision == 4
    assert not (run.parent / "none.sqlite").exists()


def test_a_run_that_is_not_finished_takes_changes_back(lessons: Run, run: Path) -> None:
    (run / "checkpoints").mkdir()
    assert "when it is resumed" in lessons("retire", run, 1, "--reason", "x")[1]
    shutil.rmtree(run / "checkpoints")
    assert lessons("retire", run, 2, "--reason", "x")[1] == ""


def test_an_evaluation_tells_the_lessons_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    """The trees say which; the evaluation keeps them, so that one that goes on tells the same."""
    scenario = tmp_path / "house.yaml"
    scenario.write_text(f"environment: {{id: {ENV}, settings: {{world: 0}}}}\nheldout: {{tasks: 12}}\n")

    def evaluated(name: str, *options: object) -> tuple[set[tuple[str, ...]], dict[str, Any]]:
        out = tmp_path / name
        given = ("eval", str(scenario), "--policy", "random", "--out", str(out), *map(str, options))
        assert command(capsys, *given)[0] == 0
        told = {lessons_of(tree.task) for _, tree in Stored(out).trees}
        return told, json.loads((out / "results.json").read_text())

    told, result = evaluated("with", "--lessons", run)
    assert told == {("2",), ("1", "2")} and result["answers_told"] == 0
    changes = []
    for folder in (tmp_path / "with", run):
        with LessonStore.read(folder / "lessons.sqlite") as store:
            changes.append(store.changes())
    assert changes[0] == changes[1]
    assert command(capsys, "replay", "verify", str(tmp_path / "with"))[0] == 0
    told, result = evaluated("without", "--lessons", "none")
    assert told == {()} and "answers_told" not in result
    status, said, _ = command(capsys, "compare", str(tmp_path / "with"), str(tmp_path / "without"))
    assert status == 0 and re.search(r"^all +12 ", said, re.MULTILINE)  # paired, whatever they are told
    status, _, errors = command(
        capsys, "eval", str(scenario), "--policy", "random", "--lessons", "gone", "--out", str(tmp_path / "c")
    )
    assert status == 2 and "gone" in errors and not (tmp_path / "c").exists()
