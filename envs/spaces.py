"""A Gymnasium space of texts in any script."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from types import ModuleType
from typing import Any, overload

import numpy as np
from gymnasium.spaces import Text
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory
from numpy.typing import NDArray

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


# AsyncVectorEnv shares memory with its workers. For a Text, Gymnasium puts places in the space's alphabet there, and
# AnyText has none. Here each environment's row is the length of its text, then the text as UTF-32.


class SharedTexts(Sequence[str]):
    """The texts that are in shared memory at the moment: AsyncVectorEnv asks once for them, and then copies."""

    def __init__(self, rows: NDArray[np.int32]) -> None:
        self._rows = rows  # [environment, 1 + characters]

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...

    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(map(_text, self._rows[place]))
        return _text(self._rows[place])

    def __len__(self) -> int:
        return len(self._rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)


def _text(row: NDArray[np.int32]) -> str:
    return row[1 : 1 + row[0]].astype("<i4").tobytes().decode("utf-32-le", "surrogatepass")


@create_shared_memory.register
def _create(space: AnyText, n: int = 1, ctx: ModuleType = multiprocessing) -> Any:
    return ctx.Array("i", n * (1 + space.max_length))


@write_to_shared_memory.register
def _write(space: AnyText, index: int, values: str, shared_memory: Any) -> None:
    if len(values) > space.max_length:
        raise ValueError(f"an observation of {len(values)} characters; {space.max_length} fit in shared memory")
    row = _rows(space, shared_memory)[index]
    row[0] = len(values)
    row[1 : 1 + len(values)] = np.frombuffer(values.encode("utf-32-le", "surrogatepass"), dtype="<i4")


@read_from_shared_memory.register
def _read(space: AnyText, shared_memory: Any, n: int = 1) -> Any:
    return SharedTexts(_rows(space, shared_memory))


def _rows(space: AnyText, shared_memory: Any) -> NDArray[np.int32]:
    return np.frombuffer(shared_memory.get_obj(), dtype=np.int32).reshape(-1, 1 + space.max_length)
