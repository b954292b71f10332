"""nano: a Llama of about a million parameters, made from scratch for a closed vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # padding, start and end of a message
TAGS = ("think", "answer", "action", "tool_call", "tool_response")
TAG = re.compile(r"</?[A-Za-z_]+>")
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_nano(
    texts: Iterable[str] = (), seed: int = 0, *, vocab_size: int = 2048
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """An untrained model and a tokenizer that reads the words and tags of `texts` as one token each.

    Where `texts` has more than `vocab_size` words the most frequent stay. Other words are read byte by byte.
    """
    tokenizer = _tokenizer(texts, vocab_size)
    return _model(len(tokenizer), seed), tokenizer


def _tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tags = dict.fromkeys(tag for name in TAGS for tag in (f"<{name}>", f"</{name}>"))
    counts: Counter[str] = Counter()
    for text in ("system", "user", "assistant", "tool", *texts):
        tags |= dict.fromkeys(TAG.findall(text))
        for part in TAG.split(text):
            counts.update(word for word, _ in split.pre_tokenize_str(part))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    twins = [word[1:] if word[0] == "Ġ" else "Ġ" + word for word in words if word.strip("Ġ").isalpha()]  # Ġ: a space
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys([*SPECIAL, *tags, *alphabet, *words, *twins]))[:vocab_size]

    # Without merges a word in the vocabulary is one token and any other falls into its bytes.
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


def _model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=128**-0.5,  # with the usual 0.02 so narrow a model learns 3 times slower
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 2:  # the norms keep their ones
            torch.nn.init.normal_(weight, std=config.initializer_range, generator=generator)
    model.eval()
    return model
