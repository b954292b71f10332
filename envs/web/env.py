"""Browser: tasks on pages in real Chromium, read and acted on as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...tools import EpisodeLost, ToolCall, ToolError
from ..base import Message
from ..formats.actions import Action, FormatError
from ..screen import Act
from .chromium import ChromiumEnv
from .desk import DeskBrowserEnv
from .miniwob import ORACLES, Seen, next_move
from .tasks import SUCCESS, Outcome, WebTask, web_tasks


def browser_env(*, tasks: str = "miniwob", **settings: Any) -> BrowserEnv | DeskBrowserEnv:
    """What `treegym/Browser-v0` is: a DeskBrowserEnv for the tasks "desk", otherwise a BrowserEnv."""
    return DeskBrowserEnv(**settings) if tasks == "desk" else BrowserEnv(tasks=tasks, **settings)


class BrowserEnv(ChromiumEnv):
    """A page in Chromium. The episode ends when the page says so, or with an answer.

    `tasks` are "miniwob" (MiniWoB++) or the path of a JSON lines file; `pages` names some of them, as does the option
    `page` of reset. The state's key is the text and the address; what a page hides from its reader, it hides from the
    key too.
    """

    instructions = (
        "Do what is asked on the page. Where nothing on it ends the task, answer done, or what was asked for."
    )
    reward_weights: Mapping[str, float] = {"reward": 1.0, "exact": 0.0}

    def __init__(self, *, tasks: str = "miniwob", pages: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self.tasks = {task.name: task for task in web_tasks(tasks, [pages] if isinstance(pages, str) else pages)}

    def start(self, options: Mapping[str, Any]) -> str:
        self._leave()
        self.task = self._drawn(options.get("page"))
        seed = int(self.np_random.integers(2**31))
        self.site = self.task.site(seed)
        self.outcome = Outcome()
        self.goal = self.task.begin(self.open(self.site, self.task.address, seed), seed)
        return self.goal

    def _drawn(self, name: str | None) -> WebTask:
        names = list(self.tasks)
        if name is None:
            return self.tasks[names[int(self.np_random.integers(len(names)))]]
        if name not in self.tasks:
            raise ValueError(f"page {name!r}: expected one of {', '.join(names)}")
        return self.tasks[name]

    def details(self) -> dict[str, Any]:
        return {"page": self.task.name}

    def perform(self, act: Act) -> str:
        if self.outcome.done:
            raise ToolError("the task on this page has ended")
        try:
            notice = self.acted(act)
        except ToolError as error:
            raise ToolError(f"{act.control} {error}" if act.control else str(error)) from None
        self.outcome = self.task.outcome(self._page, self.site, None)
        return "\n".join(filter(None, [notice, *self._page.told()]))

    def _act(self, parsed: Action | FormatError) -> list[Message]:
        messages = super()._act(parsed)
        if self.lost is not None:
            return messages
        if self.outcome.done:
            self.answered = self.answered or ""
        elif self.answered is not None:
            return self._graded(self.answered)
        return messages

    def _graded(self, answer: str) -> list[Message]:
        try:
            self.outcome = self.task.outcome(self._page, self.site, answer)
        except EpisodeLost as error:
            self.lost, self.answered = error, None
            return [Message("user", f"{error}; the episode ends here")]
        return []

    def score(self, answer: str) -> dict[str, float]:
        return {"reward": self.outcome.reward, "exact": float(self.outcome.reward >= SUCCESS)}

    def oracle(self) -> str | None:
        if self.over:
            return None
        calls = tuple((each.call.name, dict(each.call.arguments)) for each in self.transcript if not each.result.failed)
        move = next_move(self.task.name, Seen(self.goal, "\n".join(self.current.lines), calls))
        if move is None:  # an oracle that sees no way on gives up
            return self.write_answer("done") if self.task.name in ORACLES else None
        return self.format.render(Action((ToolCall(move.tool, move.arguments),) * move.times), self.tools)
