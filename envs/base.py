"""TextEnv: a Gymnasium environment of texts that can fork, name its state and show an expert's move."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import gymnasium

from ..tools import Cassette
from ..tools.protocol import encodable
from .notes import Note


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; what reset or step said is a list of these in info["messages"]."""

    role: str  # "system", "user", "assistant" or "tool"
    text: str  # `encodable`

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encodable(self.text))


class TextEnv(gymnasium.Env[str, str]):
    """Observations and actions are texts; reset and step return Gymnasium's tuples.

    `info["messages"]` holds the chat messages that reset or step added (list of Message);
    `info["reward_terms"]` the named parts of the reward (dict of float or None).
    All randomness comes from `self.np_random`, which reset seeds.
    """

    runs_code: bool = False  # of agents, which could search for the seed of their task: scenarios then take a secret
    can_fork: bool = True  # False: the engine plays the recorded actions again where it needs the state twice
    reward_weights: Mapping[str, float] = {}  # of the reward's terms; empty: it does not tell them

    def fork(self) -> Self:
        """The same state with an independent future: stepping one never changes the other."""
        raise NotImplementedError(f"{type(self).__name__} has no fork(); without one it must say can_fork = False")

    @abstractmethod
    def state_key(self) -> str:
        """Equal keys mean the same situation: GiGPO's anchors, replay's check."""

    @property
    def outside(self) -> tuple[str, ...]:
        """Names of the sources from which it reads what no seed fixes: a server, a model. On tape they are none."""
        return ()

    def tape(self, cassette: Cassette) -> None:
        """From the next reset on the answers of such sources go over the cassette; without sources nothing happens."""

    def oracle(self) -> str | None:
        """An expert's next action, or None where none is known."""
        return None

    def notes(self) -> Sequence[Note]:
        """What an expert would write down of this task's world, after reset; empty where nothing is known."""
        return ()
