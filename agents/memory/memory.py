"""Memory: lessons that are told to rollouts, and drawn from them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ...envs import Task, TextEnv
from ...envs.notes import Place, own_text
from ...envs.task import Wrappers
from ..rollouts import Response
from ..tree import RolloutTree
from .curate import curate, merged
from .lesson import Lesson, tags_of
from .reflect import Ask, Reflector, Seen
from .store import CountTokens, LessonStore, rough_tokens
from .telling import met, told

LATELY = 16  # trees over which returns are averaged


@dataclass(frozen=True, slots=True)
class Memory:
    """A store of lessons, how they are told, and what writes them down.

    `recall` is what `grow` asks for a task's notes. In a share `doubt` of the tasks, drawn by their seeds, one of the
    lessons is left out, so that it is seen what happens without it. In half of them it is any, or one of the suspects,
    where there are any. The other half falls to tasks in proportion to what rollouts have lately returned less under
    one of the lessons that fit best than under the best of all; it is left out.
    """

    store: LessonStore
    reflector: Reflector | None = None  # None: lessons are told, and none are written
    tokens: int = 400  # of the lessons that a task is told, at most
    doubt: float = 0.1
    place: Place = "turn"
    count_tokens: CountTokens = rough_tokens
    # by environment and id of a lesson in force: the mean return of the trees that lately met it, and how many have in
    # all. What stands here for an environment is replaced, never changed: recall reads it from other threads.
    returns: dict[str, Mapping[int, tuple[float, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.doubt <= 1 or self.tokens < 0:
            raise ValueError(f"doubt is a share and tokens a number, got {self.doubt}, {self.tokens}")

    def recall(self, task: Task, env: TextEnv, response: Response) -> Wrappers:
        """The lessons for a task to train on."""
        lessons = self.lessons(task, response)
        dice = random.Random(f"doubt {task.seed}")
        means = {id: mean for id, (mean, _) in self.returns.get(task.env, {}).items()}
        fitting = [lesson for lesson in lessons[: (len(lessons) + 1) // 2] if lesson.id in means]
        least = min(fitting, key=lambda lesson: means[lesson.id], default=None)
        if least and dice.random() < min(0.5, self.doubt / 2 * _need(means, least.id)):
            lessons.remove(least)
        elif lessons and dice.random() < self.doubt / (2 if least else 1):
            lessons.remove(dice.choice(suspects(lessons, self.store.retired(task.env)) or lessons))
        return told(lessons, self.place)

    def recall_all(self, task: Task, env: TextEnv, response: Response) -> Wrappers:
        """The lessons for a task to measure a policy on."""
        return told(self.lessons(task, response), self.place)

    def lessons(self, task: Task, response: Response) -> list[Lesson]:
        """Those for a task, the best first, within the budget."""
        said = own_text(response.messages[-1].text) if response.messages else ""
        return self.store.recall(task.env, tags_of(response.info), said, self.tokens, self.count_tokens)

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
        for env in sorted({seen.tree.task.env for seen in batch}):
            self.returns[env] = self._met_in(env, [seen.tree for seen in batch])
        kinds = Counter("refused" if one.refused else type(one.operation).__name__.lower() for one in outcomes)
        return {**kinds, "failures": len(reflection.failures), "in_force": self.store.in_force}

    def _met_in(self, env: str, trees: Sequence[RolloutTree]) -> dict[int, tuple[float, int]]:
        """The returns under the lessons of an environment that are in force, with those of more trees."""
        returns = {**self.returns.get(env, {})}
        for tree in (tree for tree in trees if tree.task.env == env):
            returned = fmean(tree.returns)
            for id in met(tree):
                mean, count = returns.get(id, (0.0, 0))
                returns[id] = mean + (returned - mean) / min(count + 1, LATELY), count + 1
        told = self.store.still_in_force(returns)
        return {id: kept for id, kept in returns.items() if id in told}


def _need(means: Mapping[int, float], id: int) -> float:
    """How much less was returned under a lesson than under the best, relative to the average of those met."""
    best, average = max(means.values()), fmean(means.values())
    return (best - means[id]) / (best - average) if best > average else 1.0


def suspects(lessons: Iterable[Lesson], retired: Collection[int]) -> list[Lesson]:
    """Those all of whose evidence was made while lessons were told that have been retired since."""
    wrong = frozenset(retired)
    return [one for one in lessons if one.evidence and all(wrong.intersection(e.in_force) for e in one.evidence)]
