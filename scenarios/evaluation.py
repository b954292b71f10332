"""Evaluations of scenarios: a policy by name on a scenario's tasks, and what the terminal shows of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..agents import Evaluation, Run, Stopped, Watcher, run_to_end
from ..agents.evaluation import Budget, Interval, evaluate_async
from ..agents.evaluation.run import by_cause
from ..agents.memory import LessonStore, answers_told
from ..agents.store.folder import write_json, write_text
from ..envs import Task
from .build import placed, try_environment
from .charts import save_chart
from .errors import ScenarioError
from .folders import LESSONS, begun, who
from .memory import keep_lessons, memory_of
from .modules import folders_of
from .person import Left
from .policies import OpenedPolicy, as_part, open_policy, speaking
from .schema import Scenario, dump_scenario
from .terminal import console, say
from .watch import show_repeats, summary

Split = Literal["heldout", "train", "both"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What was evaluated and how, besides the scenario."""

    policy: str | None = None  # None: the scenario's model
    tokenizer: str | None = None  # None: the scenario's model's
    split: Split = "heldout"
    seed: int = 0  # of the draws; the tasks are the same for every seed
    budget: Budget = Budget()
    lessons: str | None = None  # that are told: of a run's directory, of a store, of JSON lines

    def tasks(self, scenario: Scenario) -> list[Task]:
        splits = ["heldout", "train"] if self.split == "both" else [self.split]
        return [scenario.environment.task(split, i) for split in splits for i in range(scenario.heldout.tasks)]


def read_setting(folder: Path) -> Setting:
    """The setting of the evaluation in a folder. ScenarioError where it cannot be read."""
    file = folder / "evaluation.json"
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        failures = {"max_failures": row.pop("max_failures")} if "max_failures" in row else {}  # of older evaluations
        return Setting(**{**row, "budget": Budget(**row["budget"], **failures)})
    except (ValueError, TypeError, LookupError) as error:
        raise ScenarioError(f"{file}: not as an evaluation writes it: {error}") from error


def own_policy(folder: Path, tokenizer: str | None = None) -> tuple[str | None, str | None]:
    """(policy, tokenizer): what played an evaluation, or what a run trained."""
    if (folder / "evaluation.json").exists():
        setting = read_setting(folder)
        return setting.policy, tokenizer or setting.tokenizer
    return str(folder), tokenizer


def own_lessons(policy: str | None) -> str | None:
    """Where the lessons are that a policy is told unless one asks for others: its own, if it is a run with some."""
    return policy if policy and (Path(policy) / LESSONS).exists() else None


def evaluate_scenario(scenario: Scenario, setting: Setting, out: Path, watcher: Watcher) -> dict[str, Any]:
    """The figures, as results.json in `out` holds them; goes on with what is there.

    Stopped after Ctrl-C, TooManyFailures after more failed samples than the setting allows.
    """
    if not (out / "scenario.yaml").exists():  # an evaluation goes on in the format that it began in
        scenario = speaking(scenario, setting.policy, setting.tokenizer)
    _check(scenario, setting)
    with begun(out):
        try:
            evaluation = run_to_end(_play(scenario, setting, setting.tasks(scenario), out, watcher))
        except Left:
            raise Stopped("stopped") from None
    if not evaluation.tasks:
        raise ScenarioError(f"nothing was played: {evaluation.stopped_by or by_cause(evaluation.failures)}")
    result: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if told := answers_told(task.task for task in evaluation.tasks):
        result |= told
        write_json(out / "results.json", result)
    _save_chart(out / "results.svg", result)
    success = [task.share for task in evaluation.tasks]  # of each task, in the order in which they were drawn
    Run(out).summarize(summary({"model": evaluation}, success=success, figures=result))
    return result


def _check(scenario: Scenario, setting: Setting) -> None:
    """ScenarioError where the environment cannot be had, or the policy cannot play it as the setting says."""
    with contextlib.closing(try_environment(scenario.environment)) as env:
        if setting.policy == "oracle" and env.oracle() is None:
            raise ScenarioError(f"{scenario.environment.id} has no oracle")
    if setting.policy == "human" and scenario.heldout.rollouts > 1:
        raise ScenarioError("a person plays a task once: --samples 1")


async def _play(scenario: Scenario, setting: Setting, tasks: Sequence[Task], out: Path, watcher: Watcher) -> Evaluation:
    opened = open_policy(setting.policy, scenario, setting.tokenizer)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(opened.close)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", asdict(setting))
        write_text(out / "scenario.yaml", dump_scenario(_recorded(opened, scenario, setting)))
        recall = None
        if setting.lessons:
            if not (out / LESSONS).exists():  # a resumed evaluation tells what it began with
                keep_lessons(Path(setting.lessons), out / LESSONS)
            store = stack.enter_context(LessonStore.read(out / LESSONS))
            recall = memory_of(scenario, store, opened.renderer).recall_all
        return await evaluate_async(
            tasks, opened.policy, opened.renderer, opened.sampling, setting.budget, out,
            samples=scenario.heldout.rollouts, success=scenario.environment.success, seed=setting.seed,
            at_once=opened.rollouts, watcher=watcher, recall=recall,
        )  # fmt: skip


def _recorded(opened: OpenedPolicy, scenario: Scenario, setting: Setting) -> Scenario:
    """The scenario with what plays; a resumed evaluation opens the same."""
    folders = (*placed(scenario).look_in, *folders_of(as_part(setting.policy)))
    return replace(scenario, model=opened.scenario.model, look_in=tuple(dict.fromkeys(folders)))


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
    say(f"{who(folder)}, evaluated:")
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
    if leaked := result.get("answers_told"):
        say(f"answers told: in {leaked} of {result['drawn']} tasks a lesson holds the answer itself")
    if result["truncated"]:
        say("cut off: " + ", ".join(f"{share:.1%} {cause}" for cause, share in result["truncated"].items()))
    cost = f", cost {result['cost']:.4g}" if result["cost"] else ""
    say(f"tokens: {result['tokens']['sent']:,} sent, {result['tokens']['sampled']:,} sampled{cost}")
    if result["stopped_by"]:
        counts = f"{result['drawn']} of {result['planned_tasks']} tasks"
        say(f"stopped by {result['stopped_by']}: the figures stand on {counts}")
    if failed := result["failed"]["samples"]:
        say(
            f"failed: {failed} of {failed + result['rollouts']} samples ({by_cause(result['failed']['each'])}); the "
            f"figures stand on the others; to try again: treegym eval --resume --out {folder}"
        )
    say(f"saved in {folder}")


def _percents(interval: Mapping[str, float]) -> tuple[str, str]:
    return f"{interval['mean']:.1%}", f"{interval['low']:.1%} … {interval['high']:.1%}"
