"""Evaluations: a policy on a scenario's tasks, in a directory that can be resumed, compared and looked at."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..agents import Evaluation, Failure, RolloutTree, Run, derive_seed, grow, joined, run_to_end
from ..agents.evaluation import AnswerReader, Interval, TaskOutcome, figures
from ..agents.rollouts import SomeChains, TooManyFailures
from ..agents.store.folder import write_json, write_text
from ..envs import Task
from ..trainers import Stopped, Watcher
from .build import placed, try_environment
from .charts import save_chart
from .errors import ScenarioError
from .folders import begun
from .modules import folders_of
from .person import Left
from .policies import OpenedPolicy, open_policy, speaking
from .schema import Scenario, dump_scenario
from .terminal import console, say
from .watch import show_repeats, summary

STAGE = "evaluation"  # label of its trees
TRIES = 2  # of a sample that fails; in each of them a server is asked several times
Split = Literal["heldout", "train", "both"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What an evaluation may take. Tokens are counted as a server bills them: every turn sends its whole context."""

    tokens: int | None = None  # sent and sampled
    cost: float | None = None
    sent_price: float = 0.0  # of a million tokens
    sampled_price: float = 0.0

    @property
    def limited(self) -> bool:
        return self.tokens is not None or self.cost is not None

    def cost_of(self, sent: float, sampled: float) -> float:
        return (sent * self.sent_price + sampled * self.sampled_price) / 1e6

    def refusal(self, sent: float, sampled: float, share: float) -> str:
        """Why no part that is likely to take `share` of what was spent so far can be begun; empty where it can."""
        tokens, cost = sent + sampled, self.cost_of(sent, sampled)
        if self.tokens is not None and tokens * (1 + share) > self.tokens:
            return f"the budget of {self.tokens:,} tokens ({tokens:,.0f} taken)"
        if self.cost is not None and cost * (1 + share) > self.cost:
            return f"the budget of {self.cost:g} ({cost:.4g} spent)"
        return ""


@dataclass(frozen=True, slots=True)
class Setting:
    """What was evaluated and how, besides the scenario."""

    policy: str | None = None  # None: the scenario's model
    tokenizer: str | None = None  # None: the scenario's model's
    split: Split = "heldout"
    seed: int = 0  # of the draws; the tasks are the same for every seed
    budget: Budget = Budget()
    max_failures: str = "10%"  # samples that may fail before it stops, as `failure_limit` reads it

    def tasks(self, scenario: Scenario) -> list[Task]:
        splits = ["heldout", "train"] if self.split == "both" else [self.split]
        return [scenario.environment.task(split, i) for split in splits for i in range(scenario.heldout.tasks)]

    @property
    def rollout_seed(self) -> int:
        """That of held-out stages of a training run for seed 0."""
        return derive_seed("evaluation", self.seed) if self.seed else derive_seed("evaluation")


def read_setting(folder: Path) -> Setting:
    """That of the evaluation in a folder. ScenarioError where it cannot be read."""
    file = folder / "evaluation.json"
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        return Setting(**{**row, "budget": Budget(**row["budget"])})
    except (ValueError, TypeError, LookupError) as error:
        raise ScenarioError(f"{file}: not as an evaluation writes it: {error}") from error


def own_policy(folder: Path, tokenizer: str | None = None) -> tuple[str | None, str | None]:
    """(policy, tokenizer): what played an evaluation, or what a run trained."""
    if (folder / "evaluation.json").exists():
        setting = read_setting(folder)
        return setting.policy, tokenizer or setting.tokenizer
    return str(folder), tokenizer


def evaluate(scenario: Scenario, setting: Setting, out: Path, watcher: Watcher) -> dict[str, Any]:
    """The figures, as results.json in `out` holds them; goes on with what is there.

    Trees are written a part at a time, a part being the tasks that are played at once: what the policy takes, less
    where the budget is about to end. A part that was cut off is played again as a whole, so that an interruption
    changes nothing. Stopped after Ctrl-C, TooManyFailures after more failed samples than the setting allows.
    """
    start = time.monotonic()
    if not (out / "scenario.yaml").exists():  # an evaluation goes on in the format that it began in
        scenario = speaking(scenario, setting.policy, setting.tokenizer)
    with begun(out):
        run, why, before = _playing(scenario, setting, out, watcher)
    outcomes = read_outcomes(run, scenario.environment.success, answers=scenario.heldout.rollouts > 1)
    failures = [row for rows in _progress(out)["failures"].values() for row in rows]
    if not outcomes:
        raise ScenarioError(f"nothing was played: {why or _by_cause(failures)}")
    result = _result(outcomes, len(setting.tasks(scenario)), setting, why, failures)
    write_json(out / "results.json", result)
    _save_chart(out / "results.svg", result)
    hops = [task.difficulty if isinstance(task.difficulty, int) else 0 for task in outcomes]
    stage = Evaluation.over(outcomes, hops, before + time.monotonic() - start)
    run.summarize(summary({"model": stage}, success=stage.success, figures=result))
    return result


def _playing(scenario: Scenario, setting: Setting, out: Path, watcher: Watcher) -> tuple[Run, str, float]:
    """What `_play` gives, after the environment was tried."""
    env = try_environment(scenario.environment)
    if setting.policy == "oracle" and env.oracle() is None:
        raise ScenarioError(f"{scenario.environment.id} has no oracle")
    env.close()
    if setting.policy == "human" and scenario.heldout.rollouts > 1:
        raise ScenarioError("a person plays a task once: --samples 1")
    try:
        return run_to_end(_play(scenario, setting, setting.tasks(scenario), out, watcher))
    except Left:
        raise Stopped("stopped") from None


async def _play(
    scenario: Scenario, setting: Setting, tasks: Sequence[Task], out: Path, watcher: Watcher
) -> tuple[Run, str, float]:
    """Plays what is missing: (run, why it ended early, seconds that earlier parts took)."""
    opened = open_policy(setting.policy, scenario, setting.tokenizer)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(opened.close)
        run = Run(out)
        write_json(out / "evaluation.json", asdict(setting))
        write_text(out / "scenario.yaml", dump_scenario(_recorded(opened, scenario, setting)))
        run.save_tokenizer(opened.renderer.tokenizer)
        playing = _Playing(scenario, setting, tasks, opened, run, watcher)
        try:
            return run, await playing.play(), playing.before
        finally:
            playing.keep_partial()
            run.trees.close()


class _Playing:
    """An evaluation under way.

    Trees of tasks of which every sample came to its end are written part by part. A task with failed samples is played
    again when the evaluation is resumed, so what there is of it is written last, behind the size that is noted.
    """

    def __init__(
        self,
        scenario: Scenario,
        setting: Setting,
        tasks: Sequence[Task],
        opened: OpenedPolicy,
        run: Run,
        watcher: Watcher,
    ) -> None:
        self._setting, self._tasks, self._opened, self._run, self._watcher = setting, tasks, opened, run, watcher
        self._samples = scenario.heldout.rollouts
        self._begun = time.monotonic()
        state = _progress(run.path)
        self._done: int = state["tasks"]
        self.before: float = state["seconds"]
        self._failures = {int(number): rows for number, rows in state["failures"].items()}  # by number of the task
        self._partial = self._restore(state["trees_size"])  # trees of these tasks
        counts = [_tokens(tree) for tree in (*(tree for _, tree in run.trees), *self._partial.values())]
        self._sent, self._sampled = sum(sent for sent, _ in counts), sum(sampled for _, sampled in counts)

    def _restore(self, size: int) -> dict[int, RolloutTree]:
        """What there is of tasks with failed samples; what was written of a part that was cut off is forgotten."""
        records = self._run.trees.records(self._done - len(self._failures)) if self._failures else ()
        found = {record.labels.get("task"): record.tree for record in records}
        self._run.trees.truncate(size)
        return {number: found[number] for number in self._failures if number in found}

    async def play(self) -> str:
        """Why it ended early; empty where all was played."""
        self._watcher.begin("evaluating", len(self._tasks))
        for _ in range(self._done):
            self._watcher.advance()
        if retried := sorted(self._failures):
            if why := self._refusal(len(retried)):
                return why
            await self._part(retried)
        parts = -(-len(self._tasks) * self._samples // self._opened.rollouts)
        size = -(-len(self._tasks) // parts)
        while self._done < len(self._tasks):
            one = self._setting.budget.limited and not self._done  # it tells what the others are likely to take
            part = range(self._done, min(self._done + (1 if one else size), len(self._tasks)))
            while self._done and (why := self._refusal(len(part))):
                if len(part) == 1:
                    return why
                part = part[: len(part) // 2]
            await self._part(part)
            if self._watcher.should_stop() and self._done < len(self._tasks):
                raise Stopped(f"saved after {self._done} of {len(self._tasks)} tasks")
        return ""

    def _refusal(self, tasks: int) -> str:
        return self._setting.budget.refusal(self._sent, self._sampled, tasks / self._done)

    async def _part(self, numbers: Sequence[int]) -> None:
        """Plays the missing samples of tasks, those that fail TRIES times, and writes what is whole."""
        await self._try(numbers, self._watcher.advance if numbers[0] >= self._done else lambda: None)
        for _ in range(1, TRIES):
            await self._try(numbers)
        for number in numbers:
            if not self._missing(number):
                self._run.trees.append(self._partial.pop(number), stage=STAGE, step=0)
                del self._failures[number]
        self._done = max(self._done, numbers[-1] + 1)
        self._save()
        self._check_failures()

    async def _try(self, numbers: Sequence[int], advance: Callable[[], None] = lambda: None) -> None:
        """Plays the missing samples of these tasks once; those of tasks that lack the same ones grow together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number in numbers:
            if missing := self._missing(number):
                groups.setdefault(missing, []).append(number)
        for missing, members in groups.items():
            trees: dict[int, RolloutTree] = {}  # by number of the task
            failures: dict[int, list[Failure]] = {number: [] for number in members}
            number_of = {id(self._tasks[number]): number for number in members}
            outcomes = grow(
                [self._tasks[number] for number in members], SomeChains(missing),
                self._opened.policy, self._opened.renderer, self._opened.sampling,
                seed=self._setting.rollout_seed, cassette=self._run.cassette,
            )  # fmt: skip
            async with contextlib.aclosing(outcomes):
                async for outcome in outcomes:
                    number = number_of[id(outcome.task)]
                    if isinstance(outcome, Failure):
                        failures[number].append(outcome)
                    else:
                        trees[number] = outcome
                        advance()
            for number in members:
                self._add(number, trees.get(number), failures[number])
                if number not in trees:
                    advance()

    def _add(self, number: int, tree: RolloutTree | None, failures: Sequence[Failure]) -> None:
        if tree:
            sent, sampled = _tokens(tree)
            self._sent, self._sampled = self._sent + sent, self._sampled + sampled
            before = self._partial.get(number)
            self._partial[number] = joined([before, tree]) if before else tree
        by_sample = {failure.rollout: failure for failure in failures}
        self._failures[number] = [
            _failure_row(sample, by_sample.get(sample) or by_sample[None]) for sample in self._missing(number)
        ]

    def _missing(self, number: int) -> tuple[int, ...]:
        """Samples of a task that did not come to their end so far."""
        tree = self._partial.get(number)
        return tuple(sample for sample in range(self._samples) if tree is None or sample not in tree.origins)

    def _save(self) -> None:
        write_json(
            self._run.path / "progress.json",
            {
                "tasks": self._done,
                "trees_size": self._run.trees.size,
                "seconds": self.before + time.monotonic() - self._begun,
                "failures": self._failures,
            },
        )

    def _check_failures(self) -> None:
        rows = [row for rows in self._failures.values() for row in rows]
        planned = len(self._tasks) * self._samples
        if len(rows) > failure_limit(self._setting.max_failures, planned):
            raise TooManyFailures(
                f"{len(rows)} of {planned} samples failed, more than --max-failures {self._setting.max_failures}: "
                f"{_by_cause(rows)}; the last: {rows[-1]['error']}"
            )

    def keep_partial(self) -> None:
        """Writes what there is of tasks with failed samples."""
        for number in sorted(self._failures):
            if number < self._done and (tree := self._partial.get(number)) and tree.leaves:
                self._run.trees.append(tree, stage=STAGE, step=0, task=number)


def _failure_row(sample: int, failure: Failure) -> dict[str, Any]:
    return {
        "env": failure.task.env,
        "seed": failure.task.seed,
        "sample": sample,
        "turn": failure.turn,
        "cause": failure.cause.value,
        "error": failure.error,
    }


def _by_cause(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(row["cause"] for row in rows)
    return ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items()))


def failure_limit(text: str, samples: int) -> int:
    """How many samples may fail: a number, or a share such as 10%, rounded up. ValueError for anything else."""
    share = text.endswith("%")
    try:
        number = float(text.rstrip("%")) if share else int(text)
    except ValueError:
        number = -1
    if not 0 <= number <= (100 if share else math.inf):
        raise ValueError(f"--max-failures takes a number of samples or a share such as 10%, got {text!r}")
    return math.ceil(samples * number / 100) if share else int(number)


def _progress(folder: Path) -> dict[str, Any]:
    """How far an evaluation has come; what a part that was cut off wrote later does not count."""
    file = folder / "progress.json"
    state = json.loads(file.read_text()) if file.exists() else {"tasks": 0, "trees_size": 0, "seconds": 0.0}
    return {"failures": {}, **state}


def _recorded(opened: OpenedPolicy, scenario: Scenario, setting: Setting) -> Scenario:
    """The scenario with what plays; a resumed evaluation opens the same."""
    folders = (*placed(scenario).look_in, *folders_of(setting.policy))
    return replace(scenario, model=opened.scenario.model, look_in=tuple(dict.fromkeys(folders)))


def _tokens(tree: RolloutTree) -> tuple[int, int]:
    rollouts = TaskOutcome.of(0, tree, "").rollouts
    return sum(rollout.sent_tokens for rollout in rollouts), sum(rollout.sampled_tokens for rollout in rollouts)


def read_outcomes(run: Run, term: str, *, stage: str = STAGE, answers: bool = False) -> list[TaskOutcome]:
    """Of the trees of a stage, of its last step where there are several."""
    steps: dict[int, list[TaskOutcome]] = {}
    with contextlib.closing(AnswerReader()) as reader:
        for number, (labels, tree) in enumerate(run.trees):
            if labels.get("stage") == stage:
                outcome = TaskOutcome.of(number, tree, term, reader if answers else None)
                steps.setdefault(labels.get("step", 0), []).append(outcome)
    return steps[max(steps)] if steps else []


def _result(
    outcomes: Sequence[TaskOutcome],
    planned: int,
    setting: Setting,
    why: str,
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Free of times, so that the same evaluation is the same file. Figures are of the samples that did not fail."""
    result = figures(outcomes)
    tokens = result["tokens"]
    result["cost"] = setting.budget.cost_of(tokens["sent"], tokens["sampled"])
    result["planned_tasks"] = planned
    result["stopped_by"] = why or None
    result["failed"] = {
        "samples": len(failures),
        "by_cause": dict(sorted(Counter(row["cause"] for row in failures).items())),
        "each": list(failures),
    }
    return result


def _save_chart(path: Path, result: Mapping[str, Any]) -> None:
    """pass@k and pass^k where a task has several tries; else success by difficulty."""
    if result["samples"] > 1:
        series = {f"pass{mark}k": _points(result[key]) for mark, key in (("@", "pass_at"), ("^", "pass_hat"))}
        save_chart(path, "pass@k and pass^k", "k, tries", series)
        return
    groups = {name: group["success"] for name, group in result["by_difficulty"].items()}
    save_chart(path, "success", "difficulty", {"success": _points({"all": result["success"], **groups})})


def _points(intervals: Mapping[str, Mapping[str, float]]) -> list[tuple[str, Interval]]:
    return [(name, Interval(**interval)) for name, interval in intervals.items()]


# in the terminal


def show_evaluation(result: Mapping[str, Any], folder: Path) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("", "tasks", "success", "95% interval"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row("all", str(result["tasks"]), *_percents(result["success"]))
    for label, groups in (("", result["by_split"]), ("difficulty ", result["by_difficulty"])):
        for name, group in groups.items() if len(groups) > 1 else ():
            table.add_row(f"  {label}{name}", str(group["tasks"]), *_percents(group["success"]), style="dim")
    for label, key in (("pass@", "pass_at"), ("pass^", "pass_hat")):
        for k, interval in result[key].items() if result["samples"] > 1 else ():
            table.add_row(f"{label}{k}", "", *_percents(interval))
    console.print(table)
    show_repeats(result["tasks"], result["drawn"])
    means = {name.replace("_", " "): value for name, value in result["means"].items()}
    say("per episode: " + ", ".join(f"{value:.2f} {name}" for name, value in means.items()))
    say(f"rewards: return {result['return']:.3f}" + "".join(f", {k} {v:.3f}" for k, v in result["terms"].items()))
    if result["unique_answers"] is not None:
        say(f"unique answers: {result['unique_answers']:.1%} of a task's tries that answered")
    if result["truncated"]:
        say("cut off: " + ", ".join(f"{share:.1%} {cause}" for cause, share in result["truncated"].items()))
    cost = f", cost {result['cost']:.4g}" if result["cost"] else ""
    say(f"tokens: {result['tokens']['sent']:,} sent, {result['tokens']['sampled']:,} sampled{cost}")
    if result["stopped_by"]:
        counts = f"{result['drawn']} of {result['planned_tasks']} tasks"
        say(f"stopped by {result['stopped_by']}: the figures stand on {counts}")
    if failed := result["failed"]["samples"]:
        say(
            f"failed: {failed} of {failed + result['rollouts']} samples ({_by_cause(result['failed']['each'])}); the "
            f"figures stand on the others; to try again: treegym eval --resume --out {folder}"
        )
    say(f"saved in {folder}")


def _percents(interval: Mapping[str, float]) -> tuple[str, str]:
    return f"{interval['mean']:.1%}", f"{interval['low']:.1%} … {interval['high']:.1%}"
