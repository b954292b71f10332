"""Learner: one optimiser step from scored trees, packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..agents import RolloutTree, bring_attention, native_dtype, tree_logits
from .losses import AGGREGATIONS, PolicyLoss
from .packing import Advantages, Pack, TreeAttend, pack, score, split


@dataclass(frozen=True, slots=True)
class Optimization:
    """How weights move: AdamW, a rate that rises and falls linearly, clipped gradients."""

    learning_rate: float = 1e-5
    warmup_steps: int = 0
    decay_steps: int = 0  # after the warm-up, until the rate would be 0; 0: it stays
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 1024  # unique tokens in one forward pass; bounds memory, not the result

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        left = 1.0 - (step - self.warmup_steps) / self.decay_steps if self.decay_steps else 1.0
        return self.learning_rate * max(0.0, left)


class Learner:
    """Moves a model's weights; float32 master weights, computing in `dtype`."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimization: Optimization,
        *,
        dtype: torch.dtype | None = None,  # native_dtype of the model's device
        temperature: float = 1.0,
    ) -> None:
        bring_attention(model)
        self.model = model
        self.optimization = optimization
        self.temperature = temperature or 1.0  # of the sampler, whose distribution is the policy
        self.step = 0
        self._dtype = dtype or native_dtype(model.device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameters, betas=optimization.betas, weight_decay=optimization.weight_decay, fused=True
        )

    def update(
        self,
        batch: Sequence[tuple[RolloutTree, Advantages]],
        loss: PolicyLoss,
        on_pack: Callable[[Pack], None] = lambda pack: None,
    ) -> dict[str, float]:
        """One optimiser step on the whole batch; metrics of it. A batch without gradient moves nothing."""
        scored = score(batch, AGGREGATIONS[loss.aggregation], keep_zeros=loss.needs_zeros)
        totals: dict[str, float] = {"loss": 0.0, "trained_tokens": 0.0, "loss_terms": 0.0, "ratio_deviation": 0.0}
        for group in split(scored, self.optimization.max_tokens):
            packed = pack(group).to(self.model.device)
            for name, value in self.accumulate(packed, loss).items():
                totals[name] += value
            on_pack(packed)
        if not scored:
            return totals | {"grad_norm": 0.0, "learning_rate": 0.0}
        totals["ratio_deviation"] /= totals["loss_terms"]
        return totals | self.apply()

    def accumulate(self, packed: Pack, loss: PolicyLoss) -> dict[str, float]:
        """Adds the gradient of a pack's part of the batch loss."""
        logprobs = self.logprobs(packed)[packed.terms.logprob]  # [N]
        value = (loss(logprobs, packed.terms) * packed.terms.weight).sum()
        value.backward()  # type: ignore[no-untyped-call]
        moved = (logprobs.detach() - packed.terms.old_logprob).abs()
        return {
            "loss": value.item(),
            "trained_tokens": float(len(packed.tokens)),
            "loss_terms": float(len(logprobs)),
            "ratio_deviation": moved.sum().item(),
        }

    def logprobs(self, packed: Pack) -> Tensor:
        """Log-probability [P] of every prediction, nats."""
        model: Any = self.model
        with self._autocast():
            tokens = _embed(model.get_input_embeddings(), packed.tokens)
            logits = tree_logits(model, tokens, packed.positions, TreeAttend(packed.segments), packed.rows)
        logprobs: Tensor = _Logprobs.apply(  # type: ignore[no-untyped-call]
            logits, packed.row, packed.target, self.temperature
        )
        return logprobs

    def apply(self) -> dict[str, float]:
        """Clips the gradients, moves the weights, clears the gradients."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.optimization.max_grad_norm)
        rate = self.optimization.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {"grad_norm": norm.item(), "learning_rate": rate}

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state and the step count, by name."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
        return {**moments, "learner.step": torch.tensor(self.step)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up a state that `tensors` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = int(tensors["learner.step"])

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.model.device.type, self._dtype, enabled=self._dtype == torch.bfloat16):
            yield


def _embed(embedding: nn.Module, tokens: Tensor) -> Tensor:
    """Embeddings [T, width] of tokens [T]; the tokens themselves where the embedding is not a plain trained table."""
    if type(embedding) is nn.Embedding and embedding.weight.requires_grad and torch.is_grad_enabled():
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


class _Logprobs(torch.autograd.Function):
    """Log-softmax at some entries, of at least float32, without a second [R, vocabulary] in memory."""

    ROWS = 64  # worked on at a time

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: Tensor, target: Tensor, temperature: float) -> Tensor:
        """logits [R, vocabulary], row [P], target [P] -> [P]."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = torch.cat(
            [(part.to(dtype) / temperature).logsumexp(-1) for part in torch.split(logits, _Logprobs.ROWS)]
        )
        ctx.save_for_backward(logits, total, row, target)
        ctx.temperature = temperature
        return logits[row, target].to(dtype) / temperature - total[row]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # [P]
        logits, total, row, target = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        summed = torch.zeros_like(total).index_add_(0, row, gradient)
        out = torch.empty_like(logits)
        for start in range(0, len(logits), _Logprobs.ROWS):
            rows, own = slice(start, start + _Logprobs.ROWS), (row >= start) & (row < start + _Logprobs.ROWS)
            part = -(logits[rows].to(total.dtype) / ctx.temperature - total[rows, None]).exp() * summed[rows, None]
            part.index_put_((row[own] - start, target[own]), gradient[own], accumulate=True)  # before any rounding
            out[rows] = part
        return out, None, None, None
