"""Tasks of the calendar."""

from __future__ import annotations

from dataclasses import replace

from .calendar import Calendar, Event
from .model import Records
from .pages import address
from .plan import DeskTask, Draw, Move, Subgoal, go
from .templates import DAYS, PLACES, TITLES, see, spoken, task, template

HOURS = [f"{hour:02}:00" for hour in range(9, 18)]  # of a working day; an event takes one or two


def planned(draw: Draw) -> Calendar:
    """A week with ten events; several have the same title, on other days."""
    days = sorted(draw.some(DAYS, 6))
    titles = draw.some(TITLES, 4)
    times = draw.some([(title, day) for title in titles for day in days], 10)
    events = [event(draw, f"e{number}", title, day) for number, (title, day) in enumerate(times, 1)]
    return Calendar(tuple(events), tuple(days))


def event(draw: Draw, id: str, title: str, day: str) -> Event:
    place = draw.number(0, len(HOURS) - 3)
    return Event(id, title, day, HOURS[place], HOURS[place + draw.number(1, 2)], draw.one(PLACES))


def page_of(event: Event) -> str:
    return address("calendar", "event", event.id)


def day_page(day: str) -> str:
    return address("calendar", "day", day)


def to_event(event: Event) -> tuple[Move, ...]:
    return go("/calendar", day_page(event.day)), go(day_page(event.day), page_of(event))


def change(old: Event, new: Event) -> Subgoal:
    """Give an event other times, or another place."""
    fill = {
        name: getattr(new, name)
        for name in ("day", "start", "end", "place")
        if getattr(new, name) != getattr(old, name)
    }
    return Subgoal((*to_event(old), Move(page_of(old), "save", fill)), changed(old, new))


def changed(old: Event | None, new: Event | None) -> Records:
    """The change of records where an event is in the place of another one; each content is there once."""
    gone: Records = {f"calendar/event/{old}": None} if old else {}
    return {**gone, **({f"calendar/event/{new}": 1} if new else {})}


def enter(new: Event) -> Subgoal:
    fill = {name: getattr(new, name) for name in ("title", "day", "start", "end", "place")}
    return Subgoal((Move("/calendar/new", "save", fill),), changed(None, new))


def called(event: Event) -> str:
    return f'the event "{event.title}" on {spoken(event.day)}'


def free_day(calendar: Calendar, draw: Draw, event: Event) -> str:
    """Another day, without an event of this title."""
    taken = {each.day for each in calendar.events if each.title == event.title}
    return draw.one([day for day in DAYS if day not in taken])


@template("calendar")
def calendar_new(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    new = event(draw, "", draw.one(TITLES), draw.one(calendar.days))
    new = replace(new, day=free_day(calendar, draw, new))
    text = f'Enter the event "{new.title}" on {spoken(new.day)} from {new.start} to {new.end} in the place {new.place}.'
    return task(text, calendar, enter(new))


@template("calendar")
def calendar_move(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    old = draw.one(calendar.events)
    new = replace(old, day=free_day(calendar, draw, old))
    return task(f"Move {called(old)} to {spoken(new.day)}.", calendar, change(old, new))


@template("calendar", heldout=True)
def calendar_later(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    old = draw.one(calendar.events)
    new = replace(old, start=_later(old.start), end=_later(old.end))
    return task(f"Let {called(old)} start and end an hour later.", calendar, change(old, new))


def _later(time: str) -> str:
    return f"{int(time[:2]) + 1:02}{time[2:]}"


@template("calendar")
def calendar_place(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    old = draw.one(calendar.events)
    new = replace(old, place=draw.one([place for place in PLACES if place != old.place]))
    return task(f"Change the place of {called(old)} to {new.place}.", calendar, change(old, new))


@template("calendar")
def calendar_delete(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    old = draw.one(calendar.events)
    delete = Subgoal((*to_event(old), Move(page_of(old), "delete")), changed(old, None))
    return task(f"Delete {called(old)}.", calendar, delete)


@template("calendar")
def calendar_day(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    title = next(title for title in TITLES if title not in {each.title for each in calendar.events})
    new = event(draw, "e11", title, draw.one(calendar.days))
    results = address("calendar", "search", q=title)
    look = see(results, Move("/calendar", "search", {"q": title}))
    calendar = replace(calendar, events=(*calendar.events, new))
    return task(f'On which day is the event "{title}"?', calendar, look, kind="date", value=new.day)


@template("calendar")
def calendar_place_of(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    one = draw.one(calendar.events)
    look = see(day_page(one.day), go("/calendar", day_page(one.day)))
    return task(f"In which place is {called(one)}?", calendar, look, kind="text", value=one.place)


@template("calendar", heldout=True)
def calendar_free(draw: Draw) -> DeskTask:
    calendar = planned(draw)
    day = draw.one(calendar.days)
    full = draw.number(2, 4)  # hours that are taken, one event each
    rest = tuple(each for each in calendar.events if each.day != day)
    taken = tuple(
        Event(f"t{hour}", draw.one(TITLES), day, HOURS[hour], HOURS[hour + 1], draw.one(PLACES))
        for hour in (*range(full), full + 2)
    )
    calendar = replace(calendar, events=(*rest, *taken))
    new = Event("", "Phone call", day, HOURS[full], HOURS[full + 1], draw.one(PLACES))
    text = (
        f'Enter an event "{new.title}" of one hour on {spoken(day)} in the place {new.place}, in the first hour from '
        f"{HOURS[0]} on that is free."
    )
    return task(text, calendar, see(day_page(day), go("/calendar", day_page(day))), enter(new))
