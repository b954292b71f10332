"""KVSlab: keys and values of the rows that a sampler works on; its attention."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import causal_attention, products_are_faster


@dataclass(frozen=True, slots=True)
class Line:
    """Tokens to run through the model at the end of a slab row."""

    row: int
    start: int  # tokens the row holds already
    tokens: Sequence[int]


class Feed:
    """The T tokens of some lines, one line after the other: int64 tensors [T], and the place of each line's last token,
    [lines]."""

    def __init__(self, lines: Sequence[Line], device: torch.device) -> None:
        places = [(token, line.row, line.start + i) for line in lines for i, token in enumerate(line.tokens)]
        self.tokens, self.rows, self.positions = torch.tensor(places, device=device).T.contiguous()
        self.last = torch.tensor([len(line.tokens) for line in lines], device=device).cumsum(0) - 1


class KVSlab:
    """[layers, rows, 2, kv heads, capacity, d]: a row holds one context's keys and values. Grows as needed."""

    together: ClassVar = 1  # so many tokens are copied together or not at all

    def __init__(self, layers: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._zeros = partial(_zeros, dtype=dtype, device=device)
        self._empty = (layers, 0, 2, kv_heads, 0, dim)
        self.clear()

    def clear(self) -> None:
        """Gives its memory back; no row holds anything any more."""
        self.data = self._zeros(self._empty)

    def reserve(self, rows: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Makes room for this many rows of this many tokens. What is kept: `keep`, as (row, number of tokens)."""
        layers, have, two, kv_heads, length, dim = self.data.shape
        if rows <= have and capacity <= length:
            return
        grown = self._zeros((layers, max(rows, have), two, kv_heads, max(self._whole(capacity), length), dim))
        for row, n in keep:
            grown[:, row, :, :, : self._whole(n)] = self.data[:, row, :, :, : self._whole(n)]
        self.data = grown

    def write(self, row: int, start: int, span: Tensor) -> None:
        """Puts a span [layers, 2, kv heads, n, d] at tokens start … start + n."""
        self.data[:, row, :, :, start : start + span.shape[3]] = span

    def read(self, row: int, start: int, end: int) -> Tensor:
        """A copy of tokens start … end: [layers, 2, kv heads, end - start, d]."""
        return self.data[:, row, :, :, start:end].clone()

    def copy(self, source: int, target: int, length: int) -> None:
        self.data[:, target, :, :, : self._whole(length)] = self.data[:, source, :, :, : self._whole(length)]

    def _whole(self, tokens: int) -> int:
        return math.ceil(tokens / self.together) * self.together


class SlabAttend:
    """Attention of lines over their slab rows; lines of one token (decoding) in one batch."""

    def __init__(self, slab: KVSlab, lines: Sequence[Line]) -> None:
        self.data, device = slab.data, slab.data.device
        _, _, two, kv_heads, capacity, _ = slab.data.shape
        self.feed = feed = Feed(lines, device)
        heads = torch.arange(two * kv_heads, device=device)  # first those of keys, then those of values
        firsts = (feed.rows[:, None] * len(heads) + heads) * capacity  # of each token's row and head: its first place
        self._places = (firsts + feed.positions[:, None]).flatten()  # [T · 2 · kv heads], in a layer
        ends = itertools.accumulate(len(line.tokens) for line in lines)
        self._long = [
            (line.row, end - len(line.tokens), end, line.start)
            for line, end in zip(lines, ends, strict=True)
            if len(line.tokens) > 1
        ]
        short = [i for i, line in enumerate(lines) if len(line.tokens) == 1]
        decoding = [lines[i].row for i in short]
        self._short = feed.last[short]  # [n], their tokens
        self._short_rows = torch.tensor(decoding, dtype=torch.long, device=device)
        self._dense = not self._long and decoding == [*range(len(lines))]  # token i belongs to slab row i
        self._width = max(decoding, default=-1) + 1
        self._depth = max((lines[i].start for i in short), default=-1) + 1
        lengths = torch.ones(self._width, dtype=torch.long, device=device)  # an idle row sees one key: no NaN
        lengths[self._short_rows] = feed.positions[self._short] + 1
        hidden = torch.arange(self._depth, device=device)[None] >= lengths[:, None]
        self._mask = torch.zeros_like(hidden, dtype=slab.data.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        slab = self.data[layer]
        new = torch.stack((key.transpose(0, 1), value.transpose(0, 1)), dim=1)  # [T, 2, kv heads, d]
        slab.view(-1, slab.shape[-1]).index_copy_(0, self._places, new.to(slab.dtype).flatten(0, 2))
        query = query.to(slab.dtype)
        if self._dense:
            return self._decode(query, slab, scale)
        out = torch.empty_like(query)
        for row, begin, end, start in self._long:
            keys, values = slab[row, :, :, : start + end - begin]
            out[:, begin:end] = causal_attention(query[:, begin:end], keys, values, scale)
        if len(self._short):
            rows = query.new_zeros(len(query), self._width, query.shape[2])
            rows[:, self._short_rows] = query[:, self._short]
            out[:, self._short] = self._decode(rows, slab, scale)[:, self._short_rows]
        return out

    def _decode(self, query: Tensor, slab: Tensor, scale: float | None) -> Tensor:
        """[heads, width, d] -> the same: the query of each row over its keys.

        Query heads that share keys become several queries of one head.
        """
        keys, values = slab[: self._width, :, :, : self._depth].unbind(1)  # [width, kv heads, depth, d]
        grouped = query.transpose(0, 1).reshape(*keys.shape[:2], -1, query.shape[2])
        attend = _by_products if products_are_faster(query.device) else scaled_dot_product_attention
        return attend(grouped, keys, values, self._mask, scale=scale).flatten(1, 2).transpose(0, 1)


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float | None) -> Tensor:
    """[rows, heads, n, d] over [rows, heads, depth, d], in products over all rows and heads at once.

    Scores are float32, as they are in torch's.
    """
    rows, heads, n, dim = query.shape
    wide = (query.float() * (scale or dim**-0.5)).flatten(0, 1)
    scores = torch.bmm(wide, key.float().flatten(0, 1).transpose(1, 2))  # [rows · heads, n, depth]
    weights = scores.view(rows, heads, n, -1).add_(mask).softmax(-1).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view_as(query)


def _zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU they take memory only where they are written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
