"""Oracles for pages of MiniWoB++ that read what an agent reads, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

@dataclass(frozen=True, slots=True)
class Move:
    tool: str
    arguments: Mapping[str, Any]

@dataclass(frozen=True, slots=True)
class Seen:
    goal: str
    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()

def next_move(page: str, seen: Seen) -> Move | None:
    return None
