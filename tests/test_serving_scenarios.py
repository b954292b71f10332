"""The `serving` of a scenario: what becomes of it, and what is refused before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("httpx2", reason="pip install 'treegym[search]'")

from treegym.agents import ChatRenderer
from treegym.agents.models.lora import add_lora
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.vllm import VLLMPolicy
from treegym.envs import lookup
from treegym.scenarios.errors import ScenarioError
from treegym.scenarios.schema import AlgorithmChoice, Model, Scenario, ServingChoice
from treegym.scenarios.serving import served_policy
from treegym.trainers import Improvement, TaskSet

LOOKUP = Scenario(TaskSet("treegym/Lookup-v0"), Model("nano"), AlgorithmChoice("grpo"), serving=ServingChoice("vllm"))


@pytest.fixture
def nano(tmp_path: Path) -> tuple[PreTrainedModel, ChatRenderer]:
    """A model that was saved."""
    model, tokenizer = build_nano(lookup.vocabulary())
    model.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    return model, ChatRenderer(tokenizer)


def policy(scenario: Scenario, nano: tuple[PreTrainedModel, ChatRenderer]) -> VLLMPolicy:
    return served_policy(scenario, *nano, torch.float32)


def command(scenario: Scenario, nano: tuple[PreTrainedModel, ChatRenderer], monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the server that would be started."""
    monkeypatch.setenv("TREEGYM_VLLM", "true")  # any program
    owned = policy(scenario, nano)._owned
    assert owned
    return " ".join(owned.options.command(1))


def test_a_server_keeps_as_many_adapters_as_the_lag_needs_of_the_rank_that_the_model_has(
    nano: tuple[PreTrainedModel, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_lora(nano[0], 32, 32, seed=0)
    lora, improvement = ServingChoice("vllm", sync="lora"), Improvement(max_lag=4)
    shown = command(replace(LOOKUP, serving=lora, improvement=improvement), nano, monkeypatch)
    assert "--max-lora-rank 32 --max-loras 6" in shown


def test_more_flags_of_the_server_are_written_as_it_reads_them(
    nano: tuple[PreTrainedModel, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {"max-num-seqs": 8, "enable-expert-parallel": True, "no": False, "compilation-config": {"mode": 0}}
    shown = command(replace(LOOKUP, serving=ServingChoice("vllm", start=start)), nano, monkeypatch)
    assert shown.endswith('--max-num-seqs 8 --enable-expert-parallel --compilation-config {"mode": 0}')


def test_the_key_in_the_environment_is_that_of_the_server_that_is_started(
    nano: tuple[PreTrainedModel, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    owned = policy(LOOKUP, nano)._owned
    assert owned and owned.options.key == "secret"


def test_the_folder_that_is_served_lasts_as_long_as_its_policy(nano: tuple[PreTrainedModel, ChatRenderer]) -> None:
    served = policy(LOOKUP, nano)
    assert served._owned
    folder = Path(served._owned.options.model)
    assert (folder / "model.safetensors").is_file()
    del served
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"serving": ServingChoice("vllm", sync="lora")}, "serving.sync: lora pushes adapters: set model.weights to"),
        ({"serving": ServingChoice("vllm", urls=("http://a:1",))}, "serving.urls: write http://HOST:PORT#MODEL"),
        ({"serving": ServingChoice("vllm", urls=("http://a:1/v1#m",))}, "serving.urls: .* without /v1"),
        ({"serving": ServingChoice("vllm", urls=("http://a:1#m", "http://b:1#n"))}, "the same MODEL at each"),
        ({"serving": ServingChoice("vllm", folder="/nowhere")}, "serving.folder: /nowhere is no directory"),
        ({"model": Model("nano", policy="mine:Policy")}, "model.policy: with serving.engine: vllm the servers sample"),
        ({"algorithm": AlgorithmChoice("arpo")}, "algorithm.rollout: entropies over all tokens .* {top: 20}"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(
    changes: dict[str, Any], says: str, nano: tuple[PreTrainedModel, ChatRenderer]
) -> None:
    with pytest.raises(ScenarioError, match=says) as refused:
        policy(replace(LOOKUP, **changes), nano)
    assert "\n" not in str(refused.value)


def test_weights_are_written_where_other_machines_find_them(
    nano: tuple[PreTrainedModel, ChatRenderer], tmp_path: Path
) -> None:
    add_lora(nano[0], 2, 2, seed=0)
    policies = [
        policy(replace(LOOKUP, serving=ServingChoice("vllm", sync="lora", folder=str(tmp_path))), nano)
        for _ in range(2)
    ]
    assert len([*tmp_path.glob("treegym-adapters-*")]) == 2
    policies.clear()
    assert not [*tmp_path.glob("treegym-adapters-*")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_nccl_is_refused_where_there_is_no_cuda(nano: tuple[PreTrainedModel, ChatRenderer]) -> None:
    with pytest.raises(ScenarioError, match=r"serving.sync: nccl .* sync: files needs none"):
        policy(replace(LOOKUP, serving=ServingChoice("vllm", sync="nccl")), nano)


def test_the_number_of_entropies_is_asked_of_the_server_at_its_start(
    nano: tuple[PreTrainedModel, ChatRenderer],
) -> None:
    rollout = {"Budgeted": {"strategy": {"EntropyBranching": {"top": 30}}, "leaves": 4}}
    assert policy(replace(LOOKUP, algorithm=AlgorithmChoice("arpo", rollout=rollout)), nano)._entropy_top == 30
