"""Long work: coroutines called from plain functions, and the watcher that hears how the work gets on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Watcher(Protocol):
    """Hears how long work gets on."""

    def begin(self, stage: str, total: int) -> None:
        """A stage of `total` units of work begins."""
        ...

    def advance(self, note: str = "") -> None:
        """One unit is done."""
        ...

    def should_stop(self) -> bool:
        """Whether to save and stop as soon as the present unit is done."""
        ...


class Silent:
    """A watcher that says nothing and never stops the work."""

    def begin(self, stage: str, total: int) -> None: ...

    def advance(self, note: str = "") -> None: ...

    def should_stop(self) -> bool:
        return False


SILENT = Silent()


class Stopped(Exception):
    """The work was asked to stop; it is saved and can be resumed."""


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns. A notebook's event loop runs already; there the coroutine gets a thread of its own.

    KeyboardInterrupt cancels the coroutine and is raised once it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    return _in_thread(coroutine)


def _in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
    waited_for = threading.Event()  # set inside `try`: an interrupt cancels whatever has begun

    async def main() -> T:
        task = asyncio.current_task()
        assert task
        begun.append((asyncio.get_running_loop(), task))
        return await coroutine

    def work() -> T:
        waited_for.wait()
        return asyncio.run(main())

    with ThreadPoolExecutor(1) as pool:  # leaving it waits for the thread
        try:
            future = pool.submit(contextvars.copy_context().run, work)
            waited_for.set()
            return future.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                for loop, task in begun:
                    loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            waited_for.set()
