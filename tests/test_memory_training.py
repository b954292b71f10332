"""Lessons in training: what failures have taught is told, corrected where it is wrong, and the same after a stop."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from treegym.agents import ChatRenderer, Run, Stopped
from treegym.agents.loop import SILENT, Silent
from treegym.agents.memory import Contrast, Lesson, LessonStore, Memory, lessons_of
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.scripted import ScriptedPolicy
from treegym.agents.rollouts import verify
from treegym.envs import HouseRulesEnv
from treegym.envs.houserules import CHOICES
from treegym.trainers import HeldOut, Improvement, Plan, TaskSet, Trainer, Warmup, grpo

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
    **memory: Any,
) -> Run:
    model, tokenizer = build_nano(words(world), 0)
    renderer = ChatRenderer(tokenizer)
    plan = Plan(world, grpo(8), warmup=Warmup(0), improvement=Improvement(steps, 4, learn=False), heldout=HeldOut(30))
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
    """With doubt 1.0 every task of the improvement lacks a lesson, those of an evaluation none."""
    expert = [
        Lesson(text, "treegym/HouseRules-v0", when, (f"site:{when.split()[3]}",)) for when, text in sorted(rules())
    ]
    run = trained(tmp_path, steps=4, lessons=expert, doubt=1.0)
    number = {stage: {len(lessons_of(tree.task)) for labels, tree in run.trees if labels["stage"] == stage}
              for stage in ("improvement", "trained")}  # fmt: skip
    assert number == {"improvement": {5}, "trained": {6}}
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
