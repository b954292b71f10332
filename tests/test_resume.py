"""A killed run goes on exactly as it would have: metrics, trees and weights are the uninterrupted run's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, run_all
from safetensors.torch import save_file

from treegym.agents import Run
from treegym.trainers.learner import Checkpoints, DamagedCheckpoint, Progress

SCENARIO = """
environment:
  id: treegym/Lookup-v0
  settings: {hops: [1]}
model: {name: nano, dtype: float32}
algorithm: {parameters: {n: 4}, loss: {WithKL: {loss: ClippedLoss, coefficient: 0.1}}}
sampling: {max_tokens: 6}
warmup: {demonstrations: 32, batch_size: 8, epochs: 3, optimization: {learning_rate: 5.0e-3}}
improvement: {steps: 3, tasks_per_step: 2, evaluate_every: 2, optimization: {learning_rate: 1.0e-3}}
heldout: {tasks: 3}
checkpoint_every: 1.0e-9
threads: 1
"""
STEP, GROW, LINE = "treegym.trainers.learner.learner:Learner", "treegym.trainers.training", "append_line"
# Each is a run interrupted time and again; the n-th call counts from the last resumption.
# grow: 1 untouched, 2 demonstrations, 3 warmed up, 4 and 5 improvement, 6 midway, 7 improvement, 8 trained
CASES: dict[str, list[tuple[str, str, str, int]]] = {
    "rollouts": [
        (GROW, "grow", "first_tree", 1),
        (GROW, "grow", "first_tree", 5),
        (GROW, "grow", "first_tree", 2),
    ],
    "optimiser steps": [(STEP, "apply", "before", 4), (STEP, "apply", "after", 11), (STEP, "apply", "before", 2)],
    "checkpoints": [
        ("treegym.trainers.learner.checkpoints", "save_file", "half_file", 1),
        ("treegym.trainers.learner.checkpoints:Path", "rename", "after", 9),
        ("treegym.trainers.learner.checkpoints", "save_file", "half_file", 5),
        ("treegym.trainers.training:Trainer", "save_model", "before", 1),
    ],
    "lines": [
        ("treegym.agents.store.store", "write", "half_record", 40),
        ("treegym.agents.store.folder", LINE, "half_line", 3),
    ],
    "Ctrl-C": [(STEP, "apply", "interrupt", 3), (STEP, "apply", "interrupt", 10)],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run and one for each case, begun and resumed in processes with different hashes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(SCENARIO)
    ends = {name: 130 if name == "Ctrl-C" else -signal.SIGKILL for name in CASES}
    begun = [(["train", "tiny.yaml", "--out", name], links[0]) for name, links in CASES.items()]
    statuses = run_all(folder, [(["train", "tiny.yaml", "--out", "whole"], None), *begun], 1)
    assert statuses == [0, *ends.values()]
    assert [path.relative_to(folder).parts[0] for path in folder.rglob("*.part")] == ["checkpoints"]
    shutil.copytree(folder / "whole", folder / "whole, once more")
    resumed: list[tuple[str, Any]] = [("whole, once more", None)]
    resumed += [(name, link) for name, links in CASES.items() for link in [*links[1:], None]]
    jobs = [(["train", "--resume", "--out", name], link) for name, link in resumed]
    statuses = run_all(folder, [*jobs, (["train", "tiny.yaml", "--out", "whole, once more"], None)], 2)
    assert statuses == [*(ends[name] if link else 0 for name, link in resumed), 2]
    return folder


def outcome(run: Path) -> dict[str, Any]:
    """All a run left behind but its times."""
    summary = json.loads((run / "summary.json").read_text())
    for stage in summary["stages"].values():
        del stage["seconds"]
    return {
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if "tensorboard" not in path.parts),
        "metrics": [{**row, "seconds": None} for row in Run(run).metrics()],
        "trees": hashlib.sha256((run / "trees.jsonl.zst").read_bytes()).hexdigest(),
        "weights": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "summary": {**summary, "seconds": None, "peak_memory_gib": None},
        "scenario": (run / "scenario.yaml").read_text(),
    }


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_is_the_whole_run(case: str, runs: Path) -> None:
    assert outcome(runs / case) == outcome(runs / "whole")


def test_the_uninterrupted_run_trains(runs: Path) -> None:
    """Else the comparison above would compare nothing."""
    rows = Run(runs / "whole").metrics()
    stages = [row["stage"] for row in rows]
    assert list(dict.fromkeys(stages)) == ["untrained", "warm-up", "warmed up", "improvement", "midway", "trained"]
    assert stages.count("warm-up") == 12 and stages.count("improvement") == 3
    assert all(row["grad_norm"] > 0 for row in rows if row["stage"] in ("warm-up", "improvement"))
    assert [row["kl"] > 0 for row in rows if row["stage"] == "improvement"] == [False, True, True]
    versions = {
        (labels["stage"], labels["step"]): {node.action.weights_version for node in tree.nodes}
        for labels, tree in Run(runs / "whole").trees
    }
    assert versions["improvement", 2] == {14}  # the steps before: 12 and 2


def test_a_finished_run_is_left_alone(runs: Path) -> None:
    for file in ("summary.json", "metrics.jsonl", "trees.jsonl.zst"):
        assert (runs / "whole, once more" / file).read_bytes() == (runs / "whole" / file).read_bytes()


def test_what_a_checkpoint_counts_on_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.log(stage="s", step=0, loss=0.5)
    run.cassette.answer({"source": "time"}, lambda: 1)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    Checkpoints(run).save(Progress(), {"x": torch.tensor([1])})
    written = [tmp_path / "metrics.jsonl", tmp_path / "cassette.jsonl", *tmp_path.glob("checkpoints/*/*")]
    assert {file.stat().st_ino for file in written} == set(synced)


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert Checkpoints(run).restore() is None
    for step in range(3):
        run.log(stage="s", step=step, loss=0.5)
        Checkpoints(run).save(Progress(1, step, step + 4, {"a": [1.0]}), {"x": torch.tensor([step])})
    run.log(stage="s", step=3, loss=0.5)
    part = tmp_path / "checkpoints" / "000003.part"
    part.mkdir()
    (part / "tensors.safetensors").write_bytes(b"half")
    run.close()
    restored = Checkpoints(Run(tmp_path)).restore()
    assert restored is not None
    assert restored[0] == Progress(1, 2, 6, {"a": [1.0]}) and restored[1]["x"].item() == 2
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    Checkpoints(Run(tmp_path)).save(*restored)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000003"]


# what a checkpoint must not be


def checkpoint(folder: Path) -> Path:
    """Of a run with a row of metrics before it and one after it."""
    run = Run(folder)
    run.log(stage="s", step=0, loss=0.5)
    Checkpoints(run).save(Progress(1, 1, 1), {"a": torch.arange(64.0), "b": torch.ones(8)})
    run.log(stage="s", step=1, loss=0.25)
    run.close()
    return folder / "checkpoints" / "000000"


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["0000.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_forgotten(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    damage(checkpoint(tmp_path) / name)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(
        DamagedCheckpoint, match=rf"checkpoints/000000 is damaged: {name} (is missing|has another chec)"
    ):
        Checkpoints(Run(tmp_path)).restore()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_without_some_of_its_tensors_is_damaged(tmp_path: Path) -> None:
    """Also where the sums fit: somebody may have written them anew."""
    folder = checkpoint(tmp_path)
    save_file({"a": torch.zeros(64)}, folder / "0000.safetensors")
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(DamagedCheckpoint, match="tensors are missing: b"):
        Checkpoints(Run(tmp_path)).restore()


def test_sums_are_what_sha256sum_reads(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(list(folder.iterdir())) - 1


def test_a_checkpoint_from_before_there_were_sums_is_taken(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "SHA256SUMS").unlink()
    state = json.loads((folder / "progress.json").read_text())
    del state["tensors"], state["best"]
    (folder / "progress.json").write_text(json.dumps(state))
    restored = Checkpoints(Run(tmp_path)).restore()
    assert restored is not None
    assert restored[0] == Progress(1, 1, 1) and torch.equal(restored[1]["a"], torch.arange(64.0))


@pytest.mark.parametrize("without", ["model.", "optimizer."])
def test_a_model_is_not_trained_on_from_a_checkpoint_that_lacks_weights(
    without: str, runs: Path, tmp_path: Path
) -> None:
    """As one of a model with fewer layers would."""
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    assert run_all(tmp_path, [(["train", "tiny.yaml", "--out", "cut"], (STEP, "apply", "before", 4))], 1) == [
        -signal.SIGKILL
    ]
    progress, tensors = Checkpoints(Run(tmp_path / "cut")).restore() or pytest.fail("no checkpoint")
    lost = next(name for name in sorted(tensors) if name.startswith(without))
    Checkpoints(Run(tmp_path / "cut")).save(progress, {name: x for name, x in tensors.items() if name != lost})
    before = (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    assert run_all(tmp_path, [(["train", "--resume", "--out", "cut"], None)], 1) == [2]
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == before


def test_who_comes_second_changes_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock comes before anything is written or forgotten."""
    folder = tmp_path / "first"
    shutil.copytree(runs / "whole", folder)
    (folder / "summary.json").unlink()
    first = Run(folder)
    first.claim()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, _, said = command(capsys, "train", "--resume", "--out", str(folder))
    assert status == 2 and "trees.jsonl.zst is locked: this process writes to it" in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    first.close()


def test_models_are_kept_on_the_way(tmp_path: Path) -> None:
    """The best by held-out success, and those after every so many steps; an interruption changes none of them."""
    (tmp_path / "tiny.yaml").write_text(SCENARIO + "keep: {best: true, every: 2}\n")
    jobs = [
        (["train", "tiny.yaml", "--out", "whole"], None),
        (["train", "tiny.yaml", "--out", "cut"], (STEP, "apply", "before", 15)),
    ]
    assert run_all(tmp_path, jobs, 1) == [0, -signal.SIGKILL]
    assert run_all(tmp_path, [(["train", "--resume", "--out", "cut"], None)], 2) == [0]
    kept = [hashes(tmp_path / name / "models") for name in ("whole", "cut")]
    assert kept[0] == kept[1] and {path.parts[0] for path in kept[0]} == {"best", "step-2"}
    rows = [row for row in Run(tmp_path / "whole").metrics() if "low" in row and row["stage"] != "untrained"]
    best = max(rows, key=lambda row: row["success"])  # the first one
    last = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    same = (tmp_path / "whole" / "models" / "best" / "model.safetensors").read_bytes() == last
    assert same == (best["stage"] == "trained")


def test_trees_of_later_steps_survive_a_kill(tmp_path: Path) -> None:
    """At max_lag 2 a checkpoint holds two steps that are grown and not trained. They are trained as they are: killed
    before step 1 is trained, then while step 3 grows, the run ends as one that was left alone."""
    lagging = SCENARIO.replace("steps: 3,", "steps: 5, max_lag: 2,").replace("evaluate_every: 2,", "")
    (tmp_path / "tiny.yaml").write_text(lagging)
    jobs = [
        (["train", "tiny.yaml", "--out", "whole"], None),
        (["train", "tiny.yaml", "--out", "cut"], (STEP, "apply", "before", 14)),
    ]
    assert run_all(tmp_path, jobs, 1) == [0, -signal.SIGKILL]
    [file] = tmp_path.glob("cut/checkpoints/*/ahead.jsonl")
    untrained = [record for record in map(json.loads, file.read_text().splitlines()) if "tree" in record]
    assert [record["labels"]["step"] for record in untrained] == [1, 1, 2, 2]
    assert not [
        labels for labels, _ in Run(tmp_path / "cut").trees if labels["stage"] == "improvement" if labels["step"]
    ]
    resume = ["train", "--resume", "--out", "cut"]
    assert run_all(tmp_path, [(resume, (GROW, "grow", "first_tree", 1)), (resume, None)], 2) == [-signal.SIGKILL, 0]
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    trained = [labels["step"] for labels, _ in Run(tmp_path / "cut").trees if labels["stage"] == "improvement"]
    assert trained == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def hashes(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
