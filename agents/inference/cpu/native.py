"""NativeForward: passes of a Llama-like model in C, see compiler."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..acceptance import bring_attention
from ..forward import Forward, LlamaForward, TransformersForward, is_plain_llama, slab_shape
from ..kv import Feed, KVSlab, Line
from .compiler import KEYS, Array, Library, Source, floats, library_for, pointers, reals

LAYER = 10  # pointers of a layer: two norms, and the weights and biases of four linear layers
SLAB = reals("layers", "slab_rows", 2, "kv_heads", "capacity", "dim")
SOURCE = Source(
    Path(__file__).with_name("native.c"),
    {
        "blocks": {
            "layers": c_int,
            "model": pointers("layers", LAYER),
            "least": c_float,
            "n": c_int,
            "x": floats("n", "width"),
            "rows": Array(torch.int64, ("n",)),
            "positions": Array(torch.int64, ("n",)),
            "turns": Array(torch.complex64, ("n", "pairs")),
            "one": reals("n", "wider"),
            "two": reals("n", "widest"),
            "slab": SLAB,
            "slab_rows": c_int64,
            "capacity": c_int64,
        },
        "logits": {
            "norm": floats("width"),
            "least": c_float,
            "head": pointers(1, 2),
            "outputs": c_int,
            "n": c_int,
            "x": floats("n", "width"),
            "one": reals("n", "width"),
            "out": reals("n", "outputs"),
        },
        "move_span": {
            "layers": c_int,
            "slab": SLAB,
            "slab_rows": c_int64,
            "capacity": c_int64,
            "row": c_int64,
            "start": c_int64,
            "n": c_int64,
            "span": reals("layers", 2, "kv_heads", "n", "dim"),
            "store": c_int,
        },
    },
)
CHUNK = 256  # tokens of a pass at a time: what is computed of them stays in the cache


def forward_for(model: PreTrainedModel, dtype: torch.dtype) -> Forward:
    """TransformersForward, unless the leaner ones compute the model exactly: then NativeForward, or LlamaForward where
    there is no C compiler or torch was chosen."""
    bring_attention(model)
    library = library_for(SOURCE, model, dtype, "sampling takes up to three times as long")
    if not is_plain_llama(model):
        return TransformersForward(model, dtype)
    return NativeForward(model, dtype, library) if library else LlamaForward(model, dtype)


class TiledSlab(KVSlab):
    """A slab whose heads lie as native.c multiplies them."""

    together = KEYS

    def __init__(self, library: Library, layers: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
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
        _check_room(self, row, start + span.shape[3] - 1)
        self._library.call("move_span", self.data, row, start, span, store)


def _check_room(slab: KVSlab, row: int, position: int) -> None:
    """IndexError where the slab has no such row or position."""
    rows, capacity = slab.data.shape[1], slab.data.shape[4]
    if row >= rows or position >= capacity:
        raise IndexError(f"the slab has {rows} rows of {capacity} tokens; reserve more")


class NativeForward(LlamaForward):
    """LlamaForward in C. A token's logits do not depend, to the bit, on the other lines of the pass, as long as those
    stay finite."""

    batch_invariant: ClassVar = True
    kernels: ClassVar = "C"

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, library: Library) -> None:
        self._library, self._tile = library, library.constant("tile")
        self._outputs = len(model.lm_head.weight)
        super().__init__(model, dtype)

    def slab(self) -> KVSlab:
        return TiledSlab(self._library, *slab_shape(self._model), self.dtype)

    def refresh(self) -> None:
        super().refresh()
        sizes, outputs = self._library.sizes, len(self._head[0]) * self._tile
        of_layer = [
            floats("width"),
            *self._linear(sizes.qkv, sizes.width),
            *self._linear(sizes.width, sizes.heads * sizes.dim),
            floats("width"),
            *self._linear(2 * sizes.hidden, sizes.width),
            *self._linear(sizes.width, sizes.hidden),
        ]
        self._table = self._library.table("layer", [_flat(layer) for layer in self._layers], of_layer)
        self._head_table = self._library.table("output layer", [self._head], self._linear(outputs, sizes.width))

    def release(self) -> None:
        super().release()
        nothing: Any = None
        self._table = self._head_table = nothing

    def _linear(self, outputs: int, inputs: int) -> tuple[Array, Array]:
        """What C takes for a linear layer: its weight, as _laid_out lays it out, and its bias."""
        words = inputs * self._library.sizes.dtype.itemsize // 4
        return Array(torch.int32, (outputs // self._tile, words, self._tile)), reals(outputs)

    def _laid_out(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight as tiles [outputs / tile, inputs / step, tile] of words of 4 bytes, each with `step` inputs."""
        if missing := -len(weight) % self._tile:  # zeros fill the last tile
            weight, bias = pad(weight, (0, 0, 0, missing)), None if bias is None else pad(bias, (0, missing))
        words = weight.view(torch.int32)
        return words.view(-1, self._tile, words.shape[1]).transpose(1, 2).contiguous(), bias

    @torch.no_grad()
    def __call__(self, slab: KVSlab, lines: Sequence[Line]) -> Tensor:
        feed = Feed(lines, slab.data.device)
        _check_room(slab, int(feed.rows.max()), int(feed.positions.max()))
        x, turns = self._embedded(feed.tokens), self._turns(feed.positions)
        library, least, empty = self._library, float(self._least), slab.data.new_empty
        names = library.sizes.named()
        one, two = (empty(min(len(x), CHUNK), names[width]) for width in ("wider", "widest"))
        for start in range(0, len(x), CHUNK):
            chunk = [part[start : start + CHUNK] for part in (x, feed.rows, feed.positions, turns)]
            room = (part[: len(chunk[0])] for part in (one, two))
            library.call("blocks", self._table, least, *chunk, *room, slab.data)
        last = x[feed.last]
        logits = empty(len(last), len(self._head[0]) * self._tile)
        library.call("logits", self._norm, least, self._head_table, last, empty(last.shape), logits)
        return logits[:, : self._outputs]


def _flat(layer: Sequence[Tensor | tuple[Tensor, Tensor | None]]) -> list[Tensor | None]:
    """Norms' scales and linear layers' weights and biases, one after the other."""
    return [x for part in layer for x in ((part,) if isinstance(part, Tensor) else part)]
