"""Models by name: smollm2 as its authors trained it, nano as the vocabulary asks."""

import itertools
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treegym.agents.models import MODELS, fetch, list_models, load
from treegym.agents.nano import build_nano

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
