"""What a run shows in the terminal: progress bars, and the table at its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Mapping
from statistics import fmean
from types import FrameType, TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..agents import Evaluation
from ..agents.evaluation import Interval, paired_difference
from .terminal import console, say

SILENCE = 30.0  # seconds after which a line says how far it is, where there is no terminal


class ProgressBars:
    """A bar for each stage; where there is no terminal a line for each step, and now and then in an evaluation.

    The first Ctrl-C saves and stops, a second one stops at once; threads other than the main one hear no Ctrl-C.
    """

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<26}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Progress(
            *columns,
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=console.is_jupyter,  # where rich's bars need ipywidgets
        )
        self._stages: dict[str, TaskID] = {}
        self._task: TaskID | None = None
        self._stop = False
        self._said_at = time.monotonic()

    def __enter__(self) -> Self:
        self._heard = threading.current_thread() is threading.main_thread()
        if self._heard:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        if self._shown:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._heard:
            signal.signal(signal.SIGINT, self._before)

    def begin(self, stage: str, total: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=total, note="")
        self._task = self._stages[stage]
        self._bars.update(self._task, completed=0, total=total)

    def advance(self, note: str = "") -> None:
        if self._task is not None and self._shown:
            fields: dict[str, Any] = {"note": note} if note else {}
            self._bars.update(self._task, advance=1, **fields)
            late = time.monotonic() - self._said_at >= SILENCE
            if (note or late) and not console.is_terminal:
                bar = self._bars.tasks[self._task]
                say(f"{bar.description} {bar.completed:.0f}/{bar.total:.0f}" + f": {note}" * bool(note))
                self._said_at = time.monotonic()

    def should_stop(self) -> bool:
        return self._stop

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        console.print("saving after this step; Ctrl-C again stops at once")


def show_results(results: Mapping[str, Evaluation], last: str) -> None:
    """Prints the table, the gain and a last line."""
    if results:
        console.print(results_table(results))
    heldout = [result for stage, result in results.items() if stage != "demonstrations"]
    if most := max(heldout, key=lambda result: len(result.tasks), default=None):
        show_repeats(len(most.problems), len(most.tasks))
    if (change := gain(results)) is not None:
        say(
            f"gain over the warmed-up policy: {change.mean:+.1%} "
            f"(95%: {change.low:+.1%} … {change.high:+.1%}, paired by task)"
        )
    say(last)


def improvement_health(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the improvement's rows of the metrics say of whether it could learn: counts of steps, updates and tasks,
    means of deviations, and the largest deviation."""
    every = list(metrics)
    rows = [row for row in every if "informative" in row]  # of whatever stages grew groups
    means = {
        name: fmean(row[name] for row in rows)
        for name in ("sampler_deviation", "sampler_ratios_off", "ratio_deviation", "clip_fraction")
        if rows and all(name in row for row in rows)
    }
    largest = [row["sampler_deviation_max"] for row in rows if "sampler_deviation_max" in row]
    causes = sorted({cause for row in rows for cause in row.get("truncated", {})})
    return {
        "steps": len(rows),
        "steps_without_signal": sum(row.get("trained_tokens") == 0 for row in rows),
        "skipped_updates": int(sum(row.get("skipped_updates", 0) for row in every)),
        "failed_tasks": sum(row.get("failed_tasks", 0) for row in every),
        "failed_rollouts": sum(row.get("failed_rollouts", 0) for row in every),
        "truncated": {cause: fmean(row.get("truncated", {}).get(cause, 0.0) for row in rows) for cause in causes},
        **means,
        **({"sampler_deviation_max": max(largest)} if largest else {}),
    }


def concerns(health: Mapping[str, Any]) -> Iterable[str]:
    """What a person should hear of it."""
    if health["steps"] and health["steps_without_signal"] == health["steps"]:
        yield "no step trained anything: within each group all rollouts had the same return"
    if health["skipped_updates"]:
        yield f"{health['skipped_updates']} updates were skipped: their gradients were not finite"
    if health["failed_tasks"]:
        yield f"{health['failed_tasks']} tasks failed and were left out; metrics.jsonl names them under failures"
    elif health["failed_rollouts"]:
        yield f"{health['failed_rollouts']} rollouts failed; metrics.jsonl names them under failures"
    for cause, share in health["truncated"].items():
        if cause == "context length" and share > 0.1:
            yield f"{share:.0%} of the rollouts were cut off at sampling.max_context"


def show_repeats(tasks: int, drawn: int) -> None:
    """Says of how many distinct tasks the held-out ones are, where some were drawn again."""
    if tasks < drawn:
        say(f"{tasks} distinct task{'s' * (tasks != 1)}, drawn {drawn} times: each of them counts once")


_ROWS = {
    "demonstrations": "oracle (train tasks)",
    "untrained": "untouched model",
    "warmed up": "after warm-up",
    "trained": "after training",
}  # other stages are called by their names


def results_table(results: Mapping[str, Evaluation]) -> Table:
    """Success with its interval and means per episode, a row for every evaluation and its difficulties."""
    table = Table(
        title="held-out tasks",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for name in ("success", "95% interval", "turns", "calls", "tokens", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in sorted(results, key=lambda stage: stage != "demonstrations"):
        result = results[stage]
        numbers = (*map(result.mean, _MEANS), result.seconds)
        table.add_row(_ROWS.get(stage, stage), *_percents(result.success), *(f"{x:.1f}" for x in numbers))
        levels = result.by_difficulty()
        for level, interval in levels.items() if len(levels) > 1 else ():
            table.add_row(f"  difficulty {level}", *_percents(interval), style="dim")
    return table


def _percents(interval: Interval) -> tuple[str, str]:
    return f"{interval.mean:.1%}", f"{interval.low:.1%} … {interval.high:.1%}"


_MEANS = ("turns", "tool_calls", "sampled_tokens")  # per rollout


def gain(results: Mapping[str, Evaluation]) -> Interval | None:
    """Held-out success after training minus after warm-up, paired by task."""
    if "trained" in results and "warmed up" in results:
        after, before = ([problem.share for problem in results[stage].problems] for stage in ("trained", "warmed up"))
        return paired_difference(after, before)
    return None


def summary(results: Mapping[str, Evaluation], **more: Any) -> dict[str, Any]:
    """The results as JSON."""
    stages = {
        stage: {
            "success": result.success._asdict(),
            "tasks": len(result.problems),
            "by_difficulty": {str(level): interval._asdict() for level, interval in result.by_difficulty().items()},
            **{name: result.mean(name) for name in _MEANS},
            "seconds": result.seconds,
        }
        for stage, result in results.items()
    }
    change = gain(results)
    return {"stages": stages, "gain": change._asdict() if change else None, **more}
