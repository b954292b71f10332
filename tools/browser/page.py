"""BrowserPage: what an episode has of the browser. Every call is waited for with a limit."""

from __future__ import annotations

import weakref
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..protocol import EpisodeLost, ToolError
from .gate import Site
from .tab import SHARE, Tab

if TYPE_CHECKING:
    from .chromium import Chromium

T = TypeVar("T")

SECONDS = 15.0  # that a call may take
HUNG, CRASHED, DIED, FAILED = "page hung", "page crashed", "browser died", "page failed"  # causes of an EpisodeLost


class BrowserPage:
    """A page with an episode in it, until `close`. Any thread may call it.

    Where the page hangs or crashes, or the browser dies, the call raises EpisodeLost, and so does every later one; the
    page is closed, and other pages go on. A control is named by the `key` with which `read` gave it.
    """

    def __init__(self, chromium: Chromium, tab: Tab, seconds: float | None) -> None:
        self.seconds = seconds or SECONDS
        self._chromium, self._tab = chromium, tab
        self._lost: EpisodeLost | None = None
        self._give_back = weakref.finalize(self, chromium.take_back, tab)
        self._give_back.atexit = False  # the browser ends then

    @classmethod
    def opened(cls, chromium: Chromium, site: Site, address: str, seed: int, seconds: float | None) -> Self:
        try:
            tab = chromium.loop.wait(chromium.tab(), seconds or SECONDS)
        except Exception as error:
            raise EpisodeLost(DIED, f"the browser opens no page: {_line(error)}") from None
        page = cls(chromium, tab, seconds)
        page._wait(tab.begin(site, address, seed))
        return page

    def read(self) -> dict[str, Any]:
        """`address` and `items` of the page, in document order: a text for each line, a dict for each control."""
        return self._wait(self._tab.read())

    def told(self) -> list[str]:
        """What the page has said since the last time: dialogs, windows and downloads, which were closed."""
        return self._tab.told()

    def click(self, key: str) -> None:
        self._wait(self._tab.click(key))

    def hover(self, key: str) -> None:
        self._wait(self._tab.hover(key))

    def type(self, key: str, text: str) -> None:
        """Writes a text into a field, in place of what is there."""
        self._wait(self._tab.type(key, text))

    def select(self, key: str, option: str) -> None:
        self._wait(self._tab.select(key, option))

    def press(self, name: str) -> None:
        """Presses a key, by the name that it has in web browsers."""
        self._wait(self._tab.press(name))

    def scroll(self, key: str) -> bool:
        """Scrolls the box in which the control is, or that it is; whether anything moved."""
        return self._wait(self._tab.scroll(key))

    def back(self) -> bool:
        """Goes back in the history; whether there was a page before."""
        return self._wait(self._tab.back())

    def wait(self, seconds: float) -> None:
        """Lets virtual time pass."""
        self._wait(self._tab.settle(1000 * seconds))

    def evaluate(self, expression: str, argument: Any = None) -> Any:
        """What JavaScript gives in the page; a function is called with the argument."""
        return self._wait(self._tab.evaluate(expression, argument))

    def settle(self) -> None:
        """Lets the time of an action pass."""
        self._wait(self._tab.settle(SHARE))

    def close(self) -> None:
        """Gives the page back. A second call does nothing."""
        self._give_back()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._lost:
            coroutine.close()
            raise self._lost
        try:
            return self._chromium.loop.wait(coroutine, self.seconds)
        except ToolError:
            raise
        except TimeoutError:
            cause, text = HUNG, f"the page did not answer within {self.seconds:g} seconds"
        except Exception as error:  # of Playwright, in any number of kinds
            cause, text = self._cause(error)
        self._tab.breaks(cause)
        self._lost = EpisodeLost(cause, text)
        self._give_back()
        raise self._lost

    def _cause(self, error: Exception) -> tuple[str, str]:
        if not self._chromium.alive:
            return DIED, "the browser has ended"
        if self._tab.broken:
            return self._tab.broken, "the page has crashed"
        return FAILED, f"the page failed: {_line(error)}"


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
