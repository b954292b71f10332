"""Evaluations on disk: resumed to the byte, stopped by budgets, compared, and played by a person."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gymnasium
import numpy as np
import pytest
from commands import command, run_all

from treegym.agents import Run
from treegym.agents.evaluation import Outcome, TaskOutcome, curves, flips, paired
from treegym.agents.evaluation.statistics import wilson
from treegym.envs import Message, Task, ToolEnv
from treegym.scenarios.comparison import verdict_line
from treegym.scenarios.viewer.shelf import Shelf

SCENARIO = """
environment: {id: treegym/Lookup-v0, settings: {hops: [1, 2], max_turns: 3}}
model: {name: nano, dtype: float32, max_rows: 4}
sampling: {max_tokens: 6}
heldout: {tasks: 6, rollouts: 2}
threads: 1
"""
EVALUATION = "treegym.agents.evaluation.run"
# Each is an evaluation of three parts, of two tasks each, interrupted time and again; calls count from the resumption.
CASES: dict[str, list[tuple[str, str, str, int]]] = {
    "while growing": [(EVALUATION, "grow", "first_tree", 1), (EVALUATION, "grow", "first_tree", 2)],
    "while recording": [
        ("treegym.agents.store.store:EpisodeStore", "append", "after", 3),
        ("treegym.agents.store.store:EpisodeStore", "append", "before", 2),
    ],
    "between parts": [(EVALUATION, "write_json", "after", 1), (EVALUATION, "write_json", "before", 2)],
    "while summing up": [
        (EVALUATION, "write_json", "before", 4),
        ("treegym.scenarios.evaluation", "save_chart", "before", 1),
    ],
    "Ctrl-C": [(EVALUATION, "grow", "interrupt", 1), (EVALUATION, "grow", "interrupt", 1)],
}


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    (folder / "tiny.yaml").write_text(SCENARIO)
    ends = {name: 130 if name == "Ctrl-C" else -signal.SIGKILL for name in CASES}
    begun = [(["eval", "tiny.yaml", "--out", name], links[0]) for name, links in CASES.items()]
    statuses = run_all(folder, [(["eval", "tiny.yaml", "--out", "whole"], None), *begun], 1)
    assert statuses == [0, *ends.values()]
    resumed = [(name, link) for name, links in CASES.items() for link in [*links[1:], None]]
    statuses = run_all(folder, [(["eval", "--resume", "--out", name], link) for name, link in resumed], 2)
    assert statuses == [ends[name] if link else 0 for name, link in resumed]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_evaluation_is_the_whole_one(case: str, evaluations: Path) -> None:
    files = {path.name for path in (evaluations / "whole").iterdir()}
    assert {path.name for path in (evaluations / case).iterdir()} == files
    for file in files - {"summary.json", "progress.json", "trees.jsonl.zst.index"}:  # which tell times, or are a cache
        assert (evaluations / case / file).read_bytes() == (evaluations / "whole" / file).read_bytes(), file


def test_an_evaluation_tells_all(evaluations: Path) -> None:
    result = json.loads((evaluations / "whole" / "results.json").read_text())
    trees = [tree for _, tree in Run(evaluations / "whole").trees]
    paths = [[tree.nodes[i] for i in path] for tree in trees for path in tree.paths]
    assert (result["tasks"], result["samples"], result["rollouts"]) == (6, 2, 12) == (len(trees), 2, len(paths))
    assert result["means"]["turns"] == np.mean([len(path) for path in paths])
    assert result["means"]["malformed"] == np.mean([sum(node.info["malformed"] for node in path) for path in paths])
    assert result["truncated"]["turn limit"] == np.mean([path[-1].info.get("cause") == "turn limit" for path in paths])
    assert result["tokens"]["sampled"] == sum(len(node.action.token_ids) for path in paths for node in path)
    contexts = [tree.tokens(path[:i]) for tree in trees for path in tree.paths for i in range(len(path))]
    assert result["tokens"]["sent"] == sum(map(len, contexts))
    assert set(result["by_difficulty"]) == {"1", "2"} and set(result["by_split"]) == {"heldout"}
    assert sum(group["tasks"] for group in result["by_difficulty"].values()) == 6
    assert set(result["pass_at"]) == set(result["pass_hat"]) == {"1", "2"}
    assert set(result["terms"]) == {"exact", "format"}
    ElementTree.parse(evaluations / "whole" / "results.svg")
    volume = Shelf(evaluations / "whole", lambda path: Run(path).trees).volume("whole")
    nodes = [node for number in range(6) for node in volume.tree(number)["nodes"]]
    assert all(node["pieces"] for node in nodes if "\N{REPLACEMENT CHARACTER}" not in node["text"])  # for shading


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    (tmp_path / "some.yaml").write_text(SCENARIO)
    return str(tmp_path / "some.yaml")


def measured(capsys: pytest.CaptureFixture[str], scenario: str, out: Path, *arguments: str) -> dict[str, Any]:
    status, _, said = command(capsys, "eval", scenario, "--out", str(out), *arguments)
    assert status == 0, said
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


# policies and budgets


@pytest.mark.parametrize("env", ["Lookup", "Maze", "Household"])
def test_the_oracle_succeeds_always(env: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.yaml").write_text(f"environment: {{id: treegym/{env}-v0}}\nmodel: {{name: nano}}\nthreads: 1")
    more = ("--policy", "oracle", "--tasks", "5", "--samples", "2", "--set", "environment.settings.max_turns=60")
    result = measured(capsys, str(tmp_path / "some.yaml"), tmp_path / "out", *more)
    assert result["success"] == wilson(5, 5)._asdict() and result["means"]["malformed"] == 0
    assert result["unique_answers"] == 0.5


def test_dice_are_seeded_and_err_now_and_then(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--policy", "random", "--tasks", "20", "--split", "both")
    first = measured(capsys, scenario, tmp_path / "a", *more)
    assert measured(capsys, scenario, tmp_path / "b", *more) == first
    assert measured(capsys, scenario, tmp_path / "c", *more, "--seed", "1") != first
    assert first["tasks"] == 40 and {"heldout", "train"} == set(first["by_split"])
    means = first["means"]
    assert 0 < means["malformed"] < 1 and means["failed_calls"] < means["tool_calls"]
    assert 0.5 < first["unique_answers"] <= 1 and first["success"]["mean"] < 0.5


def test_a_script_plays(scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "some.py"
    script.write_text(
        "import time\n\n\ndef script(text, seed):\n    time.sleep(0.05)\n"
        "    return '<answer>moon</answer>' if 'follow 2' in text else 'hm'\n"
    )
    begun = time.monotonic()
    result = measured(capsys, scenario, tmp_path / "out", "--policy", f"scripted:{script}", "--samples", "1")
    seconds = time.monotonic() - begun
    assert result["by_difficulty"]["2"]["means"]["malformed"] == 0
    assert result["by_difficulty"]["1"]["means"]["malformed"] == 3
    assert result["by_difficulty"]["1"]["truncated"] == {"turn limit": 1.0}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stages"]["model"]["seconds"] <= seconds


def test_a_budget_stops_an_evaluation_and_more_of_it_goes_on(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = measured(capsys, scenario, tmp_path / "whole", "--policy", "random"), tmp_path / "part"
    total = whole["tokens"]["sent"] + whole["tokens"]["sampled"]
    at_once = ("--concurrency", "64")  # all tasks, were there no limit
    part = measured(capsys, scenario, out, "--policy", "random", *at_once, "--max-tokens-total", str(total * 2 // 3))
    assert 0 < part["tasks"] < 6 == part["planned_tasks"] and "tokens" in part["stopped_by"]
    assert part["tokens"]["sent"] + part["tokens"]["sampled"] <= total * 2 // 3
    prices = ("--price-sent", "1", "--price-sampled", "10")
    cost = (whole["tokens"]["sent"] + 10 * whole["tokens"]["sampled"]) / 1e6
    status, said, _ = command(capsys, "eval", "--resume", "--out", str(out), "--max-cost", str(cost / 2), *prices)
    assert status == 0 and "the figures stand on" in said
    stopped = (out / "results.json").read_bytes()
    assert command(capsys, "eval", "--resume", "--out", str(out))[0] == 0
    assert (out / "results.json").read_bytes() == stopped  # the limits are kept
    more = ("--max-tokens-total", str(2 * total), "--max-cost", str(2 * cost))
    assert command(capsys, "eval", "--resume", "--out", str(out), *more)[0] == 0
    assert json.loads((out / "results.json").read_text()) == {**whole, "cost": cost}
    assert (out / "trees.jsonl.zst").read_bytes() == (tmp_path / "whole" / "trees.jsonl.zst").read_bytes()
    for fixed in (["--policy", "oracle"], ["--seed", "1"], ["--set", "seed=1"], [scenario]):
        status, _, said = command(capsys, "eval", "--resume", "--out", str(out), *fixed)
        assert status == 2 and "only the budget can be new" in said


class MuteEnv(ToolEnv):
    """Has no oracle."""

    def begin(self, options: Any) -> str:
        return "?"

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": 0.0}


gymnasium.register("tests/Mute-v0", MuteEnv)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "nix"], "model.name: no model 'nix'"),
        (["--policy", "http://127.0.0.1:1/v1"], "which model? Write http://127.0.0.1:1/v1#MODEL"),
        (["--policy", "scripted:nix.py"], "scripted:nix.py: no such Python file"),
        (["--policy", "human"], "a person plays a task once: --samples 1"),
        (["--max-cost", "1"], "--max-cost needs a price"),
        (["--policy", "random", "--tokenizer", "nix"], "--tokenizer nix: no model 'nix'"),
        (["--set", f"environment={{id: '{__name__}:tests/Mute-v0'}}", "--policy", "oracle"], "Mute-v0 has no oracle"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(
    arguments: list[str], says: str, scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = command(capsys, "eval", scenario, "--out", str(tmp_path / "out"), *arguments)
    assert status == 2 and says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_fails_leaves_an_evaluation_to_go_on_with(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("httpx2", reason="pip install 'treegym[search]'")
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    arguments = (
        "--set",
        "serving.patience=0.01",
        "--policy",
        "chat+http://127.0.0.1:1/v1#m",
        "--out",
        str(tmp_path / "out"),
    )
    status, _, said = command(capsys, "eval", scenario, *arguments)
    assert status == 2 and said.endswith(f"; go on with: treegym eval --resume --out {tmp_path / 'out'}\n")


def test_trees_that_came_from_elsewhere_stay(scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trees.jsonl").write_text("imported\n")
    status, _, said = command(capsys, "eval", scenario, "--policy", "random", "--out", str(tmp_path))
    assert status == 2 and "another --out" in said
    assert (tmp_path / "trees.jsonl").read_text() == "imported\n"


# comparison


def outcomes(successes: Sequence[int], samples: int) -> list[TaskOutcome]:
    """Of tasks of which so many tries succeeded."""
    return [
        TaskOutcome(
            tree=number,
            task=Task("none", number),
            split="",
            difficulty=number % 2,
            rollouts=tuple(
                Outcome(i < count, float(i < count), {}, 1, 0, 0, 0, 0, 1, 1, None, episode=f"{number}.{i}")
                for i in range(samples)
            ),
        )
        for number, count in enumerate(successes)
    ]


@pytest.mark.parametrize("samples", [1, 4])
def test_a_planted_difference_is_found_and_the_same_policy_is_within_noise(samples: int) -> None:
    """Over 100 comparisons of 100 tasks, whose chances are any up to 0.75; the better policy's are 0.25 more."""
    generator = np.random.default_rng(0)
    verdicts: dict[float, list[str]] = {0.0: [], 0.25: []}
    for gain, found in verdicts.items():
        for _ in range(100):
            chances = generator.random(100) * 0.75
            a, b = (outcomes(generator.binomial(samples, p), samples) for p in (chances, chances + gain))
            found.append(paired(a, b).verdict)
    assert verdicts[0.0].count("within noise") >= 91
    assert verdicts[0.25].count("better") >= 91 and "worse" not in verdicts[0.25]


def test_a_comparison_is_the_other_way_round_for_the_other() -> None:
    a, b = outcomes([1] * 20 + [0] * 40, 1), outcomes([0] * 3 + [1] * 37 + [0] * 20, 1)
    forth, back = paired(a, b), paired(b, a)
    assert (forth.verdict, back.verdict) == ("better", "worse") and forth.p == back.p
    assert back.difference == pytest.approx((-forth.difference.mean, -forth.difference.high, -forth.difference.low))
    assert [flip.change for flip in flips(a, b)] == [1.0] * 20 + [-1.0] * 3
    assert flips(a, b)[0].episodes == ("20.0", "20.0")


def test_the_noise_of_the_tries_and_that_of_the_choice_of_tasks_are_told_apart() -> None:
    """Three tasks of twenty are gained, in all tries: nothing that other tries would change."""
    none, some = [0] * 20, [1] * 3 + [0] * 17
    said = verdict_line(paired(outcomes(none, 4), outcomes([4 * x for x in some], 4)))
    assert "+15.0%" in said and "makes 0.0% at most, so what is within noise is the choice of tasks" in said
    half = outcomes([1] * 9, 2)
    assert "chance in the tries alone makes 46.2% at most; a difference" in verdict_line(paired(half, half))
    assert "chance alone stays below" in verdict_line(paired(outcomes(none, 1), outcomes(some, 1)))
    uneven = [*outcomes([4], 4), *outcomes([2], 2)]
    assert paired(uneven, uneven).noise == 0


def test_flips_name_tries_that_differ() -> None:
    [flip] = flips(outcomes([1, 2], 4), outcomes([4, 3], 4))
    assert (flip.a, flip.b, flip.episodes) == ((1, 4), (4, 4), ("0.1", "0.1"))


def test_curves_tell_sharpening_from_something_new() -> None:
    base = outcomes([4] * 60, 32)  # any task now and then
    sharp = outcomes([32] * 30 + [0] * 30, 32)  # the half of them always
    found = curves(base, sharp)
    assert found.verdict == "sharpened, and narrowed: B is ahead at one try, A at 32 tries"
    assert found.ks == [1, 2, 4, 8, 16, 32] and found.crossing == 8 and len(found.only_a) == 30 and not found.only_b
    assert found.a[-1].mean == 1 and found.a[0].mean == 4 / 32
    able = outcomes([8] * 30 + [0] * 30, 32)
    new = curves(able, outcomes([8] * 50 + [0] * 10, 32))
    assert new.verdict == "found something new: B is ahead at one try and still at 32 tries"
    assert new.only_b == [str(tree) for tree in range(30, 50)] and new.crossing is None
    wise = curves(outcomes([8] * 60, 32), outcomes([24] * 60, 32))
    assert wise.verdict == "sharpened, as far as these tasks tell: B is ahead at one try, within noise at 32 tries"
    assert curves(able, able).verdict == "within noise at one try and at 32 tries"
    assert curves(sharp, base).verdict == "broadened: B is behind at one try, ahead at 32 tries"


def test_compare_pairs_tasks_and_says_where_it_cannot(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    measured(capsys, scenario, a, "--policy", "random", "--tasks", "12")
    measured(capsys, scenario, b, "--policy", "oracle", "--tasks", "12")
    measured(capsys, scenario, c, "--policy", "oracle", "--tasks", "8", "--samples", "1")
    results, plot = tmp_path / "results.json", tmp_path / "curve.svg"
    more = ("--curve", "--json", str(results), "--plot", str(plot))
    status, said, _ = command(capsys, "compare", str(a), str(b), *more)
    row = json.loads(results.read_text())
    assert status == 0 and "B is better" in said and row["verdict"] == "better" and row["tasks"] == 12
    assert row["curve"]["ks"] == [1, 2] and set(row["by_difficulty"]) == {"1", "2"}
    ElementTree.parse(plot)
    trees = [[tree for _, tree in Run(folder).trees] for folder in (a, b)]
    for flip in row["flips"]:
        one, other = (side[int(name.split(".")[0])] for side, name in zip(trees, flip["episodes"], strict=True))
        assert one.task == other.task and one.task.seed == flip["seed"]
    file = a / "scenario.yaml"
    file.write_text(file.read_text().replace("success: exact", "success: format"))
    assert command(capsys, "compare", str(b), str(a), "--json", str(results))[0] == 0  # B by what is success to A
    assert json.loads(results.read_text())["success"]["b"] == row["success"]["a"]
    status, said, _ = command(capsys, "compare", str(b), str(b))
    assert status == 0 and "within noise: B - A is +0.0%" in said
    status, _, said = command(capsys, "compare", str(b), str(c))
    assert status == 2 and f"{b} has 12 tasks, {c} 8, 8 are shared; --shared compares these" in said
    assert command(capsys, "compare", str(b), str(c), "--shared")[0] == 0
    status, _, said = command(capsys, "compare", str(c), str(c), "--curve")
    assert status == 2 and "a curve needs several tries" in said
    status, _, said = command(capsys, "compare", str(a), f"{b}@trained")
    assert status == 2 and "no trees of the stage 'trained'; stages: evaluation" in said
    assert "no evaluation and no run" in command(capsys, "compare", str(a), str(tmp_path / "nix"))[2]


# a person


PROMPT = "assistant (you)\r\n> "


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        code = "import os; os.login_tty(0); from treegym.scenarios.commands.cli import main; main()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}
        command, ends = [sys.executable, "-c", code, *arguments], {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **ends)
        os.close(slave)

    def read_until(self, text: str) -> str:
        said = ""
        while text not in said:
            said += os.read(self.master, 4096).decode()
        return said

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self, key: str = "") -> str:
        """What it says to its end; the key is pressed until it leaves, for a terminal drops one as its mode changes."""
        said = b""
        try:
            while True:
                if select.select([self.master], [], [], 2.0)[0]:
                    said += os.read(self.master, 4096)
                elif b"recorded" not in said:
                    self.type(key)
        except OSError:  # nobody holds the other side any more
            pass
        os.close(self.master)
        assert self.process.wait() == 0, said
        return said.decode()


def test_a_person_plays_sees_what_an_agent_sees_and_is_recorded(tmp_path: Path) -> None:
    """One episode to its end, with help and an action of several lines; then one left by Ctrl-D, one by Ctrl-C."""
    task = Task("treegym/Lookup-v0", 4, settings={"hops": [2]})
    env = task.make()
    _, info = env.reset(seed=task.seed)
    arguments = ("play", task.env, "--seed", "4", "--setting", "hops=[2]", "--out", "plays")
    terminal = Terminal(tmp_path, *arguments)
    said = terminal.read_until(PROMPT)
    for message in info["messages"]:
        assert message.role in said and message.text.replace("\n", "\r\n") in said
    terminal.type(":help\n")
    assert "Ctrl-D or Ctrl-C leaves" in terminal.read_until(PROMPT)
    actions = [f"I look.\n{env.oracle()}"]
    terminal.type(f'"""\n{actions[0]}\n"""\n')
    _, _, _, _, info = env.step(actions[0])
    while (action := env.oracle()) is not None:
        terminal.read_until(PROMPT)
        terminal.type(f"{action}\n")
        actions.append(action)
        env.step(action)
    said = terminal.end()
    assert "reward 1.10" in said and "recorded as 0.0 in plays" in said

    for leave in ("\x04", "\x03"):
        terminal = Terminal(tmp_path, *arguments)
        terminal.read_until(PROMPT)
        terminal.type(f"{actions[0].splitlines()[1]}\n")
        terminal.read_until(PROMPT)
        terminal.type(leave)
        assert "the episode has not ended" in terminal.end(leave)
    terminal = Terminal(tmp_path, *arguments)
    terminal.read_until(PROMPT)
    terminal.type("\x04")
    assert "nothing is recorded" in terminal.end("\x04")

    trees = [tree for _, tree in Run(tmp_path / "plays").trees]
    assert [len(tree.nodes) for tree in trees] == [len(actions), 1, 1]
    assert [node.action.text for node in trees[0].nodes] == actions
    assert (tmp_path / "plays" / "tokenizer.json").exists()
    for tree in trees:
        replayed = tree.task.make()
        _, info = replayed.reset(seed=tree.task.seed, options=dict(tree.task.options))
        assert tuple(info["messages"]) == tree.messages and replayed.state_key() == tree.state_key
        for node in tree.nodes:
            observation, reward, terminated, truncated, info = replayed.step(node.action.text)
            messages = tuple(info["messages"]) or (Message("user", observation),)
            assert (messages, reward, terminated, truncated, replayed.state_key()) == (
                node.messages, node.reward, node.terminated, node.truncated, node.state_key,
            )  # fmt: skip
