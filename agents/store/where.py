"""Where: which trees of a store are meant, and the one grammar in which commands and the viewer say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..tree import SLACK, RolloutTree

if TYPE_CHECKING:
    from .index import TreeSummary

Range = tuple[float | None, float | None]  # the least and the greatest value, both included; None: no bound
ANY: Range = (None, None)
SUCCESS: dict[str, Callable[[float], bool]] = {  # what each word asks of the share of the rollouts that succeeded
    "all": lambda share: share >= 1,
    "some": lambda share: share > 0,
    "mixed": lambda share: 0 < share < 1,
    "none": lambda share: share <= 0,
}
_RANGES = ("steps", "returns", "rollouts")
_TEXTS = ("stage", "env", "success", "cause", "text")
CONDITIONS = (*_RANGES, *_TEXTS, "term")  # by these names `Where.parse` knows them


@dataclass(frozen=True, slots=True)
class Where:
    """Conditions on a tree, which has to meet all of them. `Where()` means every tree.

    ValueError where `success` is none of the words in SUCCESS, or is given without `success_term`.
    """

    stage: str | None = None
    steps: Range = ANY
    env: str | None = None
    returns: Range = ANY  # of the mean return of the tree's rollouts
    terms: Mapping[str, Range] = field(default_factory=dict)  # reward term: range of its mean over the rollouts
    rollouts: Range = ANY  # of their number
    success: str | None = None  # how many of the rollouts succeeded: all, some, mixed or none
    success_term: str | None = None  # the reward term that reaches 1 where a rollout succeeded
    cause: str | None = None  # why at least one of the rollouts was truncated
    text: str | None = None  # occurs in a message or an action of the tree; case does not matter

    def __post_init__(self) -> None:
        if self.success is not None and self.success not in SUCCESS:
            raise ValueError(f"success: one of {', '.join(SUCCESS)}, got {self.success!r}")
        if self.success is not None and self.success_term is None:
            raise ValueError("success: success_term names the reward term that tells it, such as 'exact'")

    @classmethod
    def parse(cls, conditions: Mapping[str, str], success_term: str | None = None) -> Where:
        """Reads conditions from texts by name, as they stand in an option or an address.

        `steps`, `returns` and `rollouts` are LOW:HIGH. Either end can be left out, and a number alone is both ends.
        `term` is NAME=LOW:HIGH, or several of these with commas between them. The other names take their text as it is.
        ValueError names the condition, what it takes and what it was.
        """
        fields: dict[str, Any] = {}
        for name, text in conditions.items():
            if name in _RANGES:
                fields[name] = _range(name, text)
            elif name in _TEXTS:
                fields[name] = text
            elif name == "term":
                fields["terms"] = _terms(text)
            else:
                raise ValueError(f"{name}: no condition has this name; there are {', '.join(CONDITIONS)}")
        return cls(**fields, success_term=success_term)

    def passes(self, tree: TreeSummary) -> bool:
        """Whether a tree meets all conditions except `text`, which a summary cannot tell."""
        return (
            self.stage in (None, tree.labels.get("stage"))
            and self.env in (None, tree.env)
            and within(tree.labels.get("step"), self.steps)
            and within(tree.mean_return, self.returns)
            and within(tree.rollouts, self.rollouts)
            and all(within(tree.terms.get(name), wider(bounds)) for name, bounds in self.terms.items())
            and (self.cause is None or self.cause in tree.causes)
            and self._succeeds(tree)
        )

    def _succeeds(self, tree: TreeSummary) -> bool:
        if self.success is None or self.success_term is None:
            return True
        share = tree.success(self.success_term)
        return share is not None and SUCCESS[self.success](share)

    def text_occurs(self, tree: RolloutTree) -> bool:
        """Whether a tree meets the condition `text`."""
        if self.text is None:
            return True
        needle = self.text.casefold()
        messages = (*tree.messages, *(message for node in tree.nodes for message in node.messages))
        texts = (*(message.text for message in messages), *(node.action.text for node in tree.nodes))
        return any(needle in text.casefold() for text in texts)


def within(value: Any, bounds: Range) -> bool:
    """Whether a value lies in a range. What is not a number, such as NaN or None, lies only in ANY."""
    low, high = bounds
    if bounds == ANY:
        return True
    return isinstance(value, int | float) and (low is None or low <= value) and (high is None or value <= high)


def wider(bounds: Range) -> Range:
    """A range of a reward term, extended by SLACK at both ends, because sums of floats are off by as much."""
    low, high = bounds
    return None if low is None else low - SLACK, None if high is None else high + SLACK


def _range(name: str, text: str) -> Range:
    low, colon, high = text.replace("..", ":").partition(":")  # addresses of earlier pages hold LOW..HIGH
    ends = (low, high if colon else low)
    try:
        least, most = (float(end) if end.strip() else None for end in ends)
    except ValueError:
        least, most = ANY
    if (least, most) == ANY or math.isnan(least or 0) or math.isnan(most or 0):
        raise ValueError(f"{name}: a number or LOW:HIGH with either end left out, such as 3, 0.5: or :8, got {text!r}")
    return least, most


def _terms(text: str) -> dict[str, Range]:
    terms: dict[str, Range] = {}
    for part in text.split(","):
        name, equals, bounds = part.strip().partition("=")
        if not name or not equals:
            raise ValueError(f"term: NAME=LOW:HIGH with either end left out, such as exact=0.5:, got {part!r}")
        if name in terms:
            raise ValueError(f"term: one range for each name, got two for {name}")
        terms[name] = _range(f"term {name}", bounds)
    return terms
