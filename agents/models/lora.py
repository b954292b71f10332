"""LoRA through peft, injected in place: the model stays the class it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

_PREFIX = "base_model.model."  # of the names in an adapter's file
_USUAL = {  # settings of an adapter that is low-rank updates and nothing else
    **{"use_dora": False, "bias": "none", "lora_bias": False},
    **{"modules_to_save": None, "trainable_token_indices": None},
}


def add_lora(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> None:
    """Freezes the weights and puts trainable low-rank updates beside every linear layer (arXiv:2106.09685)."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(config, model)


def has_lora(model: PreTrainedModel) -> bool:
    """Whether the model carries an adapter that is not merged."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def lora_rank(model: PreTrainedModel) -> int:
    """The highest rank among the updates of the model's adapter; 0 where it has none."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return max((rank for layer in layers for rank in layer.r.values()), default=0)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter in `folder` added to its weights. ValueError where that cannot be done."""
    try:
        with _without_warnings():
            merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (AttributeError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"the adapter in {folder} cannot be merged: {str(error).strip().splitlines()[0]}") from error
    plain: PreTrainedModel = merged.requires_grad_(True)
    return plain


def attach_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Freezes the weights and puts the adapter in `folder` beside them, to be trained on.

    ValueError for adapters that are more than low-rank updates of layers: those can only be merged.
    """
    config = PeftConfig.from_pretrained(str(folder))
    more = [name for name, usual in _USUAL.items() if getattr(config, name, usual) != usual]
    if config.peft_type != "LORA" or more:
        kind = ", ".join(more) or config.peft_type
        raise ValueError(
            f"the adapter in {folder} has {kind}, which cannot be trained on; model.weights=full merges it"
        )
    config.inference_mode = False
    _inject(config, model)
    weights = load_peft_weights(str(folder), device="cpu")
    loaded: Any = set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): x for name, x in weights.items()})
    if loaded.unexpected_keys:
        raise ValueError(f"the adapter in {folder} is of another model: {loaded.unexpected_keys[0]} is nowhere in it")


def save_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Writes the adapter alone, as peft loads it onto `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    adapted: Any = model
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    named = {_PREFIX + name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merged_weight(module: nn.Module | LoraLayer) -> Tensor:
    """The weight that a linear layer, or a mixture's experts, act with: its adapters are added."""
    held: Any = module
    weight: Tensor = held.get_param() if isinstance(module, ParamWrapper) else held.weight
    weight = weight.detach()
    for adapter in getattr(module, "active_adapters", ()):
        weight = weight + held.get_delta_weight(adapter).detach()
    return weight


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of the plain model that acts as this one does: adapters added to the weights they belong to."""
    state = {_bare(name): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            state[f"{_bare(name)}.{getattr(module, 'parameter_name', 'weight')}"] = merged_weight(module)
    return state


def _bare(name: str) -> str:
    """The name that a module or tensor has in the model without adapters."""
    return name.replace(".base_layer", "")


def _inject(config: PeftConfig, model: PreTrainedModel) -> None:
    with _without_warnings():
        inject_adapter_in_model(config, model)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without peft's warnings of things that are as they should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # of fused experts
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # which it then sets right
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
