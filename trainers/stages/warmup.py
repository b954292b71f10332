"""Warmup: supervised fine-tuning on demonstrations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...agents import Advantages, Evaluation, RolloutTree, Sampling
from ...agents.rollouts import FollowOracle
from ..checks import STRICT, at_least
from ..learner.learner import Optimization
from ..losses.terms import ReinforceLoss

if TYPE_CHECKING:
    from ..training import Trainer


@dataclass(frozen=True, slots=True)
class Warmup:
    """Supervised fine-tuning on the oracle's demonstrations, of train tasks."""

    __pydantic_config__ = STRICT
    demonstrations: int = 128
    epochs: int = 1
    batch_size: int = 8  # demonstrations in an optimiser step
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the environment, such as an oracle that errs
    optimization: Optimization = field(default_factory=lambda: Optimization(1.5e-4, warmup_steps=4))
    name: str = "warm-up"

    def __post_init__(self) -> None:
        at_least(0, demonstrations=self.demonstrations, epochs=self.epochs)
        at_least(1, batch_size=self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.demonstrations // self.batch_size)

    async def run(self, trainer: Trainer) -> None:
        plan = trainer.plan
        tasks = [
            plan.environment.task("train", plan.seed, "demonstration", i, **self.settings)
            for i in range(self.demonstrations)
        ]
        if not tasks:
            return
        grown = await trainer.grow(tasks, FollowOracle(), Sampling(max_context=trainer.positions), 0)
        trees = grown.trees
        teacher = Evaluation.of(trees, plan.environment.success)
        trainer.keep_result("demonstrations", teacher)
        if trainer.step == 0:
            trainer.record(trees, stage=self.name, step=0)
        order = [i for epoch in range(self.epochs) for i in trainer.shuffled(len(trees), "demonstrations", epoch)]
        learner = trainer.learn(self.optimization)
        for step in trainer.steps("warming up", self.steps):
            batch = [trees[i] for i in order[step * self.batch_size : (step + 1) * self.batch_size]]
            start = time.monotonic()
            metrics = learner.update([(tree, _ones(tree)) for tree in batch], ReinforceLoss())
            failed = grown.told() if step == 0 else {}
            seconds = {"update": time.monotonic() - start}
            trainer.run.log(stage=self.name, step=step, **metrics, **failed, seconds=seconds)
            trainer.done(f"loss {metrics['loss']:.2f}")


def _ones(tree: RolloutTree) -> Advantages:
    return [[1.0] * len(path) for path in tree.paths]
