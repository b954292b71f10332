"""Calendar: days, events, moving and deleting them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from datetime import date

from ..screen import flat
from .model import Records
from .pages import Fields, Item, Items, Path, Query, Refused, address, button, field, link, listing, needed

TIME = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")


@dataclass(frozen=True, slots=True)
class Event:
    id: str
    title: str
    day: str  # 2026-05-04
    start: str  # 09:00
    end: str
    place: str = ""

    def __str__(self) -> str:
        return " | ".join((flat(self.title), self.day, f"{self.start}-{self.end}", flat(self.place)))


@dataclass(frozen=True, slots=True)
class Calendar:
    events: tuple[Event, ...]
    days: tuple[str, ...]  # that the first page lists
    made: int = 0  # how many events have been made new
    name: str = "calendar"

    @property
    def menu(self) -> dict[str, str]:
        return {"Calendar": "/calendar", "New event": "/calendar/new"}

    def on(self, day: str) -> list[Event]:
        return sorted((event for event in self.events if event.day == day), key=lambda event: (event.start, event.id))

    def records(self) -> Records:
        """An event is its content: one that is deleted and made anew on another day has been moved."""
        return Counter(f"event/{event}" for event in self.events)

    def view(self, path: Path, query: Query, size: int) -> Items | None:
        here = address("calendar", *path, **query)
        match path:
            case ():
                search = field("q", "Search", role="searchbox"), button("search", "Search")
                rows: list[Items] = [(link(_named(day), address("calendar", "day", day)),) for day in self.days]
                return "Days", *search, *listing(rows, here, size)
            case ("search",):
                words = query.get("q", "").lower().split()
                found = [event for event in self.events if all(word in event.title.lower() for word in words)]
                found.sort(key=lambda event: (event.day, event.start, event.id))
                return "Results", *listing([(_row(event), event.day) for event in found], here, size)
            case ("day", day) if day in {*self.days, *(event.day for event in self.events)}:
                return _named(day), *listing([(_row(event), event.place) for event in self.on(day)], here, size)
            case ("event", id):
                event = next((event for event in self.events if event.id == id), None)
                return (*_form(event), button("delete", "Delete")) if event else None
            case ("new",):
                return _form(Event("", "", "", "", ""))
        return None

    def submit(self, path: Path, query: Query, button: str, fields: Fields) -> tuple[Calendar, str]:
        if button == "search":
            return self, address("calendar", "search", q=fields["q"].strip())
        rest = tuple(event for event in self.events if event.id != path[-1])
        if button == "delete":
            return replace(self, events=rest), "/calendar"
        new = path == ("new",)
        event = _read(f"n{self.made + 1}" if new else path[1], fields)
        return replace(self, events=(*rest, event), made=self.made + new), address("calendar", "day", event.day)


def _read(id: str, fields: Fields) -> Event:
    needed(fields, title="Title")
    told = {name: fields[name].strip() for name in ("title", "day", "start", "end", "place")}
    day_of(told["day"], "Day")
    for name in ("start", "end"):
        if not TIME.fullmatch(told[name]):
            raise Refused(f"{name.capitalize()}: write it as 09:30.")
    if told["start"] >= told["end"]:
        raise Refused("The event ends before it starts.")
    return Event(id, **told)


def day_of(text: str, name: str) -> str:
    """The day that stands in a field. Refused where it is none."""
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text.strip()):
            raise ValueError
        return str(date.fromisoformat(text.strip()))
    except ValueError:
        raise Refused(f"{name}: write it as 2026-01-31.") from None


def _named(day: str) -> str:
    return f"{date.fromisoformat(day):%A} {day}"


def _row(event: Event) -> Item:
    return link(f"{event.start}-{event.end} {event.title}", address("calendar", "event", event.id))


def _form(event: Event) -> Items:
    return (
        field("title", "Title", event.title),
        field("day", "Day", event.day),
        field("start", "Start", event.start),
        field("end", "End", event.end),
        field("place", "Place", event.place),
        button("save", "Save"),
    )
