"""Llama, Mistral and Qwen2 for training: five activations a layer are kept, and gradients are added in place.

A block is one function that keeps the input of its norm, what its first product gives and what attention gives.
Backward computes the rest again: on a CPU that takes little longer than memory takes to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ....agents.inference.cpu.compiler import library_for
from ....agents.inference.forward import is_plain_llama
from ...packing import Pack
from ..forward import Logits, Picked, embed
from .kernels import SOURCE, Kernels, NativeKernels, TorchKernels, gradient_of


def trains_in_place(model: PreTrainedModel) -> bool:
    """Whether LlamaPredict can stand in for the model's own pass: all weights are trained, none of them adapters."""
    llama: Any = model
    return (
        is_plain_llama(model)
        and all(p.requires_grad for p in model.parameters())
        and not any(part.bias is not None for x in llama.model.layers for part in (x.self_attn.o_proj, x.mlp.down_proj))
    )


class LlamaPredict:
    """Predictions by a pass of its own, computing in `dtype`; with kernels in C where there is a compiler."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, temperature: float) -> None:
        self._model: Any = model
        self._dtype = dtype
        self._temperature = temperature
        self._library = None
        if all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters()):
            self._library = library_for(SOURCE, model, dtype, "an update takes up to twice as long")

    def __call__(self, packed: Pack, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        core = self._model.model
        x = embed(core.embed_tokens, packed.tokens)
        kernels = self._kernels(packed, core.rotary_emb(x[None], packed.positions[None]))
        for layer in core.layers:
            x = _apply(_Attention, x, layer.input_layernorm, layer.self_attn, kernels)
            x = _apply(_FeedForward, x, layer.post_attention_layernorm, layer.mlp, kernels)
        picked = Picked(packed.row, packed.target, self._temperature, entropy)
        out: tuple[Tensor, Tensor] = _apply(_Head, x[packed.rows], core.norm, self._model.lm_head, kernels, picked)
        return out

    def _kernels(self, packed: Pack, tables: tuple[Tensor, Tensor]) -> Kernels:
        """tables: cosines and sines [1, T, d]."""
        config, (cos, sin) = self._model.config, (table[0] for table in tables)
        heads = config.num_attention_heads, config.num_key_value_heads, cos.shape[-1]
        if self._library:
            return NativeKernels(self._library, self._dtype, heads, packed.segments, (cos, sin))
        return TorchKernels(self._dtype, heads, packed.segments, (cos, sin))


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


class _Attention(torch.autograd.Function):
    """x + output(attention(query, key, value of norm(x)))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, block: Any, kernels: Kernels) -> Tensor:
        joint = _projected(kernels.norm(x, norm), block)
        seen, kept = kernels.attend(joint)
        ctx.save_for_backward(x, joint, seen, kept)
        ctx.norm, ctx.block, ctx.kernels = norm, block, kernels
        return x + linear(seen, block.o_proj.weight.to(kernels.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, joint, seen, kept = ctx.saved_tensors
        block, kernels, above = ctx.block, ctx.kernels, gradients[0].contiguous()
        gradient = above.to(kernels.dtype)
        _learn(kernels, [block.o_proj], gradient, seen)
        of_seen = gradient @ block.o_proj.weight.to(kernels.dtype)
        within = kernels.attend_backward(joint, seen, kept, of_seen)
        _learn(kernels, _heads(block), within, kernels.norm(x, ctx.norm))
        below = within @ _joint(_heads(block), kernels.dtype)
        return kernels.norm_backward(x, ctx.norm, below, above), None, None, None


def _heads(block: Any) -> list[nn.Linear]:
    return [block.q_proj, block.k_proj, block.v_proj]


def _projected(inputs: Tensor, block: Any) -> Tensor:
    """Queries, keys and values side by side: [T, sum of their widths]."""
    biases = [module.bias.detach().to(inputs.dtype) for module in _heads(block) if module.bias is not None]
    return linear(inputs, _joint(_heads(block), inputs.dtype), torch.cat(biases) if biases else None)


class _FeedForward(torch.autograd.Function):
    """x + down(silu(gate) * up), gate and up of norm(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, mlp: Any, kernels: Kernels) -> Tensor:
        inner = linear(kernels.norm(x, norm), _joint([mlp.gate_proj, mlp.up_proj], kernels.dtype))
        ctx.save_for_backward(x, inner)
        ctx.norm, ctx.mlp, ctx.kernels = norm, mlp, kernels
        return x + linear(kernels.gate(inner), mlp.down_proj.weight.to(kernels.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, inner = ctx.saved_tensors
        mlp, kernels, above = ctx.mlp, ctx.kernels, gradients[0].contiguous()
        modules, gradient = [mlp.gate_proj, mlp.up_proj], above.to(kernels.dtype)
        opened, within = kernels.gate_backward(inner, gradient @ mlp.down_proj.weight.to(kernels.dtype))
        _learn(kernels, [mlp.down_proj], gradient, opened)
        _learn(kernels, modules, within, kernels.norm(x, ctx.norm))
        below = within @ _joint(modules, kernels.dtype)
        return kernels.norm_backward(x, ctx.norm, below, above), None, None, None


class _Head(torch.autograd.Function):
    """Log-probabilities [P] and entropies [R] after the last norm and the output layer, at [R, width].

    The logits, the widest of all tensors, are never in memory as a whole.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Any, head: nn.Linear, kernels: Kernels, picked: Picked
    ) -> tuple[Tensor, Tensor]:
        logits = _logits(kernels.norm(x, norm), _columns(head, kernels.dtype))
        logprobs, total, entropies = picked.of(logits, head.out_features)
        ctx.save_for_backward(x, total, entropies)
        ctx.norm, ctx.head, ctx.kernels, ctx.picked = norm, head, kernels, picked
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, *sums = ctx.saved_tensors
        kernels, weight = ctx.kernels, ctx.head.weight
        inputs, weights = kernels.norm(x, ctx.norm), _columns(ctx.head, kernels.dtype)
        below = torch.zeros_like(x)
        for columns, part in ctx.picked.gradient(_logits(inputs, weights), len(weight), *sums, *gradients):
            kernels.learn(gradient_of(weight)[columns], part, inputs)
            below += part @ weights(columns)
        gradient = below.to(kernels.dtype)
        return kernels.norm_backward(x, ctx.norm, gradient, torch.zeros_like(x)), None, None, None, None


def _logits(inputs: Tensor, weights: Callable[[slice], Tensor]) -> Logits:
    return lambda columns: linear(inputs, weights(columns))


def _columns(head: nn.Linear, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """The weights of some columns of logits; the last ones that were asked for are kept."""
    cast = lru_cache(1)(lambda start, stop: head.weight.detach()[start:stop].to(dtype))
    return lambda columns: cast(columns.start, columns.stop)


def _joint(modules: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor:
    """Their weights side by side, in one pass over them."""
    sizes = [module.out_features for module in modules]
    joint = modules[0].weight.new_empty(sum(sizes), modules[0].in_features, dtype=dtype)
    for part, module in zip(torch.split(joint, sizes), modules, strict=True):
        part.copy_(module.weight.detach())
    return joint


def _learn(kernels: Kernels, modules: Sequence[nn.Linear], gradient: Tensor, inputs: Tensor) -> None:
    """Adds the gradients of layers side by side: gradient [T, outputs], inputs [T, width]."""
    parts = torch.split(gradient, [module.out_features for module in modules], dim=-1)
    for module, part in zip(modules, parts, strict=True):
        kernels.learn(gradient_of(module.weight), part, inputs)
        if module.bias is not None:
            gradient_of(module.bias).add_(part.sum(0))
