"""Stage: a named part of a run, such as an evaluation or an improvement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..training import Trainer


class Stage(Protocol):
    """A part of a run. Stages are values: a plan lists them, and a checkpoint tells how many are over."""

    @property
    def name(self) -> str:
        """Labels its rows in the metrics and its trees; unique in a plan."""
        ...

    async def run(self, trainer: Trainer) -> None:
        """Does the stage's work, from the step on at which the run stands (`trainer.steps`)."""
        ...
