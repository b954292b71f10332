"""One Chromium a process, on an event loop in a thread of its own, and a pool of its pages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ..looping import LoopThread
from .gate import Site
from .page import BrowserPage
from .tab import Tab

if TYPE_CHECKING:
    from playwright.async_api import Browser

START_SECONDS = 60.0
CLOSE_SECONDS = 5.0  # that closing may take before the process is killed
KEPT = 8  # tabs that are kept for later episodes
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync "
    "--disable-component-update --disable-dev-shm-usage --disable-domain-reliability --disable-breakpad "
    "--enable-blink-features=ComputedAccessibilityInfo --force-webrtc-ip-handling-policy=disable_non_proxied_udp "
    "--force-color-profile=srgb --font-render-hinting=none"
).split()
# The last such flag counts, so Playwright's features that matter here are among them. Those of the omnibox would start
# two processes with every window.
DISABLED = "--disable-features=" + ",".join(
    "AvoidUnnecessaryBeforeUnloadCheckSync DestroyProfileOnBrowserClose HttpsUpgrades HttpsFirstBalancedModeAutoEnable "
    "LensOverlay MediaRouter PaintHolding OptimizationHints NetworkTimeServiceQuerying AimEnabled PreconnectToSearch "
    "WebUIOmniboxPopup WebUIOmniboxAimPopup".split()
)
RESOLVER = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"  # no name is looked up


class BrowserUnavailable(RuntimeError):
    """There is no browser, or it does not start; says what to do."""


def chromium_path() -> str:
    """Where Chromium is: what TREEGYM_CHROMIUM names, or `chromium` on the PATH. BrowserUnavailable where it is not."""
    named = os.environ.get("TREEGYM_CHROMIUM")
    path = shutil.which(named or "chromium")
    if path is None:
        place = f"TREEGYM_CHROMIUM is {named}, which is no program" if named else "there is no chromium on the PATH"
        raise BrowserUnavailable(f"{place}: apt-get install chromium, or set TREEGYM_CHROMIUM to a Chromium or Chrome")
    return path


class Chromium:
    """A running browser. It ends with `close`, with the process, or by itself; then it is not `alive` any more."""

    def __init__(self) -> None:
        try:
            import playwright.async_api  # noqa: F401
        except ImportError:
            raise BrowserUnavailable("playwright is missing: pip install 'treegym[browser]'") from None
        path = chromium_path()
        self.loop = LoopThread("the browser")
        self.process = 0  # its id
        self._tabs: set[Tab] = set()  # all that were opened
        self._idle: list[Tab] = []
        self._lock = threading.Lock()  # guards `_idle`
        self._browser: Browser | None = None
        self._closing = asyncio.Event()
        ready: Future[None] = Future()
        self._life = self.loop.start(self._live(path, ready))
        try:
            ready.result(START_SECONDS)
        except Exception as error:
            self.loop.close()
            fault = str(error).strip().split("\n")[0] or f"nothing within {START_SECONDS:g} s"
            raise BrowserUnavailable(f"{path} does not start: {fault}") from error

    @property
    def alive(self) -> bool:
        return self._browser is not None and self._browser.is_connected() and not self._life.done()

    async def _live(self, path: str, ready: Future[None]) -> None:
        """From start to end, which comes with `close`, or when the loop cancels what runs."""
        from playwright.async_api import async_playwright

        try:
            async with async_playwright() as playwright:
                self._browser = await playwright.chromium.launch(
                    executable_path=path, args=[*FLAGS, DISABLED, RESOLVER], handle_sigint=False, handle_sigterm=False
                )
                session = await self._browser.new_browser_cdp_session()
                told = await session.send("SystemInfo.getProcessInfo")
                self.process = next(each["id"] for each in told["processInfo"] if each["type"] == "browser")
                ready.set_result(None)
                try:
                    await self._closing.wait()
                finally:
                    await self._end()
        except Exception as error:
            if not ready.done():
                ready.set_exception(error)

    async def _end(self) -> None:
        assert self._browser is not None
        for tab in self._tabs:
            tab.gate.close()
        try:
            await asyncio.wait_for(self._browser.close(), CLOSE_SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)
            if not isinstance(error, Exception):  # the loop ends, and Playwright with it
                raise

    async def tab(self) -> Tab:
        """One that is idle, or a new one."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        assert self._browser is not None
        tab = await Tab.open(self._browser)
        self._tabs.add(tab)
        return tab

    def take_back(self, tab: Tab) -> None:
        """Keeps a tab for a later episode, or closes it."""
        with self._lock:
            if self.alive and not tab.broken and len(self._idle) < KEPT:
                self._idle.append(tab)
                return
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its tabs with it
            self.loop.start(self._close(tab))

    async def _close(self, tab: Tab) -> None:
        self._tabs.discard(tab)
        await tab.close()

    def close(self) -> None:
        """Ends the browser and Playwright's driver. The loop comes last: both need it in order to end."""
        with contextlib.suppress(Exception):
            self.loop.start(self._close_all())
            self._life.result(2 * CLOSE_SECONDS)
        self.loop.close()

    async def _close_all(self) -> None:
        self._closing.set()


_lock = threading.Lock()
_chromium: Chromium | None = None


def browser() -> Chromium:
    """The browser of this process, which starts where none runs."""
    global _chromium
    with _lock:
        if _chromium is None or not _chromium.alive:
            if _chromium:
                _chromium.close()
            _chromium = Chromium()
        return _chromium


def open_page(site: Site, address: str, *, seed: int = 0, seconds: float | None = None) -> BrowserPage:
    """A page at an address of the site, without cookies or storage. BrowserUnavailable; EpisodeLost."""
    return BrowserPage.opened(browser(), site, address, seed, seconds)


def close_browser() -> None:
    """Ends the browser of this process, if one runs; the next page starts another."""
    global _chromium
    with _lock:
        chromium, _chromium = _chromium, None
    if chromium:
        chromium.close()


def _forget() -> None:
    """In a fork of the process, which has the browser's thread no more: its first page starts a browser of its own."""
    global _chromium, _lock
    _chromium, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
