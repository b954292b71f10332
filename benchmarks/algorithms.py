"""GRPO, GiGPO, ARPO, Tree-GRPO and AT2PO side by side: success against what the rollouts cost.

    python benchmarks/algorithms.py                 # everything; finished runs are kept, interrupted ones go on
    python benchmarks/algorithms.py household --seeds 5 --jobs 2
    python benchmarks/algorithms.py --report        # the page alone, from the runs that there are

In each environment one policy is warmed up and saved; every algorithm and seed goes on from it, with as many leaves a
task. The runs lie in runs/algorithms, the page is docs/results/algorithms.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "algorithms"
LEAVES = 8  # of a task, for every algorithm
ALGORITHMS = {
    "grpo": {"n": LEAVES},
    "gigpo": {"n": LEAVES},
    "arpo": {"roots": LEAVES // 2, "budget": LEAVES},
    "tree_grpo": {"trees": 2, "expansions": 3, "rounds": 1},
    "at2po": {"chains": 4, "expansions": 2, "rounds": 2},
}


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

    def run(self) -> None:
        """Goes on where it stands, on one thread. SystemExit with the end of its log where it fails."""
        if self.finished:
            return
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", choices=[[], *CONTESTS], help="default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    for name in args.environments or CONTESTS:
        if not args.report:
            warm_up(name).run()
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(Training.run, trainings(name, args.seeds)))


if __name__ == "__main__":
    main()
