"""Trees that grow ahead of the learner: their weights, who waits for whom, and what a stopped run keeps."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from treegym.agents import (
    ROOT,
    ChatRenderer,
    Completion,
    Context,
    Failure,
    Node,
    RolloutTree,
    Run,
    Sample,
    Sampling,
    Stopped,
    derive_seed,
)
from treegym.agents.loop import SILENT, Silent
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.rollouts import FailureCause
from treegym.envs import Message, Task, lookup
from treegym.trainers import HeldOut, Improvement, Learner, Optimization, Plan, TaskSet, Trainer, Uniform, Warmup, grpo
from treegym.trainers.learner import Checkpoints
from treegym.trainers.pipeline import Grown, read_ahead, write_ahead

ONE_HOP = TaskSet("treegym/Lookup-v0", {"hops": [1]})
WARM = 12  # steps of the warm-up, after which rollouts of a task have different returns
PATIENCE = 60.0  # seconds after which a test that waits in vain fails


def plan(max_lag: int, steps: int = 4, *, warm: bool = False, **improvement: Any) -> Plan:
    optimization = Optimization(1e-3)
    warmup = Warmup(32, 3, 8, optimization=Optimization(5e-3)) if warm else Warmup(0)
    improving = Improvement(steps, 2, optimization=optimization, max_lag=max_lag, **improvement)
    return Plan(ONE_HOP, grpo(4), Sampling(max_tokens=6), warmup, improving, HeldOut(0))


def nano() -> tuple[PreTrainedModel, ChatRenderer]:
    model, tokenizer = build_nano(lookup.vocabulary(), 0)
    return model, ChatRenderer(tokenizer)


def trainer(chosen: Plan, folder: Path, policy: Any = None, watcher: Any = SILENT) -> Trainer:
    model, renderer = nano() if policy is None else (policy.learner, policy.renderer)
    return Trainer(chosen, model, renderer, Run(folder), watcher, policy=policy, dtype=torch.float32)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of the improvement, without their times."""
    return [{**row, "seconds": None} for row in Run(folder).metrics() if row["stage"] == "improvement"]


def improved(folder: Path) -> list[tuple[int, RolloutTree]]:
    return [(labels["step"], tree) for labels, tree in Run(folder).trees if labels["stage"] == "improvement"]


def versions(tree: RolloutTree) -> set[int]:
    return {node.action.weights_version for node in tree.nodes}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# a policy that samples from the model's own weights


@pytest.mark.parametrize("max_lag", [0, 1, 2])
def test_the_trees_of_a_step_begin_under_the_weights_of_max_lag_steps_before(max_lag: int, tmp_path: Path) -> None:
    trainer(plan(max_lag, warm=True), tmp_path).train()
    grown = improved(tmp_path)
    assert [step for step, _ in grown] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(versions(tree) == {WARM + max(0, step - max_lag)} for step, tree in grown)
    lags = [(row.get("mean_lag"), row.get("greatest_lag")) for row in rows(tmp_path)]
    behind = [min(step, max_lag) for step in range(4)]
    assert lags == ([(None, None)] * 4 if max_lag == 0 else [(lag, lag) for lag in behind])
    apart = [row["sampler_deviation"] for row in rows(tmp_path)]
    assert all(deviation < 1e-4 for deviation, lag in zip(apart, behind, strict=True) if not lag)
    assert max_lag == 0 or max(apart) > 1e-4


def test_a_draw_knows_the_reports_of_steps_more_than_max_lag_before(tmp_path: Path) -> None:
    """The steps between are not trained yet when the tasks are drawn."""
    heard: dict[int, list[int]] = {}

    class Listening(Uniform):
        def draw(self, step: int, count: int, seed: int, state: Any) -> Any:
            heard[step] = state.get("steps", [])
            return super().draw(step, count, seed, state)

        def report(self, step: int, trees: Any, state: Any) -> Any:
            return {"steps": [*state.get("steps", []), step]}

    trainer(plan(2, steps=5, source=Listening(ONE_HOP)), tmp_path).train()
    assert heard == {0: [], 1: [], 2: [], 3: [0], 4: [0, 1]}


# a policy with weights of its own


class Beside:
    """Samples from a copy of the learner's model, as a server does; `gate` is awaited before each reply."""

    moved = False  # whether the learner's weights may be others than those of the last push
    released = 0

    def __init__(self, gate: Callable[[Beside, int], Any]) -> None:
        self.learner, self.renderer = nano()
        self.copy = copy.deepcopy(self.learner)
        self.policy = TransformersPolicy(self.copy, self.renderer, dtype=torch.float32)
        self.gate = gate

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        await self.gate(self, seed)
        return await self.policy.sample(context, seed, sampling)

    def release(self) -> None:
        self.released += 1

    @contextlib.asynccontextmanager
    async def moving(self) -> AsyncIterator[None]:
        self.moved = True
        yield

    async def push(self, model: PreTrainedModel, version: int) -> None:
        self.moved = False
        self.copy.load_state_dict(model.state_dict())
        self.policy.refresh(version)


def seeds(step: int, *places: int) -> set[int]:
    """Of the rollouts of these tasks of a step."""
    drawn = Uniform(ONE_HOP).draw(step, 2, 0, {})
    first = derive_seed(0, "rollout", step)
    return {derive_seed(first, drawn[place].seed, number) for place in places for number in range(4)}


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not happened():
            await asyncio.sleep(0.001)


def test_the_learner_waits_for_no_tree_of_a_later_step(tmp_path: Path) -> None:
    """The trees of step 2 wait until step 1 is trained: if the learner waited for them, neither would go on."""
    slow = seeds(2, 0, 1)

    async def gate(policy: Beside, seed: int) -> None:
        if seed in slow:
            await until(lambda: policy.policy.weights_version >= 2)

    trainer(plan(2), tmp_path, Beside(gate)).train()
    assert [step for step, _ in improved(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {2: {2}}.items() <= {step: versions(tree) for step, tree in improved(tmp_path)}.items()


def test_trees_grow_while_the_learner_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 1 is sampled in the middle of the update of step 0. The policy is told of it, and is not asked to let
    go of its weights."""
    update, working, sampled, policies = Learner.update, threading.Event(), threading.Event(), []
    later = seeds(1, 0, 1)

    async def gate(policy: Beside, seed: int) -> None:
        policies.append(policy)
        if seed in later:
            await until(working.is_set)
            sampled.set()

    def slow_update(self: Learner, *arguments: Any, **named: Any) -> Any:
        assert policies[0].moved
        working.set()
        assert sampled.wait(PATIENCE)
        return update(self, *arguments, **named)

    monkeypatch.setattr(Learner, "update", slow_update)
    trainer(plan(1), tmp_path, Beside(gate)).train()
    assert {policy.released for policy in policies} == {1}  # before the stage


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_no_tree_begins_before_it_may(max_lag: int, tmp_path: Path) -> None:
    """Nor ends after its step; a metric tells how far behind the slowest of them was."""
    waits = {seed: number % 7 / 500 for step in range(6) for number, seed in enumerate(sorted(seeds(step, 0, 1)))}

    async def gate(policy: Beside, seed: int) -> None:
        await asyncio.sleep(waits[seed])

    trainer(plan(max_lag, steps=6), tmp_path, Beside(gate)).train()
    grown = improved(tmp_path)
    assert all(step - max_lag <= min(versions(tree)) and max(versions(tree)) <= step for step, tree in grown)
    if max_lag:
        worst = {step: max(step - min(versions(tree)) for at, tree in grown if at == step) for step in range(6)}
        assert [row["greatest_lag"] for row in rows(tmp_path)] == [*worst.values()]


class StopAfter(Silent):
    """Stops the run at the `left`-th step that is done."""

    def __init__(self, left: int) -> None:
        self.left = left

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left == 0


def test_finished_trees_of_a_stopped_run_are_trained_and_the_others_grow_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tree of step 1 is finished when the run stops after step 0, the other one is not."""
    update, stuck = Learner.update, seeds(1, 1) | seeds(2, 0, 1)

    async def gate(policy: Beside, seed: int) -> None:
        if seed in stuck:
            await asyncio.Event().wait()

    first = trainer(plan(2), tmp_path, Beside(gate), StopAfter(1))

    def patient_update(self: Learner, *arguments: Any, **named: Any) -> Any:
        end = time.monotonic() + PATIENCE
        while first.ahead and 0 not in first.ahead[1].by_task:
            assert time.monotonic() < end
            time.sleep(0.001)
        return update(self, *arguments, **named)

    monkeypatch.setattr(Learner, "update", patient_update)
    with pytest.raises(Stopped):
        first.train()
    first.run.close()
    kept = read_ahead(Checkpoints(first.run).read("ahead.jsonl"))
    assert {step: [*grown.by_task] for step, grown in kept.items()} == {1: [0], 2: []}
    monkeypatch.setattr(Learner, "update", update)

    async def open_gate(policy: Beside, seed: int) -> None: ...

    trainer(plan(2), tmp_path, Beside(open_gate)).train()
    grown = improved(tmp_path)
    assert [(step, tree.task) for step, tree in grown] == [
        (step, task) for step in range(4) for task in Uniform(ONE_HOP).draw(step, 2, 0, {})
    ]
    assert grown[2][1] == kept[1].by_task[0] and versions(grown[2][1]) == {0}
    assert versions(grown[3][1]) == {1}


# what a checkpoint keeps


def tree(task: Task, logprob: float = -0.1) -> RolloutTree:
    info = {"cause": "turn limit", "path": [1, 2]}
    node = Node(ROOT, Completion("a", (5, 6), (logprob, -1 / 3), weights_version=3), truncated=True, info=info)
    return RolloutTree(task, (1, 2, 3), (Message("user", "né\u2028\n?"),), (node,), (0,))


def failed(task: Task) -> Failure:
    return Failure(task, 1, 2, FailureCause.TIMEOUT, "TimeoutError: slow", TimeoutError("slow"))


def test_what_is_written_of_later_steps_is_read_again() -> None:
    """Of a step that is over, all of it; of another one the finished trees, with the failures of their rollouts."""
    tasks = [Task("tests/None-v0", seed, {"of": [1.5]}, wrappers=(("Hints", {"n": 1}),)) for seed in (1, 1, 2)]
    over = Grown(tasks, {2: tree(tasks[2]), 0: tree(tasks[0], float("-inf"))}, [failed(tasks[1])], True)
    partly = Grown(tasks, {1: tree(tasks[1])}, [failed(tasks[0]), failed(tasks[1])])
    again = read_ahead(write_ahead({4: over, 5: partly}))
    assert again[4] == over and again[4].told() == over.told()
    assert again[5] == replace(partly, failures=[failed(tasks[1])])
    assert again[5].missing == [tasks[0], tasks[2]]
    assert read_ahead(b"") == {}


def test_equal_tasks_of_a_step_have_a_tree_each() -> None:
    tasks = [Task("tests/None-v0", 1), Task("tests/None-v0", 1)]
    grown = Grown(tasks)
    grown.add(tree(tasks[1]))
    assert grown.missing == [tasks[0]] and [*grown.by_task] == [1]
    grown.add(tree(tasks[0]))
    assert not grown.missing and Counter(map(id, (each.task for each in grown.trees))) == Counter(map(id, tasks))


def test_a_checkpoint_without_later_steps_has_no_file_for_them(tmp_path: Path) -> None:
    stopped = trainer(plan(0), tmp_path, watcher=StopAfter(1))
    with pytest.raises(Stopped):
        stopped.train()
    [folder] = (tmp_path / "checkpoints").iterdir()
    assert not [file for file in folder.iterdir() if file.name == "ahead.jsonl"]
    assert json.loads((folder / "progress.json").read_text())["step"] == 1
