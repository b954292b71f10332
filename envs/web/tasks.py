"""WebTask: a site, its first page, a goal and how well it was reached; MiniWoB++'s pages, and files of tasks."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from ...tools.browser import BrowserPage, BrowserUnavailable, FolderSite, OtherSite, Reply, Request, Site

SUCCESS = 0.99  # a reward from which on a task counts as solved


@dataclass(frozen=True, slots=True)
class Outcome:
    """How well the goal is reached by now."""

    reward: float = 0.0
    done: bool = False  # the page says that the episode is over


class WebTask(Protocol):
    """One task on a site. Each episode makes its own with `begin`, so that a site may keep a state."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str:
        """Of the first page."""
        ...

    def site(self, seed: int) -> Site:
        """What serves an episode."""
        ...

    def begin(self, page: BrowserPage, seed: int) -> str:
        """Starts the episode on its first page; the goal."""
        ...

    def outcome(self, page: BrowserPage, site: Site, answer: str | None) -> Outcome:
        """After an action, or at the end, where an answer was given."""
        ...


# MiniWoB++

STYLE = b"<style>#reward-display, #click-canvas, #sync-task-cover { display: none !important }</style>"
START = """seed => {
    Math.seedrandom(seed);
    core.EPISODE_MAX_TIME = 1e9;  // the number of turns limits an episode
    core.startEpisodeReal();
}"""
GOAL = "() => { const said = core.getUtterance(); return typeof said === 'string' ? said : said.utterance; }"
OUTCOME = "() => [WOB_RAW_REWARD_GLOBAL, WOB_DONE_GLOBAL]"


@functools.cache
def miniwob_folder() -> Path:
    """Where the pages of the package miniwob are. BrowserUnavailable where it is not installed."""
    spec = importlib.util.find_spec("miniwob")  # which does not import it, nor the Selenium that it needs
    if spec is None or not spec.submodule_search_locations:
        raise BrowserUnavailable("MiniWoB++'s pages are missing: pip install 'treegym[browser]'")
    return Path(spec.submodule_search_locations[0]) / "html"


@dataclass(frozen=True)
class MiniWobSite:
    """The pages as UTF-8, without the display of time and rewards."""

    files: FolderSite

    @property
    def origin(self) -> str:
        return self.files.origin

    def answer(self, request: Request) -> Reply:
        reply = self.files.answer(request)
        if not reply.kind.startswith("text/html"):
            return replace(reply, headers={"Cache-Control": "max-age=86400"})  # scripts and styles, which never change
        return Reply(reply.body.replace(b"</head>", STYLE + b"</head>", 1), reply.kind, reply.status)


@dataclass(frozen=True, slots=True)
class MiniWobTask:
    """A page of MiniWoB++ (arXiv:1802.08802) with its own reward, which does not shrink with time here."""

    name: str  # such as click-button

    @property
    def address(self) -> str:
        return f"http://miniwob.test/miniwob/{self.name}.html"

    def site(self, seed: int) -> MiniWobSite:
        return MiniWobSite(FolderSite(miniwob_folder(), "http://miniwob.test"))

    def begin(self, page: BrowserPage, seed: int) -> str:
        page.evaluate(START, seed)
        page.settle()
        return str(page.evaluate(GOAL))

    def outcome(self, page: BrowserPage, site: Site, answer: str | None) -> Outcome:
        reward, done = page.evaluate(OUTCOME)
        return Outcome(float(reward), bool(done))


def miniwob_tasks() -> list[WebTask]:
    """All pages of MiniWoB++, by name."""
    return [MiniWobTask(path.stem) for path in sorted((miniwob_folder() / "miniwob").glob("*.html"))]


# a file of one's own


@dataclass(frozen=True, slots=True)
class FileTask:
    """A line of a JSON lines file."""

    name: str
    page: str  # a file, or an http address
    folder: Path  # that the file of tasks is in; files below it are served
    goal: str
    check: str  # JavaScript: an expression, or a function of the answer; true, or a number from 0 to 1

    @property
    def address(self) -> str:
        return self.page if self.page.startswith("http://") else f"http://site.test/{self.page}"

    def site(self, seed: int) -> Site:
        if not self.page.startswith("http://"):
            return FolderSite(self.folder)
        return OtherSite(f"http://{urlsplit(self.page).netloc}")

    def begin(self, page: BrowserPage, seed: int) -> str:
        return self.goal

    def outcome(self, page: BrowserPage, site: Site, answer: str | None) -> Outcome:
        if answer is None:
            return Outcome()
        value = page.evaluate(CHECK, [self.check, answer])
        if isinstance(value, str):
            raise ValueError(f"{self.name}: the check {self.check[:80]!r} fails: {value}")
        return Outcome(min(max(float(value or 0), 0.0), 1.0))


CHECK = """async ([check, answer]) => {
    try {
        const made = (0, eval)(`(${check})`), value = await (typeof made === "function" ? made(answer) : made);
        return typeof value === "number" ? value : Boolean(value);
    } catch (error) { return String(error); }
}"""
FIELDS = ("page", "goal", "check")


def file_tasks(path: Path) -> list[WebTask]:
    """The tasks of a JSON lines file: objects with `page`, `goal`, `check`, and `name` if they like. ValueError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"tasks: {path} cannot be read: {error.strerror}; expected miniwob, desk or a JSON lines file"
        ) from None
    tasks = [_task(line, f"{path}:{number}", path.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise ValueError(f"tasks: {path} has no tasks: a line is an object with {', '.join(FIELDS)}")
    return tasks


def _task(line: str, place: str, folder: Path) -> WebTask:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: no JSON: {error}") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in FIELDS):
        raise ValueError(f"{place}: expected an object with the texts {', '.join(FIELDS)}, got {line[:80]}")
    page: str = row["page"]
    if not page.startswith("http://") and not (folder / urlsplit(page).path).is_file():
        raise ValueError(f"{place}: there is no page {page}; expected a file beside the tasks, or an http:// address")
    return FileTask(str(row.get("name", page)), page, folder, row["goal"], row["check"])


def web_tasks(tasks: str, names: Sequence[str] = ()) -> list[WebTask]:
    """The tasks that a setting names, all or some of them. ValueError for names that are not there."""
    known = {task.name: task for task in (miniwob_tasks() if tasks == "miniwob" else file_tasks(Path(tasks)))}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"pages: no {unknown[0]!r} in {tasks}; there is {', '.join(known)}")
    return [known[name] for name in names or known]
