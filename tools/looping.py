"""An event loop in a thread of its own, for clients written with asyncio that any thread may call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines side by side for callers in other threads.

    The thread starts with the first coroutine. It ends with `close`; otherwise when nothing refers to this object any
    more, at the latest when Python ends. Coroutines that still run are then cancelled, and the thread is waited for.

    The loop belongs to the process that made this object. In a fork, which has no such thread, `start` and `wait` raise
    RuntimeError, while `close` and `join` do nothing.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # of the thread, and in errors
        self._owner = os.getpid()
        self._lock = threading.RLock()  # reentrant: garbage collected while it is held may close this object
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: weakref.finalize[..., LoopThread] | None = None
        self._thread: threading.Thread | None = None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs the coroutine. RuntimeError where the loop is closed or is that of another process."""
        try:
            self._check_owner()
            with self._lock:  # what is started before `close` is cancelled by it, and never forgotten
                return asyncio.run_coroutine_threadsafe(coroutine, self._running())
        except RuntimeError:
            coroutine.close()  # otherwise Python warns that it was never awaited
            raise

    def wait(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        """What the coroutine returns or raises. It is cancelled, with TimeoutError, where it takes longer."""
        answer = self.start(coroutine)
        try:
            return answer.result(seconds)
        finally:
            answer.cancel()

    def close(self) -> None:
        """Cancels what runs and ends the thread; within a coroutine of the loop it does not wait for the end."""
        if self._owner == os.getpid():
            with self._lock:
                self._closed = True
            if self._end:
                self._end()
            self.join()

    def join(self) -> None:
        """Waits until the thread has ended; within it, or in a fork, this returns at once."""
        if self._thread and self._owner == os.getpid():
            _join(self._thread)

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            raise RuntimeError(f"{self.name} runs in the process whose fork this is; open another here")

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise RuntimeError(f"the event loop of {self.name} is closed")
        if self._loop is None:
            loop, stop = asyncio.new_event_loop(), asyncio.Event()
            thread = threading.Thread(target=_run, args=(loop, stop), name=self.name, daemon=True)
            thread.start()
            self._end = weakref.finalize(self, _finish, self._owner, loop, stop, thread)
            self._loop, self._thread = loop, thread
        return self._loop


# Functions, because a method would keep its object alive.


def _run(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:  # which cancels what still runs
        runner.run(stop.wait())


def _finish(owner: int, loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread) -> None:
    if owner == os.getpid():
        with contextlib.suppress(RuntimeError):  # a coroutine raised SystemExit, which ended the loop
            loop.call_soon_threadsafe(stop.set)
        _join(thread)


def _join(thread: threading.Thread) -> None:
    if thread is not threading.current_thread():  # in which garbage may be collected, too
        thread.join()
