"""What is wrong with a scenario, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ScenarioError(Exception):
    """What is wrong with a scenario, in one line."""


def say(error: Any) -> str:
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return "no such field"
    if error["type"] in ("missing", "missing_argument"):
        return "this field is needed"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {error['input']!r}"


def suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(names))}"
