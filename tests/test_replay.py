"""Replay: every environment answers recorded actions as it did; what does not is found and named."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import gymnasium
import pytest
from commands import command
from tokenizers import Tokenizer
from wander import ENVS, Wander, sandboxed, tasks

from treegym.agents import ChatRenderer, Completion, Policy, RolloutStrategy, RolloutTree, Run, Sampling, grow_trees
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import OraclePlayer, ScriptedPolicy
from treegym.agents.rollouts import (
    LENIENT,
    STRICT,
    Chains,
    Continuation,
    FollowOracle,
    ReplayMismatch,
    Response,
    RewardTerm,
    rescore,
    verify,
)
from treegym.envs import Message, Task, TextEnv
from treegym.scenarios import load_scenario, train
from treegym.scenarios.viewer.shelf import pieces
from treegym.tools import Cassette

pytestmark = pytest.mark.filterwarnings("ignore:the sandbox 'local'")
LONG = Sampling(max_context=1 << 20)
KINDS = {env: type(Task(env, 0, settings=sandboxed(env)).make()) for env in ENVS}
each_env = pytest.mark.parametrize("env", ENVS)


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(build_nano(["red north kitchen"])[1])


def script(text: str, seed: int) -> str:
    return "<answer>red</answer>" if text.count("assistant") > 2 + seed % 3 else "<lookup>red</lookup>"


def grow(
    renderer: ChatRenderer,
    chosen: list[Task],
    strategy: RolloutStrategy | None = None,
    sampling: Sampling = LONG,
    seed: int = 0,
) -> list[RolloutTree]:
    """By default wandering ones, as they come out of a store."""
    policy = ScriptedPolicy(renderer, script)
    trees = asyncio.run(grow_trees(chosen, strategy or Wander(), policy, renderer, sampling, seed=seed))
    return [RolloutTree.from_json(json.loads(json.dumps(tree.to_json()))) for tree in trees]


@pytest.fixture(scope="module")
def recorded(renderer: ChatRenderer) -> dict[str, list[RolloutTree]]:
    """Two trees of each environment."""
    return {env: grow(renderer, tasks(env, 2)) for env in ENVS}


@pytest.fixture(params=["fork", "replay"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether environments can fork."""
    if request.param == "replay":
        for kind in KINDS.values():
            monkeypatch.setattr(kind, "can_fork", False)
            monkeypatch.setattr(kind, "fork", lambda self: pytest.fail("forked"))


def change(monkeypatch: pytest.MonkeyPatch, kind: type[TextEnv], at: str, to: Callable[..., Any]) -> None:
    """Where a step leads to the state `at`, `to` changes what it returned."""
    step = kind.step

    def changed(self: TextEnv, action: str) -> Any:
        given = step(self, action)
        return to(*given) if self.state_key() == at else given

    monkeypatch.setattr(kind, "step", changed)


def another_word(observation: str, reward: Any, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
    [first, *others] = info["messages"]
    words = first.text.split(" ")
    words[len(words) // 2] = "swordfish"
    info["messages"] = [Message(first.role, " ".join(words)), *others]
    return observation, reward, terminated, truncated, info


def a_turn_within(trees: list[RolloutTree]) -> tuple[RolloutTree, int]:
    """A node with siblings or not, but with a node after it; and its tree."""
    found = [(tree, node.parent) for tree in trees for node in tree.nodes if node.parent >= 0]
    return found[len(found) // 2]


@each_env
@pytest.mark.usefixtures("way")
def test_every_environment_answers_as_it_did(env: str, recorded: dict[str, list[RolloutTree]]) -> None:
    assert any(len(tree.leaves) > len({path[0] for path in tree.paths}) for tree in recorded[env])  # branches within
    for tree in recorded[env]:
        assert verify(tree) == verify(tree, LENIENT) == []


@each_env
@pytest.mark.usefixtures("way")
def test_one_word_that_changed_is_found_and_named(
    env: str, recorded: dict[str, list[RolloutTree]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, number = a_turn_within(recorded[env])
    node = tree.nodes[number]
    change(monkeypatch, KINDS[env], node.state_key, another_word)
    for strictness in (STRICT, LENIENT):
        found = {(d.rollout, d.turn): d.difference for d in verify(tree, strictness)}
        alike = [i for i, other in enumerate(tree.nodes) if other.state_key == node.state_key]
        first = {(next(r for r, path in enumerate(tree.paths) if i in path), len(tree.path(i))): i for i in alike}
        assert found and found.keys() <= first.keys()
        rollout, turn = min(found)
        assert first[rollout, turn] == alike[0]
        difference = found[rollout, turn]
        assert difference.field == "messages[0]" and "swordfish" in difference.replayed
        assert (
            difference.recorded == f"[{tree.nodes[alike[0]].messages[0].role}] {tree.nodes[alike[0]].messages[0].text}"
        )


@each_env
@pytest.mark.usefixtures("way")
def test_a_state_that_changed_unseen_is_found_where_all_is_compared(
    env: str, recorded: dict[str, list[RolloutTree]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, number = a_turn_within(recorded[env])
    key, state_key = tree.nodes[number].state_key, KINDS[env].state_key
    monkeypatch.setattr(KINDS[env], "state_key", lambda self: state_key(self).replace(key, "another"))
    first = verify(tree)[0].difference
    assert (first.field, first.recorded, first.replayed) == ("state_key", key, "another")
    assert verify(tree, LENIENT) == []


LOOKUP = "treegym/Lookup-v0"


@pytest.mark.parametrize(
    ("to", "strict", "lenient"),
    [
        (lambda o, r, te, tr, info: (o, r + 1e-9, te, tr, info), "reward", None),
        (lambda o, r, te, tr, info: (o, r + 1e-3, te, tr, info), "reward", "reward"),
        (lambda o, r, te, tr, info: (o, r, te, tr, info | {"new": 1}), "info.new", None),
        (lambda o, r, te, tr, info: (o, r, te, tr, info | {"calls": 9}), "info.calls", None),
        (lambda o, r, te, tr, info: (o, r, True, tr, info), "terminated", "terminated"),
        (lambda o, r, te, tr, info: (o, r, te, True, info), "truncated", "truncated"),
        (lambda o, r, te, tr, info: (o, r, te, tr, info | {"reward_terms": {"exact": 0.5}}), "reward_terms.exact",
         "reward_terms.exact"),
        (lambda o, r, te, tr, info: (o, r, te, tr, info | {"messages": [*info["messages"], Message("user", "x")]}),
         "messages[1]", "messages[1]"),
        (lambda o, r, te, tr, info: (
            o, r, te, tr, info | {"messages": [Message(m.role, f" {m.text} \n") for m in info["messages"]]}),
         "messages[0]", None),
        (lambda o, r, te, tr, info: (
            o, r, te, tr, info | {"messages": [Message("user", m.text) for m in info["messages"]]}),
         "messages[0]", "messages[0]"),
        (lambda *given: 1 / 0, "exception", "exception"),
    ],
)  # fmt: skip
def test_fields_by_mode(
    to: Callable[..., Any], strict: str, lenient: str | None, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    [tree] = grow(renderer, [Task(LOOKUP, 1)], Chains(1))
    change(monkeypatch, KINDS[LOOKUP], tree.nodes[0].state_key, to)
    assert [(d.turn, d.difference.field) for d in verify(tree)] == [(1, strict)]
    assert [(d.turn, d.difference.field) for d in verify(tree, LENIENT)] == ([(1, lenient)] if lenient else [])


def test_what_is_the_same_to_the_byte_is_the_same_to_the_lenient() -> None:
    response = Response((), "", reward=math.nan, reward_terms={"exact": math.nan, "speed": math.inf, "style": None})
    assert STRICT.first(response, response) is LENIENT.first(response, response) is None


def test_a_prompt_that_changed_is_turn_0(recorded: dict[str, list[RolloutTree]]) -> None:
    tree = recorded[LOOKUP][0]
    [found] = verify(replace(tree, messages=(*tree.messages[:-1], Message("user", "another"))))
    assert (found.turn, found.difference.field, found.difference.recorded) == (0, "messages[1]", "[user] another")


def test_episodes_that_the_engine_ended_are_as_recorded(
    renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt] = grow(renderer, [Task(LOOKUP, 1)], Chains(1))
    short = Sampling(max_context=len(prompt.prompt) + LONG.max_tokens + 40)
    for cause, sampling in (("context length", short), ("call limit", replace(LONG, max_calls=2))):
        [tree] = grow(renderer, [Task(LOOKUP, 1)], Chains(6), sampling)
        assert {tree.nodes[leaf].info.get("cause") for leaf in tree.leaves} == {cause}
        assert verify(tree) == []
        rigged = [replace(node, info={**node.info, "cause": "another"}) for node in tree.nodes]
        assert [d.difference.field for d in verify(replace(tree, nodes=tuple(rigged)))][-1] in (
            "truncated",
            "info.cause",
        )


def test_turns_are_played_once_and_environments_closed(
    recorded: dict[str, list[RolloutTree]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, tree = KINDS[LOOKUP], max(recorded[LOOKUP], key=lambda tree: len(tree.nodes))
    steps: list[str] = []
    alive: dict[int, TextEnv] = {}
    step, fork, reset = kind.step, kind.fork, kind.reset

    def opened(env: Any) -> Any:
        return alive.setdefault(id(env), env)

    monkeypatch.setattr(kind, "step", lambda self, action: [steps.append(action), step(self, action)][1])
    monkeypatch.setattr(kind, "fork", lambda self: opened(fork(self)))
    monkeypatch.setattr(kind, "reset", lambda self, **named: reset(opened(self), **named))
    monkeypatch.setattr(kind, "close", lambda self: alive.pop(id(self)))
    assert verify(tree) == [] and len(steps) == len(tree.nodes) and not alive
    monkeypatch.setattr(kind, "can_fork", False)
    assert verify(tree) == [] and not alive
    change(monkeypatch, kind, tree.nodes[0].state_key, another_word)
    assert verify(tree) != [] and not alive


def test_one_rollout_is_verified_alone(recorded: dict[str, list[RolloutTree]], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = max(recorded["treegym/FactSearch-v0"], key=lambda tree: len(tree.leaves))
    leaf = tree.leaves[-1]
    broken = replace(tree, nodes=tuple(replace(n, reward=n.reward + (i == leaf)) for i, n in enumerate(tree.nodes)))
    affected = [rollout for rollout, path in enumerate(tree.paths) if leaf in path]
    for rollout in range(len(tree.leaves)):
        found = verify(broken, rollout=rollout)
        assert [d.rollout for d in found] == ([rollout] if rollout in affected else [])
        assert all(d.turn == len(tree.paths[rollout]) for d in found)


# new rewards


def test_recorded_terms_and_weights_give_the_recorded_rewards(recorded: dict[str, list[RolloutTree]]) -> None:
    for env, trees in recorded.items():
        weights = trees[0].task.make().reward_weights  # type: ignore[attr-defined]
        for tree in trees:
            again = rescore(tree, [], {"format": 0.0, **weights})
            assert [n.reward for n in again.nodes] == pytest.approx([n.reward for n in tree.nodes]), env


def test_terms_see_the_episode_so_far(recorded: dict[str, list[RolloutTree]]) -> None:
    tree = recorded["treegym/Maze-v0"][0]

    def turns(episode: Any) -> float | None:
        assert len(episode.messages) >= len(episode.prompt) + len(episode.actions)
        assert episode.messages[: len(tree.messages)] == tree.messages
        assert episode.over == bool(episode.terms)
        return None if episode.over else float(len(episode.actions))

    scored = rescore(tree, [RewardTerm("turns", turns)], {"turns": 0.5, "exact": 2.0})
    for number, (before, after) in enumerate(zip(tree.nodes, scored.nodes, strict=True)):
        over = before.terminated or before.truncated
        depth = len(tree.path(number))
        assert after.reward_terms == {**before.reward_terms, "turns": None if over else depth}
        assert after.reward == (2.0 * before.reward_terms["exact"] if over else 0.5 * depth)  # type: ignore[operator]
        assert replace(after, reward=before.reward, reward_terms=before.reward_terms) == before


@pytest.mark.usefixtures("way")
def test_live_terms_see_the_environment_after_each_turn(recorded: dict[str, list[RolloutTree]]) -> None:
    def same(episode: Any, env: Any) -> float:
        return float(env.state_key() == episode.turns[-1].state_key)

    for trees in recorded.values():
        scored = rescore(trees[0], [RewardTerm("same", same, live=True)], live=True)
        assert all(node.reward == 1.0 for node in scored.nodes)
        blind = rescore(trees[0], [RewardTerm("same", same, live=True)])
        assert all(node.reward_terms["same"] is None and node.reward == 0.0 for node in blind.nodes)


def test_live_terms_are_not_computed_of_another_episode(
    recorded: dict[str, list[RolloutTree]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, number = a_turn_within(recorded[LOOKUP])
    change(monkeypatch, KINDS[LOOKUP], tree.nodes[number].state_key, another_word)
    with pytest.raises(ReplayMismatch, match=r"treegym/Lookup-v0, seed \d, rollout \d, turn \d: messages\[0\]"):
        rescore(tree, [RewardTerm("one", lambda episode, env: 1.0, live=True)], live=True)


# another future


def continued(
    renderer: ChatRenderer, tree: RolloutTree, policy: Policy | None = None, sampling: Sampling = LONG, **named: Any
) -> RolloutTree:
    policy = policy or ScriptedPolicy(renderer, script)
    [grown] = asyncio.run(grow_trees([tree.task], Continuation(tree, **named), policy, renderer, sampling, seed=3))
    return grown


@each_env
@pytest.mark.usefixtures("way")
def test_continuations_begin_with_the_recorded_turns(
    env: str, recorded: dict[str, list[RolloutTree]], renderer: ChatRenderer
) -> None:
    tree = recorded[env][0]
    path = max(tree.paths, key=len)
    rollout = tree.paths.index(path)
    for turn in {0, 1, len(path) - 1}:
        grown = continued(renderer, tree, rollout=rollout, turn=turn, n=4)
        assert len(grown.leaves) == 4 and grown.prompt == tree.prompt
        for other in grown.paths:
            assert [replace(grown.nodes[i], parent=0) for i in other[:turn]] == [
                replace(tree.nodes[i], parent=0) for i in path[:turn]
            ]
        assert verify(grown) == []
        again = continued(renderer, tree, rollout=rollout, turn=turn, recorded_end=True)
        assert [node.action for node in again.nodes] == [tree.nodes[i].action for i in path]
        assert again.returns == (tree.returns[rollout],)


def test_from_the_prompt_a_policy_plays_as_in_training(renderer: ChatRenderer) -> None:
    [trained] = grow(renderer, [Task(LOOKUP, 1)], Chains(5), seed=3)
    assert continued(renderer, trained, rollout=2, turn=0, n=5).nodes == trained.nodes


def test_the_oracle_goes_on_from_a_turn(renderer: ChatRenderer) -> None:
    [tree] = grow(renderer, [Task(LOOKUP, 1, settings={"max_turns": 12})], Chains(1))
    assert tree.term("exact") == (0.0,)
    grown = continued(renderer, tree, OraclePlayer(), rollout=0, turn=1, n=1)
    assert grown.term("exact") == (1.0,) and grown.nodes[0] == tree.nodes[0]


def test_tokens_that_no_tokenizer_would_choose_are_kept(renderer: ChatRenderer) -> None:
    """A policy may spell a word letter by letter; written again it would be other tokens."""
    tokenizer = renderer.tokenizer
    text = "<lookup>red</lookup>"
    letters = tuple(token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False))
    assert renderer.reply(text)[:-1] != letters and renderer.text(letters) == text
    [tree] = grow(renderer, [Task(LOOKUP, 1)], Chains(1))
    spelled = Completion(text, (*letters, renderer.end_of_turn), (-0.5,) * (len(letters) + 1))
    tree = replace(tree, nodes=(replace(tree.nodes[0], action=spelled), *tree.nodes[1:]))
    assert tree.nodes[0].action.text == text
    assert continued(renderer, tree, rollout=0, turn=1, n=1).nodes[0] == tree.nodes[0]


def test_another_tokenizer_writes_the_turns_anew(renderer: ChatRenderer) -> None:
    [tree] = grow(renderer, [Task(LOOKUP, 1)], Chains(1))
    other = ChatRenderer(build_nano([message.text for message in tree.messages])[1])
    grown = continued(other, tree, rollout=0, turn=2, n=2)
    assert grown.prompt == other.prompt(tree.messages) != tree.prompt
    for node, before in zip(grown.nodes[:2], tree.nodes, strict=False):
        assert node.action == Completion(before.action.text, other.reply(before.action.text))
        assert (node.messages, node.state_key) == (before.messages, before.state_key)


def test_a_turn_that_cannot_be_restored_is_an_error(renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    [tree] = grow(renderer, [Task(LOOKUP, 1)], Chains(1))
    with pytest.raises(ValueError, match="the episode ends at turn 1: call limit"):
        continued(renderer, tree, sampling=replace(LONG, max_calls=1), rollout=0, turn=2)
    change(monkeypatch, KINDS[LOOKUP], tree.nodes[0].state_key, another_word)
    with pytest.raises(ReplayMismatch, match=r"rollout 0, turn 1: messages\[0\]"):
        continued(renderer, tree, rollout=0, turn=2)


# the command


SCENARIO = """
environment: {id: treegym/Lookup-v0, train: {hops: [2]}, heldout: {}}
model: {name: nano, dtype: float32}
sampling: {max_tokens: 6}
threads: 1
"""


@pytest.fixture
def run(tmp_path: Path, renderer: ChatRenderer) -> Path:
    """Two demonstrations and a tree of wandering rollouts."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "scenario.yaml").write_text(SCENARIO)
    run = Run(folder)
    run.save_tokenizer(renderer.tokenizer)
    chosen = [Task(LOOKUP, seed, {"hops": [2]}) for seed in range(2)]
    for tree in (*grow(renderer, chosen, FollowOracle()), *grow(renderer, tasks(LOOKUP, 1))):
        run.trees.append(tree, stage="test", step=0)
    return folder


def test_an_episode_is_shown_as_a_conversation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [tree, _, wild] = [tree for _, tree in Run(run).trees]
    status, said, _ = command(capsys, "replay", "show", str(run), "0")
    assert status == 0 and said.index("assistant turn 1") < said.index("assistant turn 2") < said.index("return 1.10")
    for text in (*(m.text for m in tree.messages), *(m.text for node in tree.nodes for m in node.messages)):
        assert text in said
    assert command(capsys, "replay", "show", str(run), "0.0")[1] == said
    listed = command(capsys, "replay", "show", str(run), "2")[1]
    assert all(f"2.{rollout}: return" in listed for rollout in range(len(wild.leaves)))


def test_verifying_says_what_is_not_as_recorded(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = [tree for _, tree in Run(run).trees]
    turns = sum(len(tree.nodes) for tree in trees)
    assert command(capsys, "replay", "verify", str(run))[:2] == (
        0, f"3 of 3 trees are as recorded (strict; {turns} turns compared)\n",
    )  # fmt: skip
    change(monkeypatch, KINDS[LOOKUP], trees[1].nodes[1].state_key, another_word)
    status, said, _ = command(capsys, "replay", "verify", str(run), "--lenient")
    assert status == 1
    lines = said.splitlines()
    assert lines[0] == "tree 1, rollout 0, turn 2: messages[0] is not as recorded"
    assert any(line.startswith("+ ") and "swordfish" in line for line in lines)
    assert "not as recorded: 1 tree (1)" in lines and lines[-1].startswith("2 of 3 trees are as recorded (lenient")
    assert command(capsys, "replay", "verify", str(run), "0")[0] == 0
    assert command(capsys, "replay", "verify", str(run), "1.0")[0] == 1


class AwayEnv(KINDS[LOOKUP]):  # type: ignore[misc, valid-type]
    """Reads from outside, where the weather is never the same."""

    sources = ("the weather",)
    weather = itertools.count()

    def begin(self, options: Any) -> str:
        return f"{super().begin(options)} Weather {self.consult('the weather', 'today', self.weather.__next__)}."


gymnasium.register("tests/Away-v0", AwayEnv)


def test_what_cannot_be_verified_is_named(
    run: Path, renderer: ChatRenderer, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Run(run).trees
    [tree] = grow(renderer, [Task("tests/Away-v0", 1)], Chains(1))
    store.append(tree, stage="test", step=0)
    store.append(replace(tree, task=Task("tests/Nowhere-v0", 1)), stage="test", step=0)
    status, said, _ = command(capsys, "replay", "verify", str(run))
    assert status == 1
    assert "not verified, 1 tree (3): tests/Away-v0: tests/Away-v0 reads from the weather, and there is no tape" in said
    assert "not verified, 1 tree (4): tests/Nowhere-v0" in said and "3 of 5 trees are as recorded" in said
    file = run / "rewards.py"
    file.write_text("def fate(episode, env):\n    return 1.0\n")
    status, _, error = command(capsys, "replay", "rescore", str(run), "4", "--term", f"{file}:fate", "--live")
    assert status == 2 and "tree 4 cannot be scored: NameNotFound: " in error and error.count("\n") == 1


def test_an_environment_that_fails_stops_no_other(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = KINDS[LOOKUP].reset

    def broken(self: TextEnv, *, seed: int, **named: Any) -> Any:
        return reset(self, seed=seed, **named) if seed != 1 else {}["red"]

    monkeypatch.setattr(KINDS[LOOKUP], "reset", broken)
    status, said, _ = command(capsys, "replay", "verify", str(run))
    assert status == 1 and "not verified, 1 tree (1): treegym/Lookup-v0: KeyError: 'red'" in said
    assert "2 of 3 trees are as recorded" in said


def test_a_run_keeps_what_was_read_from_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "away.yaml", tmp_path / "run"
    file.write_text(
        SCENARIO.replace("treegym/Lookup-v0", "tests/Away-v0") + "algorithm: {parameters: {n: 2}}\n"
        "warmup: {demonstrations: 2}\nimprovement: {steps: 1, tasks_per_step: 2}\nheldout: {tasks: 2}\n"
    )
    train(load_scenario(file), out)
    capsys.readouterr()
    monkeypatch.setattr(AwayEnv, "weather", iter(()))
    assert command(capsys, "replay", "verify", str(out))[:2] == (0, ANY)
    read, opened = Cassette._read, set[int]()
    monkeypatch.setattr(Cassette, "_read", lambda self: [opened.add(id(self)), read(self)][1])
    file = tmp_path / "rewards.py"
    file.write_text("def fate(episode, env):\n    return 1.0\n")
    assert (
        command(capsys, "replay", "rescore", str(out), "--term", f"{file}:fate", "--live")[0] == 0 and len(opened) == 1
    )
    (out / "cassette.jsonl").unlink()
    status, said, _ = command(capsys, "replay", "verify", str(out))
    assert status == 1 and "reads from the weather, and there is no tape" in said and "0 of" in said


def test_new_rewards_are_compared_and_stored(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "rewards.py", tmp_path / "out"
    file.write_text(
        "def haste(episode):\n    return -1.0\n\n\n"
        "def fate(episode, env):\n    return 1.0 if episode.over and env.over else None\n"
    )
    named = ["--term", f"{file}:haste", "--term", f"{file}:fate", "--weight", "exact=3", "--out"]
    status, said, _ = command(capsys, "replay", "rescore", str(run), *named, str(out))
    assert status == 0 and "fate asks for the live environment and is None everywhere: --live" in said
    old = [tree for _, tree in Run(run).trees]
    for (labels, tree), before in zip(Run(out).trees, old, strict=True):
        assert labels == {"stage": "test", "step": 0, "rescored": ["haste", "fate"]}
        expected = [3 * exact - len(path) for exact, path in zip(before.term("exact"), before.paths, strict=True)]
        assert list(tree.returns) == expected
    assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert "is not empty" in command(capsys, "replay", "rescore", str(run), *named, str(out))[2]
    said = command(capsys, "replay", "rescore", str(run), *named[:4], "--live")[1]
    assert "fate is None on" in said and "live environment" not in said


def test_episodes_are_continued_from_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, _ = command(capsys, "replay", "continue", str(run), "1", "--from", "1", "--policy", "oracle")
    assert status == 0 and "another model's tokens" in said and "not saved: --out" in said
    assert said.startswith("assistant turn 2") and said.count("1.10") == 4  # reward, return, and both rows
    out = tmp_path / "out"
    status, said, _ = command(
        capsys, "replay", "continue", str(run), "1", "--from", "1", "--policy", "nano", "--n", "3", "--out", str(out)
    )
    assert status == 0 and "3 from turn 1 on: return" in said and "nano 2" in said and f"saved in {out}" in said
    [(labels, grown)] = Run(out).trees
    assert labels["episode"] == "1.0" and labels["turn"] == 1 and labels["policy"] == "nano" and len(grown.leaves) == 3
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    said = [node.action for node in grown.nodes if "\N{REPLACEMENT CHARACTER}" not in node.action.text]
    assert all(pieces(tokenizer, action.token_ids, action.text) for action in said)
    assert command(capsys, "replay", "verify", str(out))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "RUN"], "Missing argument 'EPISODE'"),
        (["show", "RUN", "3"], "has no tree 3; it has 3, counted from 0"),
        (["show", "RUN", "0.1"], "tree 0 has no rollout 1; it has 1"),
        (["show", "RUN", "x"], "an episode is TREE or TREE.ROLLOUT, such as 17 or 17.3, not 'x'"),
        (["continue", "RUN", "0", "--policy", "oracle"], "Missing option '--from'"),
        (["continue", "RUN", "0", "--from", "1"], "Missing option '--policy'"),
        (["continue", "RUN", "2", "--from", "0", "--policy", "oracle"], "which of the 6 rollouts of tree 2? Such as"),
        (["continue", "RUN", "0", "--from", "3", "--policy", "oracle"], "0.0 ends with turn 3: --from takes an earli"),
        (["continue", "RUN", "0", "--from", "1", "--policy", "no-such"], "no model 'no-such'"),
        (["rescore", "RUN"], "which terms? --term MODULE:FUNCTION or FILE.py:FUNCTION"),
        (["rescore", "RUN", "--term", "json"], "--term takes MODULE:FUNCTION or FILE.py:FUNCTION, not 'json'"),
        (["rescore", "RUN", "--term", "json:nix"], "--term json:nix: json ("),
        (["rescore", "RUN", "--term", "nix.py:nix"], "--term nix.py:nix: "),
        (["rescore", "RUN", "--term", "json:dumps"], "the function takes an episode, or an episode and the en"),
        (["rescore", "RUN", "--term", "math:sqrt"], "--term math:sqrt: treegym/Lookup-v0, seed 0, turn 1: Type"),
        (["rescore", "RUN", "--term", "builtins:ascii"], "tree 0 cannot be scored: TypeError: the reward term asci"),
        (["rescore", "RUN", "0.0", "--term", "math:sqrt"], "--term takes a whole tree, TREE, not 0.0"),
        (["rescore", "RUN", "--term", "math:sqrt", "--weight", "exct=1"], "--weight: no term 'exct'"),
        (["rescore", "RUN", "--term", "math:sqrt", "--weight", "exact"], "--weight takes TERM=NUMBER"),
        (["RUN", "--verify", "--lenient"], "write: treegym replay verify RUN --lenient"),
        (["RUN", "17.3"], "write: treegym replay show RUN 17.3"),
        (["RUN", "--rescore", "a:b", "--live"], "write: treegym replay rescore RUN --term a:b --live"),
        (["RUN", "1", "--from", "2", "--policy", "p"], "write: treegym replay continue RUN 1 --from 2 --policy p"),
    ],
)  # fmt: skip
def test_misuse_is_refused_in_one_line(
    arguments: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = command(capsys, "replay", *(word.replace("RUN", str(run)) for word in arguments))
    assert status == 2 and says.replace("RUN", str(run)) in said and said.count("\n") == 1


def test_a_run_that_is_none_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, said = command(capsys, "replay", "verify", str(tmp_path / "nix"))
    assert status == 2 and "there is no such directory" in said and not (tmp_path / "nix").exists()
    assert "holds no trees" in command(capsys, "replay", "verify", str(tmp_path))[2]
