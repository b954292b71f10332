"""A Gymnasium space of texts in any script."""

from __future__ import annotations

from typing import Any

from gymnasium.spaces import Text

MAX_LENGTH = 1_000_000  # characters
SAMPLE_LENGTH = 200
LETTERS = "".join(map(chr, [*range(32, 127), 10, 0xE9, 0x416, 0x4E2D, 0x1F600]))  # what samples are made of


class AnyText(Text):
    """Contains every str of at most MAX_LENGTH characters; samples are short and mix scripts."""

    def __init__(self, max_length: int = MAX_LENGTH) -> None:
        super().__init__(max_length, min_length=0, charset=LETTERS)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(min(SAMPLE_LENGTH, self.max_length) + 1)), None)
        return super().sample(mask, probability)
