"""The programs of tests/attacks.py against every sandbox that claims to hold them; into docs/results/attacks.md.

python benchmarks/attacks.py                     # bubblewrap, as root and as an ordinary user
.ci/with-docker python benchmarks/attacks.py     # and containers
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from attacks import ATTACKS, GREED, KEEPING, LINGERING, MACHINERY  # noqa: E402

TEST = ROOT / "tests" / "test_tools_sandbox.py"
RESULTS = ROOT / "docs" / "results" / "attacks.md"
KINDS = {
    "Walls: what must not be reached": ATTACKS,
    "Limits: what must not be used up": GREED,
    "Calls: whose answers must not be forged": MACHINERY,
    "Ends: what must not outlive its call": LINGERING,
    "Forks: what must not be kept of the other branch": KEEPING,
}
SIDES = {
    "bubblewrap": "bubblewrap or kept",
    "bubblewrap, as an ordinary user": "ordinary",
    "docker": "docker",
    "local": "local",
}
TESTS = "walls_hold|limits_hold|calls_are_answered_in_turn|what_is_started_ends|what_is_kept_over_a_fork_is_found"
LINE = re.compile(
    rf"^(PASSED|FAILED|SKIPPED|ERROR) \S*::test_(?:{TESTS})\[(?:(?:bubblewrap|docker|local)-)?(.*?)\]", re.M
)


def main() -> None:
    held = {side: outcomes(chosen) for side, chosen in SIDES.items()}
    parts = ["# Attacks on sandboxes", "", "Made by `.ci/with-docker python benchmarks/attacks.py`."]
    for kind, attacks in KINDS.items():
        parts += ["", f"## {kind}", "", row("", SIDES), row("---", ["---"] * len(SIDES))]
        parts += [row(name, [found.get(name, "not run") for found in held.values()]) for name in attacks]
    RESULTS.write_text("\n".join(parts) + "\n")
    print({side: Counter(found.values()) for side, found in held.items()})


def row(first: str, others: Iterable[str]) -> str:
    return f"| {' | '.join([first, *others])} |"


def outcomes(chosen: str) -> dict[str, str]:
    """What became of each attack."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:xdist",
        "-k",
        chosen,
        "tests/test_tools_sandbox.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    words = {"PASSED": "held", "FAILED": "**got through**", "SKIPPED": "not run", "ERROR": "not run"}
    return {name: words[word] for word, name in LINE.findall(done.stdout)}


if __name__ == "__main__":
    main()
