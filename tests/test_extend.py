"""The examples of docs/extend.md train as they stand, from their scenarios, and do what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import command

from treegym.agents import RolloutTree, Run
from treegym.agents.rollouts import verify

PAGE = (Path(__file__).parent.parent / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES: dict[str, tuple[str, str]] = {
    name: (code, scenario)
    for section in PAGE.split("\n## ")[1:]
    for name in re.findall(r"^`(\w+)\.py`", section, re.MULTILINE)
    for code in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for scenario in re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
}
SMALL = (
    "algorithm.parameters.n=4 sampling.max_tokens=8 warmup.demonstrations=32 improvement.steps=2 heldout.tasks=4 "
    "improvement.tasks_per_step=4 threads=1 model.dtype=float32"
).split()


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("gymnasium.logger.warn", lambda *texts: None)  # that an environment is registered again
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def trained(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The run of an example's scenario in a folder of its own."""
    code, scenario = EXAMPLES[name]
    (folder / f"{name}.py").write_text(code)
    (folder / f"{name}.yaml").write_text(scenario)
    monkeypatch.chdir(folder)
    changes = [part for change in SMALL for part in ("--set", change)]
    status, _, said = command(capsys, "train", f"{name}.yaml", "--out", "run", *changes)
    assert status == 0, said
    return Run(folder / "run")


def improved(run: Run) -> list[RolloutTree]:
    return [tree for labels, tree in run.trees if labels["stage"] == "improvement"]


def test_there_are_five_short_examples() -> None:
    assert list(EXAMPLES) == ["vault", "ranked", "retry", "asymmetric", "logged"]
    lines = {name: [line for line in code.splitlines() if line.strip()] for name, (code, _) in EXAMPLES.items()}
    assert {name for name, code in lines.items() if len(code) > 30} <= {"vault"}
    assert len(lines["vault"]) <= 45  # an environment and a wrapper


def test_the_environment_keeps_its_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("vault", tmp_path, monkeypatch, capsys)
    subprocess.run([sys.executable, "-W", "error", "vault.py"], cwd=tmp_path, check=True)  # check_env
    trees = [tree for _, tree in run.trees]
    assert all(tree.task.wrappers == (("vault.py:Alarm", {"turns": 2}),) for tree in trees)
    assert not any(divergence for tree in trees for divergence in verify(tree))
    nodes = [node for tree in trees for node in tree.nodes]
    heard = {node.messages[0].text: node.reward_terms.get("nearer") for node in nodes if node.calls}
    assert heard.pop("click") == 1.0 and set(heard.values()) <= {0.0}
    ends = [node for node in nodes if node.info.get("cause") == "alarm"]
    assert all(node.truncated and not node.terminated for node in ends)


def test_the_estimator_ranks_siblings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("ranked", tmp_path, monkeypatch, capsys)
    for record in run.trees.records():
        if record.labels["stage"] == "improvement":
            assert record.advantages is not None
            by_return = sorted(zip(record.tree.returns, (turns[0] for turns in record.advantages), strict=True))
            assert [rank for _, rank in by_return] == sorted(rank for _, rank in by_return)
            assert abs(sum(rank for _, rank in by_return)) < 1e-9 and all(abs(rank) <= 0.5 for _, rank in by_return)


def test_the_strategy_tries_every_turn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = improved(trained("retry", tmp_path, monkeypatch, capsys))
    assert trees
    for tree in trees:
        first, *others = tree.paths
        assert tree.origins == (0,) * len(tree.paths) and len(others) == min(3, len(first))
        assert all(path[:turn] == first[:turn] for turn, path in enumerate(others))


def test_the_loss_counts_what_went_badly_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("asymmetric", tmp_path, monkeypatch, capsys)
    loss = sys.modules["asymmetric"].Asymmetric(bad=0.25)
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    terms = type("Terms", (), {"advantage": torch.tensor([1.0, -1.0])})
    loss(logprobs, terms).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.0, 0.25]


def test_the_policy_hears_of_every_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("logged", tmp_path, monkeypatch, capsys)
    versions, requests = zip(
        *(map(int, line.split()) for line in (tmp_path / "log.txt").read_text().splitlines()), strict=True
    )
    assert list(versions) == sorted(versions) and versions[-1] == 6  # four steps of the warm-up, two of the improvement
    assert list(requests) == sorted(requests) and requests[0] > 0


def test_the_rule_of_the_page_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = PAGE.partition("`rule.py`:\n\n")[2].splitlines()
    code = "\n".join(
        line[4:]
        for line in lines[: lines.index("    treegym eval lookup --policy '{rule.py:Rule: {word: blue}}' --tasks 20")]
    )
    (tmp_path / "rule.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = ("--policy", "{rule.py:Rule: {word: blue}}", "--tasks", "20")
    status, _, said = command(capsys, "eval", "lookup", *words, "--out", "out")
    assert status == 0, said
    assert {tree.nodes[0].action.text for _, tree in Run(tmp_path / "out").trees} == {"<lookup>blue</lookup>"}
