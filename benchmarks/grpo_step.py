"""treegym's side of a GRPO step: rollout of the toy task, update, weights handed back to the sampler."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium
from task import PROMPTS, RESULT, ROLLOUTS, TEMPLATE, TURN_TOKENS, TURNS, prompt, reward
from worker import serve

from treegym.__main__ import tune_malloc
from treegym.agents import ChatRenderer, Context, Sample, Sampling, grow_trees
from treegym.agents.models.registry import load
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.envs import Message, Task, TextEnv
from treegym.trainers import Learner, Optimization, grpo


class ToyEnv(TextEnv):
    """Answers everything with the same tool result, for a number of turns."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.turns: int = (options or {})["turns"]
        self.said: tuple[str, ...] = ()
        return "", {"messages": [Message(role, text) for role, text in prompt(seed or 0)]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.said += (action,)
        over = len(self.said) == self.turns
        earned = reward("".join(self.said)) if over else 0.0
        return RESULT, earned, over, False, {"messages": [Message("tool", RESULT)]}

    def fork(self) -> Self:
        return copy.copy(self)

    def state_key(self) -> str:
        return repr(self.said)


gymnasium.register("benchmarks/Toy-v0", entry_point=lambda **settings: ToyEnv())


class EndlessRenderer(ChatRenderer):
    """No token ends a turn, so that every turn has as many as it may."""

    def ended(self, token_ids: Sequence[int]) -> bool:
        return False


class ForgetfulPolicy(TransformersPolicy):
    """Computes the whole context again in every turn."""

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        return await super().sample(Context(tuple(context.tokens())), seed, sampling)


def prepare(model: str, keep: bool = True, update: bool = True) -> Callable[[], dict[str, float]]:
    """`keep`: keys and values stay across turns; `update`: not the rollout alone."""
    loaded, tokenizer = load(Path(model))
    tokenizer.chat_template = TEMPLATE
    renderer = EndlessRenderer(tokenizer)
    policy = (TransformersPolicy if keep else ForgetfulPolicy)(loaded, renderer)
    learner = Learner(loaded, Optimization(learning_rate=1e-6, max_tokens=1152))  # a tree in each pass
    algorithm = grpo(ROLLOUTS)
    sampling = Sampling(max_tokens=TURN_TOKENS)

    def measure(turns: int = TURNS) -> dict[str, float]:
        tasks = [Task("benchmarks/Toy-v0", seed, {"turns": turns}) for seed in range(PROMPTS)]
        prefilled, sampled, seed = policy.prefilled_tokens, policy.sampled_tokens, policy.weights_version
        start = time.perf_counter()
        trees = asyncio.run(grow_trees(tasks, algorithm.rollout, policy, renderer, sampling, seed=seed))
        grown = time.perf_counter()
        if update:
            policy.release()
            learner.update([(tree, algorithm.advantage([tree])[0]) for tree in trees], algorithm.loss)
        policy.refresh(policy.weights_version + 1)
        end = time.perf_counter()
        return {
            "seconds": end - start,
            "rollout": grown - start,
            "update": end - grown,
            "prefilled": policy.prefilled_tokens - prefilled,
            "sampled": policy.sampled_tokens - sampled,
            "total": sum(tree.num_total_tokens for tree in trees),
            "unique": sum(tree.num_unique_tokens for tree in trees),
        }

    measure(turns=1)  # warms up; makes the optimiser's state
    return measure


if __name__ == "__main__":
    tune_malloc()  # as the command does
    serve(prepare)
