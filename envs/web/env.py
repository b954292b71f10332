"""Browser: tasks on pages in real Chromium, read and acted on as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...tools import EpisodeLost, ToolCall, ToolError
from ...tools.browser import BrowserPage, open_page
from ..base import Message
from ..formats.actions import Action, FormatError
from ..screen import Act, Control, Page, ScreenEnv
from .miniwob import ORACLES, Seen, next_move
from .tasks import SUCCESS, Outcome, WebTask, web_tasks


class BrowserEnv(ScreenEnv):
    """A page in Chromium. The episode ends when the page says so, or with an answer.

    `tasks` are "miniwob" (MiniWoB++) or the path of a JSON lines file; `pages` names some of them, as does the option
    `page` of reset. The state cannot be copied: where the engine needs it twice, it plays the actions again, and time
    on the pages is virtual so that they answer the same. The state's key is the text and the address; what a page hides
    from its reader, it hides from the key too. `seconds` is the limit of every call: a page that takes longer is
    closed, and ends the episode.
    """

    can_fork = False
    instructions = (
        "Do what is asked on the page. Where nothing on it ends the task, answer done, or what was asked for."
    )
    reward_weights: Mapping[str, float] = {"reward": 1.0, "exact": 0.0}

    def __init__(
        self, *, tasks: str = "miniwob", pages: Sequence[str] = (), seconds: float | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if seconds is not None and seconds <= 0:
            raise ValueError(f"seconds: expected a positive number, got {seconds:g}")
        self.seconds = seconds
        self.tasks = {task.name: task for task in web_tasks(tasks, [pages] if isinstance(pages, str) else pages)}
        self.live: BrowserPage | None = None

    def start(self, options: Mapping[str, Any]) -> str:
        self._leave()
        self.task = self._drawn(options.get("page"))
        seed = int(self.np_random.integers(2**31))
        self.site = self.task.site(seed)
        self.outcome = Outcome()
        self.live = open_page(self.site, self.task.address, seed=seed, seconds=self.seconds)
        self.goal = self.task.begin(self.live, seed)
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

    def page(self) -> Page:
        seen = self._page.read()
        return Page(seen["address"], tuple(_item(item) for item in seen["items"]))

    @property
    def _page(self) -> BrowserPage:
        assert self.live is not None
        return self.live

    def perform(self, act: Act) -> str:
        if self.outcome.done:
            raise ToolError("the task on this page has ended")
        try:
            notice = self._acted(act)
        except ToolError as error:
            raise ToolError(f"{act.control} {error}" if act.control else str(error)) from None
        self.outcome = self.task.outcome(self._page, self.site, None)
        return "\n".join(filter(None, [notice, *self._page.told()]))

    def _acted(self, act: Act) -> str:
        page, key = self._page, act.control.key if act.control else ""
        match act.kind:
            case "click":
                page.click(key)
            case "hover":
                page.hover(key)
            case "type":
                page.type(key, act.text)
            case "select":
                page.select(key, act.text)
            case "press":
                page.press(act.text)
            case "wait":
                page.wait(act.seconds)
            case "scroll":
                return "" if page.scroll(key) else "nothing more can be scrolled there"
            case "back":
                return "" if page.back() else "there is no page before"
        return ""

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

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        result = super().step(action)
        if self.over:
            self._leave()
        return result

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

    def _leave(self) -> None:
        """Gives the page back, so that another episode can have it."""
        if self.live is not None:
            self.live.close()
        self.live = None

    def close(self) -> None:
        self._leave()
        super().close()


def _item(item: str | Mapping[str, Any]) -> str | Control:
    if isinstance(item, str):
        return item
    lists = {name: tuple(item[name]) for name in ("options", "chosen", "states") if name in item}
    return Control(**{**item, **lists})
