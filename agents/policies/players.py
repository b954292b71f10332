"""Players that need no model: the environment's oracle, and dice."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...envs import Action, Message, TextEnv, ToolEnv
from ...tools import Tool, ToolCall
from ..policy import derive_seed


class OraclePlayer:
    """Does what the environment's oracle says. ValueError where the oracle knows no action."""

    async def act(self, messages: Sequence[Message], env: TextEnv, seed: int) -> str:
        action = env.oracle()
        if action is None:
            kind = type(env.unwrapped).__name__
            raise ValueError(f"the oracle of {kind} knows no action here; another policy is needed")
        return action


@dataclass(frozen=True)
class RandomPlayer:
    """Calls any tool with arguments that fit its schema, texts being words of the episode; answers now and then.

    Where an environment has no tools its action space is sampled.
    """

    answers: float = 0.2  # probability that a turn answers
    malformed: float = 0.05  # probability that what it writes breaks off in the middle

    async def act(self, messages: Sequence[Message], env: TextEnv, seed: int) -> str:
        dice = random.Random(derive_seed(seed, len(messages)))
        inner = env.unwrapped
        if not isinstance(inner, ToolEnv):
            env.action_space.seed(dice.getrandbits(31))
            return str(env.action_space.sample())
        words = [m.text.replace(".", " ").replace(",", " ").split() for m in messages if m.role in ("user", "tool")]
        tools = inner.tools
        if not tools or dice.random() < self.answers:
            action = Action(answer=_text(dice, words))
        else:
            tool = dice.choice(list(tools.values()))
            action = Action(calls=(ToolCall(tool.name, _arguments(dice, tool, words)),))
        text = inner.format.render(action, tools)
        return text[: len(text) // 2] if dice.random() < self.malformed else text


def _arguments(dice: random.Random, tool: Tool, words: list[list[str]]) -> dict[str, Any]:
    required = tool.parameters.get("required", ())
    return {
        name: _value(dice, schema, words)
        for name, schema in tool.parameters.get("properties", {}).items()
        if name in required or dice.random() < 0.5
    }


def _value(dice: random.Random, schema: Mapping[str, Any], words: list[list[str]]) -> Any:
    """Something of the schema's type."""
    if "enum" in schema:
        return dice.choice(schema["enum"])
    if "anyOf" in schema:
        return _value(dice, dice.choice(schema["anyOf"]), words)
    match schema.get("type"):
        case "integer" | "number":
            low = int(schema.get("minimum", 0))
            return dice.randint(low, max(low, int(schema.get("maximum", low + 9))))
        case "boolean":
            return dice.random() < 0.5
        case "array":
            return [_value(dice, schema.get("items", {}), words) for _ in range(dice.randint(1, 2))]
        case "object":
            return {name: _value(dice, inner, words) for name, inner in schema.get("properties", {}).items()}
        case "null":
            return None
    return _text(dice, words)


def _text(dice: random.Random, words: list[list[str]]) -> str:
    """One to three words that follow each other in a message."""
    among = [message for message in words if message]
    if not among:
        return "nothing"
    message = dice.choice(among)
    start = dice.randrange(len(message))
    return " ".join(message[start : start + dice.choice((1, 1, 2, 3))])
