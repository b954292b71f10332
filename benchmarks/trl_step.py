"""TRL's side of a GRPO step: GRPOTrainer with environment_factory on the toy task. Runs where TRL is installed.

Forced, because SmolLM2 does not call tools by itself: every completion is read as one call of the tool (in place of
TRL's parse_response), after the third one no call is followed; every completion has exactly 32 tokens
(generation_kwargs); the chat template is the benchmark's. All else is TRL's default unless a setting says otherwise.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import trl.trainer.grpo_trainer as grpo
from datasets import Dataset
from task import PROMPTS, RESULT, ROLLOUTS, TEMPLATE, TURN_TOKENS, TURNS, prompt, reward
from transformers import AutoTokenizer, TrainerCallback
from worker import Channel


class ToyEnv:
    """TRL's view of an environment: reset, and its other methods are the tools."""

    def reset(self, **task: Any) -> None:
        pass

    def search(self) -> str:
        """Looks something up."""
        return RESULT


def call_always(tokenizer: Any, ids: list[int], **options: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True), "tool_calls": [call]}


def score(completions: list[list[dict[str, Any]]], **columns: Any) -> list[float]:
    return [reward("".join(message["content"] for message in chat)) for chat in completions]


class TimedTrainer(grpo.GRPOTrainer):  # type: ignore[misc]
    """Keeps the time of its rollouts, and counts their tokens."""

    def _generate(self, prompts: list[Any]) -> Any:
        self.counts = {"prefilled": 0, "total": 0, "sampled": 0}
        start = time.perf_counter()
        result = super()._generate(prompts)
        self.rollout = time.perf_counter() - start
        prompt_ids, completion_ids, mask = result[:3]
        self.counts["total"] = sum(map(len, prompt_ids)) + sum(map(len, completion_ids))
        self.counts["sampled"] = sum(map(sum, mask))
        return result

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **options: Any) -> Any:
        self.counts["prefilled"] += sum(map(len, prompt_ids))
        return super()._generate_single_turn(prompt_ids, *rest, **options)


class Measure(TrainerCallback):
    """Waits for a request before each step and answers it afterwards; the first step, of one turn, warms up."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step:
            self.channel.ask()
            self.trainer.max_tool_calling_iterations = TURNS - 1
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        seconds, rollout = time.perf_counter() - self.start, self.trainer.rollout
        self.channel.answer(seconds=seconds, rollout=rollout, update=seconds - rollout, **self.trainer.counts)


def train(channel: Channel, model: str, **settings: Any) -> None:
    """`settings` are GRPOConfig's."""
    grpo.parse_response = call_always
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = {}  # not read: call_always stands in for the parser
    chats = [[{"role": role, "content": text} for role, text in prompt(number)] for number in range(PROMPTS)]
    callback = Measure(channel)
    with tempfile.TemporaryDirectory() as folder:
        config = grpo.GRPOConfig(
            output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
            max_steps=1000, per_device_train_batch_size=PROMPTS * ROLLOUTS, num_generations=ROLLOUTS,
            max_completion_length=512, generation_kwargs={"max_new_tokens": TURN_TOKENS, "min_new_tokens": TURN_TOKENS},
            max_tool_calling_iterations=0, **settings,
        )  # fmt: skip
        trainer = TimedTrainer(
            model=model, args=config, reward_funcs=score, train_dataset=Dataset.from_dict({"prompt": chats}),
            processing_class=tokenizer, environment_factory=ToyEnv, callbacks=[callback],
        )  # fmt: skip
        callback.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    channel = Channel()
    train(channel, **channel.settings)
