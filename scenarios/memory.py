"""The memory of a run: made as its scenario says, and measured lesson by lesson."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..agents import ChatRenderer, Run
from ..agents.memory import Lesson, LessonRefused, LessonStore, Memory, Reflector, suspects
from ..agents.memory.trials import Play, Trial, Verdict
from ..agents.rollouts.response import open_task
from ..agents.store.frames import StoreError
from ..envs import Task
from ..trainers.learner import Checkpoints
from ..trainers.training import MEMORY
from .errors import ScenarioError
from .folders import LESSONS
from .parts import build_part
from .schema import MemoryChoice, Scenario

FEW = 2_000  # tasks that are looked through for those that are told a lesson


def load_memory(scenario: Scenario, run: Run, renderer: ChatRenderer) -> Memory | None:
    """The memory of a run, with the lessons that the scenario has it begin with, or those of its checkpoint.
    ScenarioError."""
    choice = scenario.memory
    if choice is None:
        return None
    reflector = None if choice.reflector is None else build_part(Reflector, choice.reflector, "memory.reflector")
    try:
        store = begun_store(run, Path(choice.store) if choice.store else None)
    except (LessonRefused, StoreError, OSError) as error:
        raise ScenarioError(f"memory.store: {error}") from error
    return memory_of(scenario, store, renderer, reflector)


def memory_of(
    scenario: Scenario, store: LessonStore, renderer: ChatRenderer, reflector: Reflector | None = None
) -> Memory:
    """Lessons, told as the scenario says."""
    choice = scenario.memory or MemoryChoice()

    def count_tokens(text: str) -> int:
        return len(renderer.tokenizer.encode(text, add_special_tokens=False))

    return Memory(store, reflector, choice.tokens, choice.doubt, choice.place, count_tokens)


def begun_store(run: Run, source: Path | None) -> LessonStore:
    """The run's lessons. Where no checkpoint has any, it begins anew with those of `source`: a run's directory, its
    store, or JSON lines. StoreError, LessonRefused."""
    path = run.path / LESSONS
    if MEMORY in Checkpoints(run).progress().states:
        return LessonStore(path, author="training")
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    store = LessonStore(path, author="training")
    if source and source.suffix == ".jsonl":
        store.import_(source)
    elif source:
        store.take_over(source / LESSONS if source.is_dir() else source)
    return store


def keep_lessons(source: Path, path: Path) -> None:
    """Writes the lessons of a run's directory, of its store, or of JSON lines into a store of their own.
    ScenarioError."""
    if source.is_dir():
        source = source / LESSONS
    try:
        if source.suffix == ".jsonl":
            with LessonStore(path, author="import") as store:
                store.import_(source)
        else:
            with LessonStore.read(source) as store:
                store.copy(path)
    except (LessonRefused, StoreError, OSError) as error:
        raise ScenarioError(f"lessons: {error}") from error


@dataclass(frozen=True, slots=True)
class Measured:
    """A lesson as it is now, and what became of it."""

    lesson: Lesson
    verdict: Verdict


async def measured(
    scenario: Scenario, memory: Memory, play: Play, ids: Sequence[int], trial: Trial
) -> AsyncIterator[Measured]:
    """Measures lessons one after the other, and writes down what came of each: those that help are active, those that
    do harm are retired, and those that were learned under them come next. A lesson stays as it is where no train task
    is told it, or so few that nothing bounds its effect. LessonRefused for one that is not there."""
    left = [memory.store.get(id) for id in ids]
    while left:
        lesson = left.pop(0)
        verdict, effect = await trial.measure(memory, lesson, tasks_told(scenario, memory, lesson), play)
        if math.isfinite(effect.high - effect.low):
            state = "active" if verdict == "kept" else lesson.state
            lesson = memory.store.change(lesson.id, reason=f"{effect.pairs} pairs", effect=effect, state=state)
        if verdict == "retired":
            lesson = memory.store.retire(lesson.id, f"does harm: {effect.mean:+.2f} in {effect.pairs} pairs")
            doubted = suspects(left, {lesson.id})
            left = [*doubted, *(other for other in left if other not in doubted)]
        yield Measured(lesson, verdict)


def tasks_told(scenario: Scenario, memory: Memory, lesson: Lesson) -> Iterator[Task]:
    """Train tasks that are told a lesson, the first ones."""
    for number in range(FEW):
        task = scenario.environment.task("train", scenario.seed, "trial", number)
        env, response = open_task(task)
        with contextlib.closing(env):
            if lesson.id in (one.id for one in memory.lessons(task, response)):
                yield task
