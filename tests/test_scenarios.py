"""Scenario files and the command: what is wrong with them is said in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from commands import command, refused

import treegym
from treegym.agents.rollouts import TreeExpansion
from treegym.envs import ToolEnv, registered
from treegym.scenarios import Model, Scenario, ScenarioError, load_scenario
from treegym.scenarios.build import check_weights, try_environment
from treegym.scenarios.schema import BUNDLED, dump_scenario
from treegym.scenarios.terminal import say
from treegym.scenarios.watch import ProgressBars
from treegym.tools import tool
from treegym.trainers import ALGORITHMS, Improvement, TaskSet, gigpo
from treegym.trainers.advantages import AnchorStates, GroupRelative, Norm, SharedMean, Sum
from treegym.trainers.losses import ClippedLoss, SapoLoss, WithKL

MINIMAL = "environment: {id: treegym/Lookup-v0}\n"
NANO = """
environment:
  id: treegym/Lookup-v0
  settings: {hops: [1, 2]}
model: {name: nano, dtype: float32}
algorithm: {parameters: {n: 2}}
sampling: {max_tokens: 6}
warmup: {demonstrations: 8}
improvement: {steps: 1, tasks_per_step: 2}
heldout: {tasks: 4}
threads: 1
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    return tmp_path / "some.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# reading


@pytest.mark.parametrize("file", sorted(BUNDLED.glob("*.yaml")), ids=lambda file: str(file.stem))
def test_bundled_scenarios_load_and_survive_being_written_out(file: Path, scenario: Path) -> None:
    chosen = load_scenario(file)
    assert load_scenario(Path(file.stem)) == chosen
    assert load_scenario(write(scenario, dump_scenario(chosen))) == chosen


def test_what_is_set_is_what_is_read(scenario: Path) -> None:
    changes = [
        "seed=3",
        "environment.settings.hops=[1, 2]",
        "environment.success=format",
        "model.name='a/b: c'",
        "sampling.temperature=0.5",
        "heldout.untrained=0",
        "improvement.optimization.learning_rate=2e-5",
        "algorithm.parameters.clip_high=2.8e-1",
        "algorithm.parameters.clip=2e-1",
        "checkpoint_every=.inf",
    ]
    chosen = load_scenario(write(scenario, MINIMAL), changes)
    assert (chosen.seed, chosen.model.name, chosen.sampling.temperature) == (3, "a/b: c", 0.5)
    assert chosen.environment.settings == {"hops": [1, 2]} and chosen.environment.success == "format"
    assert chosen.heldout.untrained == 0
    plan = chosen.plan()
    assert plan.improvement.optimization.learning_rate == 2e-5
    assert plan.algorithm.loss == ClippedLoss(0.2, 0.28)  # YAML reads 2e-1 as a text
    assert load_scenario(write(scenario, dump_scenario(chosen))) == chosen


def test_any_part_of_an_algorithm_can_be_another(scenario: Path) -> None:
    text = """
algorithm:
  name: gigpo
  parameters: {clip: 0.1}
  rollout: {TreeExpansion: {trees: 1, choose: unsure}}
  advantage: {Sum: [[1.0, GroupRelative], [0.5, {SharedMean: {of: {AnchorStates: {norm: {ddof: 0}}}}}]]}
"""
    chosen = load_scenario(write(scenario, MINIMAL + text))
    algorithm = chosen.plan().algorithm
    assert algorithm.rollout == TreeExpansion(1, choose="unsure")
    assert algorithm.advantage == Sum((1.0, GroupRelative()), (0.5, SharedMean(AnchorStates(norm=Norm(ddof=0)))))
    assert algorithm.loss == gigpo(clip=0.1).loss
    assert load_scenario(write(scenario, dump_scenario(chosen))) == chosen
    set_here = load_scenario(scenario, ["algorithm.loss={WithKL: {loss: SapoLoss, coefficient: 1e-2}}"])
    assert set_here.plan().algorithm.loss == WithKL(SapoLoss(), 0.01)
    assert set_here.plan().algorithm.rollout == algorithm.rollout


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_had_by_name(algorithm: str, scenario: Path) -> None:
    chosen = load_scenario(write(scenario, MINIMAL), [f"algorithm.name={algorithm}"])
    assert chosen.plan().algorithm == ALGORITHMS[algorithm]()


@pytest.mark.parametrize(
    ("text", "line", "field", "says"),
    [
        ("sampling: {max_token: 1}", 2, "sampling.max_token", "no such field; did you mean 'max_tokens'?"),
        ("warmup:\n  optimization:\n    learning_rte: 1", 4, "warmup.optimization.learning_rte", "'learning_rate'?"),
        ("modle: x", 2, "modle", "did you mean 'model'?"),
        ("model: {weights: lara}", 2, "model.weights", "'full' or 'lora', got 'lara'"),
        ("heldout:\n\n  tasks: many", 4, "heldout.tasks", "integer"),
        ("improvement: {steps: 1.5}", 2, "improvement.steps", "got 1.5"),
        ("improvement: {steps: -1}", 2, "improvement", "steps must be at least 0, got -1"),
        ("improvement: {max_lag: -1}", 2, "improvement", "max_lag must be at least 0, got -1"),
        ("improvement: {max_lag: 0.5}", 2, "improvement.max_lag", "got 0.5"),
        ("improvement: {max_lag: soon}", 2, "improvement.max_lag", "got 'soon'"),
        ("improvement: {tree_seconds: 0}", 2, "improvement", "tree_seconds must be more than 0, got 0.0; null is no"),
        ("improvement: {tasks_per_step: 1, updates_per_step: 2}", 2, "improvement", "tasks_per_step must be at least"),
        ("warmup: {batch_size: 0}", 2, "warmup", "batch_size must be at least 1, got 0"),
        ("heldout: {rollouts: 0}", 2, "heldout", "rollouts must be at least 1, got 0"),
        ("sampling: {max_tokens: 0}", 2, "sampling", "max_tokens >= 1"),
        ("model: {max_rows: 0}", 2, "model.max_rows", "greater than or equal to 1"),
        ("checkpoint_every: 0", 2, "checkpoint_every", "greater than 0"),
        ("model: nano", 2, "model", "got 'nano'"),
        ("algorithm: {name: gpro}", 2, "algorithm.name", "no algorithm 'gpro'; did you mean 'grpo'?"),
        ("algorithm: {parameters: {clp: 1}}", 2, "algorithm.parameters.clp", "did you mean 'clip'?"),
        ("algorithm: {parameters: {clip: [1]}}", 2, "algorithm.parameters.clip", "number"),
        ("algorithm: {parameters: {n: 0}}", 2, "algorithm.parameters", "n must be at least 2, got 0"),
        ("algorithm: {parameters: {aggregation: mean}}", 2, "algorithm.parameters.aggregation", "'token-mean'"),
        ("algorithm:\n  loss: Clipped", 3, "algorithm.loss", "no PolicyLoss 'Clipped'; did you mean 'ClippedLoss'?"),
        ("algorithm:\n  loss:\n    ClippedLoss: {clip_hi: 1}", 4, "algorithm.loss.ClippedLoss.clip_hi", "'clip_high'"),
        ("algorithm: {loss: {ClippedLoss: {level: word}}}", 2, "algorithm.loss.ClippedLoss.level", "'turn'"),
        ("algorithm: {loss: WithKL}", 2, "algorithm.loss.WithKL", "missing 1 required positional argument: 'loss'"),
        ("algorithm: {loss: {WithKL: {loss: {SapoLos: {}}}}}", 2, "algorithm.loss.WithKL.loss", "'SapoLoss'?"),
        ("algorithm: {advantage: Sum}", 2, "algorithm.advantage.Sum", "write a list of weights and parts"),
        ("algorithm: {advantage: {Sum: [[x, BestOnly]]}}", 2, "algorithm.advantage.Sum", "number"),
        ("algorithm: {advantage: [BestOnly]}", 2, "algorithm.advantage", "write a name"),
        ("algorithm: {advantage: {GroupRelative: {norm: {dof: 1}}}}", 2, "algorithm.advantage.GroupRelative.norm.dof",
         "'ddof'?"),
        ("algorithm: {rollout: {Chains: {n: many}}}", 2, "algorithm.rollout.Chains.n", "integer"),
        ("algorithm: {rollout: {Chains: {n: 0}}}", 2, "algorithm.rollout.Chains", "n must be at least 1, got 0"),
        ("algorithm: {rollout: {Chains: 8}}", 2, "algorithm.rollout.Chains", "write its fields, {name: value}, not 8"),
        ("algorithm: {rollout: {Chains: {1: 2}}}", 2, "algorithm.rollout.Chains.1", "no such field"),
        ("algorithm: {advantage: {Whitened: BestOnly}}", 2, "algorithm.advantage.Whitened", "write its fields"),
        ("sampling: {max_calls: 0}", 2, "sampling", "max_calls must be >= 1"),
        ("algorithm: {rollout: {EntropyBranching: {roots: 9, budget: 8}}}", 2, "algorithm.rollout.EntropyBranching",
         "roots must be between 1 and budget"),
        ("seed: 1\nseed: 2", 3, "seed", "this field stands twice"),
        ("a: [", 2, "", "not YAML"),
        ("a: {[b]: c}", 2, "", "not YAML: found unhashable key"),
        ("a: !!python/name:os.system {}", 2, "", "not YAML"),
        ("a: *b", 2, "", "not YAML: found undefined alias"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_line_and_field(text: str, line: int, field: str, says: str, scenario: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(write(scenario, MINIMAL + text))
    message = str(caught.value)
    assert "\n" not in message and says in message
    assert message.startswith(f"{scenario}:{line}: {field}: " if field else f"{scenario}:{line}: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ":1: environment: this field is needed"),
        ("- a", ":1: a scenario is a mapping of fields, not a list"),
        ("model: {name: nano}", ":1: environment: this field is needed"),
        ("environment: {}", ":1: environment.id: this field is needed"),
        (
            "environment: {id: treegym/Lokup-v0}",
            ":1: environment.id: no environment 'treegym/Lokup-v0'; did you mean 'treegym/Lookup-v0'?",
        ),
        ("environment: {id: 'no_such_module:a/B-v0'}", ":1: environment.id: no module 'no_such_module' in "),
        ("a: \x01", ": not YAML: unacceptable character"),
    ],
)
def test_faults_of_the_whole_file(text: str, says: str, scenario: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(write(scenario, text))
    assert str(caught.value).startswith(f"{scenario}{says}") and "\n" not in str(caught.value)


def test_unreadable_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"^there is no file .*quickstrat\.yaml, .*did you mean 'quickstart'\?$"):
        load_scenario(tmp_path / "quickstrat.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ScenarioError, match=r"binary\.yaml: cannot be read"):
        load_scenario(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sampling.temprature=1", "sampling.temprature: no such field; did you mean 'temperature'?"),
        ("seed", "write key.path=value"),
        (".=1", "write key.path=value"),
        ("seed.deep.er=1", "seed: input should be a valid integer"),
        ("environment.id.x=1", "id is a text, it has no fields"),
        ("heldout.tasks=[", "the value is not YAML"),
        ("heldout.tasks=", "heldout.tasks: input should be a valid integer, got None"),
    ],
)
def test_faults_of_a_change_name_the_change(change: str, says: str, scenario: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(write(scenario, MINIMAL), [change])
    assert str(caught.value).startswith(f"--set {change}: {says}")


# the command


def test_help_comes_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['treegym', '--help']\nfrom treegym.scenarios.commands.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code and 'torch' not in sys.modules"
    )
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in helped.stdout for name in ("train", "eval", "envs", "models", "runs"))


def test_python_m_treegym_refuses_in_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "treegym", "trian"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "treegym: No such command 'trian'. Did you mean 'train'?\n"


@pytest.mark.parametrize("name", ["train", "eval", "envs", "models", "runs", "lessons"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = command(capsys, name, "--help")
    assert status == 0 and f"treegym {name}" in said


def test_refusals(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(scenario, MINIMAL))
    assert refused(capsys, "train", file, "--set", "sed=1") == "--set sed=1: sed: no such field; did you mean 'seed'?"
    assert refused(capsys, "train", str(tmp_path / "nix")).startswith("there is no file")
    assert refused(capsys, "train").startswith("which scenario?")
    assert "--seed" in refused(capsys, "train", file, "--seed", "1")
    assert "nothing to resume" in refused(capsys, "train", "--resume", "--out", str(tmp_path / "nix"))
    assert "nothing to resume" in refused(capsys, "train", file, "--resume", "--runs", str(tmp_path))
    assert refused(capsys, "eval", file, "--model", str(tmp_path / "nix")).startswith("model.name: no model")
    assert refused(capsys, "eval", file, "--set", "heldout.tasks=0").startswith("heldout.tasks is 0")
    assert "did you mean 'treegym/Lookup-v0'?" in refused(capsys, "envs", "treegym/Lokup-v0")
    assert "KEY=VALUE" in refused(capsys, "envs", "treegym/Lookup-v0", "--option", "hops")
    assert "unexpected keyword argument 'hop'" in refused(capsys, "envs", "treegym/Lookup-v0", "--setting", "hop=1")
    assert "expected 1 <= hops" in refused(capsys, "envs", "treegym/Lookup-v0", "--option", "hops=[40]")
    assert "models to fetch" in refused(capsys, "models", "fetch", "nix")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("environment.settings.hop=[1]", "environment: "),
        ("environment.settings.hops=[40]", "environment.heldout: 40 links"),
        (
            "environment.train.hop=[1]",
            "environment.train: 'hop' is no option that the environment reads; it reads h",
        ),
        ("environment.success=exct", "environment.success: no reward term 'exct'; terms: ['exact', 'format']"),
        ("environment.id=CartPole-v1", "environment: CartPole-v1 is a CartPoleEnv, not a TextEnv"),
        ("environment.id=tests/Silent-v0", "warmup.demonstrations: tests/Silent-v0 has no oracle"),
    ],
)
def test_environments_are_tried_before_anything_is_written(
    change: str, says: str, scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = str(write(scenario, NANO.replace("settings: {hops: [1, 2]}", "settings: {}")))
    assert refused(capsys, "train", file, "--set", change, "--out", str(out)).startswith(says)
    assert not out.exists() or not any(out.iterdir())


class HostileEnv(ToolEnv):
    """Answers with markup, emoji codes, long lines and control characters."""

    text = "[bold red]x[/] [/nix] :smile: {0} " + "wide " * 60 + "\x1b[2J\x07\u202e end"

    def begin(self, options: Any) -> str:
        return self.text

    @tool
    def ask(self) -> str:
        """Ask."""
        return self.text

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": 1.0}

    def oracle(self) -> str | None:
        return None if self.over else self.write_answer(self.text) if self.transcript else self.write_call("ask")


class SilentEnv(HostileEnv):
    """Has no oracle."""

    def oracle(self) -> str | None:
        return None


gymnasium.register("tests/Hostile-v0", HostileEnv)
gymnasium.register("tests/Silent-v0", SilentEnv)
SHOWN = "[bold red]x[/] [/nix] :smile: {0} " + "wide " * 60 + "\\x1b[2J\\x07\\u202e end\n"


def test_hostile_texts_are_shown_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = command(capsys, "envs", f"{__name__}:tests/Hostile-v0")
    assert status == 0 and said.count(SHOWN) == 2
    assert "\x1b[2J" not in said and "\x07" not in said and "\u202e" not in said
    say("lone \ud800 [b]")
    assert capsys.readouterr().out == "lone \\ud800 [b]\n"


def test_envs_lists_and_plays(capsys: pytest.CaptureFixture[str]) -> None:
    assert "treegym/Lookup-v0" in command(capsys, "envs")[1]
    status, said, _ = command(capsys, "envs", "treegym/Lookup-v0", "--seed", "1", "--option", "hops=[2]")
    assert status == 0 and "follow 2 links" in said
    assert said.count("<lookup>") == 1 + 2 and said.count("<answer>") == 1 + 1  # once in the instructions
    assert said.endswith("reward 1.10 {'exact': 1.0, 'format': 1.0}\n")
    assert command(capsys, "envs", "treegym/Lookup-v0", "--seed", "1", "--option", "hops=[2]")[1] == said
    assert command(capsys, "envs", "tests/Silent-v0")[0] == 2  # not of treegym: its module is to be named


def test_models_lists_nano(capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = command(capsys, "models")
    assert status == 0 and "nano" in said and "made on the spot" in said


def test_from_training_to_evaluation(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "runs", str(write(scenario, NANO))
    out = folder / "some-1"
    status, said, _ = command(capsys, "train", file, "--out", str(out), "--set", "seed=5")
    assert status == 0 and said.endswith(f"saved in {out}\n")
    labels = ("held-out tasks", "untouched model", "after warm-up", "after training", "difficulty 2", "95% interval")
    assert not [label for label in labels if label not in said]
    assert load_scenario(out / "scenario.yaml").seed == 5
    left = {path.name for path in out.iterdir()} - {"tensorboard"}  # where that is installed
    assert left == {
        "metrics.jsonl",
        "model",
        "scenario.yaml",
        "summary.json",
        "tokenizer.json",
        "trees.jsonl.zst",
        "trees.jsonl.zst.index",
    }
    trained = json.loads((out / "summary.json").read_text())["stages"]["trained"]["success"]

    assert "holds a run already: --resume" in refused(capsys, "train", file, "--out", str(out))
    imported = tmp_path / "imported"
    imported.mkdir()
    (imported / "trees.jsonl.zst").touch()
    assert f"{imported} holds trees already" in refused(capsys, "train", file, "--out", str(imported))
    assert command(capsys, "train", "--resume", "--out", str(out))[1] == f"the run in {out} is finished\n"
    assert "is finished" in command(capsys, "train", file, "--resume", "--runs", str(folder))[1]

    model, results = str(out / "model"), tmp_path / "results.json"
    status, said, _ = command(
        capsys, "eval", file, "--model", model, "--json", str(results), "--out", str(tmp_path / "e")
    )
    assert status == 0 and "success" in said
    measured = json.loads(results.read_text())
    assert measured["stages"]["model"]["success"] == trained and len(measured["success"]) == 4

    (folder / "[b]some-2").mkdir()
    (folder / "[b]some-2" / "scenario.yaml").write_text("seed: 1")
    listed = command(capsys, "runs", str(folder))[1]
    lines = {line.split()[0]: line for line in listed.splitlines() if "some-" in line}
    assert "unfinished" in lines["[b]some-2"]
    assert " finished" in lines["some-1"] and f"{trained['mean']:.1%}" in lines["some-1"]
    assert "no runs in" in command(capsys, "runs", str(tmp_path / "nix"))[1]


def test_scenarios_are_values() -> None:
    chosen = Scenario(TaskSet("treegym/Lookup-v0"), Model("nano"), seed=3)
    assert chosen == Scenario(TaskSet("treegym/Lookup-v0"), Model("nano"), seed=3) != Scenario(chosen.environment)


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("file", sorted(BUNDLED.glob("*.yaml")), ids=lambda file: file.stem)
def test_bundled_scenarios_fit_their_environments(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the scenario corpus has its files
    Path("corpus.jsonl").write_text('{"id": "p", "title": "Moss", "text": "Moss is green."}')
    question = {"question": "Which colour is moss?", "answers": ["green"], "supporting": ["p"]}
    rows = [{"id": split, "split": split, **question} for split in ("train", "test")]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scenario = load_scenario(file)
    check_weights(scenario, try_environment(scenario.environment))


def test_reward_weights_move_from_the_first_step_to_the_last() -> None:
    plan = Improvement(steps=5, reward_weights={"passed": (1.0, 0.0), "solved": (0.0, 2.0)})
    moved = [plan.settings(step)["reward_weights"] for step in (0, 2, 4)]
    assert moved == [{"passed": 1.0, "solved": 0.0}, {"passed": 0.5, "solved": 1.0}, {"passed": 0.0, "solved": 2.0}]
    assert Improvement(steps=5).settings(2) == {}


@pytest.mark.parametrize(
    ("terms", "fault"), [(["exact", "speed"], "'speed' is no term"), (["format"], "'exact' is missing")]
)
def test_reward_weights_name_the_terms_there_are(terms: list[str], fault: str) -> None:
    environment = TaskSet("treegym/Lookup-v0")
    scenario = Scenario(environment, improvement=Improvement(reward_weights={term: (1.0, 0.0) for term in terms}))
    with pytest.raises(ScenarioError, match=f"improvement.reward_weights: {fault}"):
        check_weights(scenario, try_environment(environment))


def test_lists_are_read_by_machines_and_people(capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in command(capsys, *arguments, "--json")[1].splitlines()]

    listed, shown = rows("scenarios"), command(capsys, "scenarios")[1]
    assert {row["name"] for row in listed} == {file.stem for file in BUNDLED.glob("*.yaml")}
    for row in listed:
        assert load_scenario(row["name"]).environment.id == row["environment"]
        assert row["about"].endswith(".") and row["name"] in shown
    assert [row["id"] for row in rows("envs")] == registered()
    assert {row["name"] for row in rows("models")} >= {"nano", "smollm2"}


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "--version")[:2] == (0, f"treegym {treegym.__version__}\n")


def test_runs_are_listed_with_who_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_name_that_is_long_but_stands_whole_in_a_pipe"
    said = command(capsys, "eval", "lookup", "--tasks", "3", "--out", str(tmp_path / name), "--policy", "oracle")[1]
    assert "\noracle, evaluated:\n" in f"\n{said}"
    arguments, environment = [sys.executable, "-m", "treegym", "runs", str(tmp_path)], {**os.environ}
    environment.pop("COLUMNS", None)
    table = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^{name} +oracle +finished +\d+\.0%", table, re.MULTILINE)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "scenario.yaml").write_text(NANO)
    (tmp_path / "b" / "summary.json").write_text("{")
    one, other = (json.loads(line) for line in command(capsys, "runs", str(tmp_path), "--json")[1].splitlines())
    assert (one["run"], one["model"], one["state"]) == (name, "oracle", "finished")
    assert one["success"]["model"].keys() == {"mean", "low", "high"}
    assert (other["model"], other["state"]) == ("nano", "damaged") and "JSON" in other["fault"]


def test_without_a_terminal_long_work_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("treegym.scenarios.watch.time.monotonic", lambda: now)
    bars = ProgressBars()
    bars.begin("evaluating", 100)
    for _ in range(100):
        now += 1.0
        bars.advance()
    assert capsys.readouterr().out == "".join(f"evaluating {done}/100\n" for done in (30, 60, 90))
    bars.advance("loss 0.10")
    assert capsys.readouterr().out == "evaluating 101/100: loss 0.10\n"
