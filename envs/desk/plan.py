"""A task of the desk and a plan that solves it, from which the oracle takes its next act."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..screen import Control, Page
from .desk import DECLINE, HOME, LOADING, WORD, Desk
from .model import Goal, Records, Value
from .pages import Fields, address, link, parsed, turned, values

T = TypeVar("T")
Call = tuple[str, dict[str, Any]]  # the name of a tool and its arguments


class Draw:
    """Draws the contents of a task."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def number(self, least: int, most: int) -> int:
        return int(self.generator.integers(least, most + 1))

    def one(self, among: Sequence[T]) -> T:
        return among[self.number(0, len(among) - 1)]

    def some(self, among: Sequence[T], count: int) -> list[T]:
        return [among[int(place)] for place in self.generator.permutation(len(among))[:count]]


@dataclass(frozen=True, slots=True)
class Move:
    """What is to be done on a page: fill in its fields, then click a control."""

    at: str  # the address of the page, or of the first part of its list
    click: str  # the key of the control
    fill: Mapping[str, str] = field(default_factory=dict)  # what the fields are to hold


def go(at: str, to: str) -> Move:
    """Follow the link to another page."""
    return Move(at, link("", to).key)


@dataclass(frozen=True, slots=True)
class Subgoal:
    """A part of a plan. It is done when the records are there and the page has been seen."""

    moves: tuple[Move, ...]  # each leads to the page of the next; the first page stands in a menu
    makes: Mapping[str, Value] = field(default_factory=dict)
    sees: str = ""  # the address of a page that says what the task needs

    def done(self, records: Records, seen: Collection[str]) -> bool:
        made = all(records.get(path) == value for path, value in self.makes.items())
        return made and (not self.sees or self.sees in seen)


@dataclass(frozen=True, slots=True)
class DeskTask:
    """Where a task begins, what it wants, and how it can be done."""

    desk: Desk
    goal: Goal
    plan: tuple[Subgoal, ...]


def pending(plan: Sequence[Subgoal], records: Records, seen: Collection[str]) -> Subgoal | None:
    """The first subgoal that is not done. Those before a change that was made are over, as the change may undo them."""
    made = [number for number, subgoal in enumerate(plan) if subgoal.makes and subgoal.done(records, seen)]
    rest = plan[made[-1] + 1 :] if made else plan
    return next((subgoal for subgoal in rest if not subgoal.done(records, seen)), None)


def next_call(subgoal: Subgoal, desk: Desk, page: Page) -> Call:
    """The next act of a subgoal on this page, by the numbers of its controls."""
    keys = {control.key: number for number, control in enumerate(page.controls, 1)}
    if DECLINE in keys:
        return "click", {"number": keys[DECLINE]}
    if LOADING in page.items:
        return "wait", {"seconds": 1}
    move = next((move for move in reversed(subgoal.moves) if move.at == turned(page.address)), None)
    if move and move.click in keys:
        return _filling(move.fill, desk, page, keys) or ("click", {"number": keys[move.click]})
    onward = [number for key, number in keys.items() if move and page.controls[number - 1].name == "Next page"]
    return "click", {"number": onward[0] if onward else _homeward(subgoal.moves[0].at, keys)}


def _filling(fill: Fields, desk: Desk, page: Page, keys: Mapping[str, int]) -> Call | None:
    """The first field that does not hold what it is to hold."""
    held = values(page)
    word = {WORD: desk.word(page.address)} if WORD in held else {}
    for key, value in (*fill.items(), *word.items()):
        if held.get(key, value) != value:  # a field may have gone by an act that was no part of the plan
            number = keys.get(key) or keys[f"{key}={value}"]
            control = page.controls[number - 1]
            return _setting(control, number, value)
    return None


def _setting(control: Control, number: int, value: str) -> Call:
    if control.role == "combobox":
        return "select", {"number": number, "option": value}
    if control.role in ("checkbox", "radio"):
        return "click", {"number": number}
    return "type", {"number": number, "text": value}


def _homeward(goal: str, keys: Mapping[str, int]) -> int:
    """The link to a page that stands in the menu of an application, or to the application, or to its link."""
    app = address(*parsed(goal)[0][:1])
    return next(keys[key] for key in (f"link:{goal}", f"link:{app}", f"link:{HOME}") if key in keys)
