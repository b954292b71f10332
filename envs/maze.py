"""Maze: find the exit of a small maze, seeing one cell at a time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

from ..tools import ToolError, tool
from .toolenv import ToolEnv, digest

Cell = tuple[int, int]  # column, counted to the east, and row, counted to the south

STEPS: dict[str, Cell] = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}


class MazeEnv(ToolEnv):
    """One knows where the exit lies as the crow flies, and which ways lead on from here; walls are found by walking.

    Success counts when the agent, at the exit, says that it is out. The state is the maze and the cell, not the way
    there. `size` is the maze's width and height, `loops` the share of walls that are left out though both sides can be
    reached without. The oracle walks the shortest way; a share `oracle_error` of its moves goes anywhere.
    """

    instructions = "Walk to the exit, then answer out."
    max_turns = 30
    reward_weights: Mapping[str, float] = {"exact": 1.0}
    shared: ClassVar[frozenset[str]] = ToolEnv.shared | {"ways"}

    def __init__(self, *, size: int = 5, loops: float = 0.1, oracle_error: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        if not 2 <= size <= 10:
            raise ValueError(f"a maze of size {size}: expected 2 to 10")
        self.size, self.loops, self.oracle_error = size, loops, oracle_error

    def begin(self, options: Mapping[str, Any]) -> str:
        cells = [(x, y) for y in range(self.size) for x in range(self.size)]
        self.ways: dict[Cell, tuple[str, ...]] = dict.fromkeys(cells, ())
        walls = [(cell, way) for cell in cells for way in ("east", "south") if _move(cell, way) in self.ways]
        joined = {cell: cell for cell in cells}  # a cell -> another that it can be reached from

        def first(cell: Cell) -> Cell:
            while joined[cell] != cell:
                cell = joined[cell]
            return cell

        for i in self.np_random.permutation(len(walls)):  # Kruskal's way
            cell, way = walls[i]
            one, other = first(cell), first(_move(cell, way))
            if one != other or self.np_random.random() < self.loops:
                joined[one] = other
                self.ways[cell] += (way,)
                self.ways[_move(cell, way)] += (_BACK[way],)
        start, end = self.np_random.permutation(len(cells))[:2]
        self.cell, self.exit = cells[start], cells[end]
        return self._describe()

    def details(self) -> dict[str, Any]:
        return {"hops": len(self._way())}

    @tool
    def go(self, direction: str) -> str:
        """Walk to the next cell."""
        if direction not in self.ways[self.cell]:
            raise ToolError(f"no way {direction}. {self._describe()}")
        self.cell = _move(self.cell, direction)
        return self._describe()

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(self.cell == self.exit)}

    def state_key(self) -> str:
        return digest([self.situation(), self.cell, self.over])

    def oracle(self) -> str | None:
        if self.over:
            return None
        dice = random.Random(f"{self.seed_key} {self.turn}")
        if dice.random() < self.oracle_error:
            return self.write_call("go", direction=dice.choice(self.ways[self.cell]))
        way = self._way()
        return self.write_call("go", direction=way[0]) if way else self.write_answer("out")

    def _way(self) -> list[str]:
        """Directions of a shortest way to the exit."""
        found: dict[Cell, list[str]] = {self.cell: []}
        queue = deque([self.cell])
        while self.exit not in found:
            near = queue.popleft()
            for way in self.ways[near]:
                if _move(near, way) not in found:
                    found[_move(near, way)] = [*found[near], way]
                    queue.append(_move(near, way))
        return found[self.exit]

    def _describe(self) -> str:
        ways = " ".join(way for way in STEPS if way in self.ways[self.cell])
        return f"Exit {self._bearing()}. Ways {ways}."

    def _bearing(self) -> str:
        """Where the exit lies, as the crow flies."""
        east, south = self.exit[0] - self.cell[0], self.exit[1] - self.cell[1]
        parts = [f"{abs(east)} {'east' if east > 0 else 'west'}"] if east else []
        parts += [f"{abs(south)} {'south' if south > 0 else 'north'}"] if south else []
        return " ".join(parts) or "here"


_BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}


def _move(cell: Cell, way: str) -> Cell:
    return cell[0] + STEPS[way][0], cell[1] + STEPS[way][1]
