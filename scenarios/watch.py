"""What a run shows in the terminal: progress bars, and the table at its end."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..agents import Evaluation, Interval, paired_difference

console = Console()


class ProgressBars:
    """A bar for each stage; the first Ctrl-C saves and stops, a second one stops at once."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("[dim]{task.fields[note]}"), console=console)
        self._task: TaskID | None = None
        self._stop = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
        signal.signal(signal.SIGINT, self._before)

    def begin(self, stage: str, total: int) -> None:
        self._task = self._bars.add_task(stage, total=total, note="")

    def advance(self, note: str = "") -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=1, **({"note": note} if note else {}))

    def should_stop(self) -> bool:
        return self._stop

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        console.print("saving after this step; Ctrl-C again stops at once")


_ROWS = {
    "demonstrations": "demonstrations",
    "untrained": "untouched model",
    "warmed up": "after warm-up",
    "trained": "after training",
}


def results_table(results: Mapping[str, Evaluation]) -> Table:
    """Success with its interval and means per episode, a row for every evaluation."""
    table = Table("", "success", "95% interval", "turns", "tool calls", "sampled tokens", "seconds", title="held-out tasks")
    for stage, label in _ROWS.items():
        if result := results.get(stage):
            mean, low, high = result.interval
            numbers = (result.turns, result.tool_calls, result.sampled_tokens, result.seconds)
            name = f"{label} (train tasks)" if stage == "demonstrations" else label
            table.add_row(name, f"{mean:.1%}", f"{low:.1%} … {high:.1%}", *(f"{x:.1f}" for x in numbers))
    hops = {hop for result in results.values() for hop in result.hops}
    if len(hops) > 1:
        table.add_section()
        for stage, label in _ROWS.items():
            for hop, (mean, low, high) in (results[stage].by_hops().items() if stage in results else ()):
                table.add_row(f"{label}, {hop} hops", f"{mean:.1%}", f"{low:.1%} … {high:.1%}", "", "", "", "")
    return table


def gain(results: Mapping[str, Evaluation]) -> Interval | None:
    """Held-out success after training minus after warm-up, paired by task."""
    if "trained" in results and "warmed up" in results:
        return paired_difference(results["trained"].success, results["warmed up"].success)
    return None


def summary(results: Mapping[str, Evaluation], **more: Any) -> dict[str, Any]:
    """The results as JSON."""
    stages = {
        stage: {
            "success": result.interval._asdict(),
            "by_hops": {str(hops): interval._asdict() for hops, interval in result.by_hops().items()},
            "turns": result.turns,
            "tool_calls": result.tool_calls,
            "sampled_tokens": result.sampled_tokens,
            "seconds": result.seconds,
        }
        for stage, result in results.items()
    }
    change = gain(results)
    return {"stages": stages, "gain": change._asdict() if change else None, **more}
