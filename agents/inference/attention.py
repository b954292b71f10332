"""Attention that a caller brings along: how unmodified transformers models run on trees.

A model switched to this attention (`acceptance.bring_attention`) hands the queries, keys and values of each
layer to the `attend` given to its forward call. The sampler's attend reads a KV slab; the learner's
lets each tree segment see its ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

BROUGHT = "treegym"  # the name of this attention to transformers
BLOCK = 256  # queries at a time, on a CPU


class Attend(Protocol):
    """Attention of one layer over the T tokens of a pass."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [heads, T, d], key and value [kv heads, T, d] -> [heads, T, d]."""
        ...


def _brought(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, kv heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    attend: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    for name in ("softcap", "s_aux"):  # a sliding window is plain attention up to its length
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}; trees need plain attention")
    layer: Any = module.layer_idx
    out = attend(layer, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(BROUGHT, _brought)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """query [heads, T, d], key and value [kv heads, S, d] -> [heads, T, d]; grouped heads share keys and values.

    The last query sees all S keys, each earlier one a key less.
    """
    if query.device.type == "cpu":
        return block_attention(query, key, value, scale, _causal(query.shape[1], key.shape[1], BLOCK))
    mask = _mask(query.shape[1], key.shape[1], value.dtype, query.device)
    return _fused(query.to(value.dtype), key.to(value.dtype), value, mask, scale)


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries, the keys that any of them sees, and which sees which."""

    rows: slice  # n queries
    keys: tuple[slice, ...]  # K in all
    mask: Tensor  # float32 [n, m], of the last m of the keys: 0 where a query sees a key, else -inf


def block_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Sequence[Block]) -> Tensor:
    """query [heads, T, d], key and value [kv heads, S, d] -> [heads, T, d], on a CPU; each query is in one block."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation leaves float32
    with torch.autocast("cpu", enabled=False):
        return _Blocks.apply(query, key, value, scale, blocks)  # type: ignore[no-untyped-call,no-any-return]


def block_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Sequence[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, which have one dtype, from that of block_attention's result."""
    of_query, scale = torch.empty_like(query), scale or query.shape[2] ** -0.5
    wide = torch.promote_types(key.dtype, torch.float32)
    of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    for block in blocks:
        rows, keys, values = block.rows, _gathered(key, block), _gathered(value, block)
        weights = _weights(query[:, rows], keys, block.mask, scale)
        queries, gradients = (x[:, rows].reshape(len(key), -1, x.shape[2]) for x in (query, gradient))
        _scatter(of_value, block, torch.bmm(weights.mT, gradients))
        of_weights = torch.bmm(gradients, values.mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query[:, rows] = torch.bmm(of_scores, keys * scale).view_as(query[:, rows])
        _scatter(of_key, block, torch.bmm(of_scores.mT, queries * scale))
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def runs_flexible(query: Tensor) -> bool:
    """Whether FlexAttention has kernels for the queries: on CUDA, in at most float32, heads at least 16 wide."""
    return query.device.type == "cuda" and query.dtype != torch.float64 and query.shape[-1] >= 16


def flexible_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: BlockMask) -> Tensor:
    """query [heads, T, d], key and value [kv heads, T, d] -> [heads, T, d]: FlexAttention over what the mask shows."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation leaves float32
    given = query[None], key[None], value[None]
    out: Tensor = _compiled_flex()(*given, block_mask=mask, scale=scale, enable_gqa=True)
    return out[0]


@cache
def _compiled_flex() -> Any:
    """Torch compiles it for the first number of tokens that it meets, and once more for any number."""
    return torch.compile(flex_attention)


@lru_cache(64)  # the layers of a pass share them
@torch.inference_mode(False)
def _causal(queries: int, keys: int, size: int) -> tuple[Block, ...]:
    blocks = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        later = torch.full((end - start, end - start), float("-inf")).triu_(1)
        blocks.append(Block(slice(start, end), (slice(0, keys - queries + end),), later))
    return tuple(blocks)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention by torch's own; query heads share keys and the mask by views."""
    grouped = query.view(len(key), -1, *query.shape[1:])
    keys, values = (x[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (key, value))
    return scaled_dot_product_attention(grouped, keys, values, mask, scale=scale).flatten(0, 1)


def products_are_faster(device: torch.device) -> bool:
    """Whether plain matrix products are faster than torch's attention, which multiplies a few rows of one head at a
    time: on a CPU it takes 1.5 times as long as they do, on one that multiplies tiles (AMX) half as long."""
    return device.type == "cpu" and not torch.cpu._is_amx_tile_supported()


@lru_cache(64)  # the layers of a pass share it
@torch.inference_mode(False)  # so may a learner, whose autograd takes no inference tensors
def _mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((queries, keys), float("-inf"), dtype=dtype, device=device).triu_(keys - queries + 1)


class _Blocks(torch.autograd.Function):
    """Attention on a CPU, one block of queries and the keys that they see at a time; see block_attention.

    The gradients come from matrix products. Forward and backward together take half as long as torch's own attention in
    bfloat16, and about as long in float32. As in torch's own, scores are at least float32, all else is of the queries'
    dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Sequence[Block]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.blocks = scale, blocks
        out, products = query.new_empty(*query.shape[:2], value.shape[2]), products_are_faster(query.device)
        for block in blocks:
            queries, keys, values = query[:, block.rows], _gathered(key, block), _gathered(value, block)
            if products:
                weights = _weights(queries, keys, block.mask, scale or query.shape[2] ** -0.5)
                out[:, block.rows] = torch.bmm(weights, values).view(*queries.shape[:2], -1)
            else:
                mask = pad(block.mask, (keys.shape[1] - block.mask.shape[1], 0)).to(query.dtype)
                out[:, block.rows] = _fused(queries, keys, values, mask, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        return *block_gradients(gradients[0], query, key, value, ctx.scale, ctx.blocks), None, None


def _gathered(x: Tensor, block: Block) -> Tensor:
    """The block's keys or values [kv heads, K, d]."""
    parts = [x[:, run] for run in block.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _scatter(total: Tensor, block: Block, part: Tensor) -> None:
    """Adds `part` to the keys or values of `total` that `_gathered` takes."""
    parts = torch.split(part, [run.stop - run.start for run in block.keys], dim=1)
    for run, rows in zip(block.keys, parts, strict=True):
        total[:, run] += rows


def _weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention weights [kv heads, groups * n, K] of the queries [heads, n, d] over the keys [kv heads, K, d]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    n = query.shape[1]
    grouped = (query.to(wide) * scale).reshape(len(key), -1, query.shape[2])
    scores = torch.bmm(grouped, key.to(wide).mT)
    scores.view(len(key), -1, n, key.shape[1])[..., key.shape[1] - mask.shape[1] :].add_(mask)
    return scores.softmax(-1).to(query.dtype)


def tree_logits(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None
) -> Tensor:
    """Logits [rows, vocabulary] at the given rows (default: all) of a pass at positions [T] over tokens [T], or over
    their embeddings [T, width]."""
    keep: Any = 0 if rows is None else rows
    name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
    inputs: Any = {name: tokens[None]}
    out = model(**inputs, position_ids=positions[None], use_cache=False, logits_to_keep=keep, attend=attend)
    logits: Tensor = out.logits[0]
    return logits
