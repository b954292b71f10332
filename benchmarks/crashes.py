"""An evaluation in the browser of which one episode in twenty crashes; into docs/results/crashes.md.

python benchmarks/crashes.py    # two minutes on two cores
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "crashes.md"
sys.path.insert(0, str(ROOT / "tests"))
from browsing import CAUSES, CrashRun, run_with_crashes  # noqa: E402

EPISODES = 200
ONE_IN = 20
AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    crashes, started = list(islice(cycle(CAUSES), EPISODES // ONE_IN)), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = run_with_crashes(Path(folder), EPISODES, crashes, AT_ONCE)
    text = report(run, crashes, time.perf_counter() - started)
    RESULTS.write_text(text)
    print(text)


def report(run: CrashRun, crashes: list[str], seconds: float) -> str:
    lines = [
        "# Crashes in the browser",
        "",
        f"Made by `python benchmarks/crashes.py`: an evaluation of {EPISODES} episodes, {AT_ONCE} at a time, of which",
        f"one in {ONE_IN} is made to crash. Where the browser is killed, the episodes beside it are lost as well.",
        "",
        "| made to crash by | episodes |",
        "|---|---|",
        *(f"| {crash} | {crashes.count(crash)} |" for crash in CAUSES),
        "",
        "| in the metrics | planned | counted |",
        "|---|---|---|",
        *(f"| {cause} | {run.planned[cause]} | {run.counted[cause]} |" for cause in dict.fromkeys(CAUSES.values())),
        f"| solved | | {run.solved} |",
        f"| failed | 0 | {len(run.evaluation.failures)} |",
        "",
        f"The run took {seconds:.0f} s. Of the processes that it started, {len(run.left)} were left.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
