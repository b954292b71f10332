"""Models run on trees only as far as they compute there what they compute on plain sequences."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from treegym.agents import ChatRenderer, Context, Sampling
from treegym.agents.inference.acceptance import bring_attention
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.sampler import TransformersPolicy

SMALL = {
    **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
HALVES = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
LLAMA4 = {
    **{"attention_chunk_size": 64, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2},
    **{"num_experts_per_tok": 1, "layer_types": ["chunked_attention", "full_attention"]},
}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    **{"factor": 4.0, "original_max_position_embeddings": 64},
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 64}
PHI3 = {"rope_parameters": LONGROPE, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
GRANITE = {
    **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 32},
    **{"mamba_n_groups": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 64},
}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_dim": 64, "block_ff_dim": 96}


def tiny(kind: str, **settings: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings}))
    return model.eval()


LIMITED = [
    ("mistral", {"sliding_window": 64}),
    ("gemma3_text", HALVES),
    ("llama4_text", LLAMA4),
    ("phi3", PHI3),
    ("llama", DYNAMIC),
]


@pytest.mark.parametrize(("kind", "settings"), LIMITED, ids=[kind for kind, _ in LIMITED])
def test_a_model_is_taken_up_to_the_length_at_which_it_changes(kind: str, settings: dict[str, Any]) -> None:
    model = tiny(kind, **settings)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="max_context up to 64"):
        bring_attention(model, 96)
    assert model.config._attn_implementation == before
    bring_attention(model, 64)
    for _ in range(2):  # refused again, and still what it was
        with pytest.raises(ValueError, match="computes other logits"):
            bring_attention(model, 96)
        assert model.config._attn_implementation == "treegym"
        bring_attention(model, 64)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("lfm2", LFM2, "has conv layers"),
        ("granitemoehybrid", GRANITE, "has .* layers, which keep a state"),
        ("gemma2", {"head_dim": 16}, "softcap"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "attends with s_aux;"),
        ("bloom", {}, "attention of its own"),
    ],
)
def test_a_refused_model_is_refused_again_and_left_as_it_was(kind: str, settings: dict[str, Any], says: str) -> None:
    model = tiny(kind, **settings)
    before, text = model.config._attn_implementation, model.config.to_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match=says) as refused:
            bring_attention(model)
        assert "\n" not in str(refused.value)
    assert model.config._attn_implementation == before and model.config.to_dict() == text


def test_a_state_that_no_config_tells_is_found_on_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("lfm2", **LFM2)
    monkeypatch.setattr("treegym.agents.inference.acceptance._stateful", lambda model: "")
    with pytest.raises(ValueError, match="packed in one pass"):
        bring_attention(model)


def test_settings_that_change_nothing_are_no_reason() -> None:
    steady = {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    bring_attention(tiny("llama", rope_parameters={**steady, "original_max_position_embeddings": 32}), 96)
    bring_attention(tiny("qwen2", sliding_window=32, use_sliding_window=False), 96)
    bring_attention(tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16), 96)


def test_a_copy_of_a_switched_model_is_proved_anew() -> None:
    model = tiny("mistral", sliding_window=64)
    bring_attention(model, 64)
    with pytest.raises(ValueError, match="max_context up to 64"):
        bring_attention(copy.deepcopy(model), 96)


def test_the_sampler_asks_before_it_goes_further() -> None:
    _, tokenizer = build_nano()
    model = tiny("mistral", sliding_window=64, vocab_size=len(tokenizer))
    policy = TransformersPolicy(model, ChatRenderer(tokenizer), dtype=torch.float32)
    within = policy.sample(Context(tuple(range(3, 53))), 0, Sampling(max_tokens=8))
    assert asyncio.run(within).completion.token_ids
    with pytest.raises(ValueError, match="max_context up to 64"):
        asyncio.run(policy.sample(Context(tuple(range(3, 63))), 0, Sampling(max_tokens=8)))
