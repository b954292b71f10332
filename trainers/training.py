"""Training: evaluate, warm up on demonstrations, improve by an algorithm, evaluate again."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..agents import (
    Chains,
    ChatRenderer,
    Cost,
    EpisodeError,
    Evaluation,
    FollowOracle,
    RolloutStrategy,
    RolloutTree,
    Sampling,
    TransformersPolicy,
    derive_seed,
    grow_trees,
    merged_state,
    native_dtype,
    positions,
    run_to_end,
    succeeded,
)
from ..envs import Task
from .algorithms import Algorithm
from .learner import Learner, Optimization
from .losses import ReinforceLoss
from .packing import Advantages, by_turn
from .run import DamagedCheckpoint, Progress, Run

_STRICT = {"extra": "forbid"}  # read by pydantic where these are validated


def _at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True, slots=True)
class Environment:
    """Which tasks there are: an environment, its settings, and the reset options of both splits."""

    __pydantic_config__ = _STRICT
    id: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=lambda: {"split": "train"})
    heldout: Mapping[str, Any] = field(default_factory=lambda: {"split": "heldout"})
    success: str = "exact"  # the reward term that is 1 where an episode succeeded
    secret: str | None = None  # what seeds derive from beside their names, so that agents cannot search for them

    def task(self, split: str, *parts: int | str, **settings: Any) -> Task:
        """The task that the parts (run seed, step, number …) name, for the secret."""
        options = self.train if split == "train" else self.heldout
        seed = derive_seed(*filter(None, [self.secret]), split, *parts)
        return Task(self.id, seed, dict(options), {**self.settings, **settings})


@dataclass(frozen=True, slots=True)
class Warmup:
    """Supervised fine-tuning on the oracle's demonstrations, of train tasks."""

    __pydantic_config__ = _STRICT
    demonstrations: int = 128
    epochs: int = 1
    batch_size: int = 8  # demonstrations in an optimiser step
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the environment, such as an oracle that errs
    optimization: Optimization = field(default_factory=lambda: Optimization(1.5e-4, warmup_steps=4))

    def __post_init__(self) -> None:
        _at_least(0, demonstrations=self.demonstrations, epochs=self.epochs)
        _at_least(1, batch_size=self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.demonstrations // self.batch_size)


@dataclass(frozen=True, slots=True)
class Improvement:
    """Reinforcement learning: each step grows trees for new tasks and updates the policy from them."""

    __pydantic_config__ = _STRICT
    steps: int = 20
    tasks_per_step: int = 8
    updates_per_step: int = 1  # optimiser steps, each on a part of the tasks
    evaluate_every: int = 0  # steps; 0: only at the end
    reward_weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of terms: first step's and last's
    optimization: Optimization = field(default_factory=Optimization)

    def __post_init__(self) -> None:
        _at_least(0, steps=self.steps, evaluate_every=self.evaluate_every)
        _at_least(1, updates_per_step=self.updates_per_step)
        _at_least(self.updates_per_step, tasks_per_step=self.tasks_per_step)

    def settings(self, step: int) -> dict[str, Any]:
        """Of the environment at a step: reward weights on the way from the first to the last."""
        way = step / max(1, self.steps - 1)
        weights = {term: first + way * (last - first) for term, (first, last) in self.reward_weights.items()}
        return {"reward_weights": weights} if weights else {}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How held-out success is measured; the tasks are the same for every stage, run and seed."""

    __pydantic_config__ = _STRICT
    tasks: int = 200
    rollouts: int = 1  # a task
    temperature: float = 1.0  # 1: the policy itself; 0: its most likely tokens
    untrained: int = 64  # tasks, the first ones, on which the untouched model is measured

    def __post_init__(self) -> None:
        _at_least(0, tasks=self.tasks, temperature=self.temperature, untrained=self.untrained)
        _at_least(1, rollouts=self.rollouts)


@dataclass(frozen=True, slots=True)
class Keep:
    """Which models stay in the run's directory besides the trained one, the last."""

    __pydantic_config__ = _STRICT
    best: bool = False  # models/best: of the evaluation on all held-out tasks with the highest success, the first one
    every: int = 0  # models/step-N after every so many steps of the improvement; 0: none

    def __post_init__(self) -> None:
        _at_least(0, every=self.every)


OnFailure = Literal["stop", "skip"]  # of an episode: ends the run, or leaves its task out and counts it


@dataclass(frozen=True, slots=True)
class Plan:
    """All a run does."""

    environment: Environment
    algorithm: Algorithm
    sampling: Sampling = Sampling()
    warmup: Warmup = Warmup()
    improvement: Improvement = Improvement()
    heldout: HeldOut = HeldOut()
    seed: int = 0
    checkpoint_every: float = 120.0  # seconds between checkpoints
    keep: Keep = Keep()
    on_failure: OnFailure = "stop"


class Watcher(Protocol):
    """Hears how a run gets on."""

    def begin(self, stage: str, total: int) -> None:
        """A stage of `total` units of work begins."""
        ...

    def advance(self, note: str = "") -> None:
        """One unit is done."""
        ...

    def should_stop(self) -> bool:
        """Whether to save and stop as soon as the present unit is done."""
        ...


class Stopped(Exception):
    """The run was asked to stop; it is saved and can be resumed."""


STAGES = "untrained", "warm-up", "warmed up", "improvement", "trained"  # by Progress.stage


class Trainer:
    """Carries a plan out in a run directory; goes on where the directory's last checkpoint stands."""

    def __init__(
        self,
        plan: Plan,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        run: Run,
        watcher: Watcher,
        *,
        dtype: torch.dtype | None = None,  # native_dtype of the model's device
        max_rows: int = 32,
    ) -> None:
        self.plan, self.model, self.renderer, self.run, self.watcher = plan, model, renderer, run, watcher
        self.dtype = dtype or native_dtype(model.device)
        self.policy = TransformersPolicy(model, renderer, dtype=self.dtype, max_rows=max_rows)
        self._max_rows = max_rows
        self._positions = positions(model) or 1 << 30
        self._progress = Progress()
        self._learner: Learner | None = None
        self._restored: dict[str, torch.Tensor] = {}  # optimiser state of the checkpoint
        self._stale = False  # whether the policy has yet to take over the learner's weights
        self._saved_at = time.monotonic()
        doing = self._evaluate, self._warm_up, self._evaluate, self._improve, self._evaluate
        self._stages: list[tuple[str, Callable[[str], None]]] = list(zip(STAGES, doing, strict=True))

    def train(self) -> dict[str, Evaluation]:
        """Evaluations by stage name. Stopped when the watcher asked for it."""
        self._restore()
        while self._progress.stage < len(self._stages):
            name, stage = self._stages[self._progress.stage]
            stage(name)
            self._learner = None
            gc.collect()  # an optimiser refers to itself, and holds twice the weights
            self._progress.stage, self._progress.step = self._progress.stage + 1, 0
        return {name: Evaluation(**row) for name, row in self._progress.results.items()}

    def save_model(self, folder: Path) -> None:
        """The trained model and its tokenizer as a transformers directory, in the computation's dtype."""
        state = {name: tensor.to(self.dtype) for name, tensor in merged_state(self.model).items()}
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # writing takes a second
        self.model.save_pretrained(folder, state_dict=state)
        if bars:
            logging.enable_progress_bar()
        self.renderer.tokenizer.save_pretrained(folder)

    # stages

    def _evaluate(self, name: str) -> None:
        held = self.plan.heldout
        tasks = min(held.untrained, held.tasks) if name == "untrained" else held.tasks
        if tasks:
            self._progress.results[name] = self.measure(name, tasks).to_json()

    def measure(self, name: str, tasks: int) -> Evaluation:
        """Success of the present weights on the first held-out tasks; recorded."""
        held = self.plan.heldout
        chosen = [self.plan.environment.task("heldout", i) for i in range(tasks)]
        sampling = replace(self.plan.sampling, temperature=held.temperature)
        self.watcher.begin(f"evaluating: {name}", tasks)
        start = time.monotonic()
        waves = -(-tasks * held.rollouts // self._max_rows)  # more at once would only take memory for keys and values
        size = -(-tasks // waves)
        failed: list[EpisodeError] = []
        trees = [
            tree
            for i in range(0, tasks, size)
            for tree in self._grow(
                chosen[i : i + size], Chains(held.rollouts), sampling, derive_seed("evaluation"), failed, watch=True
            )
        ]
        result = Evaluation.of(trees, self.plan.environment.success, time.monotonic() - start)
        if failed:
            result = _with_failures(result, chosen, trees)
        self._record(trees, stage=name, step=self._progress.step)
        mean, low, high = result.interval
        self.run.log(
            stage=name,
            step=self._progress.step,
            success=mean,
            low=low,
            high=high,
            turns=result.turns,
            tool_calls=result.tool_calls,
            **_told(failed),
            seconds={"evaluation": result.seconds},
        )
        if self.plan.keep.best and tasks == held.tasks and mean > self._progress.best:
            self._progress.best = mean
            self.save_model(self.run.path / "models" / "best")
        return result

    def _warm_up(self, name: str) -> None:
        warmup, environment = self.plan.warmup, self.plan.environment
        tasks = [
            environment.task("train", self.plan.seed, "demonstration", i, **warmup.settings)
            for i in range(warmup.demonstrations)
        ]
        if not tasks:
            return
        failed: list[EpisodeError] = []
        demonstrations = self._grow(tasks, FollowOracle(), Sampling(max_context=self._positions), 0, failed)
        teacher = Evaluation.of(demonstrations, environment.success)
        self._progress.results["demonstrations"] = teacher.to_json()
        if self._progress.step == 0:
            self._record(demonstrations, stage=name, step=0)
        order = [
            i for epoch in range(warmup.epochs) for i in self._shuffled(len(demonstrations), "demonstrations", epoch)
        ]
        learner = self._learn(warmup.optimization)
        for step in self._steps("warming up", warmup.steps):
            batch = [demonstrations[i] for i in order[step * warmup.batch_size : (step + 1) * warmup.batch_size]]
            start = time.monotonic()
            metrics = learner.update([(tree, _ones(tree)) for tree in batch], ReinforceLoss())
            told = _told(failed) if step == 0 else {}
            self.run.log(stage=name, step=step, **metrics, **told, seconds={"update": time.monotonic() - start})
            self._done(f"loss {metrics['loss']:.2f}")

    def _improve(self, name: str) -> None:
        plan = self.plan.improvement
        learner = self._learn(plan.optimization, reference="reference" in self.plan.algorithm.loss.needs)
        for step in self._steps("improving", plan.steps):
            if plan.evaluate_every and step and step % plan.evaluate_every == 0 and self.plan.heldout.tasks:
                self.measure("midway", self.plan.heldout.tasks)
                self._begin("improving", plan.steps)
            start = time.monotonic()
            settings = plan.settings(step)
            tasks = [
                self.plan.environment.task("train", self.plan.seed, step, i, **settings)
                for i in range(plan.tasks_per_step)
            ]
            before = self.policy.prefilled_tokens, self.policy.sampled_tokens
            failed: list[EpisodeError] = []
            seed = derive_seed(self.plan.seed, "rollout", step)
            trees = self._grow(tasks, self.plan.algorithm.rollout, self.plan.sampling, seed, failed)
            grown = time.monotonic()
            advantages = self.plan.algorithm.advantage(trees)
            metrics = self._update(learner, trees, advantages)
            self.run.log(
                stage=name, step=step, **self._describe(trees), **metrics, **_told(failed),
                prefilled_tokens=self.policy.prefilled_tokens - before[0],
                sampled_tokens=self.policy.sampled_tokens - before[1],
                seconds={"rollout": grown - start, "update": time.monotonic() - grown},
            )  # fmt: skip
            self._record(trees, advantages, stage=name, step=step)
            success = fmean(x for tree in trees for x in succeeded(tree, self.plan.environment.success))
            if self.plan.keep.every and (step + 1) % self.plan.keep.every == 0:
                self.save_model(self.run.path / "models" / f"step-{step + 1}")
            self._done(f"success {success:.0%}" + (f", {len(failed)} failed" if failed else ""))

    # parts of stages

    def _grow(
        self,
        tasks: Sequence[Task],
        strategy: RolloutStrategy,
        sampling: Sampling,
        seed: int,
        failed: list[EpisodeError],
        *,
        watch: bool = False,
    ) -> list[RolloutTree]:
        """A tree for each task. Where the plan skips failures, the tasks that failed are left out and appended to
        `failed`, and the others are grown again without them: the same trees, for seeds name their tasks."""
        if self._stale:
            _trim()
            self.policy.refresh(self._progress.weights_version)
            self._stale = False
        left, heard = list(tasks), set[int]()

        def hear(tree: RolloutTree) -> None:
            if watch and tree.task.seed not in heard:
                heard.add(tree.task.seed)
                self.watcher.advance()

        while True:
            growing = grow_trees(
                left, strategy, self.policy, self.renderer, sampling,
                seed=seed, on_tree=hear, cassette=self.run.cassette,
            )  # fmt: skip
            try:
                return run_to_end(growing)
            except (EpisodeError, BaseExceptionGroup) as raised:
                error = _first_episode_error(raised)
                left = [task for task in left if error.task != task]
                if self.plan.on_failure == "stop" or not left:
                    raise error from error.__cause__
                failed.append(error)

    def _update(
        self, learner: Learner, trees: Sequence[RolloutTree], advantages: Sequence[Advantages]
    ) -> dict[str, float]:
        """The step's optimiser steps; means of their metrics, sums of their counts.

        `sampler_deviation` is the mean distance, nats, of the learner's log-probabilities from the sampler's before the
        first of them.
        """
        algorithm, parts = self.plan.algorithm, self.plan.improvement.updates_per_step
        self._rest_policy()
        sampled = trees
        if "old" in algorithm.loss.needs:
            trees = [learner.with_own_logprobs(tree) for tree in trees]
        scored = list(zip(trees, advantages, strict=True))
        rows = [learner.update(scored[i::parts], algorithm.loss) for i in range(parts)]
        counts = {"trained_tokens", "loss_terms", "skipped_updates"}
        metrics = {name: (sum if name in counts else fmean)(row[name] for row in rows) for name in rows[0]}
        apart = rows[0]["ratio_deviation"] if trees is sampled else _distance(sampled, trees)
        return metrics | {"sampler_deviation": apart}

    def _describe(self, trees: Sequence[RolloutTree]) -> dict[str, Any]:
        held = Evaluation.of(trees, self.plan.environment.success)
        logprobs = [p for tree in trees for node in tree.nodes for p in node.action.logprobs]
        return {
            "success": fmean(held.success),
            "return": fmean(x for tree in trees for x in tree.returns),
            "informative": fmean(len(set(tree.returns)) > 1 for tree in trees),
            "turns": held.turns,
            "tool_calls": held.tool_calls,
            "truncated": _truncated(trees),
            "surprise": -fmean(logprobs) if logprobs else 0.0,  # nats per sampled token; an estimate of the entropy
            "unique_tokens": sum(tree.num_unique_tokens for tree in trees),
            "total_tokens": sum(tree.num_total_tokens for tree in trees),
            "cost": asdict(sum((tree.cost for tree in trees), Cost())),
        }

    def _record(
        self, trees: Sequence[RolloutTree], advantages: Sequence[Advantages] | None = None, **labels: Any
    ) -> None:
        for i, tree in enumerate(trees):
            known = None if advantages is None else by_turn(advantages[i])
            self.run.trees.append(tree, known, **labels)

    def _shuffled(self, n: int, *parts: int | str) -> list[int]:
        return sorted(range(n), key=lambda i: derive_seed(self.plan.seed, *parts, i))

    # steps and checkpoints

    def _learn(self, optimization: Optimization, *, reference: bool = False) -> Learner:
        """The stage's learner, in the state of the checkpoint that the run goes on from."""
        self._rest_policy()
        temperature = self.plan.sampling.temperature
        learner = Learner(self.model, optimization, dtype=self.dtype, temperature=temperature, reference=reference)
        if self._progress.step and self._restored:
            learner.load(self._restored)
        self._restored = {}
        self._learner = learner
        return learner

    def _steps(self, label: str, total: int) -> Iterable[int]:
        """Steps that the stage has yet to do."""
        self._begin(label, total)
        while self._progress.step < total:
            yield self._progress.step

    def _begin(self, label: str, total: int) -> None:
        self.watcher.begin(label, total)
        for _ in range(self._progress.step):
            self.watcher.advance()

    def _done(self, note: str) -> None:
        """A step's weights are in place: counts it, and saves when it is time."""
        self._progress.step += 1
        self._progress.weights_version += 1
        self._stale = True
        self.watcher.advance(note)
        stop = self.watcher.should_stop()
        if stop or time.monotonic() - self._saved_at > self.plan.checkpoint_every:
            self._save()
        if stop:
            raise Stopped(f"saved after step {self._progress.step} of {self._stages[self._progress.stage][0]}")

    def _rest_policy(self) -> None:
        """The weights are about to move: the policy's copies and caches need not take room meanwhile."""
        self.policy.release()
        _trim()
        self._stale = True

    def _save(self) -> None:
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        self.run.save(self._progress, tensors | (self._learner.tensors() if self._learner else {}))
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        found = self.run.restore()
        if found is None:
            return
        self._progress, tensors = found
        weights = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
        learned = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if other := sorted(learned ^ weights.keys()):
            raise DamagedCheckpoint(f"the checkpoint in {self.run.path} is of another model: {', '.join(other[:3])} …")
        self.model.load_state_dict(weights, strict=False)
        self._restored = {name: x for name, x in tensors.items() if not name.startswith("model.")}
        self._stale = True


def _trim() -> None:
    """Has glibc give freed memory back: what a rollout leaves in holes would else stay beside what the update takes."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _ones(tree: RolloutTree) -> Advantages:
    return [[1.0] * len(path) for path in tree.paths]


def _first_episode_error(raised: EpisodeError | BaseExceptionGroup) -> EpisodeError:
    """The first one there is in it. Raises it again where there is none."""
    if isinstance(raised, EpisodeError):
        return raised
    failures, others = raised.split(EpisodeError)
    if failures is None or others is not None:
        raise raised
    first: BaseException = failures
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, EpisodeError)
    return first


def _told(failed: Sequence[EpisodeError]) -> dict[str, Any]:
    """What a row of the metrics tells of failed tasks."""
    return {"failed_tasks": len(failed), "failures": [str(error) for error in failed]} if failed else {}


def _with_failures(result: Evaluation, tasks: Sequence[Task], trees: Sequence[RolloutTree]) -> Evaluation:
    """The evaluation of all tasks: those without a tree had no success."""
    place = {tree.task.seed: number for number, tree in enumerate(trees)}
    places = [place.get(task.seed) for task in tasks]
    own = itertools.count(len(trees))  # each that failed counts as a problem of its own
    return replace(
        result,
        problems=[next(own) if i is None else result.problems[i] for i in places],
        success=[0.0 if i is None else result.success[i] for i in places],
        hops=[0 if i is None else result.hops[i] for i in places],
    )


def _truncated(trees: Sequence[RolloutTree]) -> dict[str, float]:
    """The share of rollouts that were cut off, by cause."""
    ends = [tree.nodes[leaf] for tree in trees for leaf in tree.leaves]
    causes = Counter(str(end.info.get("cause")) for end in ends if end.truncated)
    return {cause: count / len(ends) for cause, count in sorted(causes.items())}


def _distance(before: Sequence[RolloutTree], after: Sequence[RolloutTree]) -> float:
    """Mean absolute difference of the log-probabilities of all sampled tokens, nats."""
    pairs = (pair for pair in zip(before, after, strict=True))
    nodes = ((one, two) for a, b in pairs for one, two in zip(a.nodes, b.nodes, strict=True))
    apart = [abs(x - y) for one, two in nodes for x, y in zip(one.action.logprobs, two.action.logprobs, strict=True)]
    return fmean(apart) if apart else 0.0
