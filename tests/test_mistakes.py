"""What a user gets wrong in a part of his own is said with the part's name, early, and in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import command

PARTS = """
import numpy as np
import gymnasium
from dataclasses import dataclass
from treegym.envs import LookupEnv
from treegym.trainers import spread


class Raises(LookupEnv):
    def lookup(self, word: str) -> str:
        return [1][7]


class Fails(LookupEnv):
    def score(self, answer):
        return [1][7]


gymnasium.register("mistakes/Fails-v0", Fails)


class NoEnd:
    async def grow(self, tree):
        await tree.extend(tree.root, 0)


class Twice:
    async def grow(self, tree):
        await tree.rollout(tree.root, 0)
        await tree.rollout(tree.root, 0)


class Plain:
    def grow(self, tree):
        return 7


class Crashes:
    async def grow(self, tree):
        await tree.rollout(tree.root, 0)
        [1][7]


@dataclass(frozen=True)
class Loss:
    aggregation: str = "token-mean"
    needs: frozenset = frozenset()
    couples: str = "token"
    keeps_zeros: bool = True
    scalar: bool = False

    def __call__(self, logprobs, terms):
        return -logprobs.mean() if self.scalar else -logprobs


def few(trees):
    return [spread(tree, tree.returns)[:1] for tree in trees]


def flat(trees):
    return [[1.0] * len(tree.leaves) for tree in trees]


def one(trees):
    return [spread(tree, tree.returns) for tree in trees][:1]


def nothing(trees):
    return None


def nan(trees):
    return [spread(tree, [np.nan] * len(tree.leaves)) for tree in trees]


def late(trees, q: float):
    return [spread(tree, tree.returns) for tree in trees]


def noarg():
    return []


class Clerk:
    def __init__(self, word: str):
        self.word = word

    async def act(self, messages, env, seed):
        return self.word


class Mute(Clerk):
    async def act(self, messages, env, seed):
        return None


class Sync(Clerk):
    def act(self, messages, env, seed):
        return self.word
"""
SCENARIO = """
environment: {id: treegym/Lookup-v0}
model: {name: nano, dtype: float32}
algorithm: {parameters: {n: 2}}
sampling: {max_tokens: 4}
warmup: {demonstrations: 0}
improvement: {steps: 1, tasks_per_step: 2}
heldout: {tasks: 2, untrained: 0}
threads: 1
"""


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("gymnasium.logger.warn", lambda *texts: None)  # that an environment is registered again
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistakes.py").write_text(PARTS)
    (tmp_path / "some.yaml").write_text(SCENARIO)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    for name in [name for name in sys.modules if name.startswith("mistakes")]:
        del sys.modules[name]


def of_rollout(name: str) -> str:
    return f"algorithm.rollout=mistakes.py:{name}"


def of_advantage(name: str) -> str:
    return f"algorithm.advantage=mistakes.py:{name}"


def of_loss(fields: str) -> str:
    return f"algorithm.loss={{'mistakes.py:Loss': {{{fields}}}}}"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (of_rollout("NoEnd"), ValueError, r"^NoEnd\.grow ended no rollout of treegym/Lookup-v0, seed \d+: await tree"),
        (
            of_rollout("Twice"),
            ValueError,
            "^rollout 0 has ended before: each rollout of a tree has a number of",
        ),
        (of_rollout("Plain"), TypeError, r"^Plain\.grow must be `async def`: it returned int"),
        (
            of_advantage("few"),
            ValueError,
            r"^few gave 1 rollouts of \[\d+\] turns for tree 0, which has rollouts of \[",
        ),
        (of_advantage("flat"), ValueError, "^flat gave something else than lists of turns for tree 0, which has rollo"),
        (of_advantage("one"), ValueError, r"^one gave 1 for 2 trees; advantages are \[tree\]\[rollout\]\[turn\]"),
        (of_advantage("nothing"), ValueError, "^nothing gave a NoneType for 2 trees; advantages are"),
        (of_advantage("nan"), ValueError, "^nan gave an advantage that is not finite, for tree 0"),
        (of_loss("scalar: true"), ValueError, r"^Loss gave losses of shape \[\], not \[\d+\]"),
    ],
)
def test_code_that_is_wrong_raises_with_its_name(
    change: str, error: type[Exception], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """These are errors of code: they have a traceback."""
    with pytest.raises(error, match=says):
        from treegym.scenarios import load_scenario, train

        train(load_scenario("some.yaml", [change]), "run")


def test_an_error_of_a_strategy_is_not_one_of_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    from treegym.scenarios import load_scenario, train

    with pytest.raises(IndexError) as raised:
        train(load_scenario("some.yaml", [of_rollout("Crashes")]), "run")
    assert re.fullmatch(r"in Crashes\.grow, a tree of treegym/Lookup-v0, seed \d+", raised.value.__notes__[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_advantage("late"), "algorithm.advantage: mistakes.py:late: missing a required argument: 'q'; write {'"),
        (
            of_advantage("noarg"),
            "algorithm.advantage: mistakes.py:noarg takes nothing; an AdvantageEstimator is called",
        ),
        (
            of_loss("aggregation: tokenmean"),
            "algorithm: Loss.aggregation is 'tokenmean'; it can be token-mean, seq-mean-",
        ),
        (of_loss("couples: tokens"), "algorithm: Loss.couples is 'tokens'; it can be token, turn, rollout"),
        (
            of_loss("needs: [depth]"),
            "algorithm.loss: Loss needs the column 'depth'; a scenario has entropy, old, referen",
        ),
    ],
)
def test_what_can_be_seen_before_the_run_is_said_before_it(
    change: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = command(capsys, "train", "some.yaml", "--set", change, "--out", "run")
    assert status == 2 and says in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [("train",), ("eval", "--policy", "random")])
def test_an_error_of_the_environment_is_not_blamed_on_the_model(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--set", "environment.id=mistakes.py:mistakes/Fails-v0", "--out", "run")
    status, _, said = command(capsys, words[0], "some.yaml", *words[1:], *more)
    place = r"mistakes\.py:mistakes/Fails-v0, seed 0, options \{'split': 'train'\}, turn \d+: IndexError: list index"
    assert status == 2 and re.search(rf"treegym: {place} out of range \(mistakes\.py:\d+, in score\)", said)


def test_a_policy_takes_its_fields_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = "--policy", "{mistakes.py:Clerk: {word: hello}}"
    status, _, said = command(capsys, "eval", "some.yaml", *told, "--out", "said")
    assert status == 0, said
    from treegym.agents import Run

    assert {node.action.text for _, tree in Run(Path("said")).trees for node in tree.nodes} == {"hello"}
    status, _, said = command(capsys, "eval", "some.yaml", "--policy", "mistakes.py:Clerk", "--out", "none")
    assert status == 2 and "missing 1 required positional argument: 'word'; it is given renderer, scenario, mod" in said
    for name, why in (("Mute", "act returned NoneType, not str"), ("Sync", "act must be `async def`: it returned str")):
        with pytest.raises(TypeError, match=rf"^{name}\.{re.escape(why)}"):
            command(capsys, "eval", "some.yaml", "--policy", f"{{mistakes.py:{name}: {{word: hi}}}}", "--out", name)
