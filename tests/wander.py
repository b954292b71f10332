"""Wander: a rollout strategy that does a bit of everything, and the tasks it does it in."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from treegym.agents import Completion, Context, GrowingTree, Sample
from treegym.agents.rollouts import Turn
from treegym.envs import Task, ToolEnv, registered
from treegym.envs.check import HOSTILE
from treegym.tools.sandbox import SandboxUnavailable, open_sandbox

NOISE = [text for text in HOSTILE if len(text) < 1000 and "\ud800" not in text]  # no tokenizer gives half a pair


@dataclass(frozen=True)
class Wander:
    """Rollouts from the prompt or from any turn of the ones before; the turns are an expert's, nonsense, or broken."""

    rollouts: int = 6

    async def grow(self, tree: GrowingTree) -> None:
        dice = random.Random(tree.seed("wander"))
        for number in range(self.rollouts):
            open_turns = [turn for turn in tree.turns(0) if not turn.done] or [tree.root]
            turn = tree.root if dice.random() < 0.3 else dice.choice(open_turns)
            while not turn.done:
                text = action(turn, dice)
                tokens = tree.renderer.reply(text)
                turn = await tree.attach(turn, Sample(Completion(text, tokens), Context(tokens, turn.context)))
            tree.end(number, turn, 0)


def action(turn: Turn, dice: random.Random) -> str:
    expert = turn.env.oracle() if turn.env else None
    kind = dice.random()
    if expert is not None and kind < 0.6:
        return expert
    if expert is not None and kind < 0.75:
        return expert[: dice.randrange(len(expert))]
    if isinstance(turn.env, ToolEnv) and kind < 0.9:
        word = dice.choice(
            ["north", "red", "kitchen", "print(1 + 1)", "open('kept', 'a').write('x')", "city of Oslo", "1 / 0"]
        )
        return f"<{(name := dice.choice(list(turn.env.tools)))}>{word}</{name}>"
    return dice.choice(NOISE)


def tasks(env: str, number: int, first: int = 0) -> list[Task]:
    """Of an environment, their sandbox the strongest that there is."""
    return [Task(env, seed, settings=sandboxed(env)) for seed in range(first, first + number)]


def sandboxed(env: str) -> dict[str, Any]:
    if env not in ("treegym/Code-v0", "treegym/PythonMath-v0"):
        return {}
    try:
        open_sandbox()
    except SandboxUnavailable:
        return {"sandbox": "local"}
    return {}


ENVS = registered()
