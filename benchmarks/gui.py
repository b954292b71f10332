"""What pages cost, in Chromium and in simulation, beside other suites; into docs/results/gui.md and .json.

    python benchmarks/gui.py --browsergym BG/bin/python --selenium SE/bin/python    # ten minutes on two cores
    python benchmarks/gui.py --report    # the page alone

BrowserGym and MiniWoB++'s own environment need an environment each, and chromedriver is a package of the system's:
    python -m venv BG && BG/bin/pip install browsergym-core==0.14.3 browsergym-miniwob==0.14.3
    python -m venv SE && SE/bin/pip install miniwob
What is not named is left out. BrowserGym's chat window starts a browser of its own, which it finds through a link in
PLAYWRIGHT_BROWSERS_PATH that is made here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from run import Worker

from treegym.envs import BrowserEnv, DeskEnv, HouseholdEnv, ToolEnv
from treegym.envs.web.tasks import miniwob_folder
from treegym.tools.browser import close_browser
from treegym.tools.browser.chromium import browser, chromium_path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browsing import family  # noqa: E402

RESULTS = ROOT / "docs" / "results"
PAGES = (
    "click-checkboxes click-option click-tab-2 email-inbox login-user search-engine social-media-all use-autocomplete"
).split()
CHAT = "chromium-1117/chrome-linux/chrome"  # where Playwright 1.44 looks for a browser
ROUNDS = 3
STEPS = 2_000  # of the simulation
FORKS = 2_000
OPEN = (1, 8, 16)  # pages
TARGETS = {  # ours ÷ theirs, at most
    ("browsergym", "step"): 1 / 10, ("browsergym", "reset"): 1 / 15, ("selenium", "step"): 1.0,
}  # fmt: skip
NAMES = {
    "treegym": "treegym/Browser-v0", "browsergym": "BrowserGym", "browsergym_bare": "BrowserGym, not waiting",
    "selenium": "MiniWoB++'s own, Selenium",
}  # fmt: skip
Figures = dict[str, Any]


def beside(pythons: Mapping[str, str]) -> Figures:
    """Milliseconds of the resets and clicks of each side. They take turns, round by round."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        link = Path(folder) / CHAT
        link.parent.mkdir(parents=True)
        link.symlink_to(chromium_path())
        os.environ["PLAYWRIGHT_BROWSERS_PATH"] = folder
        os.environ["SE_OFFLINE"] = "true"  # Selenium would look for a driver on the network
        os.environ["MINIWOB_URL"] = f"{miniwob_folder().as_uri()}/miniwob/"
        workers = {}
        for side, python in pythons.items():
            workers[side] = Worker([python, str(ROOT / "benchmarks" / "page_steps.py"), side, chromium_path()], 1)
            stack.callback(workers[side].close)
        times: Figures = {side: {"reset": [], "step": []} for side in workers}
        for side, worker in [(side, worker) for _ in range(ROUNDS) for side, worker in workers.items()]:
            measured: Mapping[str, Any] = worker.measure(PAGES)  # type: ignore[arg-type]
            for kind, taken in measured.items():
                times[side][kind] += taken
            print(side, {kind: round(median(taken), 1) for kind, taken in measured.items()}, flush=True)
    return times


def simulation() -> Figures:
    """Steps of the desk's oracles, their own time left out, and forks of it and of the household in mid-episode."""
    desk, household = DeskEnv(), HouseholdEnv()
    steps: list[float] = []
    seed = 0
    while len(steps) < STEPS:
        desk.reset(seed=seed)
        seed += 1
        while not desk.over and (action := desk.oracle()) is not None:
            steps.append(timed(lambda action=action: desk.step(action)))  # type: ignore[misc]
    return {"step": steps, "fork": {name: forks(env) for name, env in (("desk", desk), ("household", household))}}


def forks(env: ToolEnv) -> list[float]:
    env.reset(seed=0)
    for _ in range(2):
        action = env.oracle()
        assert action is not None
        env.step(action)
    return [timed(env.fork) for _ in range(FORKS)]


def timed(action: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def memory() -> Figures:
    """Megabytes of the browser with so many pages open, each shared part counted once."""
    found: Figures = {}
    envs: list[BrowserEnv] = []
    for count in OPEN:
        while len(envs) < count:
            envs.append(BrowserEnv())
            envs[-1].reset(seed=0, options={"page": PAGES[len(envs) % len(PAGES)]})
        time.sleep(2)  # what has been opened comes to rest
        found[str(count)] = sum(map(share, {browser().process, *family(browser().process)}))
    for env in envs:
        env.close()
    close_browser()
    return found


def share(process: int) -> float:
    """Megabytes of a process, what it shares with others being divided among them."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/smaps_rollup").read_text().split("\n")[1:-1])
    except OSError:  # it has ended
        return 0.0
    return int(lines["Pss"].split()[0]) * 1024 / 1e6


def report(found: Figures) -> str:
    sides = found["sides"]
    lines = [
        "# Pages: what they cost",
        "",
        f"Made by `python benchmarks/gui.py` on {found['machine']}.",
        "",
        "## A reset and a click",
        "",
        f"Episodes of a reset and up to three clicks on {len(PAGES)} pages of MiniWoB++, {ROUNDS} times, in the same",
        "Chromium; the sides took turns. BrowserGym's defaults wait: 500 ms before it looks at a page and 100 ms with",
        "every action; a side without these waits is given too. With every reset it starts two browsers; it reads DOM,",
        "accessibility tree and a screenshot. The Selenium environment resets in the page that is open.",
        "",
        "| | reset, median ms | p95 | click, median ms | p95 |",
        "|---|---|---|---|---|",
        *(
            f"| {NAMES[side]} | {spread(times['reset'])} | {spread(times['step'])} |"
            for side, times in found["sides"].items()
        ),
        "",
        "| treegym ÷ | | ratio of medians | target | met |",
        "|---|---|---|---|---|",
    ]
    ours = sides["treegym"]
    for side, times in list(sides.items())[1:]:
        for kind in ("reset", "step"):
            ratio, target = median(ours[kind]) / median(times[kind]), TARGETS.get((side, kind))
            said = f"at most {target:.3f} | {'yes' if ratio <= target else '**no**'}" if target else " | "
            lines.append(f"| {NAMES[side]} | {'click' if kind == 'step' else kind} | {ratio:.3f} | {said} |")
    step, fork = median(found["simulation"]["step"]), found["simulation"]["fork"]
    faster, heavier = median(ours["step"]) / step, median(fork["desk"]) / median(fork["household"])
    lines += [
        "",
        "## Simulation",
        "",
        "Steps of treegym/Desk-v0 as its oracles take them, and forks in mid-episode.",
        "",
        "| | median ms | p95 |",
        "|---|---|---|",
        f"| treegym/Desk-v0, a step | {spread(found['simulation']['step'], 3)} |",
        f"| treegym/Desk-v0, a fork | {spread(fork['desk'], 4)} |",
        f"| treegym/Household-v0, a fork | {spread(fork['household'], 4)} |",
        "",
        f"The simulation takes **{faster:,.0f}** steps while the browser takes one (target: at least 50):",
        f"{1e3 / step:,.0f} a second and {1e3 / median(ours['step']):.0f}. A fork takes **{heavier:.2f}** times",
        "as long as Household's (target: at most 2).",
        "",
        "## Memory",
        "",
        "| pages open | MB of all of the browser's processes |",
        "|---|---|",
        *(f"| {count} | {size:.0f} |" for count, size in found["memory"].items()),
    ]
    return "\n".join(lines) + "\n"


def spread(times: list[float], digits: int = 0) -> str:
    return f"{median(times):,.{digits}f} | {quantiles(times, n=20)[-1]:,.{digits}f}"


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(": ")[2] for line in info if "model name" in line), platform.machine())
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"{os.cpu_count()} cores of {processor}, Python {platform.python_version()}, Playwright {version('playwright')}"
        f";\nthe load of the machine was {load} at the end"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browsergym", metavar="PYTHON", help="an interpreter that has BrowserGym")
    parser.add_argument("--selenium", metavar="PYTHON", help="an interpreter that has miniwob and its Selenium")
    parser.add_argument("--report", action="store_true", help="write the page from the figures that there are")
    args = parser.parse_args()
    file = RESULTS / "gui.json"
    if not args.report:
        pythons = {"treegym": sys.executable}
        if args.browsergym:
            pythons |= {"browsergym": args.browsergym, "browsergym_bare": args.browsergym}
        if args.selenium:
            pythons["selenium"] = args.selenium
        found = {"simulation": simulation(), "memory": memory(), "sides": beside(pythons), "machine": machine()}
        file.write_text(json.dumps(rounded(found)) + "\n")
    (RESULTS / "gui.md").write_text(report(json.loads(file.read_text())))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
