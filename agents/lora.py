"""LoRA through peft, injected in place: the model stays the class it was."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> None:
    """Freezes the weights and puts trainable low-rank updates beside every linear layer (arXiv:2106.09685)."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merged_weight(module: nn.Module) -> Tensor:
    """The weight that a linear layer acts with, its adapters added."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    for adapter in getattr(module, "active_adapters", ()):
        weight = weight + module.get_delta_weight(adapter).detach()  # type: ignore[operator]
    return weight


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of the plain model that acts as this one does: adapters added to the weights they belong to."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            state[f"{name}.base_layer.weight"] = merged_weight(module)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
