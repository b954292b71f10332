"""An event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from treegym.tools.looping import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("a test")
    yield loop
    loop.close()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "a test"]


async def named() -> str:
    return threading.current_thread().name


class Stay:
    """A coroutine that goes on until it is cancelled, and notes both."""

    def __init__(self) -> None:
        self.begun, self.cancelled = threading.Event(), threading.Event()

    async def __call__(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


def test_the_thread_starts_with_the_first_coroutine_and_all_run_in_it(loop: LoopThread) -> None:
    assert not threads()
    assert loop.wait(named(), 60) == loop.start(named()).result(60) == "a test"
    assert len(threads()) == 1


def test_coroutines_run_side_by_side(loop: LoopThread) -> None:
    async def meet() -> int:
        return await asyncio.wait_for(barrier.wait(), 60)

    barrier = asyncio.Barrier(3)
    assert sorted(running.result(60) for running in [loop.start(meet()) for _ in range(3)]) == [0, 1, 2]


def test_what_a_coroutine_raises_its_caller_hears(loop: LoopThread) -> None:
    async def fail() -> None:
        raise LookupError("as it was raised")

    with pytest.raises(LookupError, match="as it was raised"):
        loop.wait(fail(), 60)
    assert loop.wait(named(), 60)


def test_a_coroutine_that_takes_too_long_is_cancelled_and_others_go_on(loop: LoopThread) -> None:
    stay, other = Stay(), Stay()
    loop.start(other())
    with pytest.raises(TimeoutError):
        loop.wait(stay(), 0.01)
    assert not stay.begun.is_set() or stay.cancelled.wait(60)
    assert loop.wait(named(), 60) and not other.cancelled.is_set()


def test_close_cancels_what_runs_and_waits_for_it(loop: LoopThread) -> None:
    stay = Stay()
    running = loop.start(stay())
    assert stay.begun.wait(60)
    loop.close()
    assert stay.cancelled.is_set() and not threads()
    with pytest.raises(CancelledError):
        running.result(0)
    loop.close()


def test_every_coroutine_that_is_taken_before_the_end_comes_to_one() -> None:
    """None waits for an answer that never comes, however close it is to the end."""
    for _ in range(50):
        loop, taken = LoopThread("a test"), list[object]()
        loop.wait(named(), 60)

        def start(loop: LoopThread = loop, taken: list[object] = taken) -> None:
            try:
                while True:
                    taken.append(loop.start(Stay()()))
            except RuntimeError:
                pass

        caller = threading.Thread(target=start)
        caller.start()
        loop.close()
        caller.join(60)
        assert not caller.is_alive() and all(future.cancelled() for future in taken)  # type: ignore[attr-defined]


@pytest.mark.parametrize("used", [False, True])
def test_a_closed_loop_takes_nothing(loop: LoopThread, used: bool) -> None:
    """Nor does Python warn of a coroutine that was never awaited, which is an error in these tests."""
    if used:
        loop.wait(named(), 60)
    loop.close()
    with pytest.raises(RuntimeError, match="the event loop of a test is closed"):
        loop.wait(named(), 60)
    gc.collect()
    assert not threads()


def test_a_coroutine_can_close_its_own_loop(loop: LoopThread) -> None:
    async def close() -> str:
        loop.close()
        return "not waited for"

    assert loop.wait(close(), 60) == "not waited for"
    loop.join()
    assert not threads()


def test_a_loop_that_nothing_refers_to_ends() -> None:
    stay = Stay()
    loop = LoopThread("a test")
    loop.start(stay())
    assert stay.begun.wait(60)
    del loop
    gc.collect()
    assert stay.cancelled.is_set() and not threads()


def output(code: str) -> str:
    """What a program prints, as a whole, whatever runs when it ends."""
    start = "import asyncio, os\nfrom treegym.tools.looping import LoopThread\nloop = LoopThread('a test')\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    return done.stdout


def test_python_ends_and_what_runs_is_cancelled() -> None:
    code = """
async def stay():
    try:
        await asyncio.Event().wait()
    finally:
        print("cancelled")
loop.start(stay())
loop.wait(asyncio.sleep(0), 60)
"""
    assert output(code) == "cancelled\n"


def test_a_fork_cannot_use_the_loop_nor_end_it() -> None:
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork where there are threads
loop.wait(asyncio.sleep(0), 60)
if not (pid := os.fork()):
    try:
        loop.wait(asyncio.sleep(0), 60)
    except RuntimeError as error:
        print(error, flush=True)
    loop.close()
    raise SystemExit
os.waitpid(pid, 0)
print(loop.wait(asyncio.sleep(0, "goes on"), 60))
"""
    assert output(code) == "a test runs in the process whose fork this is; open another here\ngoes on\n"
