"""Desk: the applications of a task under one roof, the pages between them, and what comes in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self
from zlib import crc32

from ..screen import Control, Page
from .model import Value
from .pages import (
    Fields,
    Items,
    Path,
    Query,
    Refused,
    address,
    button,
    distinct,
    field,
    filled,
    link,
    parsed,
    turned,
    values,
)

HOME = "/"
WORDS = "harbour lantern meadow orchard pepper quarry ribbon saddle timber velvet willow window".split()
WORD = "confirmation"  # the key of the field for a word
DECLINE, ACCEPT = "offer:decline", "offer:accept"  # the keys of a pop-up's buttons
OFTEN = 0.4  # the share of pages that each nuisance stands before, where there is as much as possible
ROWS = 8, 3  # of a part of a list, without nuisance and with as much as possible
LOADING = "Loading... Please wait."


class App(Protocol):
    """An application: its state, as a frozen dataclass, and what its pages show and do.

    The first part of all its addresses is its name. `path` and `query` are what follows.
    """

    @property
    def name(self) -> str: ...

    @property
    def menu(self) -> Mapping[str, str]:
        """Names and addresses of the links that all its pages end with; the first leads to its first page."""
        ...

    def view(self, path: Path, query: Query, size: int) -> Items | None:
        """What the page shows, with parts of lists of at most `size` rows; None where there is no such page."""
        ...

    def submit(self, path: Path, query: Query, button: str, fields: Fields) -> tuple[Self, str]:
        """What becomes of the state where a form is sent, and the address that is shown next. Refused."""
        ...

    def records(self) -> Mapping[str, Value]:
        """What can be changed in the state, by the path of each thing. What was made new is named by its content."""
        ...


@dataclass(frozen=True)
class Desk:
    """The state of all applications of a task. `view`, `submit` and `waited` are all that a browser needs."""

    apps: tuple[App, ...]
    nuisance: float = 0.0  # how often pop-ups, slow pages and refusals come, 0 to 1
    salt: str = ""  # decides with the address where they come
    passed: frozenset[str] = frozenset()  # those that have been dealt with
    subscribed: bool = False  # to the letter that pop-ups offer

    @property
    def start(self) -> str:
        """The address at which a task begins."""
        return HOME if len(self.apps) > 1 else address(self.apps[0].name)

    @property
    def size(self) -> int:
        """The rows of a part of a list."""
        return round(ROWS[0] + (ROWS[1] - ROWS[0]) * self.nuisance)

    def covered(self, address: str) -> bool:
        """Whether something comes before the page at an address: a pop-up, or that it loads."""
        return self._due("load", address) or self._due("offer", address)

    def view(self, address: str, refusal: str = "") -> Page:
        """The page at an address; after a refusal with its reason."""
        told = [f"Refused: {refusal}"] if refusal else []
        return Page(address, distinct([*told, *_items(self, address)]))

    def submit(self, address: str, button: str, fields: Fields) -> tuple[Desk, str, str]:
        """What becomes of the desk where a form is sent by a button: the state, the address that is shown next, and
        why the form was refused. After a refusal the same address is shown, with the fields as they were sent."""
        page = self.view(address)
        if button not in (
            each.key for each in page.controls if each.role == "button" and "disabled" not in each.states
        ):
            return self, address, "This form is out of date."
        if button in (DECLINE, ACCEPT):
            desk = self._pass("offer", address)
            return replace(desk, subscribed=desk.subscribed or button == ACCEPT), address, ""
        try:
            return self._sent(address, button, values(filled(page, fields)))
        except Refused as reason:
            return self._ask(address), address, str(reason)

    def waited(self, address: str, seconds: float) -> Desk:
        """The desk after a wait: from one second on a page has loaded."""
        return self._pass("load", address) if seconds >= 1 and self._due("load", address) else self

    def records(self) -> dict[str, Value]:
        told: dict[str, Value] = {"subscribed": True} if self.subscribed else {}
        for app in self.apps:
            told |= {f"{app.name}/{path}": value for path, value in app.records().items()}
        return told

    def app(self, name: str) -> App | None:
        return next((app for app in self.apps if app.name == name), None)

    def word(self, address: str) -> str:
        """The word that a form of this page asks to be confirmed with."""
        return WORDS[crc32(f"{self.salt} word {address}".encode()) % len(WORDS)]

    def _sent(self, here: str, button: str, fields: Fields) -> tuple[Desk, str, str]:
        (name, *path), query = parsed(here)
        app = self.app(name)
        assert app is not None, "a page with a button belongs to an application"
        changed, there = app.submit(tuple(path), query, button, fields)
        desk = replace(self, apps=tuple(changed if each is app else each for each in self.apps))
        if not self._due("word", here) or changed == app:
            return desk, there, ""
        if fields.get(WORD, "").strip() != self.word(here):
            raise Refused(f"Type the word {self.word(here)} to confirm.")
        return desk._pass("word", here), there, ""

    def _ask(self, here: str) -> Desk:
        """The desk where the page has a field for the word, if it wants one."""
        return replace(self, passed=self.passed | {_name("ask", here)}) if self._due("word", here) else self

    def _due(self, kind: str, address: str) -> bool:
        if not self.nuisance:
            return False
        name = _name(kind, address)
        return crc32(f"{self.salt} {name}".encode()) < self.nuisance * OFTEN * 2**32 and name not in self.passed

    def _pass(self, kind: str, address: str) -> Desk:
        return replace(self, passed=self.passed | {_name(kind, address)})


def _name(kind: str, address: str) -> str:
    """Of a nuisance. The parts of a list share theirs."""
    return f"{kind} {turned(address)}"


def _items(desk: Desk, here: str) -> Items:
    if desk._due("load", here):
        return (LOADING,)
    if desk._due("offer", here):
        return "Get our letter with offers every week!", button(DECLINE, "No, thanks"), button(ACCEPT, "Subscribe")
    path, query = parsed(here)
    app = desk.app(path[0]) if path else None
    homes = tuple(link(each.name.capitalize(), address(each.name)) for each in desk.apps)
    if path == ():
        return "Your applications", *homes
    body = app.view(path[1:], query, desk.size) if app else None
    menu: tuple[Control, ...] = tuple(link(*entry) for entry in app.menu.items()) if app else homes
    asked = _name("ask", here) in desk.passed and desk._due("word", here)
    return (
        *("There is no such page.",) * (body is None),
        *(body or ()),
        *(field(WORD, "Confirmation word"),) * asked,
        *menu,
        *(link("Home", HOME),) * (len(desk.apps) > 1),
    )
