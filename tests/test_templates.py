"""Chat templates of every habit are read right or refused in one line."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from treegym.agents import ChatRenderer
from treegym.agents.models.nano import build_nano
from treegym.envs import Message

WORDS = ["Rules. Ask. Hello. One. Two. Go on. system user assistant tool think"]
RULES, ASK, ONE, TWO = (
    Message("system", "Rules."),
    Message("user", "Ask."),
    Message("tool", "One."),
    Message("tool", "Two."),
)

# Templates of hand, each with one habit of those in use.
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASSISTANT
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe nice.<|im_end|>\n{% endif %}" + PLAIN
QWEN3 = (  # thinking only after the last question; a last reply has some, if only an empty one
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% if '</think>' not in m.content %}{% set thought = '' %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OPENS = QWEN3.replace("{% if enable_thinking", "{{ '<think>\n' }}{% if enable_thinking")  # as Qwen3.5 does
OPENS_UNSEEN = (  # as DeepSeek-R1: no past reply shows what the header opened
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
PHI3 = (  # drops tool results; another end of the text where nobody is asked to speak
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (  # neither system nor tools, turns alternate, texts are trimmed
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content|trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # the system text is in the last question, wherever that is; tool results need ids
    "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[TOOL_RESULTS] ' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
GPT_OSS = (  # channels; another token ends the last reply than earlier ones; tool results need a call
    "{{ '<|start|>system<|message|>' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ raise_exception('no previous tool call') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
SMOLLM3 = '<|im_start|>system\nToday: {{ strftime_now("%d %B %Y") }}<|im_end|>\n' + PLAIN
MARKS = [
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
]


def renderer(template: str | None, **options: Any) -> ChatRenderer:
    _, tokenizer = build_nano(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer, **options)


def shown(by: ChatRenderer, tokens: tuple[int, ...]) -> str:
    return str(by.tokenizer.decode(list(tokens)))


END = "<|im_end|>"
HEADER = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "prompt", "reply", "results"),
    [
        (
            PLAIN,
            "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nAsk.<|im_end|>\n" + HEADER,
            "Hello.<|im_end|>",
            "\n<|im_start|>tool\nOne.<|im_end|>\n<|im_start|>tool\nTwo.<|im_end|>\n" + HEADER,
        ),
        (
            DEFAULT_SYSTEM,
            "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nAsk.<|im_end|>\n" + HEADER,
            "Hello.<|im_end|>",
            "\n<|im_start|>tool\nOne.<|im_end|>\n<|im_start|>tool\nTwo.<|im_end|>\n" + HEADER,
        ),
        (
            QWEN3,
            "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nAsk.<|im_end|>\n" + HEADER,
            "<think>\n\n</think>\n\nHello.<|im_end|>",
            "\n<|im_start|>user\n<tool_response>\nOne.\n</tool_response>\n<tool_response>\nTwo.\n</tool_response>"
            "<|im_end|>\n" + HEADER,
        ),
        (
            OPENS,
            "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nAsk.<|im_end|>\n" + HEADER + "<think>\n",
            "\n</think>\n\nHello.<|im_end|>",
            "\n<|im_start|>user\n<tool_response>\nOne.\n</tool_response>\n<tool_response>\nTwo.\n</tool_response>"
            "<|im_end|>\n" + HEADER + "<think>\n",
        ),
        (
            OPENS_UNSEEN,
            "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nAsk.<|im_end|>\n" + HEADER + "<think>\n",
            "\n</think>\n\nHello.<|im_end|>",
            "\n<|im_start|>tool\nOne.<|im_end|>\n<|im_start|>tool\nTwo.<|im_end|>\n" + HEADER + "<think>\n",
        ),
        (
            PHI3,
            "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nAsk.<|im_end|>\n" + HEADER,
            "Hello.<|im_end|>",
            "\n<|im_start|>user\nOne.\n\nTwo.<|im_end|>\n" + HEADER,
        ),
        (
            GEMMA,
            "<start_of_turn>user\nRules.\n\nAsk.<end_of_turn>\n<start_of_turn>model\n",
            "Hello.<end_of_turn>",
            "\n<start_of_turn>user\nOne.\n\nTwo.<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            MISTRAL,
            "<|im_start|>[INST] Rules.\n\nAsk.[/INST]",
            " Hello.<|im_end|>",
            "[INST] One.\n\nTwo.[/INST]",
        ),
        (
            GPT_OSS,
            "<|start|>system<|message|>2025-01-01<|end|><|start|>system<|message|>Rules.<|end|>"
            "<|start|>user<|message|>Ask.<|end|><|start|>assistant",
            "<|channel|>final<|message|>Hello.<|return|>",
            "<|start|>user<|message|>One.\n\nTwo.<|end|><|start|>assistant",
        ),
        (
            SMOLLM3,
            "<|im_start|>system\nToday: 01 January 2025<|im_end|>\n"
            "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nAsk.<|im_end|>\n" + HEADER,
            "Hello.<|im_end|>",
            "\n<|im_start|>tool\nOne.<|im_end|>\n<|im_start|>tool\nTwo.<|im_end|>\n" + HEADER,
        ),
    ],
    ids=["plain", "smollm2", "qwen3", "qwen3.5", "deepseek-r1", "phi3", "gemma", "mistral", "gpt-oss", "smollm3"],
)  # fmt: skip
def test_prompt_reply_and_results(template: str, prompt: str, reply: str, results: str) -> None:
    by = renderer(template)
    assert shown(by, by.prompt([RULES, ASK])) == prompt
    assert shown(by, by.reply("Hello.")) == reply
    assert by.reply("Hello.")[-1] == by.end_of_turn
    assert shown(by, by.observation([ONE, TWO], ended=True)) == results
    cut = shown(by, by.observation([ONE, TWO], ended=False))
    assert cut.endswith(results) and not results.startswith(cut[: len(cut) - len(results)])


def test_the_end_of_a_turn_is_what_follows_a_reply_thinking_or_not() -> None:
    by = renderer(QWEN3)
    assert by.tokenizer.convert_ids_to_tokens(by.end_of_turn) == "<|im_end|>"
    assert "thinking of earlier turns stays" in by.reading
    thinking = "<think>\nI see.\n</think>\n\nHello."
    assert shown(by, by.reply(thinking)) == thinking + "<|im_end|>"
    assert by.text(by.reply(thinking)) == thinking


def test_thinking_that_the_header_opened_is_part_of_the_text() -> None:
    by = renderer(OPENS)
    said = by.tokenizer.encode("I see.\n</think>\n\nHello.<|im_end|>")
    assert by.text(said) == "<think>\nI see.\n</think>\n\nHello."
    assert by.reply(by.text(said)) == tuple(said)
    silent = renderer(OPENS.replace("{{ '<think>\n' }}", ""), settings={"enable_thinking": False})
    assert shown(silent, silent.prompt([ASK])).endswith(HEADER + "<think>\n\n</think>\n\n")
    assert shown(silent, silent.reply("Hello.")) == "Hello.<|im_end|>"


def test_a_native_reply_is_not_begun_twice_and_cannot_end_early() -> None:
    by = renderer(GPT_OSS)
    native = "<|channel|>commentary to=search<|message|>{}"
    assert shown(by, by.reply(native)) == native + "<|return|>"
    assert by.reply("a<|return|>b<|end|>c").count(by.end_of_turn) == 1


def test_every_end_token_of_the_model_ends_a_turn() -> None:
    by = renderer(GPT_OSS)
    call = by.tokenizer.convert_tokens_to_ids("<|call|>")
    assert not by.ended((5, call))
    by = renderer(GPT_OSS, ends=(call,))
    assert by.ended((5, call)) and by.ended((5, by.end_of_turn)) and not by.ended((5,)) and not by.ended(())
    assert by.text((*by.tokenizer.encode("Hello."), call)) == "Hello."


def test_the_date_is_the_same_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Tomorrow:
            return cls(2031, 5, 6)

    before = {template: renderer(template).prompt([ASK]) for template in (SMOLLM3, GPT_OSS)}
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    for template, prompt in before.items():
        assert renderer(template).prompt([ASK]) == prompt


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template"),
        (PLAIN.replace("<|im_start|>", "").replace("<|im_end|>", ""), "nothing ends a turn"),
        (PLAIN.replace("{% for", "Turn {{ messages|length }}{% for"), "rewrites earlier turns"),
        (
            PLAIN.replace("{{ m.content }}", "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"),
            "plain text",
        ),
        (PLAIN.replace("{{ m.content }}", "{{ m.content[:2] }}"), "plain text of a user message"),
        (
            PLAIN.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last or m.role == 'user' }}"),
            "does not end earlier ones",
        ),
        (PLAIN.replace("assistant\n{% endif %}", "model\n{% endif %}"), "rewrites earlier turns"),
        (PLAIN.replace("<|im_start|>{{", "<|im_start|>{{ '' if add_generation_prompt else '!' }}{{"), "begins replies"),
        ("{{ strftime_now(format) }}" + PLAIN, "date"),
        ("{% if %}", "refuses a chat"),
    ],
    ids=["none", "no end", "counts", "parts", "cuts", "last only", "header", "last header", "date", "broken"],
)
def test_what_cannot_be_followed_is_refused_in_one_line(template: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        renderer(template)
    assert "\n" not in str(refused.value)
