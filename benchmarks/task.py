"""What all benchmarks play: 2 prompts, 4 rollouts each, 4 turns, a tool result after each turn but the last.

Nothing but the standard library, for TRL's process reads it too.
"""

from __future__ import annotations

import zlib

PROMPTS = 2
ROLLOUTS = 4  # a prompt
TURNS = 4
TURN_TOKENS = 32  # sampled in every turn; no turn ends early
PROMPT_TOKENS = 271  # of a prompt below
RESULT_TOKENS = 28  # of the tool result below with its markup

# SmolLM2's own markup. Its template has no tool calls, and TRL refuses a template without them.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = """You are a careful research assistant. You answer questions about places, people and money by looking \
facts up, one at a time, in a small encyclopedia that only you can read. You never guess: what you say must have \
been in a result of a search.

You have one tool.

search(query: string): finds the article that fits the query best and shows its first lines. A query is a short \
phrase with the name of the thing you ask about, such as "airport code of Lisbon" or "currency of Norway".

In each turn first think in one short sentence about what is still missing. Then either search once more or, if \
nothing is missing, give the answer. Write a search as <search>your query</search> and an answer as \
<answer>the answer</answer>. An answer is a name, a number or a few words; do not repeat the question and do not \
explain. Write nothing after the closing tag. If a search finds nothing useful, ask in other words. Results can be \
long, out of date or about something else of the same name, so compare them with the question before you go on."""
QUESTIONS = (
    "Which language do most people speak in the country whose airport has the code LIS?",
    "Which currency is used in the country whose airport has the code OSL and why?",
)
RESULT = "Lisbon is the capital of Portugal, a country in the west of Europe."


def prompt(number: int) -> list[tuple[str, str]]:
    """Role and text of each message."""
    return [("system", SYSTEM), ("user", QUESTIONS[number % PROMPTS])]


def reward(text: str) -> float:
    """In [0, 1], and different for different texts, so that every rollout has an advantage."""
    return zlib.crc32(text.encode()) / 2**32
