"""Runs treegym commands, each in a forked process, with one function patched to interrupt it at a chosen call.

Reads jobs from stdin as JSON, [arguments, [owner, function, what happens, n-th call] or null]; prints exit statuses.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import treegym.scenarios.build  # noqa: F401  (once, before the forks)
from treegym.scenarios.commands.cli import main

Original = Callable[..., Any]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(original: Original, *arguments: Any, **named: Any) -> None:
    die()


def after(original: Original, *arguments: Any, **named: Any) -> None:
    original(*arguments, **named)
    die()


async def first_tree(original: Original, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
    """Dies when the first of the trees that grow together is done."""
    async for tree in original(*arguments, **named):
        die()
        yield tree


def half_file(original: Original, content: Any, path: Any) -> None:
    original(content, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def half_line(original: Original, path: Any, row: Any) -> None:
    size = os.path.getsize(path)
    original(path, row)
    os.truncate(path, (size + os.path.getsize(path)) // 2)
    die()


def half_record(original: Original, file: int, data: Any) -> None:
    original(file, data)
    os.ftruncate(file, os.fstat(file).st_size - len(data) // 2)
    die()


def interrupt(original: Original, *arguments: Any, **named: Any) -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments, **named)


def patch(owner: str, name: str, then: str, n: int) -> None:
    module, _, kind = owner.partition(":")
    thing = importlib.import_module(module)
    thing = getattr(thing, kind) if kind else thing
    original, calls = getattr(thing, name), 0

    def patched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return globals()[then](original, *arguments, **named) if calls == n else original(*arguments, **named)

    setattr(thing, name, patched)


def run(arguments: list[str], what: list[Any] | None) -> int:
    """The exit status of a command in a process of its own; minus the signal's number if one killed it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if what:
            patch(*what)
        sys.argv, sys.stdout = ["treegym", *arguments], sys.stderr
        main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        sys.stderr.flush()
        os._exit(99)


if __name__ == "__main__":
    print(json.dumps([run(*job) for job in json.load(sys.stdin)]))
