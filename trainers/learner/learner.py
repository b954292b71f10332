"""Learner: one optimiser step from scored trees, packed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...agents import Advantages, RolloutTree
from ...agents.inference.acceptance import bring_attention
from ...agents.inference.forward import native_dtype
from ..losses.comparisons import Compared
from ..losses.sums import SumLoss, slopes
from ..losses.terms import AGGREGATIONS, NEEDS, PolicyLoss, kl
from ..packing import Pack, ScoredTree, Terms, check_recorded, pack, score, split
from .checkpoints import DamagedCheckpoint
from .forward import predict_with

Column = Callable[[Pack], Tensor]  # a number for each of the pack's terms [N], without gradient
_TOTALS = ("loss", "trained_tokens", "loss_terms", "ratio_deviation", "clip_fraction")  # metrics of every update
NEAR = math.log(0.9), math.log(1.1)  # the log ratios that `ratios_off` does not count
_MEANS = ("ratio_deviation", "ratios_off", "clip_fraction", "kl", "entropy")  # metrics that are means over terms


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
    """Moves a model's weights. Master weights are float32; forward passes compute in `dtype`."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimization: Optimization,
        *,
        dtype: torch.dtype | None = None,  # native_dtype of the model's device
        temperature: float = 1.0,
        reference: bool = False,  # whether the present weights are kept, for losses that need the distance from them
        columns: Mapping[str, Column] | None = None,  # by the names that losses ask for in `needs`
    ) -> None:
        self.model = model
        self.optimization = optimization
        self.temperature = temperature or 1.0  # of the sampler, whose distribution is the policy
        self.step = 0
        self.columns = columns or {}
        if taken := sorted(self.columns.keys() & NEEDS):
            raise ValueError(f"columns: {taken[0]!r} is a name of the learner's own; take another")
        dtype = dtype or native_dtype(model.device)
        self._terms_dtype = torch.promote_types(dtype, torch.float32)
        self._predict = predict_with(model, dtype, self.temperature)
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

        ValueError where the loss needs what the learner or the batch does not have. A batch without gradient moves
        nothing. Neither does one whose gradient is not finite: `skipped_updates` counts it, and metrics of it that
        are not finite are given as 0. `ratio_deviation` is the mean of |log ratio|, nats; `clip_fraction` the share of
        terms that have an advantage and yet no gradient, because the loss clips them. Where the sampler recorded
        log-probabilities, `ratio_deviation_max` is the maximum of |log ratio|, and `ratios_off` the share of terms
        whose ratio is below 0.9 or above 1.1.
        """
        scored = score(batch, AGGREGATIONS[loss.aggregation], keep_zeros=loss.keeps_zeros)
        totals = self._begin(scored, loss)
        for packed in self._packs(scored):
            _add(totals, self.accumulate(packed, loss))
            on_pack(packed)
        return self._end(totals)

    def compare(
        self, batch: Sequence[Compared], loss: SumLoss, on_pack: Callable[[Pack], None] = lambda pack: None
    ) -> dict[str, float]:
        """One optimiser step on a loss over the sums of all compared rollouts; metrics of it, as `update` gives them.

        Where the batch takes several packs, they are passed through the model twice, first without gradient: the sums
        of all rollouts must be known before any of them can be trained.
        """
        scored = score([(one.tree, one.coefficients) for one in batch], AGGREGATIONS["token-sum"])
        totals = self._begin(scored, loss)
        packs = list(self._packs(scored))
        if not packs:
            return self._end(totals)
        terms = [self._with_columns(packed, loss.needs) for packed in packs]
        with torch.set_grad_enabled(len(packs) == 1):
            first = [self.logprobs(packed)[packed.terms.logprob] for packed in packs]
        totals["loss"], slope = slopes(loss, batch, terms, first)
        for packed, its, logprobs in zip(packs, terms, first, strict=True):
            if len(packs) > 1:
                logprobs = self.logprobs(packed)[its.logprob]
            gradient = slope.to(logprobs)[its.rollout] * its.advantage
            (gradient * logprobs).sum().backward()  # type: ignore[no-untyped-call]
            _add(totals, _measured(packed, its, logprobs.detach(), gradient))
            on_pack(packed)
        return self._end(totals)

    def check(self, loss: PolicyLoss | SumLoss) -> None:
        """ValueError where the loss needs what this learner does not have."""
        known = (NEEDS | self.columns.keys()) - ({"entropy"} if isinstance(loss, SumLoss) else set())
        if unknown := sorted(loss.needs - known):
            raise ValueError(
                f"{type(loss).__name__} needs {unknown[0]!r}, which the learner does not have; it has "
                f"{', '.join(sorted(known))}; make the Learner with columns={{{unknown[0]!r}: …}}"
            )
        if "reference" in loss.needs:
            self._check_reference()

    def accumulate(self, packed: Pack, loss: PolicyLoss) -> dict[str, float]:
        """Adds the gradient of a pack's part of the batch loss; returns sums over the pack. ValueError where the pack
        is longer than the model can be trained on."""
        bring_attention(self.model, int(packed.positions.max()) + 1)
        terms = self._with_columns(packed, loss.needs)
        predicted, entropies = self._predict(packed, entropy="entropy" in loss.needs)
        logprobs = predicted[terms.logprob]  # [N]
        logprobs.retain_grad()
        if "entropy" in loss.needs:
            terms = replace(terms, extras={**terms.extras, "entropy": entropies[packed.row[terms.logprob]]})
        losses = loss(logprobs, terms)
        if losses.shape != logprobs.shape:
            raise ValueError(f"{type(loss).__name__} gave losses of shape {[*losses.shape]}, not {[*logprobs.shape]}")
        value = (losses * terms.weight).sum()
        value.backward()  # type: ignore[no-untyped-call]
        gradient = torch.zeros_like(logprobs) if logprobs.grad is None else logprobs.grad
        return {"loss": value.item()} | _measured(packed, terms, logprobs.detach(), gradient)

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
                    now = tuple(itertools.islice(logprobs, len(action.token_ids)))
                    nodes[node] = replace(tree.nodes[node], action=replace(action, logprobs=now))
        return replace(tree, nodes=tuple(nodes))

    def logprobs(self, packed: Pack) -> Tensor:
        """Log-probability [P] of every prediction, nats."""
        return self._predict(packed)[0]

    def reference_logprobs(self, packed: Pack) -> Tensor:
        """The same under the weights that this learner began with, without gradient. ValueError if it kept none."""
        self._check_reference()
        self._exchange()
        try:
            with torch.no_grad():
                return self.logprobs(packed)
        finally:
            self._exchange()

    def _begin(self, scored: Sequence[ScoredTree], loss: PolicyLoss | SumLoss) -> dict[str, float]:
        """Checks that the batch can be trained with the loss, and sets the gradients to 0; metrics of no pack."""
        self.check(loss)
        if loss.needs & {"sampled", "old"}:
            check_recorded(scored, type(loss).__name__)
        for parameter in self._parameters if scored else []:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # now: made amid the activations, they would leave holes
            else:
                parameter.grad.zero_()
        distances = {"reference": "kl", "entropy": "entropy"}
        return dict.fromkeys([*_TOTALS, *(metric for name, metric in distances.items() if name in loss.needs)], 0.0)

    def _packs(self, scored: Sequence[ScoredTree]) -> Iterator[Pack]:
        for group in split(scored, self.optimization.max_tokens):
            yield pack(group, self._terms_dtype).to(self.model.device)

    def _end(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Moves the weights; metrics from the sums over all packs. Without packs nothing moves."""
        means = {name: totals[name] / max(totals["loss_terms"], 1.0) for name in _MEANS if name in totals}
        moved = self.apply() if totals["loss_terms"] else _unmoved(0)
        return {name: x if math.isfinite(x) else 0.0 for name, x in {**totals, **means, **moved}.items()}

    def _with_columns(self, packed: Pack, needs: frozenset[str]) -> Terms:
        """The pack's terms with the columns that a loss needs, except for the entropy, which comes with the forward
        pass that has the gradient. ValueError where the pack is longer than the model can be trained on."""
        bring_attention(self.model, int(packed.positions.max()) + 1)
        extras = {name: column(packed) for name, column in self.columns.items() if name in needs}
        if "reference" in needs:
            extras["reference"] = self.reference_logprobs(packed)[packed.terms.logprob]
        return replace(packed.terms, extras=extras)

    def _check_reference(self) -> None:
        if not self._reference:
            raise ValueError("the loss needs a reference: make the Learner with reference=True")

    def _exchange(self) -> None:
        """Swaps reference and present weights."""
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._reference[i] = self._reference[i], parameter.data

    def apply(self) -> dict[str, float]:
        """Clips the gradients and moves the weights. Where a gradient is not finite nothing moves: the weights would
        not be finite either, and would stay so."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not norm.isfinite():
            return _unmoved(1)
        if norm > self.optimization.max_grad_norm:  # else clipping would multiply them all by 1
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.optimization.max_grad_norm, norm)
        rate = self.optimization.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.model.device.type != "cpu":  # a CPU's heap would keep the gradients' memory anyway
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


def _measured(packed: Pack, terms: Terms, logprobs: Tensor, gradient: Tensor) -> dict[str, float]:
    """Sums over a pack, and the maximum of |log ratio|, from its terms' log-probabilities [N] and the gradient of the
    loss by them [N]."""
    sums = {
        "trained_tokens": float(len(packed.tokens)),
        "loss_terms": float(len(logprobs)),
        "ratio_deviation": (logprobs - terms.old_logprob.nan_to_num()).abs().sum().item(),
        "clip_fraction": ((terms.advantage != 0) & (gradient == 0)).sum().item(),
    }
    known = ~terms.old_logprob.isnan()
    if known.any():
        apart = (logprobs - terms.old_logprob)[known]
        sums["ratio_deviation_max"] = apart.abs().max().item()
        sums["ratios_off"] = ((apart < NEAR[0]) | (apart > NEAR[1])).sum().item()
    if "reference" in terms.extras:
        sums["kl"] = kl(logprobs, terms.extras["reference"]).sum().item()
    if "entropy" in terms.extras:
        sums["entropy"] = terms.extras["entropy"].sum().item()
    return sums


def _add(totals: dict[str, float], sums: Mapping[str, float]) -> None:
    for name, value in sums.items():
        if name == "ratio_deviation_max":
            totals[name] = max(totals.get(name, 0.0), value)
        else:
            totals[name] = totals.get(name, 0.0) + value


def _unmoved(skipped: int) -> dict[str, float]:
    return {"grad_norm": 0.0, "learning_rate": 0.0, "skipped_updates": float(skipped)}
