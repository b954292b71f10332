"""What a task wants, and what became of it: records of a state, their difference, and its grade."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Literal

from ..rewards import exact_match

Value = str | int | bool | None
Records = Mapping[str, Value]  # what can be changed in a state, by the path of each thing
Difference = Mapping[str, Sequence[Value]]  # path: what stood there before and after; None where nothing did
Kind = Literal["number", "money", "date", "text"]

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
MONTHS = "january february march april may june july august september october november december".split()
_AMOUNT = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_DATES = (
    (re.compile(r"\b(\d{4})-(\d{1,2})-(\d{1,2})\b"), "ymd"),
    (re.compile(r"\b(\d{1,2})(?:st|nd|rd|th|\.)? ([a-z]{3,9})\.?,? (\d{4})\b"), "dmy"),
    (re.compile(r"\b([a-z]{3,9})\.? (\d{1,2})(?:st|nd|rd|th)?,? (\d{4})\b"), "mdy"),
)


def difference(before: Records, after: Records) -> dict[str, list[Value]]:
    """What changed, as JSON."""
    paths = sorted({path for path in before.keys() | after.keys() if before.get(path) != after.get(path)})
    return {path: [before.get(path), after.get(path)] for path in paths}


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be done: changes to make, and nothing else; and where `kind` says so, a value to answer with."""

    text: str  # as the agent reads it
    wanted: Mapping[str, Value] = field(default_factory=dict)  # path: what is to stand there
    kind: Kind | None = None
    value: str = ""  # that is asked for

    def grade(self, difference: Difference, answer: str | None) -> dict[str, float]:
        """`exact` 1.0 if the changes are the wanted ones and the answer is right; `goals` the share of both that is
        there; `harm` the number of other changes. Without an answer `exact` is 0.0."""
        after = {path: value for path, (_, value) in difference.items()}
        made = sum(path in after and after[path] == value for path, value in self.wanted.items())
        answered = self.kind is None or (answer is not None and same(self.kind, answer, self.value))
        asked = int(self.kind is not None)
        harm = len(after) - made
        done = made == len(self.wanted) and not harm and answered and answer is not None
        goals = (made + answered * asked) / (len(self.wanted) + asked)
        return {"exact": float(done), "goals": goals, "harm": float(harm)}


def same(kind: Kind, given: str, wanted: str) -> bool:
    """Whether an answer means the value. An answer with two numbers, or two dates, means neither of them."""
    if kind == "date":
        return _dates(given) == _dates(wanted)
    if kind in ("number", "money"):
        return _amounts(_in_digits(given)) == _amounts(wanted)
    return exact_match(given, [wanted]) == 1.0


def _in_digits(text: str) -> str:
    return re.sub(r"\w+", lambda word: str(NUMBERS.index(w)) if (w := word[0].lower()) in NUMBERS else word[0], text)


def _amounts(text: str) -> list[Decimal]:
    try:
        return sorted({Decimal(amount.replace(",", "")) for amount in _AMOUNT.findall(text)})
    except InvalidOperation:
        return []


def _dates(text: str) -> list[date]:
    found = []
    for pattern, order in _DATES:
        for match in pattern.finditer(text.lower()):
            part = dict(zip(order, match.groups(), strict=True))
            month = part["m"] if part["m"].isdecimal() else str(_month(part["m"]))
            try:
                found.append(date(int(part["y"]), int(month), int(part["d"])))
            except ValueError:
                continue
    return sorted(set(found))


def _month(name: str) -> int:
    """Its number; 0 where it is none."""
    return next((number for number, month in enumerate(MONTHS, 1) if month.startswith(name)), 0)
