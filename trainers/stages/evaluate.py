"""Evaluate: success on held-out tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checks import STRICT, at_least

if TYPE_CHECKING:
    from ..training import Trainer


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measures the present weights on the first `tasks` held-out tasks; none: all of them."""

    __pydantic_config__ = STRICT
    name: str
    tasks: int | None = None
    notes: bool = True  # whether the lessons of the run's memory are told

    def __post_init__(self) -> None:
        at_least(0, tasks=self.tasks or 0)

    async def run(self, trainer: Trainer) -> None:
        held = trainer.plan.heldout.tasks
        if tasks := held if self.tasks is None else min(self.tasks, held):
            trainer.keep_result(self.name, await trainer.measure(self.name, tasks, notes=self.notes))
