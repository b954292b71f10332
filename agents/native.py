"""NativeForward: passes of a Llama-like model in C, see compiler."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .acceptance import bring_attention
from .compiler import KEYS, Sizes, library_for
from .forward import Forward, LlamaForward, TransformersForward, is_plain_llama, slab_shape
from .kv import Feed, KVSlab, Line

SOURCE = Path(__file__).with_name("native.c")
CHUNK = 256  # tokens of a pass at a time: what is computed of them stays in the cache


def forward_for(model: PreTrainedModel, dtype: torch.dtype) -> Forward:
    """NativeForward, where there is a C compiler, or LlamaForward, if they compute the model exactly; else
    TransformersForward."""
    bring_attention(model)
    if not is_plain_llama(model):
        return TransformersForward(model, dtype)
    library = library_for(SOURCE, model, dtype, "sampling takes up to three times as long")
    return NativeForward(model, dtype, library) if library else LlamaForward(model, dtype)


class TiledSlab(KVSlab):
    """A slab whose heads lie as native.c multiplies them."""

    together = KEYS

    def __init__(self, library: CDLL, layers: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(layers, kv_heads, dim, dtype, torch.device("cpu"))
        self._library = library

    def write(self, row: int, start: int, span: Tensor) -> None:
        self._move(row, start, span.to(self.data.dtype).contiguous(), store=True)

    def read(self, row: int, start: int, end: int) -> Tensor:
        layers, _, two, kv_heads, _, dim = self.data.shape
        span = self.data.new_empty(layers, two, kv_heads, end - start, dim)
        self._move(row, start, span, store=False)
        return span

    def _move(self, row: int, start: int, span: Tensor, *, store: bool) -> None:
        layers, rows, _, _, capacity, _ = self.data.shape
        slab = self.data.data_ptr(), rows, capacity
        self._library.move_span(
            torch.get_num_threads(), layers, *slab, row, start, span.shape[3], span.data_ptr(), store
        )


class NativeForward(LlamaForward):
    """LlamaForward in C. What a token gets does not depend, to the bit, on what else the pass feeds, if that is finite.

    A pass must be over before refresh or release: C has the addresses of the weights.
    """

    batch_invariant: ClassVar = True

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, library: CDLL) -> None:
        library.blocks.argtypes = [c_int, c_int, c_void_p, c_float, c_int, *[c_void_p] * 7, c_int64, c_int64]
        library.logits.argtypes = [c_int, c_void_p, c_float, c_void_p, c_int, c_int, *[c_void_p] * 3]
        library.move_span.argtypes = [c_int, c_int, c_void_p, *[c_int64] * 5, c_void_p, c_int]
        library.blocks.restype = library.logits.restype = library.move_span.restype = None
        self._library, self._tile = library, c_int.in_dll(library, "tile").value
        sizes = Sizes.of(model.config, dtype)
        self._widths = max(sizes.width, sizes.heads * sizes.dim), max(sizes.qkv, sizes.hidden)
        self._outputs = len(model.lm_head.weight)
        super().__init__(model, dtype)

    def slab(self) -> KVSlab:
        return TiledSlab(self._library, *slab_shape(self._model), self.dtype)

    def refresh(self) -> None:
        super().refresh()
        self._table = torch.tensor([[a for part in layer for a in _addresses(part)] for layer in self._layers])
        self._head_table = torch.tensor(_addresses(self._head))

    def release(self) -> None:
        super().release()
        self._table = self._head_table = torch.empty(0)  # of addresses that are no longer theirs

    def _laid_out(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight as tiles [outputs / tile, inputs / step, tile] of 4 bytes, which hold `step` of them."""
        if missing := -len(weight) % self._tile:  # zeros fill the last one
            weight, bias = pad(weight, (0, 0, 0, missing)), None if bias is None else pad(bias, (0, missing))
        words = weight.view(torch.int32)
        return words.view(-1, self._tile, words.shape[1]).transpose(1, 2).contiguous(), bias

    @torch.no_grad()
    def __call__(self, slab: KVSlab, lines: Sequence[Line]) -> Tensor:
        feed = Feed(lines, slab.data.device)
        if feed.rows.max() >= slab.data.shape[1] or feed.positions.max() >= slab.data.shape[4]:
            raise IndexError(f"the slab has {slab.data.shape[1]} rows of {slab.data.shape[4]} tokens; reserve more")
        x, turns = self._embedded(feed.tokens), self._turns(feed.positions)
        threads, least, empty = torch.get_num_threads(), float(self._least), slab.data.new_empty
        one, two = (empty(min(len(x), CHUNK) * width) for width in self._widths)
        for start in range(0, len(x), CHUNK):
            chunk = [part[start : start + CHUNK] for part in (x, feed.rows, feed.positions, turns)]
            model = threads, len(self._layers), self._table.data_ptr(), least
            places = (part.data_ptr() for part in (*chunk, one, two, slab.data))
            self._library.blocks(*model, len(chunk[0]), *places, slab.data.shape[1], slab.data.shape[4])
        last = x[feed.last]
        normed, logits = empty(last.shape), empty(len(last), len(self._head[0]) * self._tile)
        head = threads, self._norm.data_ptr(), least, self._head_table.data_ptr(), logits.shape[1]
        self._library.logits(*head, len(last), last.data_ptr(), normed.data_ptr(), logits.data_ptr())
        return logits[:, : self._outputs]


def _addresses(part: Tensor | tuple[Tensor, Tensor | None]) -> list[int]:
    """Of a norm's scale, or of a linear layer's weight and bias, 0 where there is none."""
    return [part.data_ptr()] if isinstance(part, Tensor) else [0 if x is None else x.data_ptr() for x in part]
