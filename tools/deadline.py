"""Calls that end in time: each in a thread of its own, which is asked to stop and, if deaf to that, left behind."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any

from .protocol import ToolError

GRACE = 0.1  # seconds that a thread has to stop in


class Slots:
    """At most so many calls at once; one that was left behind keeps its slot until it really ends."""

    def __init__(self, number: float = math.inf) -> None:
        self.number = self.free = number
        self.lost = 0  # to calls that were left behind
        self.changed = threading.Condition()

    def take(self) -> None:
        """Waits for a slot; ToolError where calls that were left behind hold them all."""
        with self.changed:
            self.changed.wait_for(lambda: self.free > 0 or self.lost == self.number)
            if not self.free:
                raise ToolError(f"busy: {self.lost} calls that took too long are still running; try again later")
            self.free -= 1

    def give(self, lost: bool = False) -> None:
        with self.changed:
            self.free += 1
            self.lost -= lost
            self.changed.notify()

    def lose(self) -> None:
        with self.changed:
            self.lost += 1
            self.changed.notify_all()


class _Stop(BaseException):
    """Raised in a thread that has run out of time."""


class _Call(threading.Thread):
    """Runs the work and ends in one of three ways: with an answer, with an error, or stopped."""

    def __init__(self, work: Callable[[], Any], slots: Slots) -> None:
        super().__init__(name="tool call", daemon=True)
        self.work, self.slots = work, slots
        self.answer: Any = None
        self.error: BaseException | None = None
        self.lock = threading.Lock()  # guards the four below
        self.listening = False  # the stop can be raised: whatever runs now handles it
        self.stopped = self.ended = self.lost = False

    def run(self) -> None:
        try:
            with self.lock:
                if self.stopped:
                    return
                self.listening = True
            try:
                self.answer = self.work()
            except _Stop:
                raise
            except BaseException as error:
                self.error = error
            with self.lock:
                self.listening = False
                _raise_in(self.ident, None)  # takes back a stop that has not been raised yet
        except _Stop:
            pass
        finally:
            with self.lock:
                self.ended = True
            self.slots.give(self.lost)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            if self.listening:
                _raise_in(self.ident, _Stop)
        self.join(GRACE)
        with self.lock:
            if not self.ended:
                self.lost = True
                self.slots.lose()


def left_behind() -> int:
    """Threads that still run although their calls ended at a deadline."""
    return sum(isinstance(thread, _Call) and thread.lost for thread in threading.enumerate())


def call_within(seconds: float, work: Callable[[], Any], slots: Slots) -> Any:
    """What the work returns or raises; ToolError where it takes longer. The caller has taken a slot; this gives it."""
    call = _Call(work, slots)
    try:
        call.start()
    except BaseException:
        slots.give()
        raise
    try:
        call.join(seconds)
    except BaseException:
        call.stop()
        raise
    if call.is_alive():
        call.stop()
        raise ToolError(f"no answer within {seconds:g} s; the call was stopped")
    if call.error is not None:
        raise call.error
    return call.answer


def _raise_in(thread: int | None, exception: type[BaseException] | None) -> None:
    """At the thread's next step in Python; None takes back what has not been raised."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread or 0), ctypes.py_object(exception) if exception else None
    )
