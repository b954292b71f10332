"""Parts of users, named in scenarios and commands as module:Name or path/to/file.py:Name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import command

from treegym.agents import Run
from treegym.envs import Task
from treegym.scenarios import ScenarioError, load_scenario, train
from treegym.tools.named import PartNotFound, import_place, named
from treegym.trainers import Stopped

ROOT = Path(__file__).parent.parent
PAGE = (
    (ROOT / "docs" / "training.md")
    .read_text(encoding="utf-8")
    .partition("### A part of your own")[2]
    .partition("\n### ")[0]
)
PARTS = """
from __future__ import annotations
import helper_{0}
import gymnasium
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from treegym.agents import RolloutTree
from treegym.envs import LookupEnv
from treegym.trainers import Advantages
from treegym.trainers.losses import ReinforceLoss

gymnasium.register("{0}/Links-v0", LookupEnv)

def centred(trees: Sequence[RolloutTree], scale: float = 1.0) -> list[Advantages]:
    return [[[scale * (value - 0.5)] * len(path) for value, path in zip(tree.returns, tree.paths)] for tree in trees]

class Half:
    aggregation = "token-mean"
    needs: ClassVar[frozenset[str]] = frozenset()
    couples = "token"
    keeps_zeros = False
    def __init__(self, share: float = 0.5) -> None:
        self.share = share
    def __call__(self, logprobs, terms):
        return -self.share * logprobs * terms.advantage

number = 3
"""
SCENARIO = """
environment: {{id: "parts/{0}.py:{0}/Links-v0"}}
model: {{name: nano, dtype: float32}}
algorithm:
  parameters: {{n: 2}}
  advantage: {{"{0}:centred": {{scale: 2.0}}}}
  loss: {{"parts/{0}.py:Half": {{share: 0.25}}}}
sampling: {{max_tokens: 4}}
warmup: {{demonstrations: 8}}
improvement: {{steps: 3, tasks_per_step: 2}}
heldout: {{tasks: 2}}
checkpoint_every: 1.0e-9
threads: 1
"""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python's path and torch's threads are the process's."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("gymnasium.logger.warn", lambda *texts: None)  # that an environment is registered again
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def project(folder: Path, name: str) -> Path:
    """A scenario, and the file with its parts in a folder beside it."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / f"{name}.py").write_text(PARTS.format(name))
    (folder / "parts" / f"helper_{name}.py").write_text("")
    (folder / "some.yaml").write_text(SCENARIO.format(name))
    return folder / "some.yaml"


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As in another process: the modules of a project were never imported."""
    for module in (name, f"helper_{name}"):
        sys.modules.pop(module, None)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "mine" not in path])


def test_a_run_with_a_user_s_parts_resumes_evaluates_and_replays_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project(tmp_path / "mine", "mine1")
    whole = train(load_scenario(file), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        steps = iter([False, False, True])  # of warm-up one
        patched.setattr("treegym.scenarios.watch.ProgressBars.should_stop", lambda bars: next(steps))
        train(load_scenario(file), tmp_path / "parted")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    forget(monkeypatch, "mine1")
    assert command(capsys, "train", "--resume", "--out", "../parted")[0] == 0
    assert [*Run(Path("../parted")).trees] == [*Run(Path("../whole")).trees]
    assert whole["trained"].tasks
    for words in (
        ("eval", "../parted", "--tasks", "2", "--out", "a"),
        ("eval", "../parted", "--policy", "oracle", "--tasks", "2", "--out", "b"),
        ("replay", "verify", "../parted"),
        ("replay", "continue", "../parted", "0.0", "--from", "1", "--policy", "oracle", "--out", "on"),
    ):
        forget(monkeypatch, "mine1")
        status, _, said = command(capsys, *words)
        assert status == 0, said
    forget(monkeypatch, "mine1")
    assert command(capsys, "compare", "a", "b")[0] == 0


def test_parts_of_modules_are_made_with_their_fields(tmp_path: Path) -> None:
    algorithm = load_scenario(project(tmp_path / "mine", "mine2")).plan().algorithm
    assert algorithm.loss.share == 0.25  # type: ignore[attr-defined]
    assert algorithm.advantage.keywords == {"scale": 2.0}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("advantage={'NAME:centerd': {}}", "has no 'centerd'; did you mean 'centred'?"),
        ("advantage={'NAME:centred': {skale: 1}}", "skale: no such field; did you mean 'scale'?"),
        ("advantage={'NAME:centred': {scale: wide}}", "centred.scale: input should be a valid number"),
        ("advantage={'NAME:centred': {trees: 1}}", "trees: no such field"),
        ("loss='NAME:centred'", "centred"),
        ("loss='NAME:number'", "NAME:number is a int; name a class or a function"),
        ("loss='nowhere3:Loss'", "algorithm.loss: no module 'nowhere3' in "),
        ("loss='nowhere3.py:Loss'", "algorithm.loss: no file 'nowhere3.py' in "),
        ("loss='NAME:LookupEnv'", "LookupEnv makes no PolicyLoss: it has no __call__"),
        ("parameters={}, name='NAME:Half'", "makes a Half, not an Algorithm"),
        ("name='NAME:nix'", "algorithm.name: NAME (PATH) has no 'nix'"),
    ],
)
def test_what_is_no_part_is_refused_with_its_place(
    changed: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project(tmp_path / "mine", "mine3")
    monkeypatch.delitem(sys.modules, "mine3", raising=False)
    monkeypatch.delitem(sys.modules, "helper_mine3", raising=False)
    changes = [f"algorithm.{change}" for change in changed.replace("NAME", "mine3").split(", ")]
    with pytest.raises(ScenarioError) as refusal:
        load_scenario(file, changes)
    assert reason.replace("NAME", "mine3").replace("PATH", str(tmp_path / "mine/parts/mine3.py")) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_page_s_strategy_runs_from_yaml_with_its_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [example] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    [algorithm] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    [strategy] = re.findall(r"`algorithm: (\{rollout: .*?\})`", PAGE)
    head = SCENARIO.format("x").partition("algorithm:")[0].replace("parts/x.py:x/Links-v0", "treegym/Lookup-v0")
    (tmp_path / "halfway.py").write_text(example)
    (tmp_path / "some.yaml").write_text(f"{head}{algorithm}\nwarmup: {{demonstrations: 8}}\nheldout: {{tasks: 2}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "halfway", raising=False)
    assert command(capsys, "train", "some.yaml", "--set", "improvement.steps=1", "--out", "run")[0] == 0
    grown = [tree for labels, tree in Run(Path("run")).trees if labels["stage"] == "improvement"]
    assert len(grown) == 8
    for tree in grown:
        assert tree.origins == (0, 0, 0, 0)
        assert all(path[: len(tree.paths[0]) // 2] == tree.paths[0][: len(tree.paths[0]) // 2] for path in tree.paths)
    plan = load_scenario("some.yaml", [f"algorithm={strategy}"]).plan()
    assert plan.algorithm.rollout == load_scenario("some.yaml").plan().algorithm.rollout


def test_a_task_makes_the_environment_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path / "mine", "mine4")
    monkeypatch.chdir(tmp_path)
    env = Task("mine/parts/mine4.py:mine4/Links-v0", 0).make()
    assert env.reset(seed=3)[0] == Task("treegym/Lookup-v0", 0).make().reset(seed=3)[0]


def test_a_file_may_have_the_name_of_another_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("mark = 1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "json.py").write_text("mark = 2")
    monkeypatch.chdir(tmp_path)
    assert [named(f"{place}:mark") for place in ("json.py", "other/json.py", "json.py")] == [1, 2, 1]
    assert "loads" in vars(import_place("json"))
    (tmp_path / "broken.py").write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(PartNotFound, match="cannot be imported: ZeroDivisionError"):
            named("broken.py:mark")


# policies

POLICIES = '''
from dataclasses import dataclass
from treegym.agents import TransformersPolicy

class Counted(TransformersPolicy):
    """Counts the replies that it was asked for."""
    asked = 0
    def __init__(self, model, renderer, dtype, rows: int = 4):
        super().__init__(model, renderer, dtype=dtype, max_rows=rows)
    async def sample(self, context, seed, sampling):
        Counted.asked += 1
        return await super().sample(context, seed, sampling)

@dataclass(frozen=True)
class Says:
    word: str = "?"
    async def act(self, messages, env, seed):
        return env.oracle() or self.word

class Deaf:
    def __init__(self, renderer):
        self.renderer = renderer
    async def sample(self, context, seed, sampling):
        raise NotImplementedError
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    head = SCENARIO.format("x").replace("parts/x.py:x/Links-v0", "treegym/Lookup-v0")
    (tmp_path / "some.yaml").write_text(re.sub(r"  (advantage|loss): .*\n", "", head))
    (tmp_path / "policies5.py").write_text(POLICIES)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("policies5", None)


def test_a_policy_of_one_s_own_is_trained_and_samples_the_same(own: Path) -> None:
    scenario = load_scenario("some.yaml", ["model.policy={'policies5:Counted': {rows: 3}}"])
    train(scenario, own / "counted")
    train(load_scenario("some.yaml"), own / "plain")
    assert sys.modules["policies5"].Counted.asked > 20
    assert [*Run(own / "counted").trees] == [*Run(own / "plain").trees]
    assert load_scenario(own / "counted").look_in == (str(own),)


def test_a_policy_of_one_s_own_is_evaluated_from_anywhere(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "eval", "some.yaml", "--policy", "policies5:Says", "--out", "e", "--tasks", "2")[0] == 0
    assert '"mean": 1.0' in (own / "e" / "results.json").read_text()
    monkeypatch.chdir(own / "e")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(own)])
    sys.modules.pop("policies5")
    (own / "e" / "results.json").unlink()
    assert command(capsys, "eval", "--resume", "--out", ".")[0] == 0
    assert '"mean": 1.0' in (own / "e" / "results.json").read_text()


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("'policies5:Deaf'", "model.policy: Deaf takes no weights (release, push); it can only play"),
        ("'policies5:Says'", "model.policy: Says has no sample(context, seed, sampling)"),
        ("{'policies5:Counted': {row: 3}}", "model.policy.policies5:Counted.row: no such field; did you mean 'rows'?"),
        ("'policies5:Nobody'", "model.policy: policies5 ("),
    ],
)
def test_what_cannot_be_trained_is_refused(policy: str, reason: str, own: Path) -> None:
    with pytest.raises(ScenarioError) as refusal:
        train(load_scenario("some.yaml", [f"model.policy={policy}"]), own / "run")
    assert reason in str(refusal.value) and not (own / "run").exists()
