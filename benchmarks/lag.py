"""What a lag costs: held-out success where trees are 0, 1, 4 or 8 versions of the weights old when they are trained.

    python benchmarks/lag.py                       # every run that runs/lag does not hold yet, then the page
    python benchmarks/lag.py --seeds 1 --lags 0 8
    python benchmarks/lag.py --report              # the page alone, from the runs that there are

A tiny model on Lookup. Each seed is warmed up twice, well and poorly, and every lag goes on from there. The runs
lie in runs/lag, where an interrupted one goes on; the page is docs/results/lag.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from shown import mean_interval, one

from treegym.agents import Run
from treegym.scenarios import load_scenario, train

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "lag"
PAGE = ROOT / "docs" / "results" / "lag.md"
LAGS = (0, 1, 4, 8)
MEANS = ("sampler_deviation", "clip_fraction")  # over the steps of a run
MARK = "<!-- What follows is written by hand. -->\n"
STEPS = 30
STARTS = {"well": (), "poorly": ("warmup.demonstrations=400",)}  # how a policy is warmed up
COMMON = (
    "threads=1",
    "algorithm={name: grpo, parameters: {n: 8}}",
    f"improvement.steps={STEPS}",
    "heldout={tasks: 200, untrained: 0}",
)
HEAD = f"""# What a lag costs

`python benchmarks/lag.py`: the tiny model of `treegym train lookup`, GRPO with 8 rollouts a task and 8 tasks a step,
{STEPS} steps, `ClippedLoss` against the log-probabilities of the sampler. With `improvement.max_lag: k` the trees of a
step are k versions of the weights old when they are trained, those of the first k steps as old as there are versions.
Every lag goes on from the same warmed-up policy of its seed, which has seen 800 demonstrations twice, or 400 where it
is warmed up poorly. Success is on 200 held-out tasks: of a seed with Wilson's 95% interval, over the seeds with
Student's t; so is the difference from lag 0, which is paired by seed. Deviation (of the learner from the
sampler) and the share of clipped terms are means over the steps.
"""


def finished(name: str, *changes: str) -> Path:
    """The folder of a run, which is carried to its end."""
    folder = RUNS / name
    if not (folder / "summary.json").is_file():
        scenario = load_scenario("lookup", [*COMMON, *changes])
        train(scenario, folder, resume=(folder / "scenario.yaml").exists())
    return folder


def run(start: str, seed: int, lag: int) -> None:
    warm = finished(f"{start}/warm-up-{seed}", f"seed={seed}", *STARTS[start], "improvement.steps=0")
    after = (f"model.name={warm / 'model'}", "warmup.demonstrations=0", f"improvement.max_lag={lag}")
    finished(f"{start}/lag-{lag}-{seed}", f"seed={seed}", *after)


def summaries(start: str, name: str) -> dict[int, Mapping[str, Any]]:
    """Of the finished runs, by seed."""
    folders = {int(folder.name.rpartition("-")[2]): folder for folder in RUNS.glob(f"{start}/{name}-*")}
    every = {seed: Run(folder).summary() for seed, folder in sorted(folders.items())}
    return {seed: summary for seed, summary in every.items() if summary is not None}


def success(summary: Mapping[str, Any], stage: str = "trained") -> float:
    return float(summary["stages"][stage]["success"]["mean"])


def table(start: str, lags: Sequence[int]) -> list[str]:
    """A row for each lag, with a column for each seed."""
    runs = {lag: found for lag in lags if (found := summaries(start, f"lag-{lag}"))}
    if not runs:
        return ["No run is finished."]
    seeds = sorted(set().union(*runs.values()))
    lines = [
        f"| lag | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | less lag 0 | deviation, nats | clipped |",
        "|---" * (len(seeds) + 5) + "|",
    ]
    warm = summaries(start, "warm-up")
    cells = [one(warm[seed]["stages"]["warmed up"]["success"]) for seed in seeds]
    before = mean_interval([success(warm[seed], "warmed up") for seed in seeds])
    lines.append(f"| warmed up | {' | '.join(cells)} | {before} | | | |")
    for lag, found in runs.items():
        cells = [one(found[seed]["stages"]["trained"]["success"]) if seed in found else "-" for seed in seeds]
        present = runs.get(0, {})
        apart = [success(found[seed]) - success(present[seed]) for seed in found if seed in present]
        less = mean_interval(apart, "+") if lag and apart else ""
        means = [fmean(summary["improvement"][name] for summary in found.values()) for name in MEANS]
        told = f"{mean_interval([*map(success, found.values())])} | {less} | {means[0]:.4f} | {means[1]:.2%}"
        lines.append(f"| {lag} | {' | '.join(cells)} | {told} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many of them, from 0 on")
    parser.add_argument("--lags", type=int, nargs="+", default=LAGS)
    parser.add_argument("--report", action="store_true", help="no run, the page alone")
    args = parser.parse_args()
    for start in () if args.report else STARTS:
        for seed in range(args.seeds):
            for lag in args.lags:
                run(start, seed, lag)
    tables = [line for start in STARTS for line in (f"## Warmed up {start}", "", *table(start, args.lags), "")]
    by_hand = PAGE.read_text().partition(MARK)[2] if PAGE.exists() else ""
    PAGE.write_text("\n".join([HEAD, *tables, MARK]) + by_hand)
    print("\n".join(tables))


if __name__ == "__main__":
    main()
