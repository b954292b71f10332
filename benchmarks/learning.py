"""What training runs learned: a table, a plot and the numbers, written to docs/results/NAME.md, .svg and .json.

Make the runs first, one for each seed, for example
    for seed in 0 1 2; do treegym train quickstart --set seed=$seed --out runs/quickstart-$seed; done
    python benchmarks/learning.py quickstart runs/quickstart-*
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import yaml

from treegym.agents import Run

matplotlib.use("svg")
from matplotlib import pyplot

matplotlib.rcParams["svg.hashsalt"] = "treegym"  # the same picture is the same file

RESULTS = Path(__file__).parent.parent / "docs" / "results"
STAGES = {"demonstrations": "teacher", "untrained": "untouched", "warmed up": "warmed up", "trained": "trained"}


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    seed: int
    threads: int  # 0: one a core
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @classmethod
    def of(cls, path: Path) -> Finished:
        run = Run(path)
        summary = run.summary()
        if summary is None:
            raise SystemExit(f"{path} is not finished: treegym train --resume --out {path}")
        scenario = yaml.safe_load((path / "scenario.yaml").read_text())
        return cls(scenario["seed"], scenario["threads"], summary, run.metrics())

    def curve(self, stage: str, value: str = "success") -> tuple[list[int], list[float]]:
        rows = [row for row in self.metrics if row["stage"] == stage]
        return [row["step"] for row in rows], [row[value] for row in rows]


def interval(value: dict[str, float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value['mean']:{sign}.1%} ({value['low']:{sign}.1%} to {value['high']:{sign}.1%})"


def table(runs: Sequence[Finished]) -> list[str]:
    """Success with its 95% interval, a row a seed; then by hops where there are several."""
    lines = [
        f"| seed | {' | '.join(STAGES.values())} | gain over warmed up | seconds | threads | peak memory |",
        "|---" * 9 + "|",
    ]
    for run in runs:
        stages = run.summary["stages"]
        cells = [interval(stages[stage]["success"] if stage in stages else None) for stage in STAGES]
        cells += [
            interval(run.summary["gain"], "+"),
            f"{run.summary['seconds']:.0f}",
            str(run.threads or "all"),
            f"{run.summary['peak_memory_gib']:.1f} GiB",
        ]
        lines.append(f"| {run.seed} | {' | '.join(cells)} |")
    gains = [run.summary["gain"]["mean"] for run in runs if run.summary["gain"]]
    if len(gains) > 1:
        lines += ["", f"Mean gain over {len(gains)} seeds: {fmean(gains):+.1%}."]
    if any(len(run.summary["stages"]["trained"]["by_difficulty"]) > 1 for run in runs):
        lines += ["", f"| seed | hops | {' | '.join(STAGES.values())} |", "|---" * 6 + "|"]
        for run in runs:
            for hops in run.summary["stages"]["trained"]["by_difficulty"]:
                found = [run.summary["stages"].get(stage, {}).get("by_difficulty", {}).get(hops) for stage in STAGES]
                lines.append(f"| {run.seed} | {hops} | {' | '.join(map(interval, found))} |")
    return lines


def plot(runs: Sequence[Finished], file: Path) -> None:
    """Success of the sampled rollouts at each step, and of the evaluations on held-out tasks."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, run in enumerate(runs):
        color = f"C{number}"
        axes.plot(
            *run.curve("improvement"), color=color, linewidth=1, label=f"seed {run.seed}, rollouts on train tasks"
        )
        steps = len(run.curve("improvement")[0])
        stages = run.summary["stages"]
        ends = [(0, "warmed up"), (steps, "trained")]
        points = [(step, stages[stage]["success"]["mean"]) for step, stage in ends if stage in stages]
        points += zip(*run.curve("midway"), strict=True)
        axes.plot(
            *zip(*sorted(points), strict=True),
            "o--",
            color=color,
            markersize=5,
            label=f"seed {run.seed}, held-out tasks",
        )
    axes.set(xlabel="optimiser step", ylabel="success", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the files that are written")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    args = parser.parse_args()
    runs = sorted((Finished.of(path) for path in args.runs), key=lambda run: run.seed)
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot(runs, RESULTS / f"{args.name}.svg")
    text = [
        f"# {args.name}",
        "",
        f"Held-out success with 95% intervals; `treegym train {args.name} --set seed=N`, see",
        "`benchmarks/learning.py`. The teacher's figure is on the train tasks it demonstrated.",
        "",
        *table(runs),
        "",
        f"![success by step]({args.name}.svg)",
    ]
    (RESULTS / f"{args.name}.md").write_text("\n".join(text) + "\n")
    content = [{"seed": run.seed, "summary": run.summary, "metrics": run.metrics} for run in runs]
    (RESULTS / f"{args.name}.json").write_text(json.dumps(content) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
