"""Lessons in training: what failures have taught is told, corrected where it is wrong, and the same after a stop."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from treegym.agents import ChatRenderer, Run, Sampling, Stopped, grow_trees
from treegym.agents.loop import SILENT, Silent
from treegym.agents.memory import Contrast, Lesson, LessonStore, Memory, Seen, lessons_of
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.scripted import ScriptedPolicy
from treegym.agents.rollouts import Chains, Response, verify
from treegym.agents.serving.probe import continuation_logprobs
from treegym.envs import HouseRulesEnv, Message, Task
from treegym.envs.houserules import CHOICES
from treegym.scenarios.memory import begun_store
from treegym.trainers import Distillation, HeldOut, Improvement, Optimization, Plan, TaskSet, Trainer, Warmup, grpo
from treegym.trainers.stages.distil import Retold

WORLD = TaskSet("treegym/HouseRules-v0", {"world": 5, "sites": 2})
ONE_SITE = TaskSet("treegym/HouseRules-v0", {"world": 5, "sites": 1})


def script(text: str, seed: int) -> str:
    """Does what a note behind the last message says; without one, anything."""
    noted = re.findall(r"may be wrong: choose (\w+)", text.rpartition("You are at")[2])
    choice = noted[-1] if noted else random.Random(f"{seed} {len(text)}").choice(CHOICES)
    return f"<choose>{choice}</choose>"


class Following(ScriptedPolicy):
    """A policy that follows notes, and never learns."""

    repeatable = True

    async def push(self, model: PreTrainedModel, version: int) -> None:
        pass

    def release(self) -> None:
        pass


def following() -> tuple[Following, ChatRenderer]:
    renderer = ChatRenderer(build_nano(words(WORLD), 0)[1])
    return Following(renderer, script), renderer


async def unasked(messages: Sequence[Message], seed: int) -> str:
    raise AssertionError("no model is needed")


def words(world: TaskSet) -> list[str]:
    env = world.task("train", 0).make()
    _, info = env.reset(seed=0)
    return [message.text for message in info["messages"]]


def trained(
    folder: Path,
    steps: int = 12,
    watcher: Any = SILENT,
    *,
    world: TaskSet = WORLD,
    lessons: Sequence[Lesson] = (),
    warmup: int = 0,
    **memory: Any,
) -> Run:
    model, tokenizer = build_nano(words(world), 0)
    renderer = ChatRenderer(tokenizer)
    improvement = Improvement(steps, 4, learn=False)
    plan = Plan(world, grpo(8), warmup=Warmup(warmup), improvement=improvement, heldout=HeldOut(30))
    fresh = not (folder / "lessons.sqlite").exists()
    with LessonStore(folder / "lessons.sqlite") as store:
        for each in lessons if fresh else ():
            store.add(each)
        run = Run(folder)
        trainer = Trainer(
            plan, model, renderer, run, watcher,
            policy=Following(renderer, script), memory=Memory(store, Contrast(), **memory), dtype=torch.float32,
        )  # fmt: skip
        try:
            trainer.train()
        finally:
            run.close()
    return run


def kept(folder: Path) -> list[Lesson]:
    with LessonStore.read(folder / "lessons.sqlite") as store:
        return list(store.lessons())


def rules(world: TaskSet = WORLD) -> set[tuple[str, str]]:
    """What an expert would write down of all sites: phrase and text."""
    env = world.task("train", 0).make().unwrapped
    assert isinstance(env, HouseRulesEnv)
    found: set[tuple[str, str]] = set()
    for seed in range(40):
        env.reset(seed=seed)
        found |= {(note.when, note.text) for note in env.notes()}
    return found


def test_contrast_finds_the_rules_of_a_world_and_the_policy_that_is_told_them_succeeds(tmp_path: Path) -> None:
    run = trained(tmp_path)
    found = {(lesson.when, lesson.text) for lesson in kept(tmp_path) if lesson.when}
    assert len(rules()) == 12 and len(found & rules()) >= 11 and len(found - rules()) <= 1
    success = {row["stage"]: row["success"] for row in run.metrics() if row["stage"] in ("warmed up", "trained")}
    assert success["warmed up"] < 0.25 and success["trained"] > 0.85
    rows = [row for row in run.metrics() if row["stage"] == "improvement"]
    assert all(row["lessons"]["in_force"] for row in rows[2:]) and sum(row["lessons"].get("add", 0) for row in rows)
    assert not (run.path / "checkpoints").exists() or not rows[-1].get("grad_norm")


def test_trees_carry_the_lessons_that_were_told_and_replay(tmp_path: Path) -> None:
    run = trained(tmp_path, steps=4)
    told = [(labels["stage"], tree) for labels, tree in run.trees if lessons_of(tree.task)]
    assert {stage for stage, _ in told} == {"improvement", "trained"}
    assert all(not verify(tree) for _, tree in told[::5])
    assert {record.lessons for record in run.trees.records()} >= {lessons_of(told[-1][1].task)}


def test_evaluations_are_told_all_lessons_and_teach_none(tmp_path: Path) -> None:
    """With doubt 1.0 most tasks of the improvement lack a lesson, those of an evaluation none."""
    expert = [
        Lesson(text, "treegym/HouseRules-v0", when, (f"site:{when.split()[3]}",)) for when, text in sorted(rules())
    ]
    run = trained(tmp_path, steps=4, lessons=expert, doubt=1.0)
    number = {stage: [len(lessons_of(tree.task)) for labels, tree in run.trees if labels["stage"] == stage]
              for stage in ("improvement", "trained")}  # fmt: skip
    assert set(number["improvement"]) <= {5, 6} and number["improvement"].count(5) > len(number["improvement"]) / 2
    assert set(number["trained"]) == {6}
    stages = {tree: labels["stage"] for tree, (labels, _) in enumerate(run.trees)}
    assert {stages[piece.tree] for lesson in kept(tmp_path) for piece in lesson.evidence} == {"improvement"}


def test_doubt_corrects_a_wrong_lesson(tmp_path: Path) -> None:
    """Followed by every rollout, it is never compared with anything; left out now and then, it is."""
    wrong = []
    for when, text in sorted(rules(ONE_SITE)):
        choice = CHOICES[(CHOICES.index(text.split()[1]) + 1) % len(CHOICES)]
        wrong.append(Lesson(f"choose {choice}", "treegym/HouseRules-v0", when, (f"site:{when.split()[3]}",)))
    trained(tmp_path / "trusting", lessons=wrong, doubt=0.0, world=ONE_SITE)
    assert {(lesson.when, lesson.text) for lesson in kept(tmp_path / "trusting") if lesson.when} == {
        (lesson.when, lesson.text) for lesson in wrong
    }
    trained(tmp_path / "doubting", steps=30, lessons=wrong, doubt=0.8, world=ONE_SITE)
    found = {(lesson.when, lesson.text) for lesson in kept(tmp_path / "doubting") if lesson.when}
    assert found == rules(ONE_SITE)


class StopAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_stopped_run_goes_on_with_the_lessons_of_its_checkpoint(tmp_path: Path) -> None:
    """Lessons that were written after the checkpoint go, as the trees do that they were drawn from."""
    whole = trained(tmp_path / "whole", steps=6)
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", steps=6, watcher=StopAfter(3))
    with LessonStore(tmp_path / "parts" / "lessons.sqlite") as store:
        store.add(Lesson("After the checkpoint.", "treegym/HouseRules-v0"))
    parts = trained(tmp_path / "parts", steps=6)

    def bare(lesson: Lesson) -> Any:
        return (
            lesson.id,
            lesson.text,
            lesson.when,
            lesson.state,
            [(p.tree, p.nodes, p.returns) for p in lesson.evidence],
        )

    assert [bare(each) for each in kept(tmp_path / "parts")] == [bare(each) for each in kept(tmp_path / "whole")]
    assert [tree for _, tree in parts.trees] == [tree for _, tree in whole.trees]


def test_a_run_that_stops_before_its_first_reflection_keeps_the_lessons_that_it_began_with(tmp_path: Path) -> None:
    """Whatever has become of the store that they came from."""
    with pytest.raises(Stopped):
        trained(tmp_path, watcher=StopAfter(0), lessons=[Lesson("Look first.", "treegym/HouseRules-v0")], warmup=1)
    begun_store(Run(tmp_path), None).close()
    assert [each.text for each in kept(tmp_path)] == ["Look first."]


def test_what_a_lesson_returned_is_forgotten_with_it_and_counts_in_its_environment(tmp_path: Path) -> None:
    with LessonStore(tmp_path / "lessons.sqlite") as store:
        first, second = (store.add(Lesson(text, "treegym/HouseRules-v0")).id for text in ("Look first.", "Hurry."))
        memory = Memory(store, Contrast(), returns={"other/Env-v0": {9: (1.0, 5)}})
        told = memory.recall_all(WORLD.task("train", 0), HouseRulesEnv(), Response((), ""))
        [tree] = asyncio.run(
            grow_trees([replace(WORLD.task("train", 0), wrappers=told)], Chains(2), *following(), Sampling())
        )
        batch = [Seen("runs/a", 0, tree)]
        asyncio.run(memory.learn(batch, unasked, "step 1"))
        assert memory.returns["treegym/HouseRules-v0"] == {id: (fmean(tree.returns), 1) for id in (first, second)}
        store.retire(first, "harmful")
        asyncio.run(memory.learn(batch, unasked, "step 2"))
        assert memory.returns["treegym/HouseRules-v0"] == {second: (pytest.approx(fmean(tree.returns)), 2)}
        assert memory.returns["other/Env-v0"] == {9: (1.0, 5)}


# into the weights


class Recalling(Following):
    """Follows notes; without one it chooses red, as a policy that has learned nothing."""

    def __init__(self, renderer: ChatRenderer) -> None:
        def choose(text: str, seed: int) -> str:
            noted = re.findall(r"may be wrong: choose (\w+)", text.rpartition("You are at")[2])
            return f"<choose>{noted[-1] if noted else 'red'}</choose>"

        super().__init__(renderer, choose)


def distilled(folder: Path, watcher: Any = SILENT, **fields: Any) -> tuple[Run, Trainer]:
    model, tokenizer = build_nano(words(ONE_SITE), 0)
    renderer = ChatRenderer(tokenizer)
    stage = Distillation(tasks=20, batch_size=4, settings={"world": None}, optimization=Optimization(1e-3), **fields)
    plan = Plan(ONE_SITE, grpo(8), stages=[stage])
    run, fresh = Run(folder), not (folder / "lessons.sqlite").exists()
    with LessonStore(folder / "lessons.sqlite") as store:
        for when, text in sorted(rules(ONE_SITE)) if fresh else ():
            store.add(Lesson(text, "treegym/HouseRules-v0", when, (f"site:{when.split()[3]}",)))
        trainer = Trainer(
            plan, model, renderer, run, watcher,
            policy=Recalling(renderer), memory=Memory(store), dtype=torch.float32,
        )  # fmt: skip
        try:
            trainer.train()
        finally:
            run.close()
    return run, trainer


def test_imitation_learns_what_succeeded_with_notes_as_it_reads_without(tmp_path: Path) -> None:
    run, _ = distilled(tmp_path, steps=3, others=0.5)
    trees = [tree for labels, tree in run.trees if labels == {"stage": "distillation", "step": 0}]
    own = [tree for tree in trees if tree.task.settings.get("world") == 5]
    others = [tree for tree in trees if tree.task.settings.get("world") is None]
    assert len(own) == len(others) == 20  # the policy succeeds in every task in which it is told what to do
    assert not any(tree.task.wrappers or "may be wrong" in str(tree.to_json()) for tree in own)
    assert all(tree.term("exact") == (1.0,) and not verify(tree) for tree in own)
    assert all(tree.task.wrappers and tree.term("exact") == (1.0,) for tree in others)


def test_what_fails_with_notes_is_not_imitated(tmp_path: Path) -> None:
    with LessonStore(tmp_path / "lessons.sqlite") as store:  # of one station alone
        store.add(Lesson("choose red", "treegym/HouseRules-v0", "You are at alder bridge."))
    run, _ = distilled(tmp_path, steps=1, others=0.0, trial=0)
    own = [tree for _, tree in run.trees]
    assert 0 < len(own) < 20 and all(tree.term("exact") == (1.0,) for tree in own)


def test_reverse_kl_credits_each_token_with_how_much_likelier_notes_make_it(tmp_path: Path) -> None:
    """By hand: the model's log-probabilities of the same replies, behind the prompt with notes less without, and less
    the mean of all."""
    run, trainer = distilled(tmp_path, method="reverse_kl", rounds=1, others=0.0, trial=0)
    model, _ = build_nano(words(ONE_SITE), 0)  # as it was at the first step
    found: list[float] = []
    credits: list[float] = []
    for record in run.trees.records():
        tree, advantages = record.tree, record.advantages
        assert advantages is not None and not tree.task.wrappers
        with LessonStore.read(tmp_path / "lessons.sqlite") as store:
            noted = asyncio.run(
                grow_trees(
                    [tree.task],
                    Retold({tree.task.seed: [[tree.nodes[i].action for i in path] for path in tree.paths]}),
                    trainer.policy,
                    trainer.renderer,
                    Sampling(),
                    recall=Memory(store).recall_all,
                )
            )[0]
        for turn, node in enumerate(tree.paths[0]):
            action = tree.nodes[node].action
            told, bare = (
                continuation_logprobs(model, each.tokens(each.paths[0][:turn]), action.token_ids)
                for each in (noted, tree)
            )
            found += [a - b for a, b in zip(told, bare, strict=True)]
            credits += advantages[0][turn]
    assert credits == pytest.approx([each - fmean(found) for each in found], abs=1e-3)


def test_lessons_that_make_no_difference_any_more_are_retired(tmp_path: Path) -> None:
    """`Recalling` needs its notes, so they stay; a policy that knows the rules by heart does not."""
    distilled(tmp_path / "needs", steps=1, trial=10)
    assert len(kept(tmp_path / "needs")) == 6
    by_heart = {when: text.split()[1] for when, text in rules(ONE_SITE)}

    def knows(text: str, seed: int) -> str:
        return f"<choose>{by_heart['You are at' + text.rpartition('You are at')[2].partition('.')[0] + '.']}</choose>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recalling, "__init__", lambda self, renderer: Following.__init__(self, renderer, knows))
        distilled(tmp_path / "knows", steps=1, trial=10)
    assert kept(tmp_path / "knows") == []
    with LessonStore.read(tmp_path / "knows" / "lessons.sqlite") as store:
        assert all("in the weights" in store.history(lesson.id)[-1].reason for lesson in store.lessons(states=None))


@pytest.mark.parametrize("method", ["imitation", "reverse_kl"])
def test_tasks_that_fail_are_left_out_of_a_distillation(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the rollouts is lost, with notes other ones than without: those are compared that came through."""
    grow, calls, lost = Trainer.grow, itertools.count(), []

    async def losing(self: Trainer, tasks: Sequence[Task], *more: Any, **fields: Any) -> SimpleNamespace:
        grown, call = await grow(self, tasks, *more, **fields), next(calls)
        left = [tree for place, tree in enumerate(grown.trees) if place % 3 != call % 3]
        lost.append(len(grown.trees) - len(left))
        return SimpleNamespace(trees=left)

    monkeypatch.setattr(Trainer, "grow", losing)
    run, _ = distilled(tmp_path, steps=1, method=method, others=0.0, trial=12)
    assert len(lost) == 4 and all(lost)
    assert 0 < len(run.trees) < 20


def test_a_stopped_distillation_goes_on_with_the_demonstrations_that_it_had(tmp_path: Path) -> None:
    def weights(trainer: Trainer) -> list[torch.Tensor]:
        return [p.detach() for p in trainer.model.parameters()]

    _, whole = distilled(tmp_path / "whole", steps=4, trial=0)
    with pytest.raises(Stopped):
        distilled(tmp_path / "parts", StopAfter(2), steps=4, trial=0)
    run, parts = distilled(tmp_path / "parts", steps=4, trial=0)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts), strict=True))
    assert len({labels["step"] for labels, _ in run.trees}) == 1
