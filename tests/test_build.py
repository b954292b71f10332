"""What is found out before a run begins, what is said at its end, and the cores that it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from treegym.agents import Run, Sampling
from treegym.scenarios import Model, Scenario, ScenarioError, train
from treegym.scenarios.build import build_trainer, usable_cores
from treegym.scenarios.schema import AlgorithmChoice
from treegym.scenarios.watch import ProgressBars
from treegym.trainers import HeldOut, Improvement, TaskSet, Warmup


@pytest.mark.parametrize(
    ("sampling", "fault"),
    [
        ({"max_context": 9000}, "9000 tokens, but nano has positions for 8192; --set sampling.max_context=8192"),
        ({"max_context": 60}, r"60 tokens have no room for the prompt of a train task \(\d+\) and a reply"),
    ],
)
def test_episodes_that_the_model_cannot_hold_are_refused(sampling: dict[str, int], fault: str, tmp_path: Path) -> None:
    scenario = Scenario(TaskSet("treegym/Lookup-v0"), Model("nano"), sampling=Sampling(**sampling))
    with pytest.raises(ScenarioError, match=f"sampling.max_context: {fault}"):
        build_trainer(scenario, Run(tmp_path), ProgressBars(shown=False))


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(
        ScenarioError, match=r"algorithm.parameters: n must be at least 2, got 1: a rollout alone has no"
    ):
        AlgorithmChoice(parameters={"n": 1}).build()


def test_a_run_that_could_not_learn_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = Scenario(
        TaskSet("treegym/Lookup-v0", {"hops": [1]}),
        Model("nano"),
        AlgorithmChoice(rollout={"Chains": {"n": 1}}),
        Sampling(max_tokens=4),
        Warmup(0),
        Improvement(2, tasks_per_step=1),
        HeldOut(0),
    )
    train(scenario, tmp_path / "alone")
    assert "no step trained anything" in " ".join(capsys.readouterr().out.split())
    health = json.loads((tmp_path / "alone" / "summary.json").read_text())["improvement"]
    assert health["steps"] == health["steps_without_signal"] == 2 and health["truncated"] == {"turn limit": 1.0}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
)
def test_threads_are_as_many_as_the_cores_that_may_be_used(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container with two of 64 cores, 64 threads would wait for each other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_give_their_core_away_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": before} if before else {}
    script = "import os, treegym; print(os.environ['OMP_WAIT_POLICY'])"
    shown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == after


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
