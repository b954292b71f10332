"""What a run takes beside other work: waiting threads that spin against threads that yield.

    python benchmarks/busy.py [--steps 4] [--rounds 3]

A small evaluation and training of the quickstart's model is one job. Timed, in turn within each round: the job alone,
two jobs at once, and the job beside two processes that compute; each with OMP_WAIT_POLICY=ACTIVE (threads spin),
then PASSIVE, treegym's default. A fair share beside two busy processes is half of two cores. Prints ratios.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SPIN = "while True: sum(range(10000))"


def job(folder: Path, policy: str, steps: int) -> subprocess.Popen[bytes]:
    """Trains the quickstart for a few steps in a folder of its own."""
    sizes = [
        "warmup.demonstrations=16", f"improvement.steps={steps}", "improvement.tasks_per_step=4",
        "heldout.tasks=32", "heldout.untrained=8",
    ]  # fmt: skip
    changes = [part for size in sizes for part in ("--set", size)]
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", "treegym", "train", "quickstart", *changes, "--out", str(out)]
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def seconds(folder: Path, policy: str, steps: int, *, jobs: int = 1, busy: int = 0) -> float:
    """Until all of so many jobs are done, beside so many processes that compute."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(busy)]
    start = time.monotonic()
    try:
        running = [job(folder, policy, steps) for _ in range(jobs)]
        if any(process.wait() for process in running):
            raise SystemExit("a job failed")
        return time.monotonic() - start
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="of the improvement")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    cases = {"alone": {}, "two at once": {"jobs": 2}, "beside two busy processes": {"busy": 2}}
    taken: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        seconds(Path(folder), "PASSIVE", 1)  # caches
        for round in range(options.rounds):
            for case, beside in cases.items():
                for policy in ("ACTIVE", "PASSIVE"):
                    value = seconds(Path(folder), policy, options.steps, **beside)
                    taken.setdefault((case, policy), []).append(value)
                    print(f"round {round + 1}: {case}, {policy}: {value:.1f} s", flush=True)
    print(
        f"\n| {len(os.sched_getaffinity(0))} cores | spinning, s | yielding, s | yielding / fair |\n|---|---|---|---|"
    )
    alone = median(taken["alone", "PASSIVE"])
    for case, fair in zip(cases, (alone, 2 * alone, 2 * alone), strict=True):
        spin, rest = (median(taken[case, policy]) for policy in ("ACTIVE", "PASSIVE"))
        print(f"| {case} | {spin:.1f} | {rest:.1f} | {rest / fair:.2f} |")


if __name__ == "__main__":
    main()
