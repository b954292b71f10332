"""Evaluations: a policy on a scenario's tasks, in a directory that can be resumed, compared and looked at."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..agents import (
    AnswerReader,
    Chains,
    Evaluation,
    Interval,
    RolloutTree,
    TaskOutcome,
    derive_seed,
    figures,
    grow_trees,
    run_to_end,
)
from ..envs import Task
from ..trainers import Run, Stopped, Watcher
from ..trainers.run import write_json, write_text
from .build import placed, try_environment
from .charts import save_chart
from .errors import ScenarioError
from .folders import begun
from .person import Left
from .policies import OpenedPolicy, open_policy
from .schema import Scenario, dump_scenario
from .terminal import console, say
from .watch import show_repeats, summary

STAGE = "evaluation"  # label of its trees
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
    changes nothing. Stopped after Ctrl-C.
    """
    start = time.monotonic()
    with begun(out):
        run, why, before = _playing(scenario, setting, out, watcher)
    outcomes = read_outcomes(run, scenario.environment.success, answers=scenario.heldout.rollouts > 1)
    if not outcomes:
        raise ScenarioError(f"nothing was played: {why}")
    result = _result(outcomes, len(setting.tasks(scenario)), setting, why)
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
    except BaseExceptionGroup as group:  # of the tasks that play side by side
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, Left):
            raise Stopped("stopped") from None
        raise error from None


async def _play(
    scenario: Scenario, setting: Setting, tasks: Sequence[Task], out: Path, watcher: Watcher
) -> tuple[Run, str, float]:
    """Plays what is missing: (run, why it ended early, seconds that earlier parts took)."""
    opened = open_policy(setting.policy, scenario, setting.tokenizer)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(opened.close)
        run = Run(out)
        write_json(out / "evaluation.json", asdict(setting))
        write_text(out / "scenario.yaml", dump_scenario(_recorded(opened, scenario)))
        run.save_tokenizer(opened.renderer.tokenizer)
        done, before = _restore(run)
        samples = scenario.heldout.rollouts
        parts = -(-len(tasks) * samples // opened.rollouts)
        size = -(-len(tasks) // parts)
        sent, sampled = _spent(run)
        watcher.begin("evaluating", len(tasks))
        for _ in range(done):
            watcher.advance()
        begun = time.monotonic()
        while done < len(tasks):
            one = setting.budget.limited and not done  # it tells what the others are likely to take
            part = tasks[done : done + (1 if one else size)]
            while done and (why := setting.budget.refusal(sent, sampled, len(part) / done)):
                if len(part) == 1:
                    return run, why, before
                part = part[: len(part) // 2]
            trees = await grow_trees(
                part, Chains(samples), opened.policy, opened.renderer, opened.sampling,
                seed=setting.rollout_seed, on_tree=lambda tree: watcher.advance(), cassette=run.cassette,
            )  # fmt: skip
            for tree in trees:
                run.trees.append(tree, stage=STAGE, step=0)
                sent, sampled = sent + _tokens(tree)[0], sampled + _tokens(tree)[1]
            done, seconds = done + len(part), before + time.monotonic() - begun
            write_json(out / "progress.json", {"tasks": done, "trees_size": run.trees.size, "seconds": seconds})
            if watcher.should_stop() and done < len(tasks):
                raise Stopped(f"saved after {done} of {len(tasks)} tasks")
        return run, "", before


def _recorded(opened: OpenedPolicy, scenario: Scenario) -> Scenario:
    """The scenario with what plays; a resumed evaluation opens the same."""
    return replace(placed(scenario), model=opened.scenario.model)


def _restore(run: Run) -> tuple[int, float]:
    """Tasks done and seconds taken; what was written of a part that was cut off is forgotten."""
    file = run.path / "progress.json"
    state: dict[str, Any] = {"tasks": 0, "trees_size": 0, "seconds": 0.0}
    if file.exists():
        state = json.loads(file.read_text())
    run.trees.truncate(state["trees_size"])
    return state["tasks"], state["seconds"]


def _spent(run: Run) -> tuple[int, int]:
    """Tokens sent and sampled in the trees so far."""
    counts = [_tokens(tree) for _, tree in run.trees]
    return sum(sent for sent, _ in counts), sum(sampled for _, sampled in counts)


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


def _result(outcomes: Sequence[TaskOutcome], planned: int, setting: Setting, why: str) -> dict[str, Any]:
    """Free of times, so that the same evaluation is the same file."""
    result = figures(outcomes)
    tokens = result["tokens"]
    result["cost"] = setting.budget.cost_of(tokens["sent"], tokens["sampled"])
    result["planned_tasks"] = planned
    result["stopped_by"] = why or None
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
    say(f"saved in {folder}")


def _percents(interval: Mapping[str, float]) -> tuple[str, str]:
    return f"{interval['mean']:.1%}", f"{interval['low']:.1%} … {interval['high']:.1%}"
