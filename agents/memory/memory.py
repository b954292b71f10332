"""Memory: lessons that are told to rollouts, and drawn from them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ...envs import Task, TextEnv
from ...envs.notes import Place, own_text
from ...envs.task import Wrappers
from ..rollouts import Response
from .curate import curate, merged
from .lesson import Lesson
from .reflect import Ask, Reflector, Seen
from .store import CountTokens, LessonStore, rough_tokens
from .telling import told


@dataclass(frozen=True, slots=True)
class Memory:
    """A store of lessons, how they are told, and what writes them down.

    `recall` is what `grow` asks for a task's notes. In a share `doubt` of the tasks, drawn by their seeds, one of the
    lessons is left out, so that it is seen what happens without it: one of the suspects, where there are any.
    """

    store: LessonStore
    reflector: Reflector | None = None  # None: lessons are told, and none are written
    tokens: int = 400  # of the lessons that a task is told, at most
    doubt: float = 0.1
    place: Place = "turn"
    count_tokens: CountTokens = rough_tokens

    def __post_init__(self) -> None:
        if not 0 <= self.doubt <= 1 or self.tokens < 0:
            raise ValueError(f"doubt is a share and tokens a number, got {self.doubt}, {self.tokens}")

    def recall(self, task: Task, env: TextEnv, response: Response) -> Wrappers:
        """The lessons for a task to train on."""
        lessons = self.lessons(task, response)
        dice = random.Random(f"doubt {task.seed}")
        if lessons and dice.random() < self.doubt:
            doubted = suspects(lessons, self.store.retired(task.env)) or lessons
            lessons.remove(dice.choice(doubted))
        return told(lessons, self.place)

    def recall_all(self, task: Task, env: TextEnv, response: Response) -> Wrappers:
        """The lessons for a task to measure a policy on."""
        return told(self.lessons(task, response), self.place)

    def lessons(self, task: Task, response: Response) -> list[Lesson]:
        """Those for a task, the best first, within the budget."""
        tags = [str(tag) for tag in response.info.get("tags", ())]
        said = own_text(response.messages[-1].text) if response.messages else ""
        return self.store.recall(task.env, tags, said, self.tokens, self.count_tokens)

    async def learn(self, batch: Sequence[Seen], ask: Ask, reason: str) -> dict[str, int]:
        """Draws lessons from trees. How many operations there were of each kind, how many of them were `refused`, how
        many attempts to get some failed (`failures`), and how many lessons are `in_force` now."""
        if self.reflector is None:
            return {}
        kinds_of_tasks = {(seen.tree.task.env, tags) for seen in batch for tags in (seen.tags, ())}
        known = [lesson for env, tags in sorted(kinds_of_tasks) for lesson in self.store.lessons(env=env, tags=tags)]
        reflection = await self.reflector.reflect(batch, known, ask)
        operations, aside = merged(reflection.groups)
        outcomes = [*aside, *curate(self.store, operations, reason)]
        kinds = Counter("refused" if one.refused else type(one.operation).__name__.lower() for one in outcomes)
        return {**kinds, "failures": len(reflection.failures), "in_force": self.store.in_force}


def suspects(lessons: Iterable[Lesson], retired: Collection[int]) -> list[Lesson]:
    """Those all of whose evidence was made while lessons were told that have been retired since."""
    wrong = frozenset(retired)
    return [one for one in lessons if one.evidence and all(wrong.intersection(e.in_force) for e in one.evidence)]
