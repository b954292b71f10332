"""HouseRules: pass the stations of a site whose rules one is not told. For agents that learn from their failures."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..tools import ToolCall, ToolError, tool
from .notes import Note, advice
from .toolenv import ToolEnv

SITES = (
    "alder ash aspen beech birch cedar cherry cypress elder elm fir hazel holly juniper larch laurel linden maple oak "
    "palm pine poplar walnut willow"
).split()
STATIONS = "bridge desk gate lamp pump scale".split()
CHOICES = "blue green red white".split()
SPLITS = ("train", "heldout")
EXTRA_TURNS = 2  # beyond one a station


class HouseRulesEnv(ToolEnv):
    """One passes stations of a site. At each there is one right choice, and only the end tells how many were right.

    The last choice ends the episode. `exact` is 1.0 if all were right, `right` is the share that were. Which choice is
    right depends on world, site and station; `notes()` tells all of the task's site. Tasks of the split "heldout" have
    two stations in a row that those of "train" never have in a row at the same site.

    `stations` is the number that a task passes, `sites` how many of SITES tasks are drawn from. `world` says whose
    rules hold; without a number every task has rules of its own, which nothing but notes can tell. At the sites
    `moved`, names of sites or how many of the first, every right choice is another than it was. Options of reset by the
    same names override them. `oracle_error` is the probability that a choice of the oracle's is a wrong one.
    """

    instructions = "Every site has rules of its own. Choose at each station."
    reward_weights: Mapping[str, float] = {"exact": 1.0, "right": 0.5}

    def __init__(
        self,
        *,
        stations: int = 2,
        sites: int = len(SITES),
        world: int | None = None,
        moved: int | Sequence[str] = (),
        oracle_error: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.asked = {"split": "train", "stations": stations, "sites": sites, "world": world, "moved": moved}
        self.oracle_error = oracle_error
        self.turn_limit = settings.get("max_turns")

    def begin(self, options: Mapping[str, Any]) -> str:
        asked = {name: options.get(name, value) for name, value in self.asked.items()}
        sites, moved = _first_sites(asked["sites"], 1), _moved_sites(asked["moved"])
        number, self.split = asked["stations"], asked["split"]
        if not 2 <= number <= len(STATIONS):
            raise ValueError(f"{number} stations: expected 2 to {len(STATIONS)}")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r}: expected one of {', '.join(SPLITS)}")
        own = int(self.np_random.integers(2**62))
        world = own if asked["world"] is None else asked["world"]
        self.site = sites[int(self.np_random.integers(len(sites)))]
        self.rules = tuple(right_choice(world, self.site, station, self.site in moved) for station in STATIONS)
        self.route = self._route(number)
        self.choices: tuple[str, ...] = ()
        self.max_turns = self.turn_limit or number + EXTRA_TURNS
        return f"Pass {' then '.join(self.route)} at {self.site}. {self._describe()}"

    def _route(self, number: int) -> tuple[str, ...]:
        """Stations in an order that belongs to the split."""
        while True:
            route = [STATIONS[i] for i in self.np_random.permutation(len(STATIONS))[:number]]
            if any(is_heldout(self.site, *pair) for pair in pairwise(route)) == (self.split == "heldout"):
                return tuple(route)

    def details(self) -> dict[str, Any]:
        return {"hops": len(self.route), "split": self.split, "tags": [f"site:{self.site}"]}

    @tool
    def choose(self, choice: str) -> str:
        """Choose at a station."""
        if self.answered is not None:
            raise ToolError("You are through.")
        if choice not in CHOICES:
            raise ToolError(f"no such choice. {self._describe()}")
        self.choices += (choice,)
        if len(self.choices) < len(self.route):
            return self._describe()
        self.answered = "through"
        return "You are through."

    def _describe(self) -> str:
        *most, last = CHOICES
        return f"Choose {', '.join(most)} or {last}. {place_of(self.site, self.route[len(self.choices)])}"

    def score(self, answer: str) -> dict[str, float]:
        right = sum(made == self._rule(station) for made, station in zip(self.choices, self.route, strict=False))
        return {"exact": float(right == len(self.route)), "right": right / len(self.route)}

    def _rule(self, station: str) -> str:
        return self.rules[STATIONS.index(station)]

    def situation(self) -> Any:
        return [self.site, self.route, self.rules]

    def notes(self) -> Sequence[Note]:
        right = {station: ToolCall("choose", {"choice": self._rule(station)}) for station in STATIONS}
        return [Note(advice([call]), place_of(self.site, station)) for station, call in right.items()]

    def oracle(self) -> str | None:
        if self.over:
            return None
        right = self._rule(self.route[len(self.choices)])
        dice = random.Random(f"{self.seed_key} {len(self.choices)}")
        wrong = dice.choice([choice for choice in CHOICES if choice != right])
        return self.write_call("choose", choice=wrong if dice.random() < self.oracle_error else right)


def right_choice(world: int, site: str, station: str, moved: bool = False) -> str:
    """The choice that is right in a world at a station of a site, before its rules moved or after."""
    number = checksum(world, site, station)
    if moved:
        number += 1 + checksum(world, site, station, "moved") % (len(CHOICES) - 1)
    return CHOICES[number % len(CHOICES)]


def is_heldout(site: str, station: str, following: str) -> bool:
    """Whether only held-out tasks ask for the two stations in a row at the site: about a third of all such pairs."""
    return checksum(site, station, following) % 3 == 0


def checksum(*parts: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def place_of(site: str, station: str) -> str:
    """The sentence that is said at a station of a site, and nowhere else."""
    return f"You are at {site} {station}."


def _first_sites(number: int, least: int) -> Sequence[str]:
    if not least <= number <= len(SITES):
        raise ValueError(f"{number} sites: expected {least} to {len(SITES)}")
    return SITES[:number]


def _moved_sites(moved: int | Iterable[str]) -> Sequence[str]:
    if isinstance(moved, int):
        return _first_sites(moved, 0)
    names = sorted({*moved})
    if unknown := [name for name in names if name not in SITES]:
        raise ValueError(f"moved: no site {unknown[0]!r}; sites: {', '.join(SITES)}")
    return names
