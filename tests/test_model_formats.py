"""The action format follows the chat template of the model that plays, unless the scenario names one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from transformers import PreTrainedTokenizerBase

from treegym.agents import ChatRenderer
from treegym.agents.models.nano import build_nano
from treegym.envs import HouseholdEnv, Message, lookup
from treegym.scenarios.build import in_format, in_own_format
from treegym.scenarios.policies import speaking
from treegym.scenarios.schema import Scenario
from treegym.trainers import TaskSet

SCENARIO = Scenario(TaskSet("treegym/Lookup-v0"))


def tokenizer_of(marks: str) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template has these marks where it would render calls."""
    tokenizer = build_nano(lookup.vocabulary())[1]
    tokenizer.chat_template = f"{{# {marks} #}}{tokenizer.chat_template}"
    return tokenizer


@pytest.fixture
def coder(tmp_path: Path) -> str:
    tokenizer_of("<tool_call><function=").save_pretrained(tmp_path)
    return str(tmp_path)


def format_in(scenario: Scenario) -> Any:
    return scenario.environment.settings.get("format")


def test_the_model_s_template_chooses_where_the_scenario_does_not(coder: str) -> None:
    chosen = in_own_format(SCENARIO, coder)
    assert format_in(chosen) == "qwen-coder"
    env = chosen.environment.task("train", 0).make()
    _, info = env.reset(seed=0)
    assert "<function=" in info["messages"][0].text
    named = replace(SCENARIO, environment=replace(SCENARIO.environment, settings={"format": "tagged"}))
    assert in_own_format(named, coder) == named


@pytest.mark.parametrize("model", ["nano", "no such model"])
def test_other_models_leave_the_scenario_as_it_is(model: str) -> None:
    assert in_own_format(SCENARIO, model) == SCENARIO


@pytest.mark.parametrize(
    ("policy", "tokenizer", "name"),
    [
        (None, False, "qwen-coder"),
        ("http://localhost/v1#m", False, "qwen-coder"),
        ("http://localhost/v1#m", True, "qwen-coder"),
        ("chat+http://localhost/v1#m", True, "qwen-coder"),
        ("chat+http://localhost/v1#m", False, None),  # the server's model is not the scenario's
        ("tools+http://localhost/v1#m", False, "openai"),
        ("oracle", False, None),
        ("scripted:play.py", False, None),
    ],
)
def test_the_policy_says_whose_template_counts(
    policy: str | None, tokenizer: bool, name: str | None, coder: str
) -> None:
    scenario = replace(SCENARIO, model=replace(SCENARIO.model, name=coder))
    assert format_in(speaking(scenario, policy, coder if tokenizer else None)) == name


class OwnFormat(HouseholdEnv):
    """Is written in one format alone."""

    def __init__(self) -> None:
        super().__init__(format="fenced")


def test_an_environment_with_a_format_of_its_own_keeps_it() -> None:
    gymnasium.register("test/OwnFormat-v0", OwnFormat)
    try:
        scenario = Scenario(TaskSet("test/OwnFormat-v0"))
        assert in_format(scenario, "hermes") == scenario
    finally:
        del gymnasium.registry["test/OwnFormat-v0"]


def test_a_written_reply_has_the_tokens_of_its_model_s_calls_and_no_others() -> None:
    tokenizer = tokenizer_of("<|channel|>commentary functions.")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|secret|>"]})
    renderer = ChatRenderer(tokenizer)
    channel, secret = tokenizer.convert_tokens_to_ids(["<|channel|>", "<|secret|>"])
    assert channel in renderer.reply("<|channel|>final") and secret not in renderer.reply("<|secret|>")
    assert channel not in renderer.observation([Message("user", "<|channel|>")], ended=True)
