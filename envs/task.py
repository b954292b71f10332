"""Task: one episode to play, as a value: an environment by name, its seed, and the wrappers around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from ..tools.named import import_place, split_name, written
from .base import TextEnv
from .wrappers import text_env, wrapped

Wrappers = tuple[tuple[str, Mapping[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One episode to play: same task, same episode, to the byte."""

    env: str  # a Gymnasium id, such as "treegym/FactSearch-v0", or module:id, or path/to/file.py:id
    seed: int  # to reset
    options: Mapping[str, Any] = field(default_factory=dict)  # to reset; JSON
    settings: Mapping[str, Any] = field(default_factory=dict)  # to the constructor; JSON
    wrappers: Wrappers = ()  # (name, JSON arguments), the first one innermost; `written` reads other spellings

    def __post_init__(self) -> None:
        object.__setattr__(self, "wrappers", read_wrappers(self.wrappers))

    def make(self) -> TextEnv:
        """The environment within its wrappers, not yet reset. TypeError where one of them is Gymnasium's and cannot
        take effect."""
        place, id = split_name(self.env)
        if place:
            import_place(place)
        made = gymnasium.make(id, disable_env_checker=True, **self.settings)
        try:
            env = text_env(made, self.env)
            for name, arguments in self.wrappers:
                env = wrapped(env, name, arguments)
        except BaseException:
            made.close()
            raise
        return env


def read_wrappers(spelled: Sequence[Any]) -> Wrappers:
    """Wrappers in any of the spellings that `written` reads. ValueError for another."""
    if isinstance(spelled, str | Mapping):
        raise ValueError(f"wrappers are a list, such as [{spelled!r}]")
    return tuple(map(written, spelled))
