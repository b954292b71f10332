"""How runs begin and go on: modules beside scenarios, own corpora, runs as scenarios, what leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import command, refused

from treegym.agents import Run
from treegym.agents.store.folder import whole, write_text
from treegym.scenarios import ScenarioError, load_scenario, train
from treegym.scenarios.changes import FREE, changes
from treegym.scenarios.viewer.shelf import Shelf
from treegym.trainers import Stopped

ROOT = Path(__file__).parent.parent
MODULE = """
import gymnasium
from treegym.envs import LookupEnv
{0}
gymnasium.register("{1}/Links-v0", LookupEnv)
"""
SCENARIO = """
environment: {{id: "{0}"}}
model: {{name: nano, dtype: float32}}
algorithm: {{parameters: {{n: 2}}}}
sampling: {{max_tokens: 4}}
warmup: {{demonstrations: 8}}
improvement: {{steps: 4, tasks_per_step: 2}}
heldout: {{tasks: 2}}
checkpoint_every: 1.0e-9
threads: 1
"""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python's path and torch's threads are the process's."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# modules


def project(folder: Path, name: str, head: str = "") -> Path:
    """A folder with a scenario and the module that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(MODULE.format(head, name))
    (folder / "some.yaml").write_text(SCENARIO.format(f"{name}:{name}/Links-v0"))
    return folder / "some.yaml"


def test_a_module_lies_beside_its_scenario_and_every_command_finds_it_there_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project(tmp_path / "mine", "links1", "import helper1")
    (tmp_path / "mine" / "helper1.py").write_text("")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    evaluation = "eval", "mine/some.yaml", "--policy", "oracle", "--tasks", "2", "--out", "e"
    assert command(capsys, *evaluation)[0] == 0
    assert load_scenario(tmp_path / "e").look_in == (str(file.parent),)
    for module in ("links1", "helper1"):
        del sys.modules[module]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "mine" not in path])
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("gymnasium.logger.warn", lambda *texts: None)  # that it is registered again
    assert "2 of 2 trees are as recorded" in command(capsys, "replay", "verify", "../e")[1]
    assert command(capsys, "envs", "../e")[0] == 0
    assert command(capsys, "eval", "../e", "--tasks", "2", "--out", "again")[0] == 0
    assert json.loads(Path("again/evaluation.json").read_text())["policy"] == "oracle"


@pytest.mark.parametrize("name", ["envs", "play", "serve-tools"])
def test_commands_look_in_the_current_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"links_{name[:3]}"
    project(tmp_path, module)
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, name, f"{module}:{module}/Links-v0", "--setting", "nix=1")
    assert "unexpected keyword argument 'nix'" in said


def test_a_module_that_is_nowhere_is_told_with_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project(tmp_path / "mine", "links2", "import nowhere2")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert "'links2' imports another one: No module named 'nowhere2'" in refused(capsys, "train", str(file))
    (file.parent / "links2.py").rename(file.parent / "other.py")
    said = refused(capsys, "train", str(file))
    assert f"no module 'links2' in {file.parent}, {tmp_path / 'cwd'} or among those installed" in said
    assert f"in {tmp_path / 'cwd'} or" in refused(capsys, "envs", "links2:links2/Links-v0")
    (file.parent / "links2.py").write_text("raise KeyError('x')")
    assert "cannot be imported: KeyError: 'x'" in refused(capsys, "eval", str(file))
    (file.parent / "links2.py").write_text("")
    assert f"after importing {file.parent / 'links2.py'}" in refused(capsys, "eval", str(file))
    assert f"no file 'links3.py' in {tmp_path / 'cwd'}" in refused(capsys, "envs", "links3.py:x")


def test_scenarios_are_named_by_texts_paths_and_runs(tmp_path: Path) -> None:
    file = project(tmp_path, "links3")
    assert load_scenario(str(file)) == load_scenario(file) == load_scenario(str(file), ["seed=0"])
    assert load_scenario("lookup") == load_scenario(Path("lookup"))


# a corpus of one's own


def test_the_readme_s_corpus_command_trains_on_the_format_s_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\{"id": .*\}$', page.partition("### Your own corpus")[2].partition("\n## ")[0], re.MULTILINE)
    for name, mark in (("corpus", '"text"'), ("questions", '"question"')):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(row for row in rows if mark in row))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^treegym (train corpus .*)$", readme.replace("\\\n", ""), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    less = "model.name=nano warmup.demonstrations=8 improvement.steps=1 heldout.tasks=5 heldout.untrained=1".split()
    more = [part for change in (*less, "threads=1") for part in ("--set", change)]
    status, said, _ = command(capsys, *line.split(), *more, "--out", "run")
    assert status == 0 and "1 distinct task, drawn 5 times" in said


# failing starts


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "some.yaml", "--set", "environment.settings.hops=[40]"], "environment.heldout: 40 links"),
        (["train", "some.yaml", "--set", "warmup.settings.nix=1"], "warmup.settings: "),
        (["train", "some.yaml", "--set", "model.name=nobody"], "model.name: no model 'nobody'"),
        (["train", "some.yaml", "--set", "model.name=empty"], "model.name: "),
        (["train", "some.yaml", "--set", "model.name=broken"], "model.name: "),
        (
            ["train", "corpus", "--set", "environment.settings.corpus=nix"],
            "environment: nix: No such file or directory",
        ),
        (["eval", "some.yaml", "--policy", "empty"], "model.name: "),
        (["eval", "some.yaml", "--policy", "scripted:bad.py"], "scripted:bad.py: NameError: "),
        (["eval", "some.yaml", "--policy", "oracle", "--tokenizer", "empty"], "--tokenizer empty: "),
        (["runs", "import", "bad.py", "--format", "openai"], "bad.py"),
    ],
)
def test_a_failing_start_leaves_nothing(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "some.yaml").write_text(SCENARIO.format("treegym/Lookup-v0"))
    (tmp_path / "bad.py").write_text("nix")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert says in refused(capsys, *arguments, "--out", "runs/new")
    assert sorted(tmp_path.iterdir()) == before


# going on


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped after the second step of the improvement."""
    (folder / "some.yaml").write_text(SCENARIO.format("treegym/Lookup-v0"))
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        steps = iter([False, False, True])  # of warm-up one
        patched.setattr("treegym.scenarios.watch.ProgressBars.should_stop", lambda bars: next(steps))
        train(load_scenario("some.yaml"), "runs/some-1")


def test_a_run_goes_on_with_its_scenario_or_with_what_it_can_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(tmp_path, monkeypatch)
    recorded = (tmp_path / "runs/some-1/scenario.yaml").read_text()
    resume = "train", "--resume", "--out", "runs/some-1"
    said = refused(capsys, *resume, "--set", "seed=3")
    assert said.startswith("seed is 0 in the run, not 3. A run that goes on can change only checkpoint_every, ")
    assert "improvement.steps: the run has done 2 already, got 1" in refused(
        capsys, *resume, "--set", "improvement.steps=1"
    )
    (tmp_path / "some.yaml").write_text(SCENARIO.format("treegym/Lookup-v0").replace("n: 2", "n: 3") + "seed: 1")
    said = refused(capsys, "train", "some.yaml", "--resume")
    assert "algorithm.parameters.n is 2 in the run, not 3; seed is 0 in the run, not 1" in said
    with pytest.raises(ScenarioError, match=r"seed is 0 in the run, not 1"):
        train(load_scenario("some.yaml"), "runs/some-1", resume=True)
    assert (tmp_path / "runs/some-1/scenario.yaml").read_text() == recorded
    assert not (tmp_path / "runs/some-1/changes.jsonl").exists()

    status, _, said = command(capsys, "train", "runs/some-1", "--resume", "--set", "improvement.steps=3")
    assert status == 0, said
    run = Run(tmp_path / "runs/some-1")
    assert [row["step"] for row in run.metrics() if row["stage"] == "improvement"] == [0, 1, 2]
    assert load_scenario(run.path).improvement.steps == 3
    [change] = map(json.loads, (run.path / "changes.jsonl").read_text().splitlines())
    assert change == {"stage": "improvement", "step": 2, "field": "improvement.steps", "from": 4, "to": 3}

    more = "--policy", "runs/some-1", "--tasks", "1", "--out"
    assert command(capsys, "eval", "lookup", *more, "e1", "--set", "threads=1")[0] == 0
    assert command(capsys, "eval", "runs/some-1", "--tasks", "1", "--out", "e2")[0] == 0
    one, other = (json.loads(Path(folder, "evaluation.json").read_text()) for folder in ("e1", "e2"))
    assert one["policy"] == other["policy"] == "runs/some-1"
    assert "no model: a run has one" in refused(capsys, "eval", "lookup", "--policy", "e1", "--out", "e3")


# full disks


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    """Such as /dev/stdout: a pipe stands in for it here."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "one")
        with whole(pipe) as part:
            part.write_text("two")
        assert os.read(reader, 100) == b"onetwo"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and [*tmp_path.iterdir()] == [pipe]


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file can grow beyond a size, as where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = SCENARIO.format("treegym/Lookup-v0").replace("checkpoint_every: 1.0e-9", "")
    (tmp_path / "some.yaml").write_text(text.replace("steps: 4", "steps: 1"))
    with small_files(1 << 20):
        assert "treegym" not in refused(capsys, "train", "some.yaml", "--out", "run")
    left = {path.name for path in Path("run").iterdir()}
    assert not left & {"model", "model.part", "summary.json", "summary.json.part"} and "trees.jsonl.zst" in left
    Path("old.html").write_text("old")
    with small_files(1000):
        assert "File too large" in refused(capsys, "view", "run", "--export", "old.html")
        assert "File too large" in refused(capsys, "runs", "export", "run", "--format", "openai", "--out", "new.jsonl")
    assert Path("old.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"some.yaml", "run", "old.html"}
    assert command(capsys, "train", "--resume", "--out", "run")[0] == 0

    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "scenario.yaml").write_text("seed: 1")
    (tmp_path / "damaged" / "summary.json").write_text('{"stages"')
    listed = command(capsys, "runs", ".")[1]
    assert " finished" in listed and "damaged/summary.json cannot be read: JSONDecodeError" in listed
    cards = {volume.name: volume.card() for volume in Shelf(tmp_path, lambda path: Run(path).trees).volumes().values()}
    assert cards["run"]["gain"] and not cards["run"]["fault"] and "cannot be read" in cards["damaged"]["fault"]


def test_every_field_that_may_change_is_one(tmp_path: Path) -> None:
    scenario = load_scenario("lookup")
    named = {change.field for change in changes(scenario, load_scenario("maze"))}
    assert "environment.id" in named and "model.name" not in named
    others = ("keep", "on_failure", "max_failures", "serving", "trackers")
    numbers = [f"{field}=7" for field in FREE if not field.startswith(others)]
    for changed in (*numbers, "trackers=[{Wandb: {project: mine}}]"):
        found = [change.field for change in changes(scenario, load_scenario("lookup", [changed]))]
        assert found == [changed.partition("=")[0]]
