"""Coroutines called from plain functions, in scripts and in notebooks."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


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
