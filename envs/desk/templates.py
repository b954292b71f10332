"""Templates: functions that draw a task, by their names; and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta

from .desk import App, Desk
from .model import Goal, Kind, Value
from .plan import DeskTask, Draw, Move, Subgoal

Template = Callable[[Draw], DeskTask]


@dataclass(frozen=True, slots=True)
class Named:
    """A template with its name, and the applications that its tasks have."""

    name: str
    apps: tuple[str, ...]
    make: Template
    heldout: bool


TEMPLATES: dict[str, Named] = {}


def template(*apps: str, heldout: bool = False) -> Callable[[Template], Template]:
    """Adds a function to the templates, under its name."""

    def add(make: Template) -> Template:
        TEMPLATES[make.__name__] = Named(make.__name__, apps, make, heldout)
        return make

    return add


def task(
    text: str,
    apps: App | tuple[App, ...],
    *plan: Subgoal,
    wanted: Mapping[str, Value] | None = None,
    kind: Kind | None = None,
    value: object = "",
) -> DeskTask:
    """A task whose wanted changes are all that its plan makes, unless they are given."""
    made = {path: value for subgoal in plan for path, value in subgoal.makes.items()}
    goal = Goal(text, made if wanted is None else wanted, kind, str(value))
    return DeskTask(Desk(apps if isinstance(apps, tuple) else (apps,)), goal, plan)


def see(to: str, *moves: Move) -> Subgoal:
    """Look at a page, which the moves lead to."""
    return Subgoal((*moves, Move(to, "")), sees=to)


NAMES = "Ada Berg|Ben Costa|Cleo Dahl|Dan Evans|Eva Frank|Finn Gray|Gina Holm|Hugo Ito".split("|")
STREETS = "Elm Street 4|Oak Road 17|Mill Lane 2|Lake Avenue 9|Hill Street 21|Park Road 6".split("|")
TODAY = date(2026, 5, 4)  # a Monday
DAYS = [str(TODAY + timedelta(days)) for days in range(1, 20)]
PLACES = "Blue Room|Red Room|Green Room|Café Lux|City Library|Town Hall".split("|")
TITLES = "Budget meeting|Team meeting|Project review|Dentist|Lunch|Concert|Piano lesson|Parents evening".split("|")


def spoken(day: str) -> str:
    """spoken("2026-05-04") -> "4 May 2026"."""
    return f"{date.fromisoformat(day):%-d %B %Y}"
