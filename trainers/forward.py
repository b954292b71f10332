"""The learner's forward pass: log-probabilities of a pack's predictions, of any causal model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..agents import bring_attention, tree_logits
from .packing import Pack, TreeAttend

ROWS = 64  # of logits worked on at a time


class Predict(Protocol):
    """A model's forward pass over a pack."""

    def __call__(self, packed: Pack, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities [P] of the predictions and, if wanted, the entropy [R] of the distribution at every row;
        nats."""
        ...


def predict_with(model: PreTrainedModel, dtype: torch.dtype, temperature: float) -> Predict:
    """The leaner way where it computes the model exactly, else the model's own."""
    from .llama import LlamaPredict, trains_in_place

    bring_attention(model)
    return (LlamaPredict if trains_in_place(model) else TransformersPredict)(model, dtype, temperature)


class TransformersPredict:
    """By the model's own forward, computing in `dtype`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, temperature: float) -> None:
        self._model: Any = model
        self._dtype = dtype
        self._temperature = temperature

    def __call__(self, packed: Pack, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        device = self._model.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype == torch.bfloat16):
            tokens = embed(self._model.get_input_embeddings(), packed.tokens)
            logits = tree_logits(self._model, tokens, packed.positions, TreeAttend(packed.segments), packed.rows)
        return _Pick.apply(logits, Picked(packed.row, packed.target, self._temperature, entropy))  # type: ignore[no-untyped-call,no-any-return]


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


@dataclass(frozen=True, slots=True)
class Picked:
    """What is wanted of logits [R, vocabulary], and its gradient; a part of the rows at a time, in at least float32."""

    row: Tensor  # [P]
    target: Tensor  # [P]
    temperature: float
    with_entropy: bool

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [P] of the targets, the log of the normaliser [R], and entropies [R] or none [0]; nats."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        parts = torch.split(logits, ROWS)
        total = torch.cat([(part.to(dtype) / self.temperature).logsumexp(-1) for part in parts])
        entropies = total.new_empty(0)
        if self.with_entropy:
            shares = [self._logprobs(logits, total, start) for start in range(0, len(logits), ROWS)]
            entropies = torch.cat([-(share.exp() * share).sum(-1) for share in shares])
        picked = logits[self.row, self.target].to(dtype) / self.temperature - total[self.row]
        return picked, total, entropies

    def gradient(
        self, logits: Tensor, total: Tensor, of_logprobs: Tensor, of_entropies: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """The gradient of the logits, some rows at a time, from those of what `of` gave."""
        of_logprobs, of_entropies = of_logprobs / self.temperature, of_entropies / self.temperature
        summed = torch.zeros_like(total).index_add_(0, self.row, of_logprobs)
        for start in range(0, len(logits), ROWS):
            rows, own = slice(start, start + ROWS), (self.row >= start) & (self.row < start + ROWS)
            logprobs = self._logprobs(logits, total, start)
            if self.with_entropy:
                shares = logprobs.exp()
                entropy = -(shares * logprobs).sum(-1, keepdim=True)
                part = shares.mul_(-summed[rows, None] - (logprobs + entropy) * of_entropies[rows, None])
            else:
                part = logprobs.exp_().mul_(-summed[rows, None])
            part.index_put_((self.row[own] - start, self.target[own]), of_logprobs[own], accumulate=True)
            yield rows, part.to(logits.dtype)  # rounded once the token's own part is in it

    def _logprobs(self, logits: Tensor, total: Tensor, start: int) -> Tensor:
        rows = slice(start, start + ROWS)
        return logits[rows].to(total.dtype) / self.temperature - total[rows, None]


class _Pick(torch.autograd.Function):
    """Picked without a second [R, vocabulary] of at least float32 in memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, picked: Picked) -> tuple[Tensor, Tensor]:
        logprobs, total, entropies = picked.of(logits)
        ctx.save_for_backward(logits, total)
        ctx.picked = picked
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, total = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows, part in ctx.picked.gradient(logits, total, *gradients):
            out[rows] = part
        return out, None
