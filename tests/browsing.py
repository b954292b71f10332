"""What tests and benchmarks do with pages in the browser: random actions, and episodes that are made to crash."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from treegym.agents import ChatRenderer, Sampling
from treegym.agents.evaluation import Budget, Evaluation, evaluate
from treegym.agents.models.nano import build_nano
from treegym.envs import BrowserEnv, Message, Task, TextEnv
from treegym.tools.browser import close_browser
from treegym.tools.browser.chromium import browser


def wandered(env: BrowserEnv, page: str, turns: int = 4) -> list[str]:
    """All that is read on a page, with the keys of its states, while random actions are taken."""
    chance = random.Random(page)
    texts = [env.reset(seed=7, options={"page": page})[0]]
    for _ in range(turns):
        if env.over:
            break
        number = chance.randint(1, max(len(env.shown), 1))
        role = env.shown[number - 1].role if env.shown else ""
        action = env.write_call("click", number=number)
        if role == "textbox" and chance.random() < 0.7:
            action = env.write_call("type", number=number, text="lamp")
        elif chance.random() < 0.2:
            action = env.write_call("hover", number=number)
        texts += [env.step(action)[0], env.state_key()]
    return texts


# crashes

CAUSES = {  # how an episode is made to crash, and what its truncation is to be called
    "loop in a handler": "page hung",
    "page killed": "page crashed",
    "browser killed": "browser died",
    "loop in a timer": "page hung",
    "alerts without end": "page hung",
}
CRASHING = """<!doctype html><button onclick="window.sent = 1">Send</button>
<button onclick="for (;;);">loop in a handler</button>
<button onclick="setTimeout(() => { for (;;); }, 100)">loop in a timer</button>
<button onclick="for (;;) alert('again')">alerts without end</button>"""
ENDED = 20.0  # seconds after which no process may be left
LIMIT = 3.0  # seconds in which a page that hangs is to answer; the other pages have the default


@dataclass(frozen=True)
class Crasher:
    """Sends the form of its page, or has the episode crash in the way that its task is named after."""

    seen: set[int] = field(default_factory=set)  # processes that this one has started, and they in turn

    async def act(self, messages: Sequence[Message], env: TextEnv, seed: int) -> str:
        assert isinstance(env, BrowserEnv)
        self.seen.update(family(os.getpid()))
        crash = env.task.name
        if env.turn:
            return env.write_answer("done")
        if crash == "browser killed":
            os.kill(browser().process, signal.SIGKILL)
        if crash == "page killed":
            assert env.live
            env.live._chromium.loop.start(env.live._tab.session.send("Page.crash"))
        names = [control.name for control in env.shown]
        return env.write_call("click", number=1 + names.index(crash if crash in names else "Send"))


def family(process: int) -> set[int]:
    """The processes below one."""
    children: set[int] = set()
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children.update(map(int, file.read_text().split()))
        except OSError:  # it has ended meanwhile
            continue
    return children.union(*map(family, children))


@dataclass(frozen=True)
class CrashRun:
    """What became of an evaluation in which some episodes were made to crash."""

    evaluation: Evaluation
    planned: Counter[str]  # causes
    left: list[str]  # processes that should have ended

    @property
    def counted(self) -> Counter[str]:
        """Causes of the episodes that were truncated."""
        return Counter(rollout.cause for task in self.evaluation.tasks for rollout in task.rollouts if rollout.cause)

    @property
    def solved(self) -> int:
        return sum(task.successes for task in self.evaluation.tasks)


def run_with_crashes(folder: Path, episodes: int, crashes: Sequence[str], at_once: int) -> CrashRun:
    """An evaluation of so many episodes, among them these crashes, spread evenly, so that no two come at a time."""
    rows = [
        {"name": name, "page": "page.html", "goal": "Send it.", "check": "sent === 1"} for name in ("send", *CAUSES)
    ]
    (folder / "page.html").write_text(CRASHING)
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = {(number + 1) * episodes // len(crashes) - 1: crash for number, crash in enumerate(crashes)}
    tasks = [
        Task(
            "treegym/Browser-v0", seed, {"page": places.get(seed, "send")},
            settings={"tasks": str(folder / "tasks.jsonl"), **({"seconds": LIMIT} if seed in places else {})},
        )
        for seed in range(episodes)
    ]  # fmt: skip
    before, policy = family(os.getpid()), Crasher()
    evaluation = evaluate(
        tasks, policy, ChatRenderer(build_nano()[1]), Sampling(max_context=100_000), Budget(), folder / "run",
        at_once=at_once,
    )  # fmt: skip
    close_browser()
    limit = time.monotonic() + ENDED
    while (left := [name for process in policy.seen - before if (name := named(process))]) and time.monotonic() < limit:
        time.sleep(0.05)
    return CrashRun(evaluation, Counter(CAUSES[crash] for crash in crashes), left)


def named(process: int) -> str:
    """What a process is and does, empty where there is none."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().split()[:4]
        return " ".join([*state, *Path(f"/proc/{process}/cmdline").read_text().split("\0")[:3]])
    except OSError:
        return ""
