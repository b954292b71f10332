"""Learner: one optimiser step from scored trees, packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..agents import RolloutTree, native_dtype
from .forward import logprobs_for
from .losses import AGGREGATIONS, PolicyLoss
from .packing import Advantages, Pack, pack, score, split


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
        self.model = model
        self.optimization = optimization
        self.temperature = temperature or 1.0  # of the sampler, whose distribution is the policy
        self.step = 0
        self._logprobs = logprobs_for(model, dtype or native_dtype(model.device), self.temperature)
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
        return self._logprobs(packed)

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
