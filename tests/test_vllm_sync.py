"""A real vLLM server: it computes the weights that it was given, or the push that gave them to it fails."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from live import APART, LIVE, TOLERANCE, connected, continued, deviation, metric, until
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from treegym.agents.models.lora import add_lora, merged_state
from treegym.agents.serving import Server, ServerError, guard
from treegym.agents.serving.launch import ServerOptions, VLLMServer, launch
from treegym.agents.serving.sync import Load, PushFailed, push
from treegym.agents.serving.ways import Files, Lora

pytestmark = LIVE
versions = itertools.count(1)


def add_noise(model: PreTrainedModel, seed: int, only: str = "") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if only in name and weight.requires_grad:
                scale = 0.05 * weight.std() if weight.count_nonzero() else 0.02
                weight += scale * torch.randn(weight.shape, generator=generator)


def prefix_of(seed: int) -> list[int]:
    """256 tokens and one more, which is computed even if all are cached."""
    return random.Random(seed).choices(range(40_000), k=257)


@pytest.mark.parametrize("only", ["", "embed_tokens"])
def test_a_continuation_behind_a_cached_prefix_is_of_the_pushed_weights(
    served: VLLMServer, model: PreTrainedModel, only: str
) -> None:
    prompt = prefix_of(1)

    async def scenario() -> None:
        async with connected(served.url) as server:
            await push(server, Files(), model, next(versions))
            assert deviation(await continued(server, "smollm2", prompt), model, prompt) < TOLERANCE
            old = copy.deepcopy(model)
            add_noise(model, 2, only)
            assert await push(server, Files(), model, version := next(versions)) == "smollm2"
            await continued(server, "smollm2", prompt)
            reply = await continued(server, "smollm2", prompt)
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 256
            assert deviation(reply, model, prompt) < TOLERANCE
            assert deviation(reply, old, prompt) > APART
            assert reply["choices"][0]["weight_versions"] == [{"version": str(version), "start": 0, "end": 8}]

    asyncio.run(scenario())


def test_an_adapter_is_served_as_its_merged_weights_are_here(served: VLLMServer, model: PreTrainedModel) -> None:
    prompt, way = prefix_of(3), Lora(kept=2)
    plain = copy.deepcopy(model)
    add_lora(model, 8, 16, seed=0)

    async def scenario() -> None:
        async with connected(served.url) as server:
            await push(server, Files(), plain, next(versions))
            names = []
            for seed in range(3):
                add_noise(model, seed)
                names.append(await push(server, way, model, next(versions)))
                merged = copy.deepcopy(plain)
                merged.load_state_dict(merged_state(model))
                await continued(server, names[-1], prompt)
                reply = await continued(server, names[-1], prompt)
                assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 256
                assert deviation(reply, merged, prompt) < TOLERANCE
                assert deviation(reply, plain, prompt) > APART
            assert deviation(await continued(server, "smollm2", prompt), plain, prompt) < TOLERANCE
            listed = {row["id"] for row in (await server.ask("v1/models"))["data"]}
            assert len(set(names)) == 3 and listed & {"smollm2", *names} == {"smollm2", *names[-2:]}

    asyncio.run(scenario())


class Recording(Server):
    """Remembers what it was asked."""

    paths: ClassVar[list[str]] = []

    async def ask(self, path: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
        self.paths.append(path.partition("?")[0])
        return await super().ask(path, *arguments, **settings)


def test_a_version_that_is_there_is_not_sent_again_unless_its_weights_differ(
    served: VLLMServer, model: PreTrainedModel
) -> None:
    async def scenario() -> list[int]:
        sent, version = [], next(versions)
        async with connected(served.url, Recording) as server:
            for change in (False, False, True):
                if change:
                    add_noise(model, 4)  # as another run would that counts from the same number
                Recording.paths.clear()
                await push(server, Files(), model, version)
                sent.append(Recording.paths.count("update_weights"))
        return sent

    assert asyncio.run(scenario()) == [1, 0, 1]


def pauses_after(begin: Callable[[], Awaitable[None]]) -> type[Server]:
    class PausesAfter(Server):
        async def ask(self, path: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
            if path.startswith("pause?mode=keep"):
                await begin()
            return await super().ask(path, *arguments, **settings)

    return PausesAfter


def test_a_request_that_is_kept_goes_on_with_the_new_weights(served: VLLMServer, model: PreTrainedModel) -> None:
    prompt = prefix_of(5)
    requests = []

    async def scenario() -> None:
        async def begin() -> None:
            sampled = metric(served.url, "generation_tokens_total")
            requests.append(asyncio.create_task(continued(server, "smollm2", prompt, 160)))
            await until(lambda: metric(served.url, "generation_tokens_total") > sampled)

        async with connected(served.url) as server, connected(served.url, pauses_after(begin)) as pausing:
            await push(server, Files(), model, first := next(versions))
            old = copy.deepcopy(model)
            add_noise(model, 6)
            await push(pausing, Files(), model, second := next(versions), pause="keep")
            [reply] = await asyncio.gather(*requests)
            spans = reply["choices"][0]["weight_versions"]
            assert [span["version"] for span in spans] == [str(first), str(second)]
            turn = spans[1]["start"]
            assert turn == spans[0]["end"] > 0 and spans[1]["end"] == 160
            assert deviation(reply, old, prompt, 0, turn) < TOLERANCE
            assert deviation(reply, model, prompt, turn) < TOLERANCE

    asyncio.run(scenario())


# what can go wrong


class NoReset(Server):
    """A server whose prefix cache is not reset, although it says so."""

    async def ask(self, path: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
        if path.startswith("reset_prefix_cache"):
            return {"success": True}
        return await super().ask(path, *arguments, **settings)


class Altered(Files):
    """Writes files that are not as they should be."""

    alter: Callable[[dict[str, Tensor]], None]

    @contextmanager
    def packed(self, model: PreTrainedModel, version: int) -> Iterator[Load]:
        with super().packed(model, version) as packed:
            assert packed.folder
            file = packed.folder / "model.safetensors"
            tensors = load_file(file)
            self.alter(tensors)
            save_file(tensors, file)
            yield packed


class LayerLeftOut(Altered):
    def alter(self, tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.5.")]:
            del tensors[name]


class BrokenHalfWay(Altered):
    def alter(self, tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.15.mlp.down_proj.weight"] = torch.zeros(3, 5)


class NotPacked(Files):
    """Loads the files by vLLM's own means, which leaves a tied output layer as it was."""

    async def load(self, server: Server, load: Load, model: PreTrainedModel, version: int, seconds: float) -> None:
        await server.ask("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(load.folder)}})
        await server.ask("update_weight_version", {"new_version": str(version)})


class OnceBroken(Files):
    """The first attempt fails between its phases."""

    attempts: ClassVar[list[int]] = []

    async def load(self, server: Server, load: Load, model: PreTrainedModel, version: int, seconds: float) -> None:
        self.attempts.append(version)
        if len(self.attempts) == 1:
            await server.ask("start_weight_update", {})
            raise ServerError("the connection broke")
        await super().load(server, load, model, version, seconds)


FAULTS = [
    (NoReset, Files, "", "does not have the weights"),
    (Server, LayerLeftOut, "", r"was not sent model\.layers\.5\.input_layernorm\.weight and 8 more"),
    (Server, NotPacked, "embed_tokens", "does not have the weights"),
    (Server, BrokenHalfWay, "", "answered 500"),
]


@pytest.mark.parametrize(
    ("kind", "way", "only", "reason"), FAULTS, ids=[f"{a.__name__}-{b.__name__}" for a, b, *_ in FAULTS]
)
def test_a_push_that_fails_is_reported_and_nobody_is_answered_until_a_whole_one(
    served: VLLMServer, model: PreTrainedModel, kind: type[Server], way: type[Files], only: str, reason: str
) -> None:
    prompt = prefix_of(7)

    async def scenario() -> None:
        async with connected(served.url, kind) as faulty, connected(served.url, at_once=1) as server:
            await push(server, Files(), model, next(versions))
            old = copy.deepcopy(model)
            add_noise(model, 8, only)
            with pytest.raises(PushFailed, match=f"in 3 attempts: .*{reason}"):
                await push(faulty, way(), model, next(versions))
            request = asyncio.create_task(continued(server, "smollm2", prompt))
            await asyncio.wait([request], timeout=3)
            assert not request.done()
            await push(server, Files(), model, version := next(versions))
            reply = await request
            assert reply["choices"][0]["weight_versions"] == [{"version": str(version), "start": 0, "end": 8}]
            assert deviation(reply, model, prompt) < TOLERANCE
            assert deviation(reply, old, prompt) > APART

    asyncio.run(scenario())


def test_a_push_that_fails_once_is_repeated_whole(served: VLLMServer, model: PreTrainedModel) -> None:
    prompt = prefix_of(9)
    add_noise(model, 9)

    async def scenario() -> None:
        async with connected(served.url) as server:
            await push(server, OnceBroken(), model, next(versions))
            assert len(OnceBroken.attempts) == 2
            assert deviation(await continued(server, "smollm2", prompt), model, prompt) < TOLERANCE

    asyncio.run(scenario())


# processes: a server of a model that is nothing but small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def kills(pid: int) -> type[Server]:
    class Kills(Server):
        """The process that answers is killed once it began to load new weights."""

        async def ask(self, path: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
            if path == "update_weights":
                os.kill(pid, signal.SIGKILL)
            return await super().ask(path, *arguments, **settings)

    return Kills


def test_a_server_killed_between_start_and_finish_fails_the_push_and_leaves_no_process(tiny: PreTrainedModel) -> None:
    more = ("--skip-tokenizer-init", "--max-num-seqs", "16")
    server = launch(ServerOptions(str(tiny.name_or_path), dtype="float32", max_model_len=512, cache=1, more=more))
    try:

        async def scenario() -> None:
            async with connected(server.url) as plain:
                await push(plain, Files(), tiny, 1)
            async with connected(server.url, kills(server.pid)) as killed:
                await push(killed, Files(), tiny, 2)

        assert len(guard.members(server.pid)) >= 3
        with pytest.raises(PushFailed, match="cannot be reached"):
            asyncio.run(scenario())
    finally:
        server.stop()
    assert guard.members(server.pid) == []
    assert not server.alive and not Path(server.log).exists()
