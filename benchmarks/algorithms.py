"""GRPO, GiGPO, ARPO, Tree-GRPO and AT2PO side by side: success against what the rollouts cost.

    python benchmarks/algorithms.py                 # all that docs/results/algorithms.json does not hold yet
    python benchmarks/algorithms.py maze --seeds 5 --jobs 2
    python benchmarks/algorithms.py --report        # the page alone, from the runs that there are
    rm docs/results/algorithms.json                 # everything again

In each environment one policy is warmed up and saved; every algorithm and seed goes on from it, with as many leaves a
task. The runs lie in runs/algorithms, where an interrupted one goes on; the curve of a finished one is kept in
docs/results/algorithms.json, the page is docs/results/algorithms.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import matplotlib
import numpy as np
from scipy.stats import t as student

matplotlib.use("svg")
from matplotlib import pyplot

matplotlib.rcParams["svg.hashsalt"] = "treegym"  # the same picture is the same file

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "algorithms"
RESULTS = ROOT / "docs" / "results"
CURVES = RESULTS / "algorithms.json"
LEAVES = 8  # of a task, for every algorithm
ALGORITHMS = {
    "grpo": {"n": LEAVES},
    "gigpo": {"n": LEAVES},
    "arpo": {"roots": LEAVES // 2, "budget": LEAVES},
    "tree_grpo": {"trees": 2, "expansions": 3, "rounds": 1},
    "at2po": {"chains": 4, "expansions": 2, "rounds": 2},
}
UNITS = ("steps", "sampled_tokens", "tool_calls", "sampled_tokens, shared", "tool_calls, shared")
MARK = "<!-- What follows is made by benchmarks/algorithms.py. -->"  # what stands before it is written by hand
HEAD = """
Every run has as many leaves a task and as many tasks a step. Sampled tokens and tool calls count every reply that a
rollout or its fork was given, as engines pay for them that do not join equal replies; "shared" counts what rollouts of
a task have in common once, as treegym computes it. Success is on held-out tasks, the same for all runs; means over
seeds with 95% intervals (Student's t), linear between evaluations. Budgets are the largest that every run spent.
On another kind of machine the warm-up may end in other weights; runs are paired where they share them.
"""
Curves = dict[str, list["Curve"]]  # by environment


@dataclass(frozen=True)
class Contest:
    """An environment in which the algorithms are compared."""

    scenario: str
    changes: tuple[str, ...]  # to it, for all runs


CONTESTS = {
    "factsearch": Contest(
        "quickstart",
        (
            "improvement.steps=10",
            "improvement.evaluate_every=2",
            "improvement.optimization.decay_steps=0",
            "improvement.optimization.learning_rate=4.0e-5",
            "heldout.tasks=60",
        ),
    ),
    "maze": Contest("maze", ("improvement.steps=40", "improvement.evaluate_every=8", "heldout.tasks=100")),
    "lookup": Contest("lookup", ("improvement.steps=20", "improvement.evaluate_every=2", "heldout.tasks=200")),
}


@dataclass(frozen=True)
class Training:
    """One run of `treegym train`."""

    folder: Path
    scenario: str
    changes: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    def run(self) -> Path:
        """Its folder, once it is finished; it goes on where it stands, on one thread. SystemExit with the end of its
        log where it fails."""
        if self.finished:
            return self.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        changes = [word for change in ("threads=1", *self.changes) for word in ("--set", change)]
        command = [sys.executable, "-m", "treegym", "train", self.scenario, *changes]
        begun = ["--resume"] if (self.folder / "scenario.yaml").exists() else []
        log = self.folder / "log.txt"
        with log.open("a") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "--out", str(self.folder), *begun], stdout=file, stderr=file, env=environment, check=False
            )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-2000:]}")
        print(self.folder.relative_to(RUNS), flush=True)
        return self.folder


def warm_up(name: str) -> Training:
    contest = CONTESTS[name]
    return Training(RUNS / name / "warm-up", contest.scenario, (*contest.changes, "improvement.steps=0"))


def trainings(name: str, seeds: int) -> Iterator[Training]:
    """Seed by seed, so that an interrupted comparison has all algorithms."""
    model = warm_up(name).folder / "model"
    for seed in range(seeds):
        for algorithm, parameters in ALGORITHMS.items():
            changes = (
                *CONTESTS[name].changes,
                f"model.name={model}",
                "warmup.demonstrations=0",
                "heldout.untrained=0",
                f"algorithm={json.dumps({'name': algorithm, 'parameters': parameters})}",
                f"seed={seed}",
            )
            yield Training(RUNS / name / f"{algorithm}-{seed}", CONTESTS[name].scenario, changes)


@dataclass(frozen=True)
class Curve:
    """Held-out success of one run as its rollouts cost more; the first point is the warmed-up policy."""

    algorithm: str
    seed: int
    start: str  # the first digits of the SHA-256 of the warmed-up weights
    spent: dict[str, list[float]]  # by unit: before each evaluation
    success: list[float]

    @classmethod
    def of(cls, folder: Path) -> Curve:
        algorithm, _, seed = folder.name.rpartition("-")
        spent: dict[str, float] = dict.fromkeys(UNITS, 0.0)
        points: dict[str, list[float]] = {unit: [] for unit in UNITS}
        success = []
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["stage"] == "improvement":
                cost = row["cost"]
                spent["steps"] += 1
                for unit in ("sampled_tokens", "tool_calls"):
                    spent[unit] += cost[unit] + cost[f"repeated_{unit.split('_')[1]}"]
                    spent[f"{unit}, shared"] += cost[unit]
            elif row["stage"] in ("warmed up", "midway", "trained"):
                success.append(row["success"])
                for unit in UNITS:
                    points[unit].append(spent[unit])
        weights = folder.with_name("warm-up") / "model" / "model.safetensors"
        start = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        return cls(algorithm, int(seed), start, points, success)

    @property
    def run(self) -> str:
        """The name of its run's folder."""
        return f"{self.algorithm}-{self.seed}"

    def at(self, unit: str, budget: float) -> float:
        """Success when so much was spent, linear between evaluations."""
        return float(np.interp(budget, self.spent[unit], self.success))

    def reaches(self, unit: str, success: float) -> float | None:
        """What had been spent when the success was first had, linear between evaluations; None: never."""
        for i, found in enumerate(self.success):
            if found >= success:
                if i == 0:
                    return 0.0
                share = (success - self.success[i - 1]) / (found - self.success[i - 1])
                before, after = self.spent[unit][i - 1 : i + 1]
                return before + share * (after - before)
        return None


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95% interval by Student's t."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def read_curves() -> Curves:
    found = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    return {name: [Curve(**curve) for curve in found.get(name, [])] for name in CONTESTS}


def keep(curves: Curves, name: str, curve: Curve) -> None:
    """Adds the curve to those on disk: a comparison may take several machines, one after the other."""
    curves[name].append(curve)
    curves[name].sort(key=lambda curve: (list(ALGORITHMS).index(curve.algorithm), curve.seed))
    rows = {name: [asdict(curve) for curve in found] for name, found in curves.items()}
    lines = (f'"{name}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]" for name, found in rows.items())
    CURVES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(curves: Curves, name: str, seeds: int, jobs: int) -> None:
    """Makes the runs that are missing."""
    kept = {curve.run for curve in curves[name]}
    missing = [training for training in trainings(name, seeds) if training.folder.name not in kept]
    if not missing:
        return
    warm_up(name).run()
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(training.run) for training in missing]):
            keep(curves, name, Curve.of(done.result()))


class Section:
    """What the page says about one environment."""

    def __init__(self, name: str, found: Sequence[Curve]) -> None:
        self.name = name
        self.curves: dict[str, list[Curve]] = {}
        for curve in found:
            self.curves.setdefault(curve.algorithm, []).append(curve)
        self.everyone = found

    def lines(self) -> list[str]:
        """Its tables; its plot is drawn."""
        contest, curves = CONTESTS[self.name], self.curves
        lines = [
            f"## {self.name}",
            "",
            f"`treegym train {contest.scenario}` with {', '.join(f'`{change}`' for change in contest.changes)}.",
        ]
        if not self.everyone:
            return [*lines, "No run is finished."]
        common = {unit: min(curve.spent[unit][-1] for curve in self.everyone) for unit in UNITS}
        goal = self._goal()
        plot(curves, RESULTS / f"algorithms-{self.name}.svg")
        starts = sorted({(curve.start, curve.success[0]) for curve in self.everyone})
        succeeds = " or ".join(f"{success:.1%}" for _, success in starts)
        lines += [
            f"The warmed-up policy succeeds in {succeeds} of the held-out tasks.",
            "",
            f"| held-out success | seeds | {' | '.join(f'after {common[unit]:,.0f} {unit}' for unit in UNITS)} |",
            "|---" * (2 + len(UNITS)) + "|",
        ]
        for algorithm, found in curves.items():
            cells = [percent(*mean_interval([curve.at(unit, common[unit]) for curve in found])) for unit in UNITS]
            lines.append(f"| {algorithm} | {len(found)} | {' | '.join(cells)} |")
        if len(curves.get("grpo", ())) > 1:
            lines += ["", *self._differences(common)]
        lines += ["", f"| spent until {goal:.0%} | reached by | {' | '.join(UNITS)} |", "|---" * (2 + len(UNITS)) + "|"]
        for algorithm, found in curves.items():
            reached = [curve for curve in found if curve.reaches("steps", goal) is not None]
            cells = [f"{median(curve.reaches(unit, goal) for curve in reached):,.0f}" if reached else "-"
                     for unit in UNITS]  # fmt: skip
            lines.append(f"| {algorithm} | {len(reached)} of {len(found)} | {' | '.join(cells)} |")
        return [*lines, "", f"![success by budget](algorithms-{self.name}.svg)"]

    def _goal(self) -> float:
        """Four fifths of the way from the warmed-up success to the median of the last ones, in twentieths, down."""
        start, end = self.everyone[0].success[0], median(curve.success[-1] for curve in self.everyone)
        return max(start, int((start + 0.8 * (end - start)) * 20) / 20)

    def _differences(self, common: dict[str, float]) -> list[str]:
        lines = [f"| less GRPO's, paired by seed | {' | '.join(UNITS)} |", "|---" * (1 + len(UNITS)) + "|"]
        baseline = {(curve.seed, curve.start): curve for curve in self.curves["grpo"]}
        for algorithm, found in self.curves.items():
            pairs = [(curve, baseline[key]) for curve in found if (key := (curve.seed, curve.start)) in baseline]
            if algorithm != "grpo" and len(pairs) > 1:
                cells = [
                    percent(
                        *mean_interval([a.at(unit, common[unit]) - b.at(unit, common[unit]) for a, b in pairs]), "+"
                    )
                    for unit in UNITS
                ]
                lines.append(f"| {algorithm} | {' | '.join(cells)} |")
        return lines


def percent(mean: float, low: float, high: float, sign: str = "") -> str:
    return f"{mean:{sign}.1%}" + f" ({low:{sign}.1%} to {high:{sign}.1%})" * (low < high)  # one seed: no interval


def plot(curves: dict[str, list[Curve]], file: Path) -> None:
    """Mean success over seeds, with its interval, against each of the budgets."""
    figure, axes = pyplot.subplots(1, len(UNITS), figsize=(4 * len(UNITS), 3.6), sharey=True)
    for axis, unit in zip(axes, UNITS, strict=True):
        for algorithm, found in curves.items():
            grid = np.linspace(0, min(curve.spent[unit][-1] for curve in found), 25)
            rows = [mean_interval([curve.at(unit, budget) for curve in found]) for budget in grid]
            means, lows, highs = zip(*rows, strict=True)
            axis.plot(grid, means, label=algorithm)
            axis.fill_between(grid, lows, highs, alpha=0.12)
        axis.set(xlabel=unit, ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out success")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", choices=[[], *CONTESTS], help="default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    curves = read_curves()
    if not args.report:
        for name in args.environments or CONTESTS:
            compare(curves, name, args.seeds, args.jobs)
    sections = [line for name, found in curves.items() for line in ["", *Section(name, found).lines()]]
    file = RESULTS / "algorithms.md"
    by_hand = file.read_text().partition(MARK)[0] if file.exists() else "# Algorithms compared\n\n"
    file.write_text("\n".join([f"{by_hand}{MARK}", HEAD, *sections]) + "\n")


if __name__ == "__main__":
    main()
