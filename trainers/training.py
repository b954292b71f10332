"""Training: carries a plan's stages out in a run directory, and goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..agents import (
    Advantages,
    ChatRenderer,
    Context,
    ContextLengthExceeded,
    Evaluation,
    RolloutStrategy,
    RolloutTree,
    Run,
    Sampling,
    Served,
    Stopped,
    TokenPolicy,
    Watcher,
    WeightSync,
    derive_seed,
    grow,
    run_to_end,
)
from ..agents.evaluation import TaskOutcome
from ..agents.inference.forward import native_dtype, positions
from ..agents.memory import Memory, Seen, answers_told, lessons_of
from ..agents.models.lora import merged_state
from ..agents.policies.sampler import TransformersPolicy
from ..agents.rollouts import Chains, Recall, TooManyFailures
from ..agents.store.folder import whole
from ..envs import Message, Task
from .learner.checkpoints import Checkpoints, DamagedCheckpoint, Progress
from .learner.learner import Learner, Optimization
from .pipeline import Grown, read_ahead, write_ahead
from .plan import Plan

MEMORY = "memory"  # the state of a checkpoint that holds the revision of the lessons and what they returned
REPLY = 512  # tokens of what the policy writes for a memory, at most
AHEAD = "ahead.jsonl"  # the file of a checkpoint that holds the trees of steps to come


class LearningPolicy(TokenPolicy, WeightSync, Protocol):
    """A policy that samples tokens and takes over new weights: what a trainer can improve."""


class Trainer:
    """Carries a plan out in a run directory; goes on where the directory's last checkpoint stands.

    `policy` samples and takes over the learner's weights; by default the model itself does, in this process. `memory`
    has the lessons that are told to rollouts of the improvement and of evaluations, and learns from the former.
    """

    def __init__(
        self,
        plan: Plan,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        run: Run,
        watcher: Watcher,
        *,
        policy: LearningPolicy | None = None,
        memory: Memory | None = None,
        dtype: torch.dtype | None = None,  # native_dtype of the model's device
        max_rows: int = 32,
    ) -> None:
        self.plan, self.model, self.renderer, self.run, self.watcher = plan, model, renderer, run, watcher
        self.memory = memory
        self.dtype = dtype or native_dtype(model.device)
        self.policy = policy or TransformersPolicy(model, renderer, dtype=self.dtype, max_rows=max_rows)
        self.positions = positions(model) or 1 << 30  # tokens that the model can read
        self._max_rows = max_rows
        self._progress, self._checkpoints = Progress(), Checkpoints(run)
        self._learner: Learner | None = None
        self._restored: dict[str, torch.Tensor] = {}  # optimiser state of the checkpoint
        self._stale = False  # whether the policy has yet to take over the learner's weights
        self._saved_at = time.monotonic()
        self._threads: ThreadPoolExecutor | None = None
        self.ahead: dict[int, Grown] = {}  # of the stage's next steps, by step; checkpoints keep the finished trees

    def train(self) -> dict[str, Evaluation]:
        """Evaluations by stage name. Stopped when the watcher asked for it."""
        return run_to_end(self._train())

    async def _train(self) -> dict[str, Evaluation]:
        """All stages in one event loop, so that a policy or an environment may keep a connection over the whole run."""
        self._restore()
        if not self.state(MEMORY):
            self.keep_memory()  # a run that resumes before it has learned goes on with its own lessons, too
        served = self.policy if isinstance(self.policy, Served) else None
        async with contextlib.AsyncExitStack() as stack:
            if served:
                stack.push_async_callback(served.close)
                await served.open(self.plan.sampling)
                self._stale = True  # whatever weights it has
            await self._carry_out()
        return {name: Evaluation.from_json(row) for name, row in self._progress.results.items()}

    async def _carry_out(self) -> None:
        with ThreadPoolExecutor(self.plan.environment_threads, "environment") as self._threads:
            while self._progress.stage < len(self.plan.stages):
                await self.plan.stages[self._progress.stage].run(self)
                self._learner = None
                gc.collect()  # an optimiser refers to itself, and holds twice the weights
                self._progress.stage, self._progress.step = self._progress.stage + 1, 0

    def save_model(self, folder: Path) -> None:
        """The trained model and its tokenizer as a transformers directory, in the computation's dtype.

        They replace what was in the folder once they are whole.
        """
        state = {name: tensor.to(self.dtype) for name, tensor in merged_state(self.model).items()}
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # writing takes a second
        try:
            with whole(folder) as part:
                self.model.save_pretrained(part, state_dict=state)
                self.renderer.tokenizer.save_pretrained(part)
        finally:
            if bars:
                logging.enable_progress_bar()

    # what stages are made of

    async def measure(self, name: str, tasks: int, *, notes: bool = True) -> Evaluation:
        """Success of the present weights on the first held-out tasks; recorded under this stage name. `notes`: the
        lessons of the memory are told."""
        held = self.plan.heldout
        chosen = [self.plan.environment.task("heldout", i) for i in range(tasks)]
        sampling = replace(self.plan.sampling, temperature=held.temperature)
        self.watcher.begin(f"evaluating: {name}", tasks)
        start = time.monotonic()
        grown = await self.grow(
            chosen, Chains(held.rollouts), sampling, derive_seed("evaluation"),
            at_once=max(1, self._max_rows // held.rollouts),  # more would only take memory for keys and values
            watch=True,
            recall=self.memory.recall_all if self.memory and notes else None,
        )  # fmt: skip
        result = Evaluation.of(grown.trees, self.plan.environment.success, time.monotonic() - start)
        if grown.failed_tasks:
            result = _with_failures(result, chosen)
        self.record(grown.trees, stage=name, step=self.step)
        self.run.show(name, self.step, grown.trees)
        mean, low, high = result.success
        self.run.log(
            stage=name,
            step=self.step,
            success=mean,
            low=low,
            high=high,
            turns=result.mean("turns"),
            tool_calls=result.mean("tool_calls"),
            **answers_told(tree.task for tree in grown.trees),
            **grown.told(),
            seconds={"evaluation": result.seconds},
        )
        if self.plan.keep.best and tasks == held.tasks and mean > self._progress.best:
            self._progress.best = mean
            self.save_model(self.run.path / "models" / "best")
        return result

    async def grow(
        self,
        tasks: Sequence[Task],
        strategy: RolloutStrategy,
        sampling: Sampling,
        seed: int,
        *,
        at_once: int | None = None,
        watch: bool = False,
        recall: Recall | None = None,
    ) -> Grown:
        """Trees of the tasks, by the policy with the present weights. `watch`: the watcher hears of each.

        TooManyFailures where more tasks fail than the plan allows, or all of them; an EpisodeError where an
        environment's code raises an error, unless the plan skips those.
        """
        await self.push()
        grown = Grown(tasks)
        await self.fill(grown, strategy, sampling, seed, at_once=at_once, watch=watch, recall=recall)
        return grown

    async def push(self) -> None:
        """Gives the policy the present weights, unless it has them."""
        if self._stale:
            _trim()
            await self.policy.push(self.model, self._progress.weights_version)
            self._stale = False

    async def fill(
        self,
        grown: Grown,
        strategy: RolloutStrategy,
        sampling: Sampling,
        seed: int,
        *,
        at_once: int | None = None,
        watch: bool = False,
        tree_seconds: float | None = None,
        recall: Recall | None = None,
    ) -> None:
        """Grows the trees that are missing, by the policy with the weights that it has, and raises what `grow` does."""
        places = grown.missing
        outcomes = grow(
            [grown.tasks[place] for place in places], strategy, self.policy, self.renderer, sampling,
            seed=seed, cassette=self.run.cassette, executor=self._threads, at_once=at_once,
            skip_errors=self.plan.on_failure == "skip", tree_seconds=tree_seconds, recall=recall,
        )  # fmt: skip
        async with contextlib.aclosing(outcomes):
            async for number, outcome in outcomes:
                grown.add(places[number], outcome)
                if watch and isinstance(outcome, RolloutTree):
                    self.watcher.advance()
        grown.failures.sort(key=lambda one: (one[1].task.seed, one[1].rollout or 0))  # not by when they came
        self._check(grown)
        grown.over = True

    def _check(self, grown: Grown) -> None:
        failed, all_tasks = grown.failed_tasks, len(grown.tasks)
        if failed and (failed > self.plan.max_failures * all_tasks or failed == all_tasks):
            raise TooManyFailures(
                f"{failed} of {all_tasks} tasks failed, more than max_failures allows ({self.plan.max_failures:g} of "
                f"them, and never all); the first: {grown.told()['failures'][0]}"
            ) from grown.failures[0][1].raised

    def keep_result(self, name: str, result: Evaluation) -> None:
        """Keeps an evaluation for the summary, under this name."""
        self._progress.results[name] = result.to_json()

    def state(self, stage: str) -> Mapping[str, Any]:
        """What a stage kept at its last step; empty at the first."""
        state: Mapping[str, Any] = self._progress.states.get(stage, {})
        return state

    def keep_state(self, stage: str, state: Mapping[str, Any]) -> None:
        """Keeps JSON that the next steps of a stage depend on, in checkpoints too."""
        if state:
            self._progress.states[stage] = dict(state)

    def record(
        self, trees: Sequence[RolloutTree], advantages: Sequence[Advantages] | None = None, **labels: Any
    ) -> list[int]:
        """Writes the trees into the run's store; their numbers there."""
        lessons = [lessons_of(tree.task) for tree in trees]
        scored: Sequence[Advantages | None] = advantages or [None] * len(trees)
        return [
            self.run.trees.append(tree, each, lessons=told, **labels)
            for tree, each, told in zip(trees, scored, lessons, strict=True)
        ]

    async def reflect(self, trees: Mapping[int, RolloutTree], reason: str) -> dict[str, Any]:
        """Has the memory learn from trees by their number in the store; what it did, for the metrics."""
        if self.memory is None:
            return {}
        batch = [Seen(str(self.run.path), number, tree) for number, tree in trees.items()]
        counts = await self.memory.learn(batch, self._ask, reason)
        self.keep_memory()
        return {"lessons": counts, **answers_told(tree.task for tree in trees.values())}

    def keep_memory(self) -> None:
        """Has the next checkpoint stand at the lessons as they are now."""
        if self.memory:
            returns = {env: [*met.items()] for env, met in self.memory.returns.items()}
            self.keep_state(MEMORY, {"revision": self.memory.store.revision, "returns": returns})

    async def _ask(self, messages: Sequence[Message], seed: int) -> str:
        """What the policy replies to a chat, with the present weights."""
        await self.push()
        prompt, sampling = Context(self.renderer.prompt(messages)), self.plan.sampling
        room = min(sampling.max_context, self.positions) - prompt.length
        if room < 1:
            raise ContextLengthExceeded(f"the question has {prompt.length} tokens, which leaves no room for a reply")
        sample = await self.policy.sample(prompt, seed, replace(sampling, max_tokens=min(room, REPLY)))
        return sample.completion.text

    @property
    def step(self) -> int:
        """Steps of the present stage that are done."""
        return self._progress.step

    @property
    def weights_version(self) -> int:
        """Of the learner's present weights: steps done in all stages."""
        return self._progress.weights_version

    def shuffled(self, n: int, *parts: int | str) -> list[int]:
        return sorted(range(n), key=lambda i: derive_seed(self.plan.seed, *parts, i))

    # steps and checkpoints

    def learn(self, optimization: Optimization, *, reference: bool = False) -> Learner:
        """The stage's learner, in the state of the checkpoint that the run goes on from."""
        self.rest_policy()
        temperature = self.plan.sampling.temperature
        learner = Learner(self.model, optimization, dtype=self.dtype, temperature=temperature, reference=reference)
        if self._progress.step and self._restored:
            learner.load(self._restored)
        self._restored = {}
        self._learner = learner
        return learner

    def steps(self, label: str, total: int) -> Iterable[int]:
        """Steps that the stage has yet to do."""
        self.begin(label, total)
        while self._progress.step < total:
            yield self._progress.step

    def begin(self, label: str, total: int) -> None:
        self.watcher.begin(label, total)
        for _ in range(self._progress.step):
            self.watcher.advance()

    def done(self, note: str, *, moved: bool = True) -> None:
        """A step has come to its end: counts it, and saves when it is time. `moved`: its weights are new ones."""
        self._progress.step += 1
        if moved:
            self._progress.weights_version += 1
            self._stale = True
        self.watcher.advance(note)
        stop = self.watcher.should_stop()
        if stop or time.monotonic() - self._saved_at > self.plan.checkpoint_every:
            self._save()
        if stop:
            raise Stopped(f"saved after step {self._progress.step} of {self.plan.stages[self._progress.stage].name}")

    def rest_policy(self) -> None:
        """The weights are about to move: the policy's copies and caches need not take room meanwhile."""
        self.policy.release()
        _trim()
        self._stale = True

    def _save(self) -> None:
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        files = {AHEAD: write_ahead(self.ahead)} if self.ahead else {}
        self._checkpoints.save(self._progress, tensors | (self._learner.tensors() if self._learner else {}), files)
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        found = self._checkpoints.restore()
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
        self.ahead = read_ahead(self._checkpoints.read(AHEAD))
        if self.memory and (kept := self.state(MEMORY)):
            self.memory.store.rewind(kept["revision"])
            for env, met in kept["returns"].items():
                self.memory.returns[env] = {id: (mean, count) for id, (mean, count) in met}


def _trim() -> None:
    """Has glibc give freed memory back: what a rollout leaves in holes would else stay beside what the update takes."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _with_failures(result: Evaluation, tasks: Sequence[Task]) -> Evaluation:
    """The evaluation of all tasks: those that failed have no rollouts and no success."""
    outcomes = {outcome.task.seed: outcome for outcome in result.tasks}
    every = (outcomes.get(task.seed) or TaskOutcome(-1, task, "", None, ()) for task in tasks)
    return replace(result, tasks=tuple(every))
