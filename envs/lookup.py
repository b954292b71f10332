"""Lookup: follow links through a small random table. Closed vocabulary and short texts, for tiny models and tests."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..tools import ToolError, tool
from .formats.actions import FormatError
from .rewards import exact_match
from .toolenv import ToolEnv

WORDS = (
    "apple bread cloud door earth fire glass house iron juice king lamp moon nest oak pearl queen river stone tree "
    "violet wolf yard zebra"
).split()
MALFORMED = ("", "</answer>", "<answer>", "<answer><lookup>", "<answer></answer> text", "<answer></answer>" * 2)
EXTRA_TURNS = 2  # beyond one a link


class LookupEnv(ToolEnv):
    """Each word of a random table leads to another; say where a number of links leads.

    `hops` are the numbers of links that a task may ask for, `size` the words in its table; options of reset by the
    same names override them. `oracle_error` is the probability that the oracle's episode stops one link early.
    """

    def __init__(
        self, *, hops: Sequence[int] = (1, 2, 3), size: int = 12, oracle_error: float = 0.0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.hops, self.size, self.oracle_error = tuple(hops), size, oracle_error
        self.turn_limit = settings.get("max_turns")

    def begin(self, options: Mapping[str, Any]) -> str:
        size = options.get("size", self.size)
        self.links = int(self.np_random.choice(options.get("hops", self.hops)))
        if not 1 <= self.links < size <= len(WORDS):
            raise ValueError(
                f"{self.links} links in a table of {size} words: expected 1 <= hops < size <= {len(WORDS)}"
            )
        self.ring: tuple[str, ...] = tuple(
            WORDS[i] for i in self.np_random.permutation(len(WORDS))[:size]
        )  # each leads to the next
        self.max_turns = self.turn_limit or self.links + EXTRA_TURNS
        return question(self.ring[0], self.links)

    def details(self) -> dict[str, Any]:
        return {"hops": self.links}

    @tool
    def lookup(self, word: str) -> str:
        """See where a word leads."""
        if word not in self.ring:
            raise ToolError("no such word")
        return self.ring[(self.ring.index(word) + 1) % len(self.ring)]

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": exact_match(answer, [self.ring[self.links]])}

    def oracle(self) -> str | None:
        if self.over:
            return None
        early = random.Random(self.seed_key).random() < self.oracle_error
        looked_up = {exchange.call.arguments.get("word") for exchange in self.transcript}
        for word in self.ring[: self.links - early]:
            if word not in looked_up:
                return self.write_call("lookup", word=word)
        return self.write_answer(self.ring[self.links - early])


def question(word: str, links: int) -> str:
    return f"Start at {word} and follow {links} links. Where are you?"


def pieces(text: str) -> list[str]:
    """The tags, words, numbers and marks that a text of this environment is made of, blanks left out."""
    return re.findall(r"</?\w+>|\w+|[^\w\s]", text)


def vocabulary() -> list[str]:
    """Every piece that the environment or its oracle can write in the tagged format, sorted."""
    env = LookupEnv()
    said = [env.format.instructions(env.tools), question("", 0), "no such word", *WORDS, *map(str, range(len(WORDS)))]
    errors = [
        env.format.parse(text, env.tools) for text in (*MALFORMED, "</lookup>", "<lookup>", "<lookup></lookup> text")
    ]
    said += [error.text for error in errors if isinstance(error, FormatError)]
    return sorted({piece for text in said for piece in pieces(text)})
