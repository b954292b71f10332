"""MiniWoB++ in treegym/Browser-v0: what oracles solve from text alone, and whether all pages read the same again.

    python benchmarks/miniwob_pages.py                     # both parts: a quarter of an hour on two cores
    python benchmarks/miniwob_pages.py --parts sameness    # one part; the page keeps what it has of the other
    python benchmarks/miniwob_pages.py --report            # the page alone, from the figures that there are

The figures are in docs/results/miniwob.json, the page is docs/results/miniwob.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from treegym.envs import BrowserEnv
from treegym.envs.web.miniwob import ORACLES
from treegym.envs.web.tasks import SUCCESS, web_tasks
from treegym.tools.browser import close_browser

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browsing import wandered  # noqa: E402

RESULTS = ROOT / "docs" / "results"
SEEDS = range(5)
TURNS = 4  # random actions
PLACE, DRAG, PICTURE = "a place in a picture is meant", "dragging", "a picture has to be seen"
REASONS = {  # why no oracle solves a page, or not with every seed
    "bisect-angle": PLACE,
    "chase-circle": "the pointer follows something that moves",
    "circle-center": PLACE,
    "click-checkboxes-soft": "words of like meaning are meant: no oracle was written",
    "click-menu-2": f"{PICTURE}, with some seeds: the item with an icon",
    "click-pie-nodelay": "the item that is marked at first does not hear clicks",
    "copy-paste": "an event of pasting is wanted; there is no clipboard",
    "copy-paste-2": "an event of pasting is wanted; there is no clipboard",
    "count-sides": PICTURE,
    "daily-calendar": DRAG,
    "draw-circle": "drawing",
    "draw-line": "drawing",
    "find-midpoint": PLACE,
    "highlight-text": f"{DRAG}: text is marked",
    "highlight-text-2": f"{DRAG}: text is marked",
    "hot-cold": PLACE,
    "hover-shape": "the pointer follows something that moves",
    "moving-items": "things are hit while they move",
    "number-checkboxes": PICTURE,
    "resize-textarea": DRAG,
    "right-angle": PLACE,
    "simon-says": "earlier pages are to be remembered: no oracle was written",
    "terminal": "keys are typed where there is no field",
    "text-editor": "text is marked and formatted: no oracle was written",
    "tic-tac-toe": "the other player can force a draw",
    "use-colorwheel-2": PICTURE,
    "visual-addition": PICTURE,
}
Figures = dict[str, Any]


def oracles() -> Figures:
    """What the oracles got on their pages, by page and seed."""
    started, pages = time.perf_counter(), {}
    with contextlib.closing(BrowserEnv()) as env:
        for page in sorted(ORACLES):
            pages[page] = [solved(env, page, seed) for seed in SEEDS]
            print(page, [row["reward"] for row in pages[page]], flush=True)
    return {"seconds": time.perf_counter() - started, "pages": pages}


def solved(env: BrowserEnv, page: str, seed: int) -> Figures:
    """An episode with the oracle; it ends early where the oracle sees no way on."""
    env.reset(seed=seed, options={"page": page})
    reward, calls = 0.0, 0
    while not env.over and (action := env.oracle()) is not None:
        _, reward, *_, info = env.step(action)
        calls += info["calls"]
    return {"reward": reward, "turns": env.turn, "calls": calls}


def sameness() -> Figures:
    """Which pages read otherwise, when random episodes on all of them are played three times: by name, then backwards,
    then in a drawn order, each time in another browser."""
    orders = [names(), names()[::-1], random.Random(0).sample(names(), len(names()))]
    seen: dict[str, list[list[str]]] = {name: [] for name in names()}
    with contextlib.closing(BrowserEnv()) as env:
        for order in orders:
            close_browser()
            for name in order:
                seen[name].append(wandered(env, name, TURNS))
            print(f"{len(order)} pages played", flush=True)
    return {"differ": {name: difference(*runs) for name, runs in seen.items() if runs != runs[:1] * len(orders)}}


def difference(first: list[str], *others: list[str]) -> list[str]:
    """The first lines that are not the same in all of them."""
    for texts in zip(first, *others, strict=False):
        for lines in zip(*(text.split("\n") for text in texts), strict=False):
            if len(set(lines)) > 1:
                return list(dict.fromkeys(lines))
    return ["one is longer"]


def report(found: Figures) -> str:
    lines = ["# MiniWoB++", "", "Made by `python benchmarks/miniwob_pages.py`."]
    if "oracles" in found:
        lines += ["", "## Oracles", "", *solutions(found["oracles"]["pages"], found["oracles"]["seconds"])]
    if "sameness" in found:
        lines += ["", "## Sameness", "", *repetitions(found["sameness"]["differ"])]
    return "\n".join(lines) + "\n"


def solutions(pages: Mapping[str, list[Figures]], seconds: float) -> list[str]:
    """A row for every page."""
    won = {name: sum(row["reward"] >= SUCCESS for row in rows) for name, rows in pages.items()}
    whole, episodes = (
        sum(count == len(SEEDS) for count in won.values()),
        [row for rows in pages.values() for row in rows],
    )
    lines = [
        "Scripted oracles read the goal and the page's text, as an agent does. An episode is solved with",
        f"a reward of at least {SUCCESS}, the page's own; a page with all of the seeds 0 to {SEEDS[-1]}.",
        f"**{whole} of {len(names())} pages are solved.** {len(episodes)} episodes with"
        f" {sum(row['calls'] for row in episodes):,} calls took {seconds:.0f} s.",
        "",
        "| page | solved | turns | left out because |",
        "|---|---|---|---|",
    ]
    for name in names():
        turns = f"{mean(row['turns'] for row in pages[name]):.1f}" if name in pages else ""
        share = f"{won[name]} of {len(SEEDS)}" if name in pages else ""
        reason = "" if won.get(name) == len(SEEDS) else REASONS.get(name, DRAG if name.startswith("drag-") else "")
        lines.append(f"| {name} | {share} | {turns} | {reason} |")
    return lines


def repetitions(differ: Mapping[str, list[str]]) -> list[str]:
    return [
        f"Episodes of {TURNS} random actions on all {len(names())} pages were played three times: by name, backwards",
        "and in a drawn order, each time in another browser. Texts and keys of states were equal to the byte on",
        f"**{len(names()) - len(differ)} of {len(names())}** pages.",
        *(f"- {name}: {' / '.join(f'`{line}`' for line in seen)}" for name, seen in differ.items()),
    ]


def names() -> list[str]:
    return [task.name for task in web_tasks("miniwob")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--report", action="store_true", help="write the page from the figures that there are")
    args = parser.parse_args()
    file = RESULTS / "miniwob.json"
    found: Figures = json.loads(file.read_text()) if file.exists() else {}
    for part in [] if args.report else args.parts:
        found[part] = PARTS[part]()
        file.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "miniwob.md").write_text(report(found))


PARTS = {"oracles": oracles, "sameness": sameness}

if __name__ == "__main__":
    main()
