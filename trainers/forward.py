"""The learner's forward pass: log-probabilities of a pack's predictions, of any causal model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..agents import bring_attention, tree_logits
from .packing import Pack, TreeAttend

ROWS = 64  # of logits worked on at a time


def logprobs_for(model: PreTrainedModel, dtype: torch.dtype, temperature: float) -> Callable[[Pack], Tensor]:
    """What gives the log-probabilities [P], nats, of a pack: the leaner way where it computes the model exactly."""
    from .llama import LlamaLogprobs, trains_in_place

    bring_attention(model)
    return (LlamaLogprobs if trains_in_place(model) else TransformersLogprobs)(model, dtype, temperature)


class TransformersLogprobs:
    """By the model's own forward, computing in `dtype`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, temperature: float) -> None:
        self._model: Any = model
        self._dtype = dtype
        self._temperature = temperature

    def __call__(self, packed: Pack) -> Tensor:
        """[P], nats."""
        device = self._model.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype == torch.bfloat16):
            tokens = embed(self._model.get_input_embeddings(), packed.tokens)
            logits = tree_logits(self._model, tokens, packed.positions, TreeAttend(packed.segments), packed.rows)
        return cast(Tensor, _Pick.apply(logits, packed.row, packed.target, self._temperature))  # type: ignore[no-untyped-call]


def embed(embedding: nn.Module, tokens: Tensor) -> Tensor:
    """Embeddings [T, width] of tokens [T]; the tokens themselves where the embedding is not a plain trained table."""
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad:
        return cast(Tensor, _Embed.apply(torch.empty(0, requires_grad=True), embedding, tokens))  # type: ignore[no-untyped-call]
    return tokens


class _Embed(torch.autograd.Function):
    """A look-up that adds to its table's gradient in place.

    Autograd's own makes a gradient of the size of the table in every pass and, where the table is the output layer
    too, keeps that layer's waiting for it while the pass needs the most memory.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """`anchor` requires a gradient, and so makes autograd come back here."""
        ctx.embedding, ctx.tokens = embedding, tokens
        return embedding.weight.detach()[tokens]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        weight, padding = ctx.embedding.weight, ctx.embedding.padding_idx
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        learnt = slice(None) if padding is None else ctx.tokens != padding
        weight.grad.index_add_(0, ctx.tokens[learnt], gradients[0][learnt].to(weight.dtype))
        return None, None, None


def pick_logprobs(logits: Tensor, row: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-softmax of logits [R, vocabulary] at entries (row [P], target [P]), in at least float32: [P], and the log
    of the normaliser [R]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = torch.cat([(part.to(dtype) / temperature).logsumexp(-1) for part in torch.split(logits, ROWS)])
    return logits[row, target].to(dtype) / temperature - total[row], total


def gradient_of_logits(
    logits: Tensor, total: Tensor, gradient: Tensor, row: Tensor, target: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """The gradient of logits, some rows at a time, from that of what `pick_logprobs` gave, gradient [P]."""
    gradient = gradient / temperature
    summed = torch.zeros_like(total).index_add_(0, row, gradient)
    for start in range(0, len(logits), ROWS):
        rows, own = slice(start, start + ROWS), (row >= start) & (row < start + ROWS)
        part = (logits[rows].to(total.dtype) / temperature - total[rows, None]).exp_().mul_(-summed[rows, None])
        part.index_put_((row[own] - start, target[own]), gradient[own], accumulate=True)  # before any rounding
        yield rows, part.to(logits.dtype)


class _Pick(torch.autograd.Function):
    """pick_logprobs without a second [R, vocabulary] of at least float32 in memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: Tensor, target: Tensor, temperature: float) -> Tensor:
        logprobs, total = pick_logprobs(logits, row, target, temperature)
        ctx.save_for_backward(logits, total, row, target)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, total, row, target = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows, part in gradient_of_logits(logits, total, gradients[0], row, target, ctx.temperature):
            out[rows] = part
        return out, None, None, None
