"""What pages are made of: addresses, links, buttons, fields, lists in parts; and what a form holds when it is sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from urllib.parse import parse_qsl, quote, unquote, urlencode

from ..screen import TYPED, Control, Page

Item = str | Control
Items = tuple[Item, ...]
Path = tuple[str, ...]  # the parts of an address
Query = Mapping[str, str]  # what stands behind its question mark
Fields = Mapping[str, str]  # value of each field by its key: "on" or "" for a checkbox; for radios by their group
CHOSEN = "on"  # the value of a checkbox that is checked
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # what Chromium takes for one
WIDE = str.maketrans("０１２３４５６７８９．－", "0123456789.-")  # noqa: RUF001, as Chinese keyboards write them


class Refused(Exception):
    """An application does not take a form; its text says why."""


def address(*path: object, **query: object) -> str:
    """address("shop", "search", q="desk lamp") -> "/shop/search?q=desk+lamp". Empty values are left out."""
    asked = {name: value for name, value in query.items() if value != ""}
    return "/" + "/".join(quote(str(part), safe="") for part in path) + (f"?{urlencode(asked)}" if asked else "")


def parsed(address: str) -> tuple[Path, Query]:
    """The parts of an address and its query."""
    path, _, query = address.partition("?")
    return tuple(unquote(part) for part in path.split("/") if part), dict(parse_qsl(query))


def link(name: str, address: str) -> Control:
    return Control(f"link:{address}", "link", name)


def target(control: Control) -> str:
    """The address that a link leads to."""
    return control.key.removeprefix("link:").partition("#")[0]


def button(key: str, name: str, *, enabled: bool = True) -> Control:
    return Control(key, "button", name, states=() if enabled else ("disabled",))


def field(key: str, name: str, value: object = "", role: str = "textbox") -> Control:
    """A field for a text; with the role searchbox or spinbutton (a number) as well."""
    return Control(key, role, name, value=str(value))


def choice(key: str, name: str, options: Iterable[str], chosen: str = "") -> Control:
    """A list to choose from; the first option is chosen where no other is."""
    options = tuple(options)
    return Control(key, "combobox", name, options=options, chosen=(chosen if chosen in options else options[0],))


def checkbox(key: str, name: str, checked: bool = False) -> Control:
    return Control(key, "checkbox", name, states=("checked",) if checked else ())


def radios(group: str, names: Iterable[str], chosen: str = "") -> Items:
    """One for each name, of which at most one is checked."""
    return tuple(
        Control(f"{group}={name}", "radio", name, states=("checked",) if name == chosen else ()) for name in names
    )


def listing(rows: Sequence[Items], address: str, size: int) -> Items:
    """The rows of one part of a list, with links to the parts before and after. The address says which part."""
    number = _number(parsed(address)[1])
    parts = max(1, -(-len(rows) // size))
    number = min(number, parts)
    shown = [item for row in rows[(number - 1) * size : number * size] for item in row]
    if parts > 1:
        shown += [f"Page {number} of {parts}"]
        shown += [link("Previous page", turned(address, number - 1))] * (number > 1)
        shown += [link("Next page", turned(address, number + 1))] * (number < parts)
    return tuple(shown) or ("Nothing here.",)


def _number(query: Query) -> int:
    text = query.get("page", "1")
    return max(1, int(text)) if text.isdecimal() and len(text) < 6 else 1


def turned(shown: str, number: int = 1) -> str:
    """The address of another part of a list; that of the first part has no number."""
    path, query = parsed(shown)
    rest = {name: value for name, value in query.items() if name != "page"}
    return address(*path, **rest, **({"page": number} if number > 1 else {}))


def distinct(items: Iterable[Item]) -> Items:
    """The same items, where every control has a key of its own: a second link to an address is marked so."""
    seen: dict[str, int] = {}
    told: list[Item] = []
    for item in items:
        if isinstance(item, Control):
            seen[item.key] = count = seen.get(item.key, 0) + 1
            item = replace(item, key=f"{item.key}#{count}") if count > 1 else item
        told.append(item)
    return tuple(told)


def values(page: Page) -> dict[str, str]:
    """What a form holds: the value of each field of the page by its key, of radios by their group."""
    told: dict[str, str] = {}
    for control in page.controls:
        checked = "checked" in control.states
        if control.role in TYPED:
            told[control.key] = control.value or ""
        elif control.role == "combobox":
            told[control.key] = control.chosen[0]
        elif control.role == "checkbox":
            told[control.key] = CHOSEN * checked
        elif control.role == "radio":
            group, _, name = control.key.partition("=")
            told[group] = name if checked else told.get(group, "")
    return told


def filled(page: Page, fields: Fields) -> Page:
    """The page with these values in its fields."""
    return Page(page.address, tuple(_filled(item, fields) for item in page.items)) if fields else page


def _filled(item: Item, fields: Fields) -> Item:
    if isinstance(item, str):
        return item
    group, _, name = item.key.partition("=")
    if item.role == "radio" and group in fields:
        return replace(item, states=("checked",) if fields[group] == name else ())
    if item.key not in fields:
        return item
    value = fields[item.key]
    if item.role == "checkbox":
        return replace(item, states=("checked",) if value else ())
    if item.role == "combobox":
        return replace(item, chosen=(value,)) if value in item.options else item
    return replace(item, value=kept(item, value)) if item.role in TYPED else item


def kept(control: Control, text: str) -> str:
    """What Chromium keeps of a text that is typed into a field: line ends become spaces; a spinbutton takes only what
    numbers are made of, and has no value unless they make one."""
    if control.role != "spinbutton":
        return re.sub(r"\r\n|[\r\n]", " ", text.rstrip("\r\n"))
    line = ""
    for letter in text.translate(WIDE):
        line += letter * _continues(line, letter)
    if not {*"eE"} & {*line}:
        line = re.sub(r"^\+(?![+-])", "", line).removesuffix(".")
    return line if NUMBER.fullmatch(line) and isfinite(float(line)) else ""


def _continues(line: str, letter: str) -> bool:
    """Whether a field of numbers takes a letter after those that it has taken."""
    power = {*"eE"} & {*line}
    if letter in "+-":
        return not power or line[-1] in "eE"
    return letter in "0123456789" or (letter in "eE" and not power) or (letter == "." and not power and "." not in line)


def edited(control: Control, text: str = "") -> Fields:
    """What a click, a text or an option does to the fields: the changed value by its key."""
    group, _, name = control.key.partition("=")
    if control.role == "radio":
        return {group: name}
    if control.role == "checkbox":
        return {control.key: "" if "checked" in control.states else CHOSEN}
    return {control.key: kept(control, text) if control.role in TYPED else text}


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02} EUR"


def whole(text: str, name: str, least: int, most: int) -> int:
    """The number that stands in a field. Refused where it is none, or out of range."""
    if not re.fullmatch(r"[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise Refused(f"{name}: a whole number from {least} to {most}.")
    return int(text)


def needed(fields: Fields, **names: str) -> None:
    """Refused where one of these fields is empty."""
    for key, name in names.items():
        if not fields[key].strip():
            raise Refused(f"{name} is missing.")
