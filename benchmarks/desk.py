"""What a tiny model learns on the desk, by GRPO and by GiGPO: pages of a shop and of forms, from one warmed-up policy.

    python benchmarks/desk.py                       # every run that runs/desk does not hold yet, then the page
    python benchmarks/desk.py --seeds 1 --algorithms grpo
    python benchmarks/desk.py --report              # the page alone, from the runs that there are

One policy is warmed up; every algorithm and seed goes on from it. Each policy is measured on other tasks of the
templates that it trained on, on templates that are held out, and on an application that is. The runs
lie in runs/desk, where an interrupted one goes on. The page is docs/results/desk.md, its numbers stand in
docs/results/desk.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
from shown import mean_interval, one

from treegym.agents import Run
from treegym.agents.evaluation import Budget, evaluate
from treegym.scenarios import load_scenario, train
from treegym.scenarios.policies import open_policy

matplotlib.use("svg")
from matplotlib import pyplot

matplotlib.rcParams["svg.hashsalt"] = "treegym"  # the same picture is the same file

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "desk"
RESULTS = ROOT / "docs" / "results"
NUMBERS = RESULTS / "desk.json"
ALGORITHMS = ("grpo", "gigpo")
OTHER = ("sampling.max_context=4096", "environment.settings={apps: [shop, forms], max_turns: 30}")  # longer, too
SPLITS = {  # what a policy is measured on
    "held-out tasks": ("heldout.tasks=200",),
    "held-out templates": ("heldout.tasks=50", "environment.heldout={split: templates}", *OTHER),
    "held-out application": (
        "heldout.tasks=30",
        "environment.heldout={split: application, apps: [flight]}",
        *OTHER,
    ),
}
MARK = "<!-- What follows is written by hand. -->\n"
HEAD = """# Learning on the desk

`python benchmarks/desk.py`: the tiny model of `treegym train desk`, in a shop and with forms. One policy is warmed up
on demonstrations; both algorithms go on from it, with seeds of their own for tasks and rollouts, and with as many of
both. Success is `exact` at temperature 1: of one policy with Wilson's 95% interval, over the seeds with Student's t,
as the gain and the difference of the algorithms are, which is paired by seed. The tasks are the same for all policies.
"""


def finished(name: str, *changes: str) -> Path:
    """The folder of a run, which is carried to its end. What it cost stands there too."""
    folder = RUNS / name
    if not (folder / "summary.json").is_file():
        scenario, before = load_scenario("desk", ["threads=1", *changes]), time.process_time()
        train(scenario, folder, resume=(folder / "scenario.yaml").exists())
        minutes = (time.process_time() - before) / 60
        cost = {"cpu_minutes": minutes, "load": os.getloadavg()[2], "commit": commit()}
        (folder / "cost.json").write_text(json.dumps(cost))
    return folder


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measured(name: str, model: str, *more: str) -> None:
    """The success of a policy on all splits."""
    for split, changes in SPLITS.items():
        fresh = (f"model.name={model}", "warmup.demonstrations=0", "improvement.steps=0")
        finished(f"measured/{name}/{split}", *fresh, *changes, *more, "stages=[{Evaluate: {name: measured}}]")


def run(seeds: int, algorithms: Sequence[str]) -> None:
    measured("untrained", "nano", "heldout.tasks=32")
    warm = finished("warm-up", "stages=[Warmup]") / "model"
    measured("warm-up", str(warm))
    for seed in range(seeds):
        for algorithm in algorithms:
            name = f"{algorithm}-{seed}"
            after = (f"model.name={warm}", "warmup.demonstrations=0", "stages=[Improvement]")
            trained = finished(name, f"algorithm.name={algorithm}", f"seed={seed}", *after) / "model"
            measured(name, str(trained))
    if seeds and ALGORITHMS[0] in algorithms:
        in_both_worlds(f"{ALGORITHMS[0]}-0")


SAME = RUNS / "worlds.json"
WORLDS = {"simulation": ("treegym/Desk-v0", ""), "Chromium": ("treegym/Browser-v0", ", tasks: desk")}


def in_both_worlds(name: str) -> None:
    """A policy's episodes of 100 held-out tasks of the shop, in simulation and in Chromium: how many are equal to the
    byte, and success."""
    if not SAME.exists():
        folders = [played(name, world) for world in WORLDS]
        equal = sum(one == other for one, other in zip(*map(episodes, folders), strict=True))
        success = [json.loads((folder / "results.json").read_text())["success"] for folder in folders]
        SAME.write_text(json.dumps({"policy": name, "equal": equal, "success": success}))


def played(name: str, world: str) -> Path:
    env, tasks = WORLDS[world]
    settings = f"environment.settings={{apps: [shop], templates: [shop_remove, shop_cancel], max_turns: 8{tasks}}}"
    scenario = load_scenario("desk", [f"environment.id={env}", settings, "threads=1"])
    opened = open_policy(str(RUNS / name / "model"), scenario)
    drawn = [scenario.environment.task("heldout", i) for i in range(100)]
    evaluate(drawn, opened.policy, opened.renderer, opened.sampling, Budget(), RUNS / world, at_once=8)
    return RUNS / world


def episodes(folder: Path) -> list[Any]:
    """What was said, done and rewarded, task by task."""
    found = {}
    for _, tree in Run(folder).trees:
        turns = [(node.action.text, node.messages, node.reward, node.reward_terms) for node in tree.nodes]
        found[tree.task.seed] = [tree.messages, turns]
    return [found[seed] for seed in sorted(found)]


def success(name: str, split: str) -> dict[str, float]:
    """Of a policy, with its interval."""
    summary = Run(RUNS / "measured" / name / split).summary()
    assert summary is not None
    return dict(summary["stages"]["measured"]["success"])


def seeds_of(algorithm: str) -> list[int]:
    """Those whose policy was measured on every split."""
    folders = (RUNS / "measured").glob(f"{algorithm}-*")
    whole = [folder for folder in folders if all((folder / split / "summary.json").is_file() for split in SPLITS)]
    return sorted(int(folder.name.rpartition("-")[2]) for folder in whole)


def numbers() -> dict[str, dict[str, Any]]:
    """By policy, all that the page says, from the runs that there are."""
    trained = [f"{algorithm}-{seed}" for algorithm in ALGORITHMS for seed in seeds_of(algorithm)]
    rows: dict[str, dict[str, Any]] = {}
    for name in ("untrained", "warm-up", *trained):
        rows[name] = {"success": {split: success(name, split) for split in SPLITS}}
        if name != "untrained":
            summary = Run(RUNS / name).summary() or {}
            steps = [row["success"] for row in Run(RUNS / name).metrics() if row["stage"] == "improvement"]
            cost = json.loads((RUNS / name / "cost.json").read_text())
            rows[name] |= {"minutes": summary["seconds"] / 60, **cost, "rollouts": steps}
    return rows


Rows = Mapping[str, Mapping[str, Any]]


def values(rows: Rows, algorithm: str, split: str) -> dict[int, float]:
    """The success of each seed."""
    found = {int(name.rpartition("-")[2]): row for name, row in rows.items() if name.startswith(f"{algorithm}-")}
    return {seed: row["success"][split]["mean"] for seed, row in found.items()}


def table(rows: Rows) -> list[str]:
    """The success of every policy on each split, the gain over the warmed-up one, and the algorithms' difference."""
    lines = [f"| | {' | '.join(SPLITS)} |", "|---" * (1 + len(SPLITS)) + "|"]
    for name in ("untrained", "warm-up"):
        lines.append(f"| {name} | {' | '.join(one(rows[name]['success'][split]) for split in SPLITS)} |")
    start = {split: rows["warm-up"]["success"][split]["mean"] for split in SPLITS}
    done = [algorithm for algorithm in ALGORITHMS if values(rows, algorithm, "held-out tasks")]
    for algorithm in done:
        found = {split: values(rows, algorithm, split) for split in SPLITS}
        cells = [mean_interval([*found[split].values()]) for split in SPLITS]
        gains = [mean_interval([value - start[split] for value in found[split].values()], "+") for split in SPLITS]
        seeds = len(found["held-out tasks"])
        lines += [f"| {algorithm}, {seeds} seeds | {' | '.join(cells)} |", f"| … less warm-up | {' | '.join(gains)} |"]
    if len(done) == len(ALGORITHMS):
        cells = [mean_interval(differences(rows, split), "+") for split in SPLITS]
        lines.append(f"| {ALGORITHMS[1]} less {ALGORITHMS[0]}, paired | {' | '.join(cells)} |")
    return lines


def differences(rows: Rows, split: str) -> list[float]:
    first, second = (values(rows, algorithm, split) for algorithm in ALGORITHMS)
    return [second[seed] - first[seed] for seed in first if seed in second]


def single(rows: Rows) -> list[str]:
    """A row for each run: success, minutes without the measurements, and how busy the machine was."""
    lines = [f"| run | {' | '.join(SPLITS)} | minutes | of CPU | load | commit |", "|---" * (5 + len(SPLITS)) + "|"]
    for name, row in rows.items():
        if "minutes" in row:
            cells = [one(row["success"][split]) for split in SPLITS]
            cost = f"{row['minutes']:.1f} | {row['cpu_minutes']:.1f} | {row['load']:.0f} | {row['commit']}"
            lines.append(f"| {name} | {' | '.join(cells)} | {cost} |")
    return lines


def worlds() -> list[str]:
    """What the policy that played in both worlds did there."""
    if not SAME.exists():
        return []
    both = json.loads(SAME.read_text())
    first, second = map(one, both["success"])
    return [
        f"{both['policy']} on 100 held-out tasks of the shop: {both['equal']} episodes are the same to the byte in "
        f"simulation and in Chromium; success {first} and {second}.\n"
    ]


def plot(rows: Rows, file: Path) -> None:
    """Success of the rollouts on train tasks by step, each seed thin and their mean thick."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, algorithm in enumerate(ALGORITHMS):
        curves = [row["rollouts"] for name, row in rows.items() if name.startswith(f"{algorithm}-")]
        for curve in curves:
            axes.plot(curve, color=f"C{number}", linewidth=0.6, alpha=0.5)
        if curves:
            axes.plot([fmean(step) for step in zip(*curves, strict=True)], color=f"C{number}", label=algorithm)
    axes.set(xlabel="optimiser step", ylabel="success of rollouts on train tasks", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def report() -> None:
    rows = numbers()
    page = RESULTS / "desk.md"
    by_hand = page.read_text().partition(MARK)[2] if page.exists() else ""
    NUMBERS.write_text(
        "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}\n"
    )
    plot(rows, RESULTS / "desk.svg")
    tables = [*table(rows), "", *worlds(), *single(rows), "", "![success by step](desk.svg)", ""]
    page.write_text("\n".join([HEAD, *tables, MARK]) + by_hand)
    print("\n".join(tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many of them, from 0 on")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--report", action="store_true", help="no run, the page alone")
    args = parser.parse_args()
    if not args.report:
        run(args.seeds, args.algorithms)
    report()


if __name__ == "__main__":
    main()
