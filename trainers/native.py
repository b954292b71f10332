"""NativeAttend: a layer's attention to packed trees in C, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, c_int, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packing import Segment, last_seers

SOURCE = Path(__file__).with_name("native.c")
SPAN = 32  # keys at a time: room is for a whole number of them


class NativeAttend:
    """Attention of queries, keys and values that lie side by side and are not turned yet: joint [T, QKV].

    All but lengths are of one dtype. For given threads, the same bits each time.
    """

    def __init__(
        self, library: CDLL, heads: tuple[int, int, int], segments: Sequence[Segment], turns: tuple[Tensor, Tensor]
    ) -> None:
        """heads: query heads, those of keys, and the width d of one; turns: cosines and sines [T, d / 2]."""
        library.attend.argtypes = [*[c_int] * 3, *[c_void_p] * 7]
        library.attend_backward.argtypes = [*[c_int] * 3, *[c_void_p] * 11]
        library.attend.restype = library.attend_backward.restype = None
        self._library, self._heads = library, heads
        until = last_seers(segments)
        self._until = pad(until, (0, -len(until) % SPAN)).int()
        self._turns = torch.stack(turns, dim=1).float().contiguous()  # [T, 2, d / 2]

    def __call__(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """seen [T, heads * d], and lengths [heads, T], float32: what attention's weights were divided by, its log."""
        (heads, _, dim), tokens = self._heads, len(joint)
        seen, lengths = joint.new_empty(tokens, heads * dim), self._turns.new_empty(heads, tokens)
        keys, values = self._room(joint), self._room(joint)
        self._run(self._library.attend, joint, keys, values, seen, lengths)
        return seen, lengths

    def gradient(self, gradient: Tensor, joint: Tensor, seen: Tensor, lengths: Tensor) -> Tensor:
        """That of joint, from that of seen."""
        rooms = [self._room(joint) for _ in range(3)]
        sums = self._turns.new_empty(torch.get_num_threads(), len(self._until), 2, self._heads[2])
        within = torch.empty_like(joint)
        self._run(self._library.attend_backward, joint, seen, lengths, gradient.contiguous(), *rooms, sums, within)
        return within

    def _room(self, joint: Tensor) -> Tensor:
        _, kv_heads, dim = self._heads
        return joint.new_empty(kv_heads, len(self._until), dim)

    def _run(self, function: object, joint: Tensor, *others: Tensor) -> None:
        assert callable(function)
        places = [x.data_ptr() for x in (self._until, self._turns, joint, *others)]
        function(torch.get_num_threads(), len(joint), len(self._until), *places)
