"""ScreenEnv: pages that are read as text with numbered controls, and acted on by these numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..tools import ToolError, tool
from .base import Message
from .formats.actions import Action, FormatError
from .toolenv import ToolEnv, digest

CHARS = 2_000  # of a page that are shown at a time
MAX_TEXT = 2_000  # characters that can be typed at once
MAX_WAIT = 30.0  # seconds
NEAREST = 3  # numbers that are named where one is not there
KEYS = "Enter Escape Tab Space Backspace Delete Home End PageUp PageDown ArrowUp ArrowDown ArrowLeft ArrowRight".split()
TYPED = frozenset(
    {"textbox", "searchbox", "spinbutton"}
)  # roles that text is typed into; comboboxes without options too
CHOSEN = frozenset({"combobox", "listbox"})  # roles with options
CONTROL = re.compile(r"\\*\[\d+\]")  # what a line of text must not begin with: it would read as a control

Kind = Literal["click", "hover", "type", "select", "press", "scroll", "back", "wait"]


@dataclass(frozen=True, slots=True)
class Control:
    """Something on a page that can be acted on, as the agent reads it."""

    key: str  # which element of the page it is, as long as the page lives; the agent does not see it
    role: str  # of ARIA: button, link, textbox, combobox, checkbox …
    name: str = ""  # its accessible name
    value: str | None = None  # of a field
    options: tuple[str, ...] = ()  # of a combobox or listbox
    chosen: tuple[str, ...] = ()  # those of the options that are
    states: tuple[str, ...] = ()  # such as checked, disabled, expanded
    vague: bool = False  # whether the name is made of its id or class, for want of one

    def __str__(self) -> str:
        words = [self.role]
        if self.name:
            words.append(f"{'~' * self.vague}{quoted(self.name)}")
        if self.value is not None:
            words.append(f"value={quoted(self.value)}")
        if self.options:
            marked = (f"{'*' * (option in self.chosen)}{flat(option)}" for option in self.options)
            words.append(f"options: {' | '.join(marked)}")
        return " ".join([*words, *(f"({state})" for state in self.states)])


@dataclass(frozen=True, slots=True)
class Page:
    """What is on the screen: lines of text and controls, in document order."""

    address: str
    items: tuple[str | Control, ...]

    @property
    def controls(self) -> tuple[Control, ...]:
        """Number n is the control at n - 1."""
        return tuple(item for item in self.items if isinstance(item, Control))

    @property
    def lines(self) -> list[str]:
        """As the agent reads them. No text can be taken for a control."""
        lines, number = [], 0
        for item in self.items:
            if isinstance(item, Control):
                number += 1
                lines.append(f"[{number}] {item}")
            elif text := flat(item):
                lines.append(f"\\{text}" if CONTROL.match(text) else text)
        return lines


def flat(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())


def quoted(text: str) -> str:
    """A text between quotes, on one line; quotes and backslashes in it have a backslash before them."""
    return '"' + flat(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True, slots=True)
class Act:
    """What the agent does on a page; it has been checked against what is there."""

    kind: Kind
    control: Control | None = None  # of click, hover, type, select; of scroll and press where one was named
    text: str = ""  # that is typed; the option; the key
    seconds: float = 0.0  # of a wait


class ScreenEnv(ToolEnv):
    """Subclasses give `start`, `page` and `perform`, and score what has become of the world.

    Numbers count the controls of a page in document order, anew on every page, so that equal pages read equally. A
    number means what was shown under it: where that has gone or changed meanwhile, the call fails. A turn of several
    calls shows the page once, after the last one.
    """

    chars: int = CHARS
    max_turns = 30
    in_turn = False  # an MCP server, for one, calls the tools outside of turns
    shared: ClassVar[frozenset[str]] = ToolEnv.shared | {"current", "shown"}

    def __init__(self, *, chars: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.chars = self.chars if chars is None else chars
        if self.chars < 200:
            raise ValueError(f"chars: expected at least 200 characters of a page at a time, got {self.chars}")

    def start(self, options: Mapping[str, Any]) -> str:
        """Draws the task with `self.np_random` and opens its first page; what is to be done."""
        raise NotImplementedError

    def page(self) -> Page:
        """What is on the screen now."""
        raise NotImplementedError

    def perform(self, act: Act) -> str:
        """Does what the agent wants; what there is to say of it beside the page, or nothing. ToolError."""
        raise NotImplementedError

    def begin(self, options: Mapping[str, Any]) -> str:
        goal = self.start(options)
        self.current = self.page()
        self.shown = self.current.controls
        self.line = 0  # of the page, with which what is shown begins
        return f"{goal}\n\n{self.view()}"

    def _lines(self) -> list[str]:
        """Of the page; a long one in pieces."""
        return [piece for line in self.current.lines for piece in _pieces(line, self.chars // 2)]

    def view(self) -> str:
        """The part of the page that is shown."""
        lines = self._lines()
        end = self._end(lines)
        rest = len(lines) - end
        told = [f"({rest} more line{'s' * (rest > 1)}: scroll)"] if rest else []
        return "\n".join([*lines[self.line : end], *told])

    def _end(self, lines: Sequence[str]) -> int:
        """The line before which what is shown ends."""
        room = self.chars
        for i in range(self.line, len(lines)):
            room -= len(lines[i]) + 1
            if room < 0:
                return i
        return len(lines)

    # tools

    @tool
    def click(self, number: int) -> str:
        """Click what has this number."""
        return self._do(Act("click", self._meant(number)))

    @tool
    def hover(self, number: int) -> str:
        """Move the pointer over what has this number."""
        return self._do(Act("hover", self._meant(number)))

    @tool
    def type(self, number: int, text: str) -> str:
        """Write a text into a field, in place of what is there."""
        control = self._meant(number)
        if control.role not in TYPED and not (control.role == "combobox" and not control.options):
            raise ToolError(f"[{number}] is a {control.role}: text goes into a textbox or searchbox")
        if len(text) > MAX_TEXT:
            raise ToolError(f"{len(text)} characters are too many: at most {MAX_TEXT} at once")
        return self._do(Act("type", control, text))

    @tool
    def select(self, number: int, option: str) -> str:
        """Choose an option of a list."""
        control = self._meant(number)
        if control.role not in CHOSEN or not control.options:
            raise ToolError(f"[{number}] is a {control.role} without options")
        found = [each for each in control.options if flat(each) == flat(option)]
        if not found:
            raise ToolError(f"no option {quoted(option[:80])}: there is {' | '.join(map(flat, control.options))}")
        return self._do(Act("select", control, found[0]))

    @tool
    def press(self, key: str) -> str:
        """Press a key, such as Enter, Escape, Tab or ArrowDown."""
        if key not in KEYS:
            raise ToolError(f"no key {quoted(key[:40])}: there is {' '.join(KEYS)}")
        return self._do(Act("press", text=key))

    @tool
    def scroll(self, number: int | None = None) -> str:
        """Show more of the page; with a number, of the list or box that has it."""
        if number is not None:
            return self._do(Act("scroll", self._meant(number)))
        lines = self._lines()
        end = self._end(lines)
        self.line = end if end < len(lines) else 0
        return self._answer("" if self.line else "that was the end; from the top:")

    @tool
    def back(self) -> str:
        """Go back to the page before."""
        return self._do(Act("back"))

    @tool
    def wait(self, seconds: float = 1.0) -> str:
        """Wait, at most 30 seconds."""
        if not 0 <= seconds <= MAX_WAIT:
            raise ToolError(f"{seconds:g} seconds: expected 0 to {MAX_WAIT:g}")
        return self._do(Act("wait", seconds=seconds))

    def _do(self, act: Act) -> str:
        if act.control and "disabled" in act.control.states and act.kind not in ("hover", "scroll"):
            raise ToolError(f"{act.control} cannot be used now")
        address = self.current.address
        notice = self.perform(act)
        self.current = self.page()
        if self.current.address != address:
            self.line = 0
        return self._answer(notice)

    def _answer(self, notice: str) -> str:
        """What a call comes to. A turn shows the page after its last call; a call from outside of one, at once."""
        return notice if self.in_turn else self._with_page(notice)

    def _with_page(self, notice: str) -> str:
        self.shown = self.current.controls
        self.line = min(self.line, max(0, len(self._lines()) - 1))
        return "\n".join(filter(None, [notice, self.view()]))

    def _meant(self, number: int) -> Control:
        """The control that was shown under a number, as it is now. ToolError where it has gone or is another."""
        if not 1 <= number <= len(self.shown):
            raise ToolError(f"no [{number}] on this page{self._nearest(number)}")
        meant = self.shown[number - 1]
        now = next((control for control in self.current.controls if control.key == meant.key), None)
        if now is None:
            raise ToolError(f"[{number}] {meant} has gone: look at the page again")
        if (now.role, now.name) != (meant.role, meant.name):
            raise ToolError(f"[{number}] was {meant} and is {now} now: look at the page again")
        return now

    def _nearest(self, number: int) -> str:
        numbers = sorted(range(1, len(self.shown) + 1), key=lambda n: abs(n - number))[:NEAREST]
        return "; there is " + ", ".join(f"[{n}] {self.shown[n - 1]}" for n in sorted(numbers)) if numbers else ""

    def _act(self, parsed: Action | FormatError) -> list[Message]:
        before = len(self.transcript)
        self.in_turn = True
        try:
            messages = super()._act(parsed)
        finally:
            self.in_turn = False
        results = [exchange.result for exchange in self.transcript[before:]]
        if all(result.failed for result in results):  # nothing has changed, and the page is still to be read above
            return messages
        texts = [message.text for message in messages]
        seen = [text or "done" for text in texts[:-1]] + [self._with_page(texts[-1])]
        return [Message(message.role, text) for message, text in zip(messages, seen, strict=True)]

    def state_key(self) -> str:
        seen = [self.current.address, self.current.lines, self.line]
        return digest([self.situation(), seen, self.answered, self.over])


def _pieces(line: str, size: int) -> list[str]:
    """A line, in pieces where it is too long to be shown at a time. All but the first begin with a mark, so that
    none of them can be taken for a control."""
    return [f"{'…' * bool(i)}{line[i : i + size]}" for i in range(0, len(line), size)] or [line]
