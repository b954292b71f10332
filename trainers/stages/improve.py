"""Improvement: reinforcement learning, step by step."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...agents import Advantages, Cost, Evaluation, RolloutTree
from ...agents.evaluation import TaskOutcome
from ...envs import Task
from ..advantages.estimators import advantages_of
from ..checks import STRICT, at_least
from ..curriculum import TaskSource, Uniform
from ..learner.learner import NEAR, Learner, Optimization
from ..losses.comparisons import Comparisons
from ..losses.sums import SumLoss
from ..pipeline import Pipeline

if TYPE_CHECKING:
    from ..training import Trainer


@dataclass(frozen=True, slots=True)
class Improvement:
    """Reinforcement learning: each step grows trees for new tasks and updates the policy from them."""

    __pydantic_config__ = STRICT
    steps: int = 20
    tasks_per_step: int = 8
    updates_per_step: int = 1  # optimiser steps, each on a part of the tasks
    evaluate_every: int = 0  # steps; 0: only at the end
    reward_weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of terms: first step's and last's
    optimization: Optimization = field(default_factory=Optimization)
    max_lag: int = 0  # how many versions of the weights a tree may be old when it is trained; 0: none
    tree_seconds: float | None = None  # after which a tree's unfinished rollouts end as truncated; None: no limit
    source: Any = None  # a TaskSource; None: new train tasks of the plan's environment at every step
    name: str = "improvement"

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps, evaluate_every=self.evaluate_every, max_lag=self.max_lag)
        if self.tree_seconds is not None and self.tree_seconds <= 0:
            raise ValueError(f"tree_seconds must be more than 0, got {self.tree_seconds}; null is no limit")
        at_least(1, updates_per_step=self.updates_per_step)
        at_least(self.updates_per_step, tasks_per_step=self.tasks_per_step)

    def settings(self, step: int) -> dict[str, Any]:
        """Of the environment at a step: reward weights on the way from the first to the last."""
        way = step / max(1, self.steps - 1)
        weights = {term: first + way * (last - first) for term, (first, last) in self.reward_weights.items()}
        return {"reward_weights": weights} if weights else {}

    async def run(self, trainer: Trainer) -> None:
        source: TaskSource = self.source or Uniform(trainer.plan.environment)
        loss = trainer.plan.algorithm.loss
        learner = trainer.learn(self.optimization, reference="reference" in loss.needs)
        learner.check(loss)
        draw = functools.partial(self._tasks, trainer, source)
        pipeline = Pipeline(trainer, self.steps, draw, max_lag=self.max_lag, tree_seconds=self.tree_seconds)
        async with contextlib.aclosing(pipeline):
            for step in trainer.steps("improving", self.steps):
                await self._step(step, trainer, pipeline, learner, source)

    def _tasks(self, trainer: Trainer, source: TaskSource, step: int) -> list[Task]:
        """The tasks of a step. With a lag they are drawn before the source has heard of the steps right before it."""
        settings = self.settings(step)
        drawn = source.draw(step, self.tasks_per_step, trainer.plan.seed, trainer.state(self.name))
        return [replace(task, settings={**task.settings, **settings}) for task in drawn]

    async def _step(
        self, step: int, trainer: Trainer, pipeline: Pipeline, learner: Learner, source: TaskSource
    ) -> None:
        plan, credit = trainer.plan, trainer.plan.algorithm.advantage
        if self.evaluate_every and step and step % self.evaluate_every == 0 and plan.heldout.tasks:
            await trainer.measure("midway", plan.heldout.tasks)
            trainer.begin("improving", self.steps)
        start = time.monotonic()
        grown = await pipeline.take(step)
        trees, end = grown.trees, time.monotonic()
        advantages = None if isinstance(credit, Comparisons) else advantages_of(credit, trees)
        metrics = await pipeline.learn(lambda: self._update(trainer, learner, trees, advantages))
        terms = {environment.id: environment.success for environment in source.environments}
        described = _describe(trees, [terms.get(tree.task.env, plan.environment.success) for tree in trees])
        described |= metrics | pipeline.lag(trees)
        seconds = {"rollout": end - start, "update": time.monotonic() - end}
        trainer.run.log(stage=self.name, step=step, **described, **grown.told(), seconds=seconds)
        trainer.record(trees, advantages, stage=self.name, step=step)
        if plan.keep.every and (step + 1) % plan.keep.every == 0:
            trainer.save_model(trainer.run.path / "models" / f"step-{step + 1}")
        trainer.keep_state(self.name, source.report(step, trees, trainer.state(self.name)))
        trainer.done(f"success {described['success']:.0%}{grown.noted()}")

    def _update(
        self, trainer: Trainer, learner: Learner, trees: Sequence[RolloutTree], advantages: Sequence[Advantages] | None
    ) -> dict[str, float]:
        """The step's optimiser steps; means of their metrics, sums of their counts. Without advantages the algorithm
        compares rollouts.

        The mismatch of sampler and learner is measured before the first optimiser step. `sampler_deviation` and
        `sampler_deviation_max` are the mean and the maximum, over sampled tokens, of the absolute difference of their
        log-probabilities, nats. `sampler_ratios_off` is the share of tokens that the learner finds less than 0.9 or
        more than 1.1 times as likely as the sampler did.
        """
        algorithm, parts = trainer.plan.algorithm, self.updates_per_step
        sampled = trees
        if "old" in algorithm.loss.needs:
            trees = [learner.with_own_logprobs(tree) for tree in trees]
        if isinstance(algorithm.loss, SumLoss):
            assert isinstance(algorithm.advantage, Comparisons)  # as an Algorithm checks
            compared = algorithm.advantage.compare(trees)
            rows = [learner.compare(compared[i::parts], algorithm.loss) for i in range(parts)]
        else:
            scored = list(zip(trees, advantages or [], strict=True))
            rows = [learner.update(scored[i::parts], algorithm.loss) for i in range(parts)]
        counts = {"trained_tokens", "loss_terms", "skipped_updates"}
        names = [name for name in rows[0] if name not in ("ratio_deviation_max", "ratios_off")]
        metrics = {name: (sum if name in counts else fmean)(row[name] for row in rows) for name in names}
        return metrics | (_mismatch(rows[0]) if trees is sampled else _distance(sampled, trees))


def _describe(trees: Sequence[RolloutTree], terms: Sequence[str]) -> dict[str, Any]:
    """Of a step's trees, each with the reward term that is 1 where its rollouts succeeded."""
    tasks = [TaskOutcome.of(number, tree, term) for number, (tree, term) in enumerate(zip(trees, terms, strict=True))]
    held = Evaluation(tuple(tasks))
    logprobs = [p for tree in trees for node in tree.nodes for p in node.action.logprobs]
    return {
        "success": fmean(task.share for task in tasks),
        "return": fmean(x for tree in trees for x in tree.returns),
        "informative": fmean(len(set(tree.returns)) > 1 for tree in trees),
        "turns": held.mean("turns"),
        "tool_calls": held.mean("tool_calls"),
        "truncated": _truncated(trees),
        "surprise": -fmean(logprobs) if logprobs else 0.0,  # nats per sampled token; an estimate of the entropy
        "unique_tokens": sum(tree.num_unique_tokens for tree in trees),
        "total_tokens": sum(tree.num_total_tokens for tree in trees),
        "sampled_tokens": sum(tree.num_sampled_tokens for tree in trees),
        "cost": asdict(sum((tree.cost for tree in trees), Cost())),
        **_by_environment(tasks),
    }


def _by_environment(tasks: Sequence[TaskOutcome]) -> dict[str, Any]:
    """Tasks and success of each environment, where there are several."""
    groups: dict[str, list[float]] = {}
    for task in tasks:
        groups.setdefault(task.task.env, []).append(task.share)
    each = {env: {"tasks": len(shares), "success": fmean(shares)} for env, shares in sorted(groups.items())}
    return {"by_environment": each} if len(each) > 1 else {}


def _truncated(trees: Sequence[RolloutTree]) -> dict[str, float]:
    """The share of rollouts that were cut off, by cause."""
    ends = [tree.nodes[leaf] for tree in trees for leaf in tree.leaves]
    causes = Counter(str(end.info.get("cause")) for end in ends if end.truncated)
    return {cause: count / len(ends) for cause, count in sorted(causes.items())}


def _mismatch(first: Mapping[str, float]) -> dict[str, float]:
    """The mismatch of sampler and learner, from the metrics of a step's first update."""
    return {
        "sampler_deviation": first["ratio_deviation"],
        "sampler_deviation_max": first.get("ratio_deviation_max", 0.0),
        "sampler_ratios_off": first.get("ratios_off", 0.0),
    }


def _distance(before: Sequence[RolloutTree], after: Sequence[RolloutTree]) -> dict[str, float]:
    """The mismatch of sampler and learner, from trees with the sampler's log-probabilities (`before`) and the same
    trees with the learner's (`after`). Tokens whose log-probability the sampler did not record are left out."""
    pairs = (pair for pair in zip(before, after, strict=True))
    nodes = ((one, two) for a, b in pairs for one, two in zip(a.nodes, b.nodes, strict=True) if one.action.logprobs)
    change = [y - x for one, two in nodes for x, y in zip(one.action.logprobs, two.action.logprobs, strict=True)]
    apart = [abs(x) for x in change]
    return {
        "sampler_deviation": fmean(apart) if apart else 0.0,
        "sampler_deviation_max": max(apart, default=0.0),
        "sampler_ratios_off": fmean(not NEAR[0] <= x <= NEAR[1] for x in change) if change else 0.0,
    }
