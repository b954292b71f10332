"""Models by name: smollm2 as its authors trained it, nano as the vocabulary asks."""

import itertools
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from treegym.agents.models.lora import add_lora, has_lora, merged_state, save_adapter
from treegym.agents.models.nano import build_nano
from treegym.agents.models.registry import (
    MODELS,
    end_tokens,
    fetch,
    list_models,
    load,
    load_end_tokens,
    load_tokenizer,
)

TEXTS = [
    "You can search. Write <search>words</search> and read the result.",
    "What is the capital of France? <answer>Paris</answer>",
    "Go to the kitchen, take the apple 1 and put it on the table 12.",
]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    try:
        return load("smollm2")
    except ConnectionError as error:
        pytest.skip(str(error))


def test_digits_are_tokens_of_their_own(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("67")) == ["6", "7"]
    for number in ("2026", " 1,234.5", "x12y"):
        assert [t for t in tokenizer.tokenize(number) if any(c.isdigit() for c in t)] == [
            c for c in number if c.isdigit()
        ]


def test_known_words_keep_their_ids(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.decode(tokenizer.encode("Hello, wörld! 漢字\n\n  67")) == "Hello, wörld! 漢字\n\n  67"


def test_smollm2_chat_template(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_smollm2_knows_the_capital_of_france(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_is_as_large_as_its_card_says(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    assert model.num_parameters() == MODELS["smollm2"].parameters
    assert MODELS["smollm2"].cached
    assert fetch("smollm2") == MODELS["smollm2"].folder


def test_nano_has_about_a_million_parameters() -> None:
    words = ["".join(letters) for letters in itertools.product(string.ascii_lowercase[:13], repeat=3)]
    for texts in ([], TEXTS, words):
        model, tokenizer = build_nano(texts)
        assert 0.75e6 < model.num_parameters() < 1.25e6
        assert model.config.vocab_size == len(tokenizer) <= 2048


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    (first, _), (again, _), (other, _) = build_nano(TEXTS, 1), build_nano(TEXTS, 1), build_nano(TEXTS, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_nano_reads_words_and_tags_of_its_vocabulary_as_one_token() -> None:
    _, tokenizer = build_nano(TEXTS)
    assert tokenizer.tokenize("take the apple 12 <search>Paris</search>") == [
        "take", "Ġthe", "Ġapple", "Ġ", "1", "2", "Ġ", "<search>", "Paris", "</search>",
    ]  # fmt: skip


NANO = build_nano(TEXTS)[1]


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([*TEXTS, "<answer>", "<|im_end|>", " ", "\n"]))).map("".join))
def test_any_text_survives_the_round_trip_through_nano(text: str) -> None:
    assert NANO.decode(NANO.encode(text)) == text


def test_nano_chat_template_is_smollm2_s_without_a_default_system_message() -> None:
    assert NANO.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert NANO.eos_token == "<|im_end|>"


def test_nano_is_saved_and_loaded_as_any_model(tmp_path: Path) -> None:
    model, tokenizer = load("nano", texts=TEXTS, seed=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, reloaded = load(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert reloaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    for weight, saved in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, saved.to(torch.bfloat16))


def test_an_unknown_model_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model 'smollm3': not one of smollm2, nano, no such directory"):
        load("smollm3")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match="models to fetch: smollm2"):
        fetch("nano")


def test_every_listed_model_has_a_licence() -> None:
    assert [card.name for card in list_models()] == ["smollm2", "nano"]
    assert all(card.licence for card in list_models())


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ASKED = torch.arange(3, 15)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ASKED).logits  # type: ignore[no-any-return]


@pytest.fixture(params=["llama", "qwen3_moe"])
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model with a trained adapter, and the adapter's directory beside that of its base."""
    _, tokenizer = build_nano(TEXTS)
    sizes = {**SMALL, "vocab_size": len(tokenizer), "num_key_value_heads": 2}
    config = AutoConfig.for_model(request.param, **sizes, **(MOE if request.param == "qwen3_moe" else {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base")
    before = logits(model)
    add_lora(model, 4, 8, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    return model, tmp_path / "adapter"


def test_an_adapter_is_a_model_merged_or_beside_its_base(adapted: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = adapted
    merged, tokenizer = load(folder)
    assert not has_lora(merged) and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)
    beside, _ = load(folder, merge=False)
    assert has_lora(beside) and all(p.requires_grad == (".lora_" in name) for name, p in beside.named_parameters())
    torch.testing.assert_close(logits(beside), logits(model), atol=1e-5, rtol=1e-4)
    assert tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()
    assert load_end_tokens(folder) == end_tokens(beside)

    with torch.no_grad():  # trained on
        for name, parameter in beside.named_parameters():
            if ".lora_" in name:
                parameter.mul_(1.5)
    beside.save_pretrained(tmp_path / "merged", state_dict=merged_state(beside))
    save_adapter(beside, tmp_path / "further", beside.name_or_path)
    for source in (tmp_path / "merged", tmp_path / "further"):
        again = AutoModelForCausalLM.from_pretrained(source) if source.name == "merged" else load(source)[0]
        torch.testing.assert_close(logits(again), logits(beside), atol=1e-5, rtol=1e-4)


def test_an_adapter_that_fits_nothing_is_refused_in_one_line(adapted: tuple[Any, Path]) -> None:
    _, folder = adapted
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, error, says in (
        ({"base_model_name_or_path": "/nowhere"}, FileNotFoundError, "is an adapter of '/nowhere', which is not there"),
        ({"base_model_name_or_path": None}, FileNotFoundError, "names no base_model_name_or_path"),
        ({"use_dora": True}, ValueError, "has use_dora, which cannot be trained on"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "has modules_to_save, which cannot be trained on"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=says) as refused:
            load(folder, merge=False)
        assert "\n" not in str(refused.value)
