"""Tab: a page of the browser with a context and a gate of its own, driven on the browser's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import time
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

from ..protocol import ToolError
from .gate import Gate, Site

if TYPE_CHECKING:
    from playwright.async_api import Browser, BrowserContext, CDPSession, Dialog, Download, Page

SHARE = 300.0  # virtual milliseconds that pass with an action
INSTANT = 1_767_258_000_000  # milliseconds since 1970, at which every document starts: 2026-01-01, 9:00 UTC
VIEW = {"width": 1280, "height": 800}
OUTSIDE = (-5.0, -5.0)  # where the pointer starts
TYPED = 200  # characters that are typed key by key; longer texts are inserted at once
ARRIVAL = 5.0  # seconds in which a navigation that has begun leads to another document
POLL = 0.004  # seconds
ERROR = "chrome-error://chromewebdata/"  # the address of Chromium's page that says what is wrong
# what belongs to a tab, and is not among the storage of an origin
FORGET = "() => { window.name = ''; try { sessionStorage.clear(); } catch { /* about:blank has none */ } }"


def one_line(text: str) -> str:
    """A text as Chromium pastes it into a field of one line."""
    return re.sub(r"\r\n|[\r\n]", " ", text.rstrip("\r\n"))


@functools.cache
def script() -> str:
    return files(__package__).joinpath("page.js").read_text(encoding="utf-8")


@dataclass(eq=False)
class Tab:
    """Its methods run on the browser's loop; whoever calls them waits with a limit, for a page may never answer."""

    context: BrowserContext
    page: Page
    session: CDPSession
    gate: Gate
    broken: str = ""  # why it is of no use any more
    notices: list[str] = field(default_factory=list)  # what the page would have said or opened
    pointer: tuple[float, float] = OUTSIDE
    document: str = ""  # which one was read last
    seeded: str = ""  # the number of the script that runs before the page's own
    pictures: set[str] = field(default_factory=set)  # requests for pictures that are under way

    @classmethod
    async def open(cls, browser: Browser) -> Self:
        gate = Gate()
        context = await browser.new_context(
            proxy={"server": await gate.open(), "bypass": "<-loopback>"},
            viewport=VIEW,  # type: ignore[arg-type]
            locale="en-US",
            timezone_id="UTC",
            color_scheme="light",
            reduced_motion="reduce",
            accept_downloads=False,
            service_workers="block",
        )
        page = await context.new_page()
        session = await context.new_cdp_session(page)
        tab = cls(context, page, session, gate)
        page.set_default_timeout(0)  # whoever calls waits with a limit
        page.on("crash", lambda _: tab.breaks("page crashed"))
        page.on("close", lambda _: tab.breaks("page crashed"))
        page.on("dialog", tab._dialog)
        page.on("download", tab._download)
        context.on("page", tab._window)
        session.on("Runtime.bindingCalled", lambda call: tab.notices.append(call["payload"]))
        session.on("Network.requestWillBeSent", tab._asked)
        session.on("Network.loadingFinished", lambda answer: tab.pictures.discard(answer["requestId"]))
        session.on("Network.loadingFailed", lambda answer: tab.pictures.discard(answer["requestId"]))
        await session.send("Network.enable", {"maxTotalBufferSize": 0})
        await session.send("Runtime.enable")
        await session.send("Page.enable")
        return tab

    def breaks(self, why: str) -> None:
        self.broken = self.broken or why

    def _asked(self, request: dict[str, Any]) -> None:
        if request["type"] == "Image":
            self.pictures.add(request["requestId"])

    async def _dialog(self, dialog: Dialog) -> None:
        if dialog.type == "beforeunload":
            await dialog.accept()
        else:
            await dialog.dismiss()

    async def _download(self, download: Download) -> None:
        from playwright.async_api import Error

        self.notices.append("a download was refused")
        await download.cancel()
        with contextlib.suppress(Error):
            await self.evaluate("() => __treegym.stay()")  # the navigation that began it leads to no document

    async def _window(self, page: Page) -> None:
        if page is not self.page:
            self.notices.append("a window was closed")
            await page.close()

    async def begin(self, site: Site, address: str, seed: int) -> None:
        """An episode: nothing is left of the one before."""
        await self.evaluate(FORGET)
        await self.page.goto("about:blank")
        self.gate.site, self.notices = site, []
        await asyncio.gather(
            self.context.clear_cookies(),
            self.session.send("Storage.clearDataForOrigin", {"origin": site.origin, "storageTypes": "all"}),
            self._prepare(seed),
            self._point(*OUTSIDE),
        )
        await self.page.goto(address, wait_until="load")
        await self.session.send("Page.resetNavigationHistory")
        await self.settle()

    async def _prepare(self, seed: int) -> None:
        """Has our script run before the page's own, in every document from now on."""
        if self.seeded:
            await self.session.send("Page.removeScriptToEvaluateOnNewDocument", {"identifier": self.seeded})
        else:
            await self.session.send("Runtime.addBinding", {"name": "__treegymTell"})
        settings = json.dumps({"seed": seed % 2**32, "start": INSTANT})
        source = {"source": f"{script()}({settings});"}
        self.seeded = (await self.session.send("Page.addScriptToEvaluateOnNewDocument", source))["identifier"]

    async def evaluate(self, expression: str, argument: Any = None) -> Any:
        return await self.page.evaluate(expression, argument)

    async def settle(self, milliseconds: float = SHARE) -> None:
        """Lets virtual time pass, in the document in which an action ends."""
        from playwright.async_api import Error

        await self._meet()
        for _ in range(20):  # navigations in a row
            try:
                left = await self.evaluate("time => __treegym.advance(time)", milliseconds)
                if left != "leaving":
                    break
            except Error:  # the document went away meanwhile
                if self.broken or self.page.is_closed():
                    raise
            await self._arrive()
        await self._meet()

    async def _meet(self) -> None:
        """Has the page notice where the pointer is now. Chromium does so by itself after a layout, but at any time."""
        if self.pointer != OUTSIDE:
            await self._point(*self.pointer)
        else:
            await self._pictures()

    async def _point(self, x: float, y: float) -> None:
        self.pointer = (x, y)
        for _ in range(3):  # a picture that arrives may move what is under the pointer
            await self.page.mouse.move(x, y)
            if not await self._pictures():
                return

    async def _pictures(self) -> bool:
        """Waits for the pictures that styles name; whether there were any. Boxes have other sizes without them."""
        from playwright.async_api import Error

        waited, limit = False, time.monotonic() + ARRIVAL
        with contextlib.suppress(Error):  # the document went away meanwhile
            while time.monotonic() < limit:
                await self.evaluate("() => void document.body?.offsetWidth")  # with the layout, pictures are asked for
                if not self.pictures:
                    return waited
                waited = True
                await asyncio.sleep(POLL)
        self.pictures.clear()
        return waited

    async def _arrive(self) -> None:
        """Waits for the document that a navigation leads to."""
        from playwright.async_api import Error

        limit = time.monotonic() + ARRIVAL
        while time.monotonic() < limit:
            with contextlib.suppress(Error):
                if await self.evaluate("() => window.__treegym?.id") != self.document:
                    break
                if not await self.evaluate("() => __treegym.leaving()"):
                    return
            if self.broken or self.page.is_closed():
                return
            await asyncio.sleep(POLL)
        else:
            await self.evaluate("() => __treegym.stay()")
            return
        await self.page.wait_for_load_state("load")
        with contextlib.suppress(Error):
            self.document = await self.evaluate("() => __treegym.id")

    async def read(self) -> dict[str, Any]:
        """Address and items of the page; a text, or what a control is."""
        seen: dict[str, Any] = await self.evaluate("() => __treegym.read()")
        self.document = seen.pop("document")
        return seen

    def told(self) -> list[str]:
        """What the page has said since the last time."""
        notices, self.notices = self.notices, []
        return notices

    # acting

    async def _ask(self, name: str, *arguments: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.evaluate(f"given => __treegym.{name}(...given)", list(arguments))
        if fault := answer.get("fault"):
            raise ToolError(fault)
        return answer

    async def click(self, key: str) -> None:
        aim = await self._ask("aim", key)
        if not aim.get("focused"):
            await self._point(aim["x"], aim["y"])
            await self.page.mouse.down()
            await self.page.mouse.up()
        await self.settle()

    async def hover(self, key: str) -> None:
        aim = await self._ask("aim", key)
        if not aim.get("focused"):
            await self._point(aim["x"], aim["y"])
        await self.settle()

    async def type(self, key: str, text: str) -> None:
        field = await self._ask("enter", key, text)
        if not field.get("set"):
            await self._write(re.sub(r"\r\n?", "\n", text) if field["lines"] else one_line(text))
        await self.settle()

    async def _write(self, text: str) -> None:
        keyboard = self.page.keyboard
        if not text:
            await keyboard.press("Backspace")
        elif len(text) <= TYPED:
            await keyboard.type(text)
        else:
            await keyboard.insert_text(text)

    async def select(self, key: str, option: str) -> None:
        await self._ask("choose", key, option)
        await self.settle()

    async def press(self, key: str) -> None:
        await self.page.keyboard.press(key)
        await self.settle()

    async def scroll(self, key: str) -> bool:
        """Whether anything moved."""
        moved = (await self._ask("scroll", key))["moved"]
        await self.session.send(
            "Page.captureScreenshot", {"clip": {"x": 0, "y": 0, "width": 1, "height": 1, "scale": 1}}
        )
        await self.settle()
        return bool(moved)

    async def back(self) -> bool:
        """Goes to the last page that had another address; whether there was one."""
        from playwright.async_api import Error

        history = await self.session.send("Page.getNavigationHistory")
        here = history["entries"][history["currentIndex"]]["url"]
        before = [entry for entry in history["entries"][: history["currentIndex"]] if entry["url"] != here]
        if not before:
            return False
        try:
            async with self.page.expect_navigation(wait_until="load"):
                await self.session.send("Page.navigateToHistoryEntry", {"entryId": before[-1]["id"]})
        except Error as error:
            if "ERR_CACHE_MISS" not in str(error):
                raise
            await self.page.wait_for_url(ERROR, wait_until="commit")
            await self.page.goto(before[-1]["url"], wait_until="load")  # it answered a form, which is not sent again
        await self.settle()
        return True

    async def close(self) -> None:
        """It may hang as its page does: then the browser ends it."""
        self.breaks("closed")
        self.gate.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.context.close(), ARRIVAL)
