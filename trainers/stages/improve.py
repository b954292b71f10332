"""Improvement: reinforcement learning, step by step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...agents import Advantages, Cost, Evaluation, RolloutTree, derive_seed
from ...agents.evaluation import TaskOutcome
from ..advantages.estimators import advantages_of
from ..checks import STRICT, at_least
from ..curriculum import TaskSource, Uniform
from ..learner.learner import Learner, Optimization
from ..losses.comparisons import Comparisons
from ..losses.sums import SumLoss

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
    source: Any = None  # a TaskSource; None: new train tasks of the plan's environment at every step
    name: str = "improvement"

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps, evaluate_every=self.evaluate_every)
        at_least(1, updates_per_step=self.updates_per_step)
        at_least(self.updates_per_step, tasks_per_step=self.tasks_per_step)

    def settings(self, step: int) -> dict[str, Any]:
        """Of the environment at a step: reward weights on the way from the first to the last."""
        way = step / max(1, self.steps - 1)
        weights = {term: first + way * (last - first) for term, (first, last) in self.reward_weights.items()}
        return {"reward_weights": weights} if weights else {}

    async def run(self, trainer: Trainer) -> None:
        plan, algorithm = trainer.plan, trainer.plan.algorithm
        source: TaskSource = self.source or Uniform(plan.environment)
        terms = {environment.id: environment.success for environment in source.environments}
        learner = trainer.learn(self.optimization, reference="reference" in algorithm.loss.needs)
        learner.check(algorithm.loss)
        for step in trainer.steps("improving", self.steps):
            if self.evaluate_every and step and step % self.evaluate_every == 0 and plan.heldout.tasks:
                await trainer.measure("midway", plan.heldout.tasks)
                trainer.begin("improving", self.steps)
            start = time.monotonic()
            drawn = source.draw(step, self.tasks_per_step, plan.seed, trainer.state(self.name))
            settings = self.settings(step)
            tasks = [replace(task, settings={**task.settings, **settings}) for task in drawn]
            grown = await trainer.grow(tasks, algorithm.rollout, plan.sampling, derive_seed(plan.seed, "rollout", step))
            trees, end = grown.trees, time.monotonic()
            credit = algorithm.advantage
            advantages = None if isinstance(credit, Comparisons) else advantages_of(credit, trees)
            metrics = self._update(trainer, learner, trees, advantages)
            described = _describe(trees, [terms.get(tree.task.env, plan.environment.success) for tree in trees])
            seconds = {"rollout": end - start, "update": time.monotonic() - end}
            trainer.run.log(stage=self.name, step=step, **described, **metrics, **grown.told(), seconds=seconds)
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

        `sampler_deviation` is the mean distance, nats, of the learner's log-probabilities from the sampler's before the
        first of them.
        """
        algorithm, parts = trainer.plan.algorithm, self.updates_per_step
        trainer.rest_policy()
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
        metrics = {name: (sum if name in counts else fmean)(row[name] for row in rows) for name in rows[0]}
        apart = rows[0]["ratio_deviation"] if trees is sampled else _distance(sampled, trees)
        return metrics | {"sampler_deviation": apart}


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


def _distance(before: Sequence[RolloutTree], after: Sequence[RolloutTree]) -> float:
    """Mean absolute difference of the log-probabilities of all sampled tokens, nats, where they were recorded."""
    pairs = (pair for pair in zip(before, after, strict=True))
    nodes = ((one, two) for a, b in pairs for one, two in zip(a.nodes, b.nodes, strict=True) if one.action.logprobs)
    apart = [abs(x - y) for one, two in nodes for x, y in zip(one.action.logprobs, two.action.logprobs, strict=True)]
    return fmean(apart) if apart else 0.0
