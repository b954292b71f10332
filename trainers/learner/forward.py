"""The learner's forward pass: log-probabilities of a pack's predictions, of any causal model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.special import entr
from transformers import PreTrainedModel

from ...agents.inference.acceptance import bring_attention
from ...agents.inference.attention import tree_logits
from ..packing import Pack, TreeAttend

COLUMNS = 2048  # of logits worked on at a time
Logits = Callable[[slice], Tensor]  # of some columns


class Predict(Protocol):
    """A model's forward pass over a pack."""

    def __call__(self, packed: Pack, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities [P] of the predictions and, if wanted, the entropy [R] of the distribution at every row;
        nats."""
        ...


def predict_with(model: PreTrainedModel, dtype: torch.dtype, temperature: float) -> Predict:
    """TransformersPredict; on a CPU, to take less memory, LlamaPredict where it computes the model exactly, else
    LeanPredict."""
    from .cpu.llama import LlamaPredict, trains_in_place

    bring_attention(model)
    if model.device.type != "cpu":
        return TransformersPredict(model, dtype, temperature)
    return (LlamaPredict if trains_in_place(model) else LeanPredict)(model, dtype, temperature)


class TransformersPredict:
    """By the model's own forward, computing in `dtype`, and by autograd alone, on any device.

    FSDP2 and DDP can wrap the model, because every gradient comes to its parameter as autograd brings it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, temperature: float) -> None:
        self._model: Any = model
        self._dtype = dtype
        self._temperature = temperature

    def __call__(self, packed: Pack, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        logits = self._logits(packed, packed.tokens)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self._temperature
        logprobs = wide.log_softmax(-1)
        entropies = _entropies(logprobs) if entropy else logprobs.new_empty(0)
        return logprobs[packed.row, packed.target], entropies

    def _logits(self, packed: Pack, inputs: Tensor) -> Tensor:
        """[R, vocabulary], of the tokens or their embeddings."""
        with torch.autocast(inputs.device.type, self._dtype, enabled=self._dtype == torch.bfloat16):
            return tree_logits(self._model, inputs, packed.positions, TreeAttend(packed.segments), packed.rows)


def _entropies(logprobs: Tensor) -> Tensor:
    """Entropy of each row, nats; a token whose probability is 0 adds 0."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


class LeanPredict(TransformersPredict):
    """The same on a CPU, in less memory: neither the gradient of the embedding table nor a wide copy of the logits is
    made beside them."""

    def __call__(self, packed: Pack, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        inputs = embed(self._model.get_input_embeddings(), packed.tokens)
        picked = Picked(packed.row, packed.target, self._temperature, entropy)
        return _Pick.apply(self._logits(packed, inputs), picked)  # type: ignore[no-untyped-call,no-any-return]


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
    """Log-probabilities and entropies from logits [R, vocabulary], and their gradient: some columns at a time, in at
    least float32.

    The argument `logits` gives the columns that it is asked for, so that they need not all be there at once.
    """

    row: Tensor  # [P]
    target: Tensor  # [P]
    temperature: float
    with_entropy: bool

    def of(self, logits: Logits, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [P] of the targets, the log of the normaliser [R], and entropies [R] or none [0]; nats."""
        picked, total, entropies = torch.empty(0), torch.empty(0), torch.empty(0)
        for columns in _parts(vocabulary):
            scaled = self._scaled(logits(columns))
            if not columns.start:
                picked = scaled.new_full((len(self.row),), float("nan"))
                total, entropies = scaled.new_full((len(scaled),), float("-inf")), scaled.new_zeros(len(scaled))
            inside = self._inside(columns)
            picked[inside] = scaled[self.row[inside], self.target[inside] - columns.start]
            before, total = total, torch.logaddexp(total, scaled.logsumexp(-1))
            if self.with_entropy:
                share = (before - total).exp()  # of all columns before
                here = entr((scaled - total[:, None]).exp_()).sum(-1)
                entropies = share * entropies + entr(share) + here
        return picked - total[self.row], total, entropies if self.with_entropy else total.new_empty(0)

    def gradient(
        self,
        logits: Logits,
        vocabulary: int,
        total: Tensor,
        entropies: Tensor,
        of_logprobs: Tensor,
        of_entropies: Tensor,
    ) -> Iterator[tuple[slice, Tensor]]:
        """The gradient of the logits, some columns at a time, from what `of` gave and the gradients of that."""
        of_logprobs, of_entropies = of_logprobs / self.temperature, of_entropies / self.temperature
        summed = torch.zeros_like(total).index_add_(0, self.row, of_logprobs)
        for columns in _parts(vocabulary):
            raw = logits(columns)
            logprobs = self._scaled(raw) - total[:, None]
            if self.with_entropy:
                slope = -summed[:, None] - (logprobs + entropies[:, None]) * of_entropies[:, None]
                part = logprobs.exp_().mul_(slope)
            else:
                part = logprobs.exp_().mul_(-summed[:, None])
            inside = self._inside(columns)
            place = self.row[inside], self.target[inside] - columns.start
            part.index_put_(place, of_logprobs[inside], accumulate=True)
            yield columns, part.to(raw.dtype)  # rounded once the token's own part is in it

    def _scaled(self, logits: Tensor) -> Tensor:
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return scaled if self.temperature == 1 else scaled / self.temperature

    def _inside(self, columns: slice) -> Tensor:
        """Indices of the predictions whose targets are among these columns."""
        return torch.where((self.target >= columns.start) & (self.target < columns.stop))[0]


def _parts(vocabulary: int) -> Iterator[slice]:
    return (slice(start, min(start + COLUMNS, vocabulary)) for start in range(0, vocabulary, COLUMNS))


class _Pick(torch.autograd.Function):
    """What Picked computes, as one step of autograd, without a second [R, vocabulary] of at least float32 in memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, picked: Picked) -> tuple[Tensor, Tensor]:
        logprobs, total, entropies = picked.of(lambda columns: logits[:, columns], logits.shape[1])
        ctx.save_for_backward(logits, total, entropies)
        ctx.picked = picked
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, *sums = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = ctx.picked.gradient(lambda columns: logits[:, columns], logits.shape[1], *sums, *gradients)
        for columns, part in parts:
            out[:, columns] = part
        return out, None
