"""The learner's forward pass: log-probabilities of a pack's predictions, of any causal model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..agents import bring_attention, tree_logits
from .packing import Pack, TreeAttend

ROWS = 128  # of logits worked on at a time


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
    """What is wanted of logits [R, vocabulary], and its gradient; a part of the rows at a time, in at least float32.

    `logits` gives those of some rows, so that they need not all be there at once.
    """

    row: Tensor  # [P]
    target: Tensor  # [P]
    temperature: float
    with_entropy: bool

    def of(self, logits: Callable[[slice], Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [P] of the targets, the log of the normaliser [R], and entropies [R] or none [0]; nats."""
        totals, entropies, found, order = [], [], [], []
        for part in _parts(rows):
            scaled = self._scaled(logits(part))
            total = scaled.logsumexp(-1)
            own = self._own(part)
            found.append(scaled[self.row[own] - part.start, self.target[own]] - total[self.row[own] - part.start])
            order.append(own)
            totals.append(total)
            if self.with_entropy:
                shares = scaled.sub_(total[:, None])
                entropies.append(-(shares.exp() * shares).sum(-1))
        total = torch.cat(totals)
        picked = total.new_empty(len(self.row)).index_copy_(0, torch.cat(order), torch.cat(found))
        return picked, total, torch.cat(entropies) if entropies else total.new_empty(0)

    def gradient(
        self, logits: Callable[[slice], Tensor], total: Tensor, of_logprobs: Tensor, of_entropies: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """The gradient of the logits, some rows at a time, from those of what `of` gave."""
        of_logprobs, of_entropies = of_logprobs / self.temperature, of_entropies / self.temperature
        summed = torch.zeros_like(total).index_add_(0, self.row, of_logprobs)
        for rows in _parts(len(total)):
            given = logits(rows)
            logprobs = self._scaled(given).sub_(total[rows, None])
            if self.with_entropy:
                shares = logprobs.exp()
                entropy = -(shares * logprobs).sum(-1, keepdim=True)
                part = shares.mul_(-summed[rows, None] - (logprobs + entropy) * of_entropies[rows, None])
            else:
                part = logprobs.exp_().mul_(-summed[rows, None])
            own = self._own(rows)
            part.index_put_((self.row[own] - rows.start, self.target[own]), of_logprobs[own], accumulate=True)
            yield rows, part.to(given.dtype)  # rounded once the token's own part is in it

    def _scaled(self, logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature

    def _own(self, rows: slice) -> Tensor:
        """Indices of the predictions made at these rows."""
        return torch.where((self.row >= rows.start) & (self.row < rows.stop))[0]


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))


class _Pick(torch.autograd.Function):
    """Picked without a second [R, vocabulary] of at least float32 in memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, picked: Picked) -> tuple[Tensor, Tensor]:
        logprobs, total, entropies = picked.of(logits.__getitem__, len(logits))
        ctx.save_for_backward(logits, total)
        ctx.picked = picked
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, total = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows, part in ctx.picked.gradient(logits.__getitem__, total, *gradients):
            out[rows] = part
        return out, None
