"""The README's example runs as it stands, and the policy learns what the README says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from treegym.agents.rollouts import Budgeted, Chains
from treegym.scenarios import load_scenario
from treegym.trainers.advantages import AnchorStates, GroupRelative, Norm, Sum
from treegym.trainers.losses import ClippedLoss, WithKL

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
[EXAMPLE] = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_example_is_short() -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 30


def test_the_example_learns_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLE, "README.md", "exec"), {"__name__": "__main__"})
    run = tmp_path / "runs" / "boxes"
    stages = json.loads((run / "summary.json").read_text())["stages"]
    success = {stage: stages[stage]["success"]["mean"] for stage in ("untrained", "warmed up", "trained")}
    assert success["untrained"] < 0.1 and success["warmed up"] < 0.9
    assert success["trained"] > max(0.85, success["warmed up"] + 0.05)
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("start", [["bin/treegym"], ["bin/python", "-m", "treegym"]], ids=["script", "module"])
def test_the_example_s_files_run_as_printed(start: list[str], tmp_path: Path) -> None:
    [scenario] = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "boxes.py").write_text(EXAMPLE)
    (tmp_path / "boxes.yaml").write_text(scenario)
    less = "warmup.demonstrations=8 improvement.steps=1 improvement.tasks_per_step=1 heldout.tasks=1 threads=1".split()
    arguments = ["train", "boxes.yaml", "--out", "run", *(part for change in less for part in ("--set", change))]
    command = [str(Path(sys.prefix) / start[0]), *start[1:], *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("saved in run\n") and not (tmp_path / "runs").exists()


def test_the_training_page_s_parts_are_parts(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    [example, *_] = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    file = tmp_path / "some.yaml"
    file.write_text(f"environment: {{id: treegym/Lookup-v0}}\n{example}")
    algorithm = load_scenario(file).plan().algorithm
    assert algorithm.rollout == Budgeted(Chains(4), tool_calls=20)
    assert algorithm.advantage == Sum((1.0, GroupRelative()), (0.5, AnchorStates(0.9, Norm(divide=False))))
    assert algorithm.loss == WithKL(ClippedLoss(clip_high=0.28))


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/training.md", "docs/environments.md", "docs/episodes.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_what_pages_import_is_there(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^from treegym\S* import .*$", block, re.MULTILINE):
            exec(line, {})


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # threads: 0 is one for each core
    yield
    torch.set_num_threads(before)
