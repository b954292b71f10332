"""Distillation: the lessons of a memory move into the weights, so that prompts stay short."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...agents import Advantages, Completion, Context, RolloutTree, Sample, Sampling, derive_seed
from ...agents.memory import Lesson, Memory, tags_of, without_lessons
from ...agents.memory.trials import effect_of
from ...agents.rollouts import Chains, FollowOracle, GrowingTree
from ...agents.tree import is_success
from ...envs import Task
from ..checks import STRICT, at_least
from ..learner.learner import Learner, Optimization
from ..losses.terms import ReinforceLoss
from .warmup import Warmup

if TYPE_CHECKING:
    from ..training import Trainer

Scored = tuple[RolloutTree, Advantages]


@dataclass(frozen=True, slots=True)
class Retold:
    """Plays the replies of other rollouts again, in tasks of the same seeds that may be told other notes."""

    replies: Mapping[int, Sequence[Sequence[Completion]]]  # by seed of the task: of each rollout, turn by turn

    async def grow(self, tree: GrowingTree) -> None:
        for number, rollout in enumerate(self.replies[tree.task.seed]):
            turn = tree.root
            for reply in rollout:
                if not turn.done:
                    turn = await tree.attach(turn, Sample(reply, Context(reply.token_ids, turn.context)))
            tree.end(number, turn)


@dataclass(frozen=True, slots=True)
class Distillation:
    """The policy learns, without notes, from itself with them; then lessons that it no longer needs are retired.

    "imitation" learns from the rollouts with notes that succeeded, of `tasks` a round. "reverse_kl" has the policy play
    without notes, and credits each token with how much likelier it is with them (on-policy distillation, as in
    arXiv:2306.13649); a round is then a step. A share `others` of what is learned from are demonstrations of the
    environment's oracle with the notes of its expert, under other `settings`, such as those of other worlds: they keep
    the policy able to follow notes.
    """

    __pydantic_config__ = STRICT
    method: Literal["imitation", "reverse_kl"] = "imitation"
    rounds: int = 1
    tasks: int = 400  # that are played in a round of imitation
    steps: int = 50  # optimiser steps of a round of imitation
    batch_size: int = 16  # rollouts in an optimiser step
    others: float = 0.4
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the environment in other demonstrations
    trial: int = 200  # tasks on which it is tried what is still needed; 0: nothing is retired
    needed: float = 0.1  # difference of the return from which on lessons are needed
    optimization: Optimization = field(default_factory=Optimization)
    name: str = "distillation"

    def __post_init__(self) -> None:
        at_least(0, trial=self.trial)
        at_least(1, rounds=self.rounds, tasks=self.tasks, steps=self.steps, batch_size=self.batch_size)
        if not 0 <= self.others < 1:
            raise ValueError(f"others is a share, from 0 to less than 1, got {self.others}")

    async def run(self, trainer: Trainer) -> None:
        memory = trainer.memory
        if memory is None:
            raise ValueError("a distillation takes lessons from a memory: give the scenario one")
        learner = trainer.learn(self.optimization)
        each = self.steps if self.method == "imitation" else 1
        shown: dict[int, list[RolloutTree]] = {}  # the demonstrations of a round, by its first step
        for step in trainer.steps("distilling", self.rounds * each):
            start, first = time.monotonic(), step - step % each
            metrics: dict[str, float] = {}
            if self.method == "imitation":
                shown = shown if first in shown else {first: await self._shown(trainer, memory, first)}
                batch = self._batch(trainer, shown[first], step)
            else:
                batch, metrics = await self._credited(trainer, memory, learner, step)
            metrics |= learner.update(batch, ReinforceLoss())
            trainer.run.log(stage=self.name, step=step, **metrics, seconds={"update": time.monotonic() - start})
            trainer.done(f"loss {metrics['loss']:.2f}")
        if self.trial:
            await self._retire(trainer, memory)

    # what is learned from

    async def _shown(self, trainer: Trainer, memory: Memory, first: int) -> list[RolloutTree]:
        """The demonstrations of the round that begins with a step. A run that resumes within the round reads them."""
        if trainer.step == first:
            own = await self._successes(trainer, memory, first)
            others = await self._others(trainer, self._share(len(own)), first)
            trainer.record([*own, *others], stage=self.name, step=first)
        return [tree for labels, tree in trainer.run.trees if labels["stage"] == self.name and labels["step"] == first]

    async def _successes(self, trainer: Trainer, memory: Memory, first: int) -> list[RolloutTree]:
        """Rollouts that succeed with notes, as they read without."""
        tasks, seed = self._tasks(trainer, self.tasks, first), self._seed(trainer, first)
        noted = await trainer.grow(tasks, Chains(1), trainer.plan.sampling, seed, recall=memory.recall_all)
        good = [tree for tree in noted.trees if is_success(tree.term(trainer.plan.environment.success)[0])]
        return await self._retold(trainer, good, noted=None)

    async def _others(self, trainer: Trainer, number: int, first: int) -> list[RolloutTree]:
        tasks = self._tasks(trainer, number, first, "other", **self.settings)
        if not tasks:
            return []
        tell = Warmup(told=1.0, place=trainer.memory.place if trainer.memory else "turn").tell
        sampling = Sampling(max_context=trainer.positions)
        return (await trainer.grow(tasks, FollowOracle(), sampling, 0, recall=tell)).trees

    def _batch(self, trainer: Trainer, shown: Sequence[RolloutTree], step: int) -> list[Scored]:
        """Demonstrations of a step, in an order that is drawn anew whenever all were used."""
        if not shown:
            raise ValueError(f"{self.name}: no rollout with notes succeeded, so there is nothing to learn from")
        round, place = divmod(step, self.steps)
        places = [divmod(place * self.batch_size + i, len(shown)) for i in range(self.batch_size)]
        orders = {epoch: trainer.shuffled(len(shown), self.name, round, epoch) for epoch, _ in places}
        return [(tree, _ones(tree)) for tree in (shown[orders[epoch][i]] for epoch, i in places)]

    async def _credited(
        self, trainer: Trainer, memory: Memory, learner: Learner, step: int
    ) -> tuple[list[Scored], dict[str, float]]:
        """Rollouts without notes, each token with how much likelier it is with them; and demonstrations with others."""
        tasks = self._tasks(trainer, self.batch_size, step)
        bare = (await trainer.grow(tasks, Chains(1), trainer.plan.sampling, self._seed(trainer, step))).trees
        noted = {tree.task.seed: tree for tree in await self._retold(trainer, bare, noted=memory)}
        bare = [tree for tree in bare if tree.task.seed in noted]  # some tasks may have failed
        pairs = [[learner.with_own_logprobs(each) for each in (tree, noted[tree.task.seed])] for tree in bare]
        credits = [credits_of(*pair) for pair in pairs]
        gains = np.concatenate([turn for rows in credits for row in rows for turn in row])
        mean = gains.mean()  # a baseline, which changes no expectation
        credits = [[[turn - mean for turn in row] for row in rows] for rows in credits]
        trainer.record(bare, credits, stage=self.name, step=step)
        others = await self._others(trainer, self._share(len(bare)), step)
        scored: list[Scored] = list(zip(bare, credits, strict=True))
        scored += [(tree, _ones(tree)) for tree in others]
        return scored, {"reverse_kl": -float(mean)}

    async def _retold(self, trainer: Trainer, trees: Sequence[RolloutTree], noted: Memory | None) -> list[RolloutTree]:
        """The same replies in the same tasks, told the lessons of a memory or nothing."""
        replies = {tree.task.seed: [[tree.nodes[i].action for i in path] for path in tree.paths] for tree in trees}
        tasks = [without_lessons(tree.task) for tree in trees]
        if not tasks:
            return []
        recall = noted.recall_all if noted else None
        sampling = Sampling(max_context=trainer.positions)
        return (await trainer.grow(tasks, Retold(replies), sampling, 0, recall=recall)).trees

    def _tasks(self, trainer: Trainer, number: int, step: int, *more: str, **settings: Any) -> list[Task]:
        draw = trainer.plan.environment.task
        return [draw("train", trainer.plan.seed, self.name, step, *more, i, **settings) for i in range(number)]

    def _seed(self, trainer: Trainer, step: int) -> int:
        return derive_seed(trainer.plan.seed, self.name, step)

    def _share(self, own: int) -> int:
        """How many other demonstrations go with so many of one's own."""
        return round(own * self.others / (1 - self.others))

    # what is no longer needed

    async def _retire(self, trainer: Trainer, memory: Memory) -> None:
        """Retires the lessons of those kinds of tasks on which the policy returns as much without any."""
        tasks, seed = self._tasks(trainer, self.trial, -1), self._seed(trainer, -1)
        noted, bare = [
            {tree.task.seed: tree for tree in grown.trees}
            for grown in [
                await trainer.grow(tasks, Chains(1), trainer.plan.sampling, seed, recall=recall)
                for recall in (memory.recall_all, None)
            ]
        ]
        differences: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for seed in (seed for seed in noted if seed in bare):  # some tasks may have failed
            difference = fmean(noted[seed].returns) - fmean(bare[seed].returns)
            differences[tags_of(bare[seed].info)].append(difference)
        retired = 0
        for tags, seen in differences.items():
            effect = effect_of(seen)
            if effect.mean >= self.needed or len(seen) < 2:
                continue
            lessons: list[Lesson] = [*memory.store.lessons(env=trainer.plan.environment.id, tags=tags)]
            for lesson in lessons:
                memory.store.retire(
                    lesson.id, f"in the weights: without it {effect.mean:.2f} less in {effect.pairs} tasks"
                )
            retired += len(lessons)
        trainer.keep_memory()
        trainer.run.log(stage=self.name, step=self.rounds, lessons={"retired": retired})


def credits_of(tree: RolloutTree, noted: RolloutTree) -> list[list[NDArray[np.float64]]]:
    """[rollout][turn][token] how much likelier, in nats, a token is where the notes are told than it was without."""

    def gain(node: int, twin: int) -> NDArray[np.float64]:
        with_them, without = noted.nodes[twin].action.logprobs, tree.nodes[node].action.logprobs
        return np.subtract(with_them, without)

    pairs = zip(tree.paths, noted.paths, strict=True)
    return [[gain(node, twin) for node, twin in zip(path, other, strict=True)] for path, other in pairs]


def _ones(tree: RolloutTree) -> Advantages:
    return [[1.0] * len(path) for path in tree.paths]
