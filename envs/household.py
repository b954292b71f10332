"""Household: find a thing in a house of many rooms, wash it if need be, and put it where it belongs."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from ..tools import ToolError, tool
from .toolenv import ToolEnv, digest

ROOMS = "attic bathroom bedroom cellar garage hall kitchen nursery office pantry".split()
PLACES = "bench bin box cabinet chest counter desk drawer fridge rack shelf sofa stool table tray wardrobe".split()
CLOSED = frozenset("bin box cabinet chest drawer fridge wardrobe".split())  # until they are opened
THINGS = "apple ball book bowl brush candle cup fork hat key knife mug pen plate spoon towel".split()
SINK = "sink"
SPLITS = ("train", "heldout")
T = TypeVar("T")


class HouseholdEnv(ToolEnv):
    """One walks from room to room, sees what stands and lies there, and carries one thing at a time.

    Success counts only at the end, when the agent says that it is done. Episodes are long and states come back: the
    state is the house and the walker, not the way there. Tasks of the split "heldout" ask for pairs of thing and place
    that those of "train" never ask for. The oracle knows no more than what it has seen; `oracle_error` is the
    probability that a turn of its is a random move.
    """

    instructions = "Find the thing, wash it if it is to be clean, bring it to its place, then answer done."
    max_turns = 30
    reward_weights: Mapping[str, float] = {"exact": 1.0}
    shared: ClassVar[frozenset[str]] = ToolEnv.shared | {"ways", "room_of"}

    def __init__(
        self, *, rooms: int = 6, things: int = 6, washing: float = 0.5, oracle_error: float = 0.0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if not (2 <= rooms <= len(ROOMS) and 2 * rooms <= len(PLACES) and 1 <= things <= len(THINGS)):
            most = len(PLACES) // 2, len(THINGS)
            raise ValueError(f"{rooms} rooms and {things} things: expected 2 to {most[0]} and 1 to {most[1]}")
        self.rooms, self.things, self.washing, self.oracle_error = rooms, things, washing, oracle_error

    def begin(self, options: Mapping[str, Any]) -> str:
        split = options.get("split", "train")
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
        pairs: list[tuple[str, str]] = []
        while not pairs:
            self._build()
            pairs = [
                (thing, place)
                for thing, lies_in in self.place_of.items()
                for place in self.room_of
                if place not in (lies_in, SINK) and is_heldout(thing, place) == (split == "heldout")
            ]
        self.thing, self.goal = self._draw(pairs)
        self.wash_it = bool(self.np_random.random() < self.washing)
        self.clean = frozenset[str]()
        self.held: str | None = None
        self.room = self._draw(list(self.ways))
        self.visited = frozenset({self.room})
        return self._describe()

    def _build(self) -> None:
        """Rooms joined to a tree and by one way more, two places in each, and a sink; things lie in the places."""
        rooms, places, things = (
            [names[i] for i in self.np_random.permutation(len(names))[:count]]
            for names, count in ((ROOMS, self.rooms), (PLACES, 2 * self.rooms), (THINGS, self.things))
        )
        self.ways: dict[str, tuple[str, ...]] = dict.fromkeys(rooms, ())
        for i, room in enumerate(rooms[1:], 1):
            self._join(room, self._draw(rooms[:i]))
        self._join(rooms[0], self._draw(rooms[1:]))
        self.room_of = {place: rooms[i // 2] for i, place in enumerate(places)} | {SINK: self._draw(rooms)}
        self.closed = CLOSED.intersection(places)
        self.place_of = {thing: self._draw(places) for thing in things}

    def _draw(self, among: Sequence[T]) -> T:
        return among[int(self.np_random.integers(len(among)))]

    def details(self) -> dict[str, Any]:
        return {"hops": 1 + self.wash_it}

    @tool
    def go(self, name: str) -> str:
        """Walk to a room next to this one."""
        if name not in self.ways[self.room]:
            raise self._refusal(f"no way from {self.room} to {name}")
        self.room = name
        self.visited |= {name}
        return self._describe()

    @tool
    def open(self, name: str) -> str:
        """Open a closed place of this room."""
        if name not in self._here() or name not in self.closed:
            raise self._refusal(f"nothing closed called {name} here")
        self.closed -= {name}
        return self._describe()

    @tool
    def take(self, name: str) -> str:
        """Take a thing that lies in this room."""
        if self.held:
            raise self._refusal(f"your hand is full: {self.held}")
        if name not in self._lying():
            raise self._refusal(f"no {name} to be seen here")
        self.held = name
        del self.place_of[name]
        return self._describe()

    @tool
    def put(self, name: str) -> str:
        """Put what you hold on an open place of this room."""
        if self.held is None:
            raise self._refusal("your hand is empty")
        if name not in self._here() or name in self.closed:
            raise self._refusal(f"no open {name} here")
        self.place_of[self.held], self.held = name, None
        return self._describe()

    @tool
    def wash(self, name: str) -> str:
        """Wash what you hold where there is a sink."""
        if name != self.held:
            raise self._refusal(f"you do not hold {name}")
        if self.room_of[SINK] != self.room:
            raise self._refusal("no sink here")
        self.clean |= {name}
        return self._describe()

    @property
    def solved(self) -> bool:
        """Whether the task is done."""
        return self.place_of.get(self.thing) == self.goal and (not self.wash_it or self.thing in self.clean)

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(self.solved)}

    def state_key(self) -> str:
        world = [sorted(self.place_of.items()), sorted(self.closed), sorted(self.clean), self.held, self.room]
        return digest([self.situation(), world, self.over])

    def oracle(self) -> str | None:
        if self.over:
            return None
        dice = random.Random(f"{self.seed_key} {self.turn}")
        if dice.random() < self.oracle_error:
            tool, name = dice.choice(self._moves())
        elif self.solved:
            return self.write_answer("done")
        else:
            tool, name = self._best()
        return self.write_call(tool, name=name)

    def _best(self) -> tuple[str, str]:
        """What one does who knows what it has seen: look for the thing, then for the sink, then for the goal."""
        if self.held not in (None, self.thing):
            return self._reach(next((p for p in self._here() if p not in self.closed), self.goal), "put")
        if self.held is None:
            at = self.place_of[self.thing]
            seen = at not in self.closed and self.room_of[at] in self.visited
            return self._reach(at, "take", self.thing) if seen else self._look()
        if self.wash_it and self.thing not in self.clean:
            return self._reach(SINK, "wash", self.thing)
        return self._reach(self.goal, "put")

    def _reach(self, place: str, tool: str, word: str = "") -> tuple[str, str]:
        """A step towards a place, or into the unknown, its opening, or, there, the call."""
        room = self.room_of[place]
        if room == self.room:
            return ("open", place) if place in self.closed else (tool, word or place)
        known = room in self.visited
        return "go", self._step_to(lambda found: found == room if known else found not in self.visited)

    def _look(self) -> tuple[str, str]:
        """The opening of a closed place, or a step to where there may be one."""
        shut = [place for place in self._here() if place in self.closed]
        if shut:
            return "open", shut[0]
        closed = {self.room_of[place] for place in self.closed}
        return "go", self._step_to(lambda room: room not in self.visited or room in closed)

    def _step_to(self, wanted: Callable[[str], bool]) -> str:
        """The first room on a shortest way, through rooms one has been in, to a room that is wanted."""
        first = {self.room: ""}  # a room -> the first room on the way there
        queue = deque([self.room])
        while queue:
            near = queue.popleft()
            if near != self.room and wanted(near):
                return first[near]
            for room in self.ways[near] if near in self.visited else ():
                if room not in first:
                    first[room] = first[near] or room
                    queue.append(room)
        raise AssertionError("every room can be reached")

    def _moves(self) -> list[tuple[str, str]]:
        """All calls that move something."""
        moves = [("go", room) for room in self.ways[self.room]]
        moves += [("open", place) for place in self._here() if place in self.closed]
        if self.held is None:
            return moves + [("take", thing) for thing in self._lying()]
        return moves + [("put", place) for place in self._here() if place not in self.closed]

    def _join(self, one: str, other: str) -> None:
        if other not in self.ways[one]:
            self.ways[one] += (other,)
            self.ways[other] += (one,)

    def _here(self) -> list[str]:
        """The places of this room, the sink left out."""
        return [place for place, room in self.room_of.items() if room == self.room and place != SINK]

    def _lying(self) -> list[str]:
        """The things to be seen in this room."""
        seen = [place for place in self._here() if place not in self.closed]
        return [thing for thing, place in self.place_of.items() if place in seen]

    def _refusal(self, reason: str) -> ToolError:
        return ToolError(f"{reason}. {self._describe()}")

    def _describe(self) -> str:
        """What one sees, holds and is to do."""
        parts = [self.room]
        for place in self._here():
            inside = [thing for thing, at in self.place_of.items() if at == place]
            open_ = ["with", *(inside or ["nothing"])]
            parts.append(" ".join([place, *(["closed"] if place in self.closed else open_)]))
        if self.room_of[SINK] == self.room:
            parts.append(SINK)
        held = "nothing" if self.held is None else f"{'clean ' * (self.held in self.clean)}{self.held}"
        task = f"Bring {'clean ' * self.wash_it}{self.thing} to {self.goal}."
        return f"{', '.join(parts)}. Ways to {' '.join(self.ways[self.room])}. You hold {held}. {task}"


def is_heldout(thing: str, place: str) -> bool:
    """Whether only held-out tasks ask for the thing at the place: a quarter of all pairs."""
    return (THINGS.index(thing) + PLACES.index(place)) % 4 == 0
