"""Forms: applications and claims whose fields are checked, and what has been sent before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..screen import flat
from .calendar import day_of
from .model import Records
from .pages import (
    CHOSEN,
    Fields,
    Item,
    Items,
    Path,
    Query,
    Refused,
    address,
    button,
    checkbox,
    choice,
    field,
    link,
    listing,
    needed,
    radios,
    whole,
)

Check = Literal["text", "day", "email", "phone", "number", "amount", "choice", "radio", "yes"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A field of a form, and what may stand in it."""

    key: str
    name: str
    check: Check = "text"
    options: tuple[str, ...] = ()
    most: int = 9  # of a number, from 1


@dataclass(frozen=True, slots=True)
class Form:
    key: str
    name: str
    fields: tuple[Asked, ...]


WHO = Asked("name", "Name"), Asked("email", "E-mail", "email")
TERMS = Asked("terms", "I accept the terms", "yes")
COURSES = ("Pottery", "Drawing", "Cooking", "Chess")
FORMS = (
    Form(
        "course",
        "Course registration",
        (
            *WHO,
            Asked("course", "Course", "choice", COURSES),
            Asked("level", "Level", "radio", ("Beginner", "Advanced")),
            TERMS,
        ),
    ),
    Form(
        "claim",
        "Expense claim",
        (
            *WHO,
            Asked("day", "Day of the expense", "day"),
            Asked("kind", "Kind", "choice", ("Travel", "Meals", "Material")),
            Asked("amount", "Amount in EUR", "amount"),
        ),
    ),
    Form(
        "visit",
        "Visit",
        (
            Asked("name", "Name"),
            Asked("phone", "Phone", "phone"),
            Asked("day", "Day of the visit", "day"),
            Asked("guests", "Guests", "number"),
            TERMS,
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A form that has been sent."""

    number: int
    form: Form
    values: tuple[str, ...]  # of its fields

    def __str__(self) -> str:
        told = (f"{each.name}: {flat(value)}" for each, value in zip(self.form.fields, self.values, strict=True))
        return f"{self.form.key}/{' | '.join(told)}"


@dataclass(frozen=True, slots=True)
class Forms:
    entries: tuple[Entry, ...] = ()
    name: str = "forms"

    @property
    def menu(self) -> dict[str, str]:
        return {"Forms": "/forms", "Sent forms": "/forms/sent"}

    def records(self) -> Records:
        return Counter(str(entry) for entry in self.entries)

    def entry(self, number: str) -> Entry | None:
        return next((entry for entry in self.entries if str(entry.number) == number), None)

    def view(self, path: Path, query: Query, size: int) -> Items | None:
        match path:
            case ():
                return "Forms", *(link(form.name, address("forms", "new", form.key)) for form in FORMS)
            case ("new", key):
                form = next((form for form in FORMS if form.key == key), None)
                return _blank(form, {}) if form else None
            case ("sent",):
                rows: list[Items] = [(_row(entry),) for entry in self.entries]
                return "Sent forms", *listing(rows, address("forms", *path, **query), size)
            case ("entry", number):
                entry = self.entry(number)
                return _entry(entry) if entry else None
            case ("change", number):
                entry = self.entry(number)
                return _blank(entry.form, _values(entry)) if entry else None
        return None

    def submit(self, path: Path, query: Query, button: str, fields: Fields) -> tuple[Forms, str]:
        if button == "withdraw":
            return replace(self, entries=tuple(e for e in self.entries if str(e.number) != path[1])), "/forms/sent"
        old = self.entry(path[1]) if path[0] == "change" else None
        form = old.form if old else next(form for form in FORMS if form.key == path[1])
        number = old.number if old else max((entry.number for entry in self.entries), default=10) + 1
        new = Entry(number, form, tuple(checked(each, fields) for each in form.fields))
        entries = tuple(new if entry.number == number else entry for entry in self.entries)
        return replace(self, entries=entries if old else (*entries, new)), address("forms", "entry", number)


def checked(asked: Asked, fields: Fields) -> str:
    """What stands in a field, as it is kept. Refused where it may not stand there."""
    text = flat(fields[asked.key])
    if asked.check == "yes":
        if text != CHOSEN:
            raise Refused(f"{asked.name}: check this.")
        return "yes"
    needed(fields, **{asked.key: asked.name})
    if asked.check == "day":
        return day_of(text, asked.name)
    if asked.check == "email" and not re.fullmatch(r"[^@ ]+@[^@ ]+", text):
        raise Refused(f"{asked.name}: write an address such as ada@post.example.")
    if asked.check == "phone" and not re.fullmatch(r"\+[0-9 ]{6,20}", text):
        raise Refused(f"{asked.name}: begin with + and the number of the country.")
    if asked.check == "amount" and not re.fullmatch(r"[0-9]{1,6}\.[0-9]{2}", text):
        raise Refused(f"{asked.name}: write it with two digits after the point.")
    return str(whole(text, asked.name, 1, asked.most)) if asked.check == "number" else text


def _values(entry: Entry) -> dict[str, str]:
    return {asked.key: value for asked, value in zip(entry.form.fields, entry.values, strict=True)}


def _blank(form: Form, values: Mapping[str, str]) -> Items:
    fields = (item for asked in form.fields for item in _field(asked, values.get(asked.key, "")))
    return form.name, *fields, button("send", "Send")


def _field(asked: Asked, value: str) -> Items:
    if asked.check == "choice":
        return (choice(asked.key, asked.name, asked.options, value),)
    if asked.check == "radio":
        return f"{asked.name}:", *radios(asked.key, asked.options, value)
    if asked.check == "yes":
        return (checkbox(asked.key, asked.name, value == "yes"),)
    return (field(asked.key, asked.name, value, "spinbutton" if asked.check == "number" else "textbox"),)


def _row(entry: Entry) -> Item:
    return link(f"{entry.form.name} {entry.number}: {entry.values[0]}", address("forms", "entry", entry.number))


def _entry(entry: Entry) -> Items:
    told = (f"{asked.name}: {value}" for asked, value in zip(entry.form.fields, entry.values, strict=True))
    change = link("Change", address("forms", "change", entry.number))
    return f"{entry.form.name} {entry.number}", *told, change, button("withdraw", "Withdraw")
