"""KVSlab: keys and values of the rows that a sampler works on; its attention."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import causal_mask, grouped_attention


@dataclass(frozen=True, slots=True)
class Line:
    """Tokens to run through the model at the end of a slab row."""

    row: int
    start: int  # tokens the row holds already
    tokens: Sequence[int]


class KVSlab:
    """[layers, 2, rows, kv heads, capacity, d]: a row holds one context's keys and values; made larger as needed."""

    def __init__(self, layers: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._zeros = partial(_zeros, dtype=dtype, device=device)
        self._empty = (layers, 2, 0, kv_heads, 0, dim)
        self.clear()

    def clear(self) -> None:
        """Gives its memory back; no row holds anything any more."""
        self.data = self._zeros(self._empty)

    def reserve(self, rows: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Makes room for this many rows of this many tokens; of what was written, `keep` stays: (row, tokens)."""
        layers, two, have, kv_heads, length, dim = self.data.shape
        if rows <= have and capacity <= length:
            return
        grown = self._zeros((layers, two, max(rows, have), kv_heads, max(capacity, length), dim))
        for row, n in keep:
            grown[:, :, row, :, :n] = self.data[:, :, row, :, :n]
        self.data = grown

    def write(self, row: int, start: int, span: Tensor) -> None:
        """Puts a span [layers, 2, kv heads, n, d] at tokens start … start + n."""
        self.data[:, :, row, :, start : start + span.shape[3]] = span

    def read(self, row: int, start: int, end: int) -> Tensor:
        """A copy of tokens start … end: [layers, 2, kv heads, end - start, d]."""
        return self.data[:, :, row, :, start:end].clone()

    def copy(self, source: int, target: int, length: int) -> None:
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]


class SlabAttend:
    """Attention of lines over their slab rows; lines of one token (decoding) in one batch."""

    def __init__(self, slab: KVSlab, lines: Sequence[Line]) -> None:
        self.data = slab.data
        device = slab.data.device
        rows = [line.row for line in lines for _ in line.tokens]
        positions = [line.start + i for line in lines for i in range(len(line.tokens))]
        self.rows = torch.tensor(rows, device=device)
        self.positions = torch.tensor(positions, device=device)
        ends = torch.tensor([len(line.tokens) for line in lines], device=device).cumsum(0)
        self.last = ends - 1  # [lines], each line's last token
        self._long = [
            (line.row, int(end) - len(line.tokens), int(end), line.start)
            for line, end in zip(lines, ends.tolist(), strict=True)
            if len(line.tokens) > 1
        ]
        short = [i for i, line in enumerate(lines) if len(line.tokens) == 1]
        self._short = self.last[short]  # [n] token indices
        self._short_rows = self.rows[self._short]
        self._width = max((lines[i].row for i in short), default=-1) + 1
        self._depth = max((lines[i].start for i in short), default=-1) + 1
        lengths = torch.ones(self._width, dtype=torch.long, device=device)  # an idle row sees one key: no NaN
        lengths[self._short_rows] = self.positions[self._short] + 1
        hidden = torch.arange(self._depth, device=device)[None] >= lengths[:, None]
        self._mask = hidden[:, None, None].to(self.data.dtype).masked_fill_(hidden[:, None, None], float("-inf"))
        self._masks = [causal_mask(end - begin, start + end - begin, self.data) for _, begin, end, start in self._long]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        keys, values = self.data[layer]  # [rows, kv heads, capacity, d]
        keys[self.rows, :, self.positions] = key.transpose(0, 1).to(keys.dtype)
        values[self.rows, :, self.positions] = value.transpose(0, 1).to(keys.dtype)
        query = query.to(keys.dtype)
        out = torch.empty_like(query)
        for (row, begin, end, start), mask in zip(self._long, self._masks, strict=True):
            seen = start + end - begin
            out[:, begin:end] = grouped_attention(
                query[:, begin:end], keys[row, :, :seen], values[row, :, :seen], mask, scale
            )
        if len(self._short):
            out[:, self._short] = self._decode(query[:, self._short], keys, values, scale)
        return out

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        heads, count, dim = query.shape
        kv_heads = keys.shape[1]
        rows = query.new_zeros(self._width, kv_heads, heads // kv_heads, dim)
        rows[self._short_rows] = query.transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, dim)
        depth = self._depth
        out = scaled_dot_product_attention(
            rows, keys[: self._width, :, :depth], values[: self._width, :, :depth], self._mask, scale=scale
        )
        return out[self._short_rows].reshape(count, heads, dim).transpose(0, 1)


def _zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU they take memory only where they are written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
