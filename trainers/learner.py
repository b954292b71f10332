"""Learner: one optimiser step from scored trees, packed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..agents import RolloutTree, bring_attention, native_dtype
from .checkpoints import DamagedCheckpoint
from .forward import predict_with
from .losses import AGGREGATIONS, PolicyLoss, kl
from .packing import Advantages, Pack, pack, score, split

_MEANS = ("ratio_deviation", "clip_fraction", "kl", "entropy")  # metrics that are means over terms


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
        reference: bool = False,  # whether the present weights are kept, for losses that need the distance from them
    ) -> None:
        self.model = model
        self.optimization = optimization
        self.temperature = temperature or 1.0  # of the sampler, whose distribution is the policy
        self.step = 0
        self._predict = predict_with(model, dtype or native_dtype(model.device), self.temperature)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._reference = [p.detach().clone() for p in self._parameters] if reference else []
        self.optimizer = torch.optim.AdamW(
            self._parameters, betas=optimization.betas, weight_decay=optimization.weight_decay, fused=True
        )

    def update(
        self,
        batch: Sequence[tuple[RolloutTree, Advantages]],
        loss: PolicyLoss,
        on_pack: Callable[[Pack], None] = lambda pack: None,
    ) -> dict[str, float]:
        """One optimiser step on the whole batch; metrics of it.

        A batch without gradient moves nothing. Neither does one whose gradient is not finite: `skipped_updates`
        counts it, and figures of it that are not finite either are given as 0. `ratio_deviation` is the mean of
        |log ratio|, nats; `clip_fraction` the share of terms that have an advantage and yet no gradient, because the
        loss clips them.
        """
        scored = score(batch, AGGREGATIONS[loss.aggregation], keep_zeros=bool(loss.needs - {"old"}))
        totals = dict.fromkeys(("loss", "trained_tokens", "loss_terms", "ratio_deviation", "clip_fraction"), 0.0)
        for parameter in self._parameters if scored else []:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # now: made amid the activations, they would leave holes
            else:
                parameter.grad.zero_()
        for group in split(scored, self.optimization.max_tokens):
            packed = pack(group).to(self.model.device)
            for name, value in self.accumulate(packed, loss).items():
                totals[name] = totals.get(name, 0.0) + value
            on_pack(packed)
        means = {name: totals[name] / max(totals["loss_terms"], 1.0) for name in _MEANS if name in totals}
        metrics = totals | means | (self.apply() if scored else _unmoved(0))
        return {name: value if math.isfinite(value) else 0.0 for name, value in metrics.items()}

    def accumulate(self, packed: Pack, loss: PolicyLoss) -> dict[str, float]:
        """Adds the gradient of a pack's part of the batch loss; sums over the pack. ValueError where it is longer than
        the model can be trained on."""
        bring_attention(self.model, int(packed.positions.max()) + 1)
        terms = packed.terms
        if "reference" in loss.needs:
            terms = replace(terms, reference=self.reference_logprobs(packed)[terms.logprob])
        predicted, entropies = self._predict(packed, entropy="entropy" in loss.needs)
        logprobs = predicted[terms.logprob]  # [N]
        logprobs.retain_grad()
        if "entropy" in loss.needs:
            terms = replace(terms, entropy=entropies[packed.row[terms.logprob]])
        value = (loss(logprobs, terms) * terms.weight).sum()
        value.backward()  # type: ignore[no-untyped-call]
        clipped = (terms.advantage != 0) & (logprobs.grad == 0 if logprobs.grad is not None else True)
        logprobs = logprobs.detach()
        sums = {
            "loss": value.item(),
            "trained_tokens": float(len(packed.tokens)),
            "loss_terms": float(len(logprobs)),
            "ratio_deviation": (logprobs - terms.old_logprob).abs().sum().item(),
            "clip_fraction": clipped.sum().item(),
        }
        if terms.reference is not None:
            sums["kl"] = kl(logprobs, terms.reference).sum().item()
        if terms.entropy is not None:
            sums["entropy"] = terms.entropy.sum().item()
        return sums

    def with_own_logprobs(self, tree: RolloutTree) -> RolloutTree:
        """The tree with its replies' log-probabilities under the present weights, nats, in place of the sampler's."""
        ones = [[1.0] * len(path) for path in tree.paths]
        nodes = list(tree.nodes)
        for group in split(score([(tree, ones)], AGGREGATIONS["token-sum"]), self.optimization.max_tokens):
            packed = pack(group).to(self.model.device)
            with torch.no_grad():
                logprobs = iter(self.logprobs(packed)[packed.terms.logprob].tolist())
            for part in group:  # terms are the tokens of its rollouts, one rollout after the other
                for node in (node for path in part.tree.paths for node in path):
                    action = tree.nodes[node].action
                    own = tuple(itertools.islice(logprobs, len(action.token_ids)))
                    nodes[node] = replace(tree.nodes[node], action=replace(action, logprobs=own))
        return replace(tree, nodes=tuple(nodes))

    def logprobs(self, packed: Pack) -> Tensor:
        """Log-probability [P] of every prediction, nats."""
        return self._predict(packed)[0]

    def reference_logprobs(self, packed: Pack) -> Tensor:
        """The same under the weights that this learner began with, without gradient. ValueError if it kept none."""
        if not self._reference:
            raise ValueError("the loss needs a reference: make the Learner with reference=True")
        self._exchange()
        try:
            with torch.no_grad():
                return self.logprobs(packed)
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Reference and present weights change places."""
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._reference[i] = self._reference[i], parameter.data

    def apply(self) -> dict[str, float]:
        """Clips the gradients and moves the weights. Where a gradient is not finite nothing moves: what would come of
        it is not finite either, for good."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not norm.isfinite():
            return _unmoved(1)
        if norm > self.optimization.max_grad_norm:  # else clipping would multiply them all by 1
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.optimization.max_grad_norm, norm)
        rate = self.optimization.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.model.device.type != "cpu":  # whose heap would keep the gradients' memory anyway
            self.optimizer.zero_grad()
        self.step += 1
        return {"grad_norm": norm.item(), "learning_rate": rate, "skipped_updates": 0.0}

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state and the step count, by name."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
        reference = {f"reference.{i}": weights for i, weights in enumerate(self._reference)}
        return {**moments, **reference, "learner.step": torch.tensor(self.step)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up a state that `tensors` gave. DamagedCheckpoint where a part of it is missing."""
        needed = {"learner.step"} | {f"reference.{i}" for i in range(len(self._reference))}
        if int(tensors.get("learner.step", 0)):
            moments = ("step", "exp_avg", "exp_avg_sq")
            needed |= {f"optimizer.{i}.{moment}" for i in range(len(self._parameters)) for moment in moments}
        if missing := sorted(needed - tensors.keys()):
            raise DamagedCheckpoint(f"the checkpoint is not of this learner: it lacks {', '.join(missing[:3])}")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        self._reference = [
            tensors[f"reference.{i}"].to(p.device) for i, p in enumerate(self._parameters) if self._reference
        ]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = int(tensors["learner.step"])


def _unmoved(skipped: int) -> dict[str, float]:
    return {"grad_norm": 0.0, "learning_rate": 0.0, "skipped_updates": float(skipped)}
