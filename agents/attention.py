"""Attention that a caller brings along: how unmodified transformers models run on trees.

A model switched to this attention (`bring_attention`) hands the queries, keys and values of each
layer to the `attend` given to its forward call. The sampler's attend reads a KV slab; the learner's
lets each tree segment see its ancestors.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

_NAME = "treegym"


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
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}={options[name]}; trees need plain attention")
    layer: Any = module.layer_idx
    out = attend(layer, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(_NAME, _brought)


def bring_attention(model: PreTrainedModel) -> None:
    """Switches the model to brought attention. Raises ValueError for models that cannot run on trees.

    Needed: positions only through position_ids (rotary or absolute), full causal attention.
    A small forked sequence is run both ways to prove it.
    """
    if model.config._attn_implementation == _NAME:
        return
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{name} has attention of its own; treegym runs causal models with rotary or absolute positions"
        )
    tokens = torch.arange(6, device=model.device) + 1
    with torch.no_grad():
        expected = model(input_ids=tokens[None], use_cache=False).logits[0]
        model.set_attn_implementation(_NAME)
        try:
            logits = tree_logits(model, tokens, torch.arange(6, device=model.device), CausalAttend())
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{name} cannot run on trees: {error}") from error
    if not torch.allclose(logits.float(), expected.float(), atol=0.05, rtol=0.05):
        raise ValueError(f"{name} computes other logits on a packed sequence than on a plain one")


class CausalAttend:
    """Plain causal attention: the simplest attend."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return grouped_attention(query, key, value, causal_mask(query.shape[1], key.shape[1], query), scale)


def causal_mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """[queries, keys] additive: the last query sees all keys, each earlier one a key less."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """query [heads, T, d], key and value [kv heads, S, d], additive mask [T, S] -> [heads, T, d].

    Query heads share key heads and all of them the mask by views: nothing is copied, so that no copy is kept for
    backward.
    """
    kv_heads, groups = len(key), len(query) // len(key)
    queries = query.view(kv_heads, groups, *query.shape[1:])
    keys, values = (x[:, None].expand(-1, groups, -1, -1) for x in (key, value))
    return scaled_dot_product_attention(queries, keys, values, mask, scale=scale).flatten(0, 1)


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
