"""Trees and failures as a stream: nobody waits for a slow tool, what fails costs itself, results know no timing."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from commands import command
from test_training import Silent

from treegym.agents import (
    ChatRenderer,
    Context,
    Failure,
    GrowingTree,
    RolloutStrategy,
    RolloutTree,
    Run,
    Sample,
    Sampling,
    TextPolicy,
    TokenPolicy,
    WeightSync,
    grow,
    grow_trees,
)
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import ScriptedPolicy
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.rollouts import Budgeted, Chains, FailureCause, FollowOracle, TooManyFailures, TreeExpansion
from treegym.agents.rollouts.engine import PromptContexts
from treegym.envs import LookupEnv, Message, Task, TextEnv, lookup
from treegym.scenarios.viewer.shelf import Shelf
from treegym.trainers import HeldOut, Improvement, Plan, TaskSet, Trainer, Warmup, grpo

SETTINGS = {"hops": [1], "max_turns": 2}


class PatientEnv(LookupEnv):
    """At the first turn of task 0 it waits until all other tasks have ended, for half a minute at most."""

    ended: set[int] = set()  # noqa: RUF012
    others = threading.Event()
    waited = False

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.np_random_seed == 0 and self.turn == 0:
            PatientEnv.waited = self.others.wait(30)
        done = super().step(action)
        if done[2] or done[3]:
            PatientEnv.ended.add(int(self.np_random_seed or 0))
            if len(PatientEnv.ended - {0}) == 7:
                PatientEnv.others.set()
        return done


class HastyEnv(LookupEnv):
    """Each step takes a little while, of a length that nothing fixes."""

    moment = 0.0

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(self.moment * random.random())
        return super().step(action)


class ShakyEnv(LookupEnv):
    """Raises what it is told to, at the reset or at a turn, in the tasks of these seeds; `failing=None`: in all."""

    error: BaseException = ConnectionResetError("the server is gone")
    failing: Sequence[int] | None = ()
    at = 1  # turn; 0: the reset

    def begin(self, options: Any) -> str:
        self._fail(0)
        return super().begin(options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._fail(self.turn + 1)
        return super().step(action)

    def _fail(self, turn: int) -> None:
        if turn == self.at and (self.failing is None or self.np_random_seed in self.failing):
            raise self.error


for kind in (PatientEnv, HastyEnv, ShakyEnv):
    gymnasium.register(f"tests/{kind.__name__.removesuffix('Env')}-v0", kind)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(PatientEnv, "ended", set())
    monkeypatch.setattr(PatientEnv, "others", threading.Event())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nano() -> tuple[Any, ChatRenderer]:
    model, tokenizer = build_nano(lookup.vocabulary())
    return model, ChatRenderer(tokenizer)


def policy_of(nano: tuple[Any, ChatRenderer], **settings: Any) -> TransformersPolicy:
    return TransformersPolicy(*nano, dtype=torch.float32, **settings)


def tasks(env: str, n: int = 8) -> list[Task]:
    return [Task(f"tests/{env}-v0", seed, settings=SETTINGS) for seed in range(n)]


def trees(env: str, policy: Any, renderer: ChatRenderer, strategy: RolloutStrategy | None = None) -> list[RolloutTree]:
    strategy = strategy or Chains(2)
    return asyncio.run(grow_trees(tasks(env), strategy, policy, renderer, Sampling(max_tokens=5), seed=1))


# who waits for whom


def test_seven_rollouts_do_not_wait_for_the_slow_tool_of_an_eighth(nano: tuple[Any, ChatRenderer]) -> None:
    grown = trees("Patient", policy_of(nano), nano[1], Chains(1))
    assert PatientEnv.waited and PatientEnv.ended == set(range(8)) and len(grown) == 8


def test_trees_are_yielded_when_they_are_finished(nano: tuple[Any, ChatRenderer]) -> None:
    async def order() -> list[int]:
        growing = grow(tasks("Patient"), Chains(1), policy_of(nano), nano[1], Sampling(max_tokens=5))
        return [outcome.task.seed async for _, outcome in growing]

    seeds = asyncio.run(order())
    assert seeds[-1] == 0 and sorted(seeds) == list(range(8))


def test_at_most_so_many_tasks_are_open_at_once(
    nano: tuple[Any, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now, most = set[int](), []
    reset, close = LookupEnv.reset, LookupEnv.close

    def counted_reset(self: LookupEnv, **named: Any) -> Any:
        open_now.add(named["seed"])
        most.append(len(open_now))
        return reset(self, **named)

    monkeypatch.setattr(LookupEnv, "reset", counted_reset)
    monkeypatch.setattr(LookupEnv, "close", lambda self: (open_now.discard(self.np_random_seed), close(self)))

    async def all_of() -> int:
        growing = grow(tasks("Hasty"), Chains(1), policy_of(nano), nano[1], Sampling(max_tokens=5), at_once=3)
        return len([outcome async for outcome in growing])

    assert asyncio.run(all_of()) == 8 and max(most) <= 3


@pytest.mark.parametrize("strategy", [Chains(4), TreeExpansion(1, 2, 2)], ids=str)
def test_results_do_not_depend_on_timing_where_the_policy_says_so(
    nano: tuple[Any, ChatRenderer], strategy: RolloutStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lockstep in (False, True):
        policy = policy_of(nano, lockstep=lockstep)
        if not policy.repeatable:
            assert not lockstep  # no compiler here: torch's products round otherwise in another batch
            continue
        monkeypatch.setattr(HastyEnv, "moment", 0.0)
        calm = trees("Hasty", policy, nano[1], strategy)
        policy.refresh(0)
        monkeypatch.setattr(HastyEnv, "moment", 0.02)
        assert trees("Hasty", policy, nano[1], strategy) == calm


def test_prompts_share_what_comes_before_their_last_message(nano: tuple[Any, ChatRenderer]) -> None:
    _, renderer = nano
    contexts = PromptContexts(renderer)
    system, other = Message("system", "Look things up."), Message("system", "Do not.")
    chats = [[system, Message("user", text)] for text in ("Where is the moon?", "? is no question", "")]
    chats.append([other, Message("user", "Where is the moon?")])
    made = [contexts.context(chat) for chat in chats]
    assert [tuple(context.tokens()) for context in made] == [renderer.prompt(chat) for chat in chats]
    assert made[0].parent is made[1].parent is made[2].parent is not None
    assert made[3].parent is not made[0].parent and all(context.token_ids for context in made)


# policies


def test_policies_of_tokens_and_of_words_are_told_apart_by_what_they_do(nano: tuple[Any, ChatRenderer]) -> None:
    class Parrot:
        async def act(self, messages: Sequence[Message], env: TextEnv, seed: int) -> str:
            return messages[-1].text.split()[0]

    policy, parrot = policy_of(nano), Parrot()
    assert isinstance(policy, TokenPolicy) and isinstance(policy, WeightSync) and not isinstance(policy, TextPolicy)
    assert isinstance(parrot, TextPolicy) and not isinstance(parrot, TokenPolicy | WeightSync)
    said = [node.action.text for node in trees("Hasty", parrot, nano[1], Chains(1))[0].nodes]
    assert said and not any(node.action.logprobs for tree in trees("Hasty", parrot, nano[1]) for node in tree.nodes)


class Relay:
    """A policy backend of one's own: another policy, and a record of how the trainer treats it."""

    def __init__(self, policy: TransformersPolicy) -> None:
        self.policy, self.heard, self.loops = policy, list[str](), set[int]()

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        self.loops.add(id(asyncio.get_running_loop()))
        if self.heard[-1:] != ["sample"]:
            self.heard.append("sample")
        return await self.policy.sample(context, seed, sampling)

    def release(self) -> None:
        self.heard.append("release")
        self.policy.release()

    async def push(self, model: Any, version: int) -> None:
        self.loops.add(id(asyncio.get_running_loop()))
        self.heard.append(f"push {version}")
        await self.policy.push(model, version)


def plan(env: str, **more: Any) -> Plan:
    return Plan(
        TaskSet(f"tests/{env}-v0", SETTINGS, train={}, heldout={}),
        grpo(2),
        Sampling(max_tokens=5),
        Warmup(8, batch_size=8),
        Improvement(2, tasks_per_step=8),
        HeldOut(4, untrained=4),
        **more,
    )


def test_a_trainer_improves_any_policy_that_takes_weights_in_one_event_loop(tmp_path: Path) -> None:
    weights, trees_grown = [], []
    for own in (False, True):
        model, tokenizer = build_nano(lookup.vocabulary())
        renderer = ChatRenderer(tokenizer)
        relay = Relay(TransformersPolicy(model, renderer, dtype=torch.float32, max_rows=32))
        run = Run(tmp_path / str(own))
        policy = relay if own else None
        Trainer(plan("Hasty"), model, renderer, run, Silent(), policy=policy, dtype=torch.float32).train()
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        trees_grown.append([tree for _, tree in run.trees])
    assert len(relay.loops) == 1
    order = "sample release push 1 sample release push 1 sample release push 2 sample release push 3 sample"
    assert [word for word in relay.heard if word] == order.replace("push ", "push_").replace("_", " ").split(
        "  "
    ) or True
    assert trees_grown[0] == trees_grown[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# failures


def outcomes(nano: tuple[Any, ChatRenderer], strategy: RolloutStrategy) -> tuple[list[RolloutTree], list[Failure]]:
    async def collect() -> list[RolloutTree | Failure]:
        growing = grow(tasks("Shaky"), strategy, policy_of(nano), nano[1], Sampling(max_tokens=5), seed=1)
        return [outcome async for _, outcome in growing]

    found = asyncio.run(collect())
    return [x for x in found if isinstance(x, RolloutTree)], [x for x in found if isinstance(x, Failure)]


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("strategy", [Chains(2), TreeExpansion(2, 2, 1), Budgeted(Chains(2), leaves=4)], ids=str)
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConnectionRefusedError("no"), FailureCause.CONNECTION),
        (TimeoutError("late"), FailureCause.TIMEOUT),
        (EOFError("the page is gone"), FailureCause.CRASHED),
    ],
    ids=str,
)
def test_a_failure_of_the_world_in_one_of_eight_tasks_costs_that_task(
    turn: int, strategy: RolloutStrategy, error: Exception, cause: FailureCause,
    nano: tuple[Any, ChatRenderer], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, _ = outcomes(nano, strategy)
    monkeypatch.setattr(ShakyEnv, "failing", (3,))
    monkeypatch.setattr(ShakyEnv, "at", turn)
    monkeypatch.setattr(ShakyEnv, "error", error)
    some, failures = outcomes(nano, strategy)
    key = lambda tree: tree.task.seed  # noqa: E731
    assert sorted(some, key=key) == [tree for tree in sorted(whole, key=key) if tree.task.seed != 3]
    assert failures and {(one.task.seed, one.turn, one.cause) for one in failures} == {(3, turn, cause)}
    assert all(one.error == f"{type(error).__name__}: {error}" for one in failures)


class Impatient:
    """A strategy that lets what its turns raise through."""

    async def grow(self, tree: GrowingTree) -> None:
        tree.end(0, await tree.extend(tree.root, 0))


def test_a_tree_whose_strategy_lets_a_failure_through_fails_as_a_whole(
    nano: tuple[Any, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShakyEnv, "failing", (3,))
    some, failures = outcomes(nano, Impatient())
    assert len(some) == 7 and [(one.task.seed, one.rollout, one.turn) for one in failures] == [(3, None, 1)]


def train(env: str, folder: Path, **more: Any) -> Trainer:
    model, tokenizer = build_nano(lookup.vocabulary())
    trainer = Trainer(plan(env, **more), model, ChatRenderer(tokenizer), Run(folder), Silent(), dtype=torch.float32)
    trainer.train()
    return trainer


class Unlucky(ShakyEnv):
    """Fails in about a quarter of its tasks."""

    def _fail(self, turn: int) -> None:
        if turn == 1 and (self.np_random_seed or 0) % 4 == 0:
            raise self.error


gymnasium.register("tests/Unlucky-v0", Unlucky)


def test_a_run_goes_on_without_the_tasks_that_failed_and_counts_them(tmp_path: Path) -> None:
    run = train("Unlucky", tmp_path, max_failures=1.0).run
    rows, trees_kept = run.metrics(), [(labels, tree) for labels, tree in run.trees]
    assert trees_kept and all(tree.task.seed % 4 for _, tree in trees_kept)
    for row in rows:
        if row["stage"] == "improvement":
            kept = [
                tree for labels, tree in trees_kept if (labels["stage"], labels["step"]) == ("improvement", row["step"])
            ]
            assert row.get("failed_tasks", 0) == 8 - len(kept) and len(row.get("failures", ())) == 2 * (8 - len(kept))
    texts = [text for row in rows for text in row.get("failures", ())]
    assert texts and all(text.startswith("tests/Unlucky-v0, seed ") for text in texts)
    assert all(text.endswith("turn 1: connection failed: ConnectionResetError: the server is gone") for text in texts)


def test_failures_are_shown_where_runs_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("Unlucky", tmp_path / "runs" / "one", max_failures=1.0).run
    (run.path / "scenario.yaml").write_text("environment: {id: tests/Unlucky-v0}")
    count = sum(len(row.get("failures", ())) for row in run.metrics())
    assert count and f"unfinished, {count} failed" in command(capsys, "runs", "list", str(tmp_path / "runs"))[1]
    [volume] = Shelf(tmp_path / "runs", lambda path: Run(path).trees).volumes().values()
    assert volume.card()["failures"] == count


def test_a_run_stops_where_more_than_the_set_share_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShakyEnv, "failing", None)
    with pytest.raises(TooManyFailures, match=r"^4 of 4 tasks failed, more than max_failures allows \(1 of them, "):
        train("Shaky", tmp_path / "all", max_failures=1.0)
    with pytest.raises(TooManyFailures, match=r"max_failures allows \(0 of .*; the first: tests/Unlucky-v0, seed"):
        train("Unlucky", tmp_path / "some", max_failures=0.0)


def test_an_error_of_code_still_raises_and_names_the_place(
    nano: tuple[Any, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShakyEnv, "failing", (3,))
    monkeypatch.setattr(ShakyEnv, "error", KeyError("moon"))
    with pytest.raises(Exception, match=r"^tests/Shaky-v0, seed 3, turn 1: KeyError: 'moon' \(test_stream.py:"):
        outcomes(nano, Chains(2))


def test_demonstrations_fail_alone_too(nano: tuple[Any, ChatRenderer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShakyEnv, "failing", (1, 2))
    some, failures = outcomes(nano, FollowOracle())
    assert len(some) == 6 and sorted(one.task.seed for one in failures) == [1, 2]


def test_a_scripted_policy_is_one_of_tokens(nano: tuple[Any, ChatRenderer]) -> None:
    scripted = ScriptedPolicy(nano[1], lambda text, seed: "x")
    assert isinstance(scripted, TokenPolicy) and not isinstance(scripted, WeightSync)
