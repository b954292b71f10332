"""Llama, Mistral and Qwen2 for training: five activations a layer are kept, and gradients are added in place.

A block is one function that keeps the input of its norm, what its first product gives and what attention gives.
Backward computes the rest again: on a CPU that takes little longer than memory takes to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from ..agents import is_plain_llama, rotate
from ..agents.compiler import library_for
from .forward import Logits, Picked, embed
from .native import SOURCE, NativeAttend
from .packing import Pack, Segment, TreeAttend


def trains_in_place(model: PreTrainedModel) -> bool:
    """Whether LlamaPredict can stand in for the model's own pass: all weights are trained, none of them adapters."""
    found: Any = model
    return (
        is_plain_llama(model)
        and all(p.requires_grad for p in model.parameters())
        and not any(layer.mlp.down_proj.bias is not None for layer in found.model.layers)
    )


class LlamaPredict:
    """By a pass of its own, computing in `dtype`; on a CPU, attention is in C where there is a compiler."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, temperature: float) -> None:
        self._model: Any = model
        self._dtype = dtype
        self._temperature = temperature
        self._library = library_for(SOURCE, model, dtype, "an update takes up to twice as long")

    def __call__(self, packed: Pack, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        core = self._model.model
        x = embed(core.embed_tokens, packed.tokens)
        attend = self._attend(packed, core.rotary_emb(x[None], packed.positions[None]))
        for layer in core.layers:
            x = x + _apply(_Attention, x, layer.input_layernorm, layer.self_attn, attend, self._dtype)
            x = x + _apply(_FeedForward, x, layer.post_attention_layernorm, layer.mlp, self._dtype)
        picked = Picked(packed.row, packed.target, self._temperature, entropy)
        found: tuple[Tensor, Tensor] = _apply(
            _Head, x[packed.rows], core.norm, self._model.lm_head, self._dtype, picked
        )
        return found

    def _attend(self, packed: Pack, tables: tuple[Tensor, Tensor]) -> JointAttend:
        """`tables` are cosines and sines [1, T, d], the second half of each as the first."""
        config, (cos, sin) = self._model.config, (table[0] for table in tables)
        heads = config.num_attention_heads, config.num_key_value_heads, cos.shape[-1]
        if self._library:
            half = heads[2] // 2
            return NativeAttend(self._library, heads, packed.segments, (cos[:, :half], sin[:, :half]))
        return TorchAttend(heads, packed.segments, (cos.to(self._dtype), sin.to(self._dtype)))


class JointAttend(Protocol):
    """Attention of queries, keys and values that lie side by side and are not turned yet: joint [T, QKV]."""

    def __call__(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """seen [T, heads * d], and what else the gradient is computed from."""
        ...

    def gradient(self, gradient: Tensor, joint: Tensor, seen: Tensor, kept: Tensor) -> Tensor:
        """That of joint, from that of seen."""
        ...


class TorchAttend:
    """With torch, on any device and in any dtype."""

    def __init__(self, heads: tuple[int, int, int], segments: Sequence[Segment], tables: tuple[Tensor, Tensor]) -> None:
        """heads: query heads, those of keys, and the width d of one; tables: cosines and sines [T, d]."""
        self._query_heads, self._kv_heads, self._dim = heads
        self._tables, self._attend = tables, TreeAttend(segments)

    def __call__(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        return _flat(self._attend(0, *self._turned(joint), None)), joint.new_empty(0)

    def gradient(self, gradient: Tensor, joint: Tensor, seen: Tensor, kept: Tensor) -> Tensor:
        cos, sin = self._tables
        query, key, value = self._attend.gradients(self._by_head(gradient), *self._turned(joint), None)
        return _flat(torch.cat([rotate(query, cos, -sin), rotate(key, cos, -sin), value]))

    def _turned(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, and values: [heads, T, d] each."""
        query, key, value = torch.split(self._by_head(joint), [self._query_heads, self._kv_heads, self._kv_heads])
        return rotate(query, *self._tables), rotate(key, *self._tables), value

    def _by_head(self, x: Tensor) -> Tensor:
        """[T, heads * d] -> [heads, T, d]."""
        return x.view(len(x), -1, self._dim).transpose(0, 1)


def _flat(heads: Tensor) -> Tensor:
    """[heads, T, d] -> [T, heads * d]."""
    return heads.transpose(0, 1).flatten(1)


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


class _Attention(torch.autograd.Function):
    """The attention block after its norm: output(attention(rotated query, rotated key, value))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, block: Any, attend: JointAttend, dtype: torch.dtype) -> Tensor:
        joint = _projected(_normed(x, norm, dtype), block)
        seen, kept = attend(joint)
        ctx.save_for_backward(x, joint, seen, kept)
        ctx.norm, ctx.block, ctx.attend, ctx.dtype = norm, block, attend, dtype
        return linear(seen, block.o_proj.weight.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, joint, seen, kept = ctx.saved_tensors
        block, gradient = ctx.block, gradients[0].to(ctx.dtype)
        _learn([block.o_proj], gradient, seen)
        within = ctx.attend.gradient(gradient @ block.o_proj.weight.to(ctx.dtype), joint, seen, kept)
        _learn(_heads(block), within, _normed(x, ctx.norm, ctx.dtype))
        below = (within @ _joint(_heads(block), ctx.dtype)).to(x.dtype)
        return _norm_backward(x, ctx.norm, below), None, None, None, None


def _heads(block: Any) -> list[nn.Linear]:
    return [block.q_proj, block.k_proj, block.v_proj]


def _projected(inputs: Tensor, block: Any) -> Tensor:
    """Queries, keys and values side by side: [T, sum of their widths]."""
    biases = [module.bias.detach().to(inputs.dtype) for module in _heads(block) if module.bias is not None]
    return linear(inputs, _joint(_heads(block), inputs.dtype), torch.cat(biases) if biases else None)


class _FeedForward(torch.autograd.Function):
    """The gated block after its norm: down(silu(gate(x)) * up(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, mlp: Any, dtype: torch.dtype) -> Tensor:
        inner = linear(_normed(x, norm, dtype), _joint([mlp.gate_proj, mlp.up_proj], dtype))
        gate, up = inner.chunk(2, dim=-1)
        ctx.save_for_backward(x, inner)
        ctx.norm, ctx.mlp, ctx.dtype = norm, mlp, dtype
        return linear(silu(gate).mul_(up), mlp.down_proj.weight.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, inner = ctx.saved_tensors
        mlp, gradient = ctx.mlp, gradients[0].to(ctx.dtype)
        modules, within = [mlp.gate_proj, mlp.up_proj], torch.empty_like(inner)
        (gate, up), (of_gate, of_up) = inner.chunk(2, dim=-1), within.chunk(2, dim=-1)
        opened = silu(gate)
        _learn([mlp.down_proj], gradient, opened * up)
        between = gradient @ mlp.down_proj.weight.to(ctx.dtype)
        torch.mul(between, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(between.mul_(up), gate, grad_input=of_gate)
        _learn(modules, within, _normed(x, ctx.norm, ctx.dtype))
        return _norm_backward(x, ctx.norm, (within @ _joint(modules, ctx.dtype)).to(x.dtype)), None, None, None


class _Head(torch.autograd.Function):
    """Log-probabilities [P] and entropies [R] after the last norm and the output layer, at [R, width].

    The logits, of all tensors the widest, are never all there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Any, head: nn.Linear, dtype: torch.dtype, picked: Picked
    ) -> tuple[Tensor, Tensor]:
        logits = _logits(_normed(x, norm, dtype), _columns(head, dtype))
        logprobs, total, entropies = picked.of(logits, head.out_features)
        ctx.save_for_backward(x, total, entropies)
        ctx.norm, ctx.head, ctx.dtype, ctx.picked = norm, head, dtype, picked
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, *found = ctx.saved_tensors
        inputs, weight = _normed(x, ctx.norm, ctx.dtype), ctx.head.weight
        weights = _columns(ctx.head, ctx.dtype)
        below = torch.zeros_like(x)
        for columns, part in ctx.picked.gradient(_logits(inputs, weights), len(weight), *found, *gradients):
            _gradient(weight)[columns] += part.T @ inputs
            below += part @ weights(columns)
        return _norm_backward(x, ctx.norm, below), None, None, None, None


def _logits(inputs: Tensor, weights: Callable[[slice], Tensor]) -> Logits:
    return lambda columns: linear(inputs, weights(columns))


def _columns(head: nn.Linear, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """The weights of some columns of logits; those asked for last are kept."""
    cast = lru_cache(1)(lambda start, stop: head.weight.detach()[start:stop].to(dtype))
    return lambda columns: cast(columns.start, columns.stop)


def _joint(modules: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor:
    """Their weights side by side, in one pass over them."""
    sizes = [module.out_features for module in modules]
    joint = modules[0].weight.new_empty(sum(sizes), modules[0].in_features, dtype=dtype)
    for part, module in zip(torch.split(joint, sizes), modules, strict=True):
        part.copy_(module.weight.detach())
    return joint


def _normed(x: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """RMSNorm, in fewer passes over x [T, width] than torch's."""
    return (x * _scale(x, norm)).mul_(norm.weight.detach()).to(dtype)


def _scale(x: Tensor, norm: Any) -> Tensor:
    """1 / sqrt(mean(x²) + eps), as sqrt(width) / hypot(|x|, sqrt(width eps)): [T, 1]."""
    width = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    least = length.new_tensor((width * norm.variance_epsilon) ** 0.5)
    return torch.hypot(length, least).reciprocal_().mul_(width**0.5)


def _norm_backward(x: Tensor, norm: Any, gradient: Tensor) -> Tensor:
    """Adds the norm's own gradient; the gradient [T, width] of its input."""
    weight, scale = norm.weight.detach(), _scale(x, norm)
    unit = x * scale
    product = gradient * unit
    _add(norm.weight, product.sum(0))
    along = torch.mv(product, weight).div_(-x.shape[-1])[:, None]
    return torch.addcmul(gradient * weight, unit, along).mul_(scale)


def _learn(modules: Sequence[nn.Linear], gradient: Tensor, inputs: Tensor) -> None:
    """Adds the gradients of layers side by side: gradient [T, outputs], inputs [T, width]."""
    parts = torch.split(gradient, [module.out_features for module in modules], dim=-1)
    for module, part in zip(modules, parts, strict=True):
        weight = module.weight
        if weight.grad is None or weight.dtype != part.dtype:
            _add(weight, part.T @ inputs)
        else:
            weight.grad.addmm_(part.T, inputs)
        if module.bias is not None:
            _add(module.bias, part.sum(0))


def _add(parameter: Tensor, gradient: Tensor) -> None:
    _gradient(parameter).add_(gradient)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
