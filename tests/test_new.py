"""treegym new: what it writes is a package whose environment every command knows, keeps its promises and is learned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command, refused


def done(folder: Path, *arguments: str, path: Path) -> str:
    """What Python says in the folder, where packages in `path` are installed too. AssertionError if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))}
    ran = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_a_new_package_installs_tests_plays_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, place = tmp_path / "word_game", tmp_path / "installed"
    status, out, _ = command(capsys, "new", "word-game", "--out", str(folder))
    assert status == 0 and "word_game/WordGameEnv-v0" in out
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(place), ".")
    done(folder, *pip, path=place)
    assert "3 passed" in done(folder, "-m", "pytest", "-p", "no:cacheprovider", "tests", path=place)
    known = done(tmp_path, "-m", "treegym", "envs", path=place).split()
    assert "word_game/WordGameEnv-v0" in known and "treegym/Lookup-v0" in known
    assert "reward 1.10" in done(tmp_path, "-m", "treegym", "envs", "word_game/WordGameEnv-v0", path=place)
    quick = ("--set", "improvement.steps=1", "--set", "warmup.demonstrations=32", "--set", "heldout.tasks=8")
    told = done(folder, "-m", "treegym", "train", "train.yaml", *quick, "--out", "run", path=place)
    assert "gain over the warmed-up policy" in told and (folder / "run" / "summary.json").exists()


@pytest.mark.parametrize("name", ["treegym", "class", "9lives", "a b", "Caps", ""])
def test_a_name_that_no_package_can_have_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cannot name a package" in refused(capsys, "new", name)
    assert not [*tmp_path.iterdir()]


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "env.py").write_text("x = 1")
    assert "is there already: --out" in refused(capsys, "new", "mine", "--out", str(tmp_path / "mine"))
    assert [*(tmp_path / "mine").iterdir()] == [tmp_path / "mine" / "env.py"]
