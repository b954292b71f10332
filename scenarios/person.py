"""A person at the terminal who acts as an agent would, and sees what it would see."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from ..agents import GrowingTree, Sampling, grow_trees, run_to_end
from ..agents.chat import ChatRenderer
from ..agents.tree import RolloutTree
from ..envs import Message, Task, TextEnv, ToolEnv
from .terminal import console, say

QUOTES = '"""'
HELP = f"""A line is an action. Several lines: begin with a line {QUOTES} and end with another.
:help shows this and what can be done here. Ctrl-D or Ctrl-C leaves; what was played is kept."""


class Left(Exception):
    """The person went away."""


class Person:
    """Reads actions from standard input. Left where it ends, or at Ctrl-C."""

    def __init__(self) -> None:
        self.left = False  # Ctrl-C came while the environment was at work

    async def act(self, messages: Sequence[Message], env: TextEnv, seed: int) -> str:
        show(_unseen(messages))
        if not any(message.role == "assistant" for message in messages):
            console.print("[dim]:help explains how to act[/dim]")
        while (text := self._read()) == ":help":
            say(HELP)
            if isinstance(inner := env.unwrapped, ToolEnv):
                say(inner.format.instructions(inner.tools))
        return text

    def _read(self) -> str:
        console.print("[bold green]assistant (you)[/]")
        with _interruptible():
            try:
                if self.left:
                    raise KeyboardInterrupt
                line = input("> ")
                if line.strip() != QUOTES:
                    return line
                lines = []
                while (line := input("… ")).strip() != QUOTES:
                    lines.append(line)
                return "\n".join(lines)
            except (EOFError, KeyboardInterrupt):
                print()
                raise Left("the person left") from None


@dataclass(frozen=True, slots=True)
class _UntilLeft:
    """One rollout, which may end before the episode does."""

    async def grow(self, tree: GrowingTree) -> None:
        turn = tree.root
        with contextlib.suppress(Left):
            while not turn.done:
                turn = await tree.extend(turn, 0)
        tree.end(0, turn)


def play(task: Task, renderer: ChatRenderer) -> RolloutTree:
    """The episode that the person at the terminal plays, as far as they play it; a second Ctrl-C in a step loses it."""
    person = Person()

    def leave(signum: int, frame: FrameType | None) -> None:
        if person.left:
            raise KeyboardInterrupt
        person.left = True

    before = signal.signal(signal.SIGINT, leave)
    try:
        [tree] = run_to_end(grow_trees([task], _UntilLeft(), person, renderer, Sampling(max_context=1 << 30)))
    finally:
        signal.signal(signal.SIGINT, before)
    return tree


def show(messages: Sequence[Message]) -> None:
    for message in messages:
        console.print(f"[bold cyan]{message.role}[/]", highlight=False)
        say(message.text)


def _unseen(chat: Sequence[Message]) -> Sequence[Message]:
    """What came after the last action."""
    said = [place for place, message in enumerate(chat) if message.role == "assistant"]
    return chat[said[-1] + 1 :] if said else chat


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt at once; elsewhere it waits for the present step, which here waits for the person.

    In a notebook this runs in a thread, which hears no Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
