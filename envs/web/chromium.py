"""ChromiumEnv: a ScreenEnv whose screen is a page in Chromium."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...tools.browser import BrowserPage, Site, open_page
from ..screen import Act, Control, Page, ScreenEnv


class ChromiumEnv(ScreenEnv):
    """Subclasses open the first page of an episode in `start`, with `open`, and do an act with `acted`.

    The state cannot be copied: where the engine needs it twice, it plays the actions again, and time on the pages is
    virtual so that they answer the same. `seconds` is the limit of every call of the browser: a page that takes longer
    is closed, and ends the episode.
    """

    can_fork = False

    def __init__(self, *, seconds: float | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if seconds is not None and seconds <= 0:
            raise ValueError(f"seconds: expected a positive number, got {seconds:g}")
        self.seconds = seconds
        self.live: BrowserPage | None = None

    def open(self, site: Site, address: str, seed: int) -> BrowserPage:
        """The page of a new episode, at an address of the site."""
        self.live = open_page(site, address, seed=seed, seconds=self.seconds)
        return self.live

    @property
    def _page(self) -> BrowserPage:
        assert self.live is not None
        return self.live

    def page(self) -> Page:
        seen = self._page.read()
        return Page(seen["address"], tuple(_item(item) for item in seen["items"]))

    def acted(self, act: Act) -> str:
        """Does what the agent wants, to the control whose key Chromium's page gave; what there is to say of it."""
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

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        result = super().step(action)
        if self.over:
            self._leave()
        return result

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
