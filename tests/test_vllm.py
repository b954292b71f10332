"""A real vLLM server under VLLMPolicy: rollouts, training, and what goes wrong with servers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from listening import listening
from live import LIVE, TOLERANCE, connected, continued, deviation, metric, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from transformers import PreTrainedModel

from treegym.agents import ChatRenderer, Context, RolloutStrategy, RolloutTree, Run, Sampling, grow_trees
from treegym.agents.models.lora import add_lora
from treegym.agents.models.nano import build_nano
from treegym.agents.models.registry import load, load_tokenizer
from treegym.agents.policies.vllm import ServerRefused, VLLMPolicy
from treegym.agents.rollouts import Chains, TreeExpansion
from treegym.agents.serving import Server, guard
from treegym.agents.serving.launch import ServerOptions, VLLMServer, launch
from treegym.agents.serving.owned import Owned
from treegym.agents.serving.probe import continuation_logprobs
from treegym.agents.serving.sync import Load, PushFailed, push
from treegym.agents.serving.ways import Files, Lora, begin
from treegym.envs import LookupEnv, Task, lookup
from treegym.scenarios import load_scenario, train
from treegym.trainers import TaskSet

pytestmark = LIVE
SAMPLING = Sampling(max_tokens=32, max_context=640)
FACTS = TaskSet("treegym/FactSearch-v0", {"top_k": 2, "max_turns": 4}, train={"split": "train", "hops": 2})
Step = Callable[[VLLMPolicy], Awaitable[Any]]


def facts(number: int) -> list[Task]:
    return [FACTS.task("train", i) for i in range(number)]


def played(
    urls: Sequence[str],
    model: str,
    renderer: ChatRenderer,
    task: Step,
    *,
    push: Any = None,
    entropy_top: int = 0,
    **server: Any,
) -> Any:
    """What the task gives with a policy before these servers."""

    async def main() -> Any:
        servers = [Server(url, **server) for url in urls]
        policy = VLLMPolicy(servers, model, renderer, push=push, entropy_top=entropy_top, hop=2.0)
        try:
            return await task(policy)
        finally:
            await policy.close()

    return asyncio.run(main())


async def files(server: Server, model: PreTrainedModel, version: int) -> str:
    return await push(server, Files(), model, version)


def off(model: PreTrainedModel, tree: RolloutTree) -> float:
    """How far the log-probability of any sampled token is from the model's in torch, nats."""
    most = 0.0
    for path in tree.paths:
        for end, i in enumerate(path):
            action = tree.nodes[i].action
            own = continuation_logprobs(model, tree.tokens(path[:end]), action.token_ids)
            most = max([most, *(abs(a - b) for a, b in zip(action.logprobs, own, strict=True))])
    return most


def said(trees: Sequence[RolloutTree]) -> list[list[tuple[int, ...]]]:
    return [[tree.tokens(path) for path in tree.paths] for tree in trees]


# rollouts of SmolLM2


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(load_tokenizer("smollm2"))


def test_sampled_tokens_have_the_log_probabilities_of_torch_and_do_not_depend_on_how_many_are_asked_for_at_a_time(
    served: VLLMServer, smollm2: PreTrainedModel, renderer: ChatRenderer
) -> None:
    async def grown(policy: VLLMPolicy) -> list[RolloutTree]:
        await policy.push(smollm2, 1_000)
        return await grow_trees(facts(2), Chains(4), policy, renderer, SAMPLING, seed=3)

    three, eight = (played([served.url], "smollm2", renderer, grown, push=files, at_once=n) for n in (3, 8))
    assert said(three) == said(eight)
    assert sum(tree.num_sampled_tokens for tree in eight) > 300
    assert max(off(smollm2, tree) for tree in eight) < TOLERANCE


def asked(url: str) -> tuple[float, float]:
    """Tokens of prompts that the server was asked for since it began, and those of them that were in its cache."""
    return metric(url, "prefix_cache_queries_total"), metric(url, "prefix_cache_hits_total")


@pytest.mark.parametrize("strategy", [Chains(8), TreeExpansion(1, 3, 1)], ids=["chains", "expansion"])
def test_a_shared_prefix_is_computed_once(
    served: VLLMServer, smollm2: PreTrainedModel, renderer: ChatRenderer, strategy: RolloutStrategy
) -> None:
    def grown(strategy: RolloutStrategy, version: int) -> tuple[RolloutTree, float, float]:
        async def task(policy: VLLMPolicy) -> tuple[RolloutTree, float, float]:
            await policy.push(smollm2, version)
            before = asked(served.url)
            [tree] = await grow_trees(facts(1), strategy, policy, renderer, SAMPLING, seed=4)
            queries, hits = (b - a for a, b in zip(before, asked(served.url), strict=True))
            return tree, queries, hits

        found: tuple[RolloutTree, float, float] = played([served.url], "smollm2", renderer, task, push=files)
        return found

    tree, queries, hits = grown(strategy, 1_001)
    assert len(tree.leaves) >= 4
    assert queries - hits <= 1.2 * tree.num_unique_tokens
    _, few, found = grown(Chains(1), 1_002)
    assert found / few < hits / queries


def test_a_server_works_no_more_on_what_nobody_waits_for(served: VLLMServer, renderer: ChatRenderer) -> None:
    async def task(policy: VLLMPolicy) -> None:
        sampling = Sampling(max_tokens=900, max_context=1000)
        done = metric(served.url, "request_success_total")
        asking = [asyncio.create_task(policy.sample(Context((5, 6)), i, sampling)) for i in range(3)]
        await until(lambda: metric(served.url, "num_requests_running") == 3)
        for request in asking:
            request.cancel()
        await until(lambda: metric(served.url, "num_requests_running") == 0)
        assert metric(served.url, "request_success_total") == done  # none was carried to its end

    played([served.url], "smollm2", renderer, task)


# training SmolLM2


def three_steps(url: str, folder: Path, *changes: str) -> Run:
    common = (
        "model.dtype=float32",
        "algorithm.parameters={n: 4}",
        "warmup.demonstrations=40",
        "improvement.steps=3",
        "improvement.tasks_per_step=2",
        "heldout={tasks: 2, untrained: 0}",
        f"serving={{engine: vllm, urls: ['{url}#smollm2']}}",
    )
    train(load_scenario("quickstart", [*common, *changes]), folder)
    return Run(folder)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_three_steps_of_grpo_through_the_server(
    served: VLLMServer, smollm2: PreTrainedModel, renderer: ChatRenderer, weights: str, tmp_path: Path
) -> None:
    async def plain(policy: VLLMPolicy) -> None:
        await policy.push(smollm2, 1_003)

    played([served.url], "smollm2", renderer, plain, push=files)
    lora = ("model.weights=lora", "model.lora_rank=8", "serving.sync=lora", "warmup.optimization.learning_rate=1e-3")
    run = three_steps(served.url, tmp_path, *(lora if weights == "lora" else ()))
    rows = [row for row in run.metrics() if row["stage"] == "improvement"]
    assert len(rows) == 3 and max(row["sampler_deviation"] for row in rows) < 1e-4
    assert any(row["grad_norm"] > 0 for row in rows)
    made = {
        labels["step"]: {node.action.weights_version for node in tree.nodes}
        for labels, tree in run.trees
        if labels["stage"] == "improvement"
    }
    first = min(made[0])
    assert made == {step: {first + step} for step in range(3)}

    trained, prompt = load(str(tmp_path / "model"))[0].float(), [5, 6, 7]

    async def last() -> float:
        async with connected(served.url) as server:
            names = [row["id"] for row in (await server.ask("v1/models"))["data"]]
            [name] = [name for name in names if name.startswith(f"v{first + 3}-")] if weights == "lora" else ["smollm2"]
            return deviation(await continued(server, name, prompt), trained, prompt)

    assert asyncio.run(last()) < TOLERANCE


# faults, before servers of a small model


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, ChatRenderer]:
    """A model that is saved where its name says."""
    model, tokenizer = build_nano(lookup.vocabulary())
    folder = tmp_path_factory.mktemp("nano")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model, ChatRenderer(tokenizer)


def serving(model: PreTrainedModel, **settings: Any) -> ServerOptions:
    more = ("--max-num-seqs", "16")
    return ServerOptions(
        str(model.name_or_path), name="nano", dtype="float32", max_model_len=512, cache=1, more=more, **settings
    )


@pytest.fixture(scope="module")
def small(nano: tuple[PreTrainedModel, ChatRenderer]) -> Iterator[VLLMServer]:
    with launch(serving(nano[0], processed_logprobs=True)) as server:
        yield server


LOOKUPS = [Task("treegym/Lookup-v0", seed, {"hops": [3]}) for seed in range(3)]
TURNS = Sampling(max_tokens=24, max_context=480)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every action that an environment was given."""
    taken: list[str] = []
    step = LookupEnv.step

    def counted(env: LookupEnv, action: str) -> Any:
        taken.append(action)
        return step(env, action)

    monkeypatch.setattr(LookupEnv, "step", counted)
    return taken


def whole(trees: Sequence[RolloutTree], steps: Sequence[str], version: int) -> bool:
    """Whether there are all leaves, each turn was taken once and by these weights, and no reply was cut by a server."""
    nodes = [node for tree in trees for node in tree.nodes]
    cut = [n for n in nodes if n.action.stop_reason == "length" and len(n.action.token_ids) < TURNS.max_tokens]
    assert not cut and {node.action.weights_version for node in nodes} == {version}
    assert len(steps) == len(nodes)
    return [len(tree.leaves) for tree in trees] == [4] * len(LOOKUPS)


async def rollouts(policy: VLLMPolicy) -> list[RolloutTree]:
    return await grow_trees(LOOKUPS, Chains(4), policy, policy.renderer, TURNS, seed=5)


JSON = {"Content-Type": "application/json"}
Fault = Callable[["Proxy", Request], Awaitable[Response]]


class Proxy:
    """Stands before a server. The answers to some of the requests for tokens go wrong, counted from the first."""

    def __init__(self, url: str, fault: Fault, at: Sequence[int] = (2, 7, 8)) -> None:
        self.url, self.fault, self.at, self.count = url, fault, at, 0

    async def answer(self, request: Request) -> Response:
        if request.url.path == "/inference/v1/generate":
            self.count += 1
            if self.count in self.at:
                return await self.fault(self, request)
        return await self.forward(request)

    async def forward(self, request: Request) -> Response:
        async with httpx2.AsyncClient(timeout=300) as client:
            path = f"{self.url}{request.url.path}"
            reply = await client.request(
                request.method, path, params=request.url.query, content=await request.body(), headers=JSON
            )
        return Response(reply.content, reply.status_code, media_type="application/json")

    async def tell(self, path: str) -> None:
        async with httpx2.AsyncClient(timeout=300) as client:
            (await client.post(f"{self.url}/{path}")).raise_for_status()


async def failing(proxy: Proxy, request: Request) -> Response:
    return Response("Internal Server Error", 500)


async def overrun(proxy: Proxy, request: Request) -> Response:
    return Response("{}", 429, headers={"Retry-After": "1"})


async def silent(proxy: Proxy, request: Request) -> Response:
    await asyncio.sleep(4)
    return await proxy.forward(request)


async def broken_off(proxy: Proxy, request: Request) -> Response:
    """A reply that ends inside of its JSON."""
    reply = await proxy.forward(request)
    return Response(bytes(reply.body)[: len(reply.body) // 2], media_type="application/json")


async def aborted(proxy: Proxy, request: Request) -> Response:
    """A reply of a request that the server itself aborts, as it does for new weights by default."""
    await proxy.tell("pause?mode=keep")
    reply = asyncio.create_task(proxy.forward(request))
    await asyncio.sleep(0.3)
    await proxy.tell("pause?mode=abort")
    await proxy.tell("resume")
    text = bytes((await reply).body)
    assert b'"abort"' in text
    return Response(text, media_type="application/json")


@pytest.mark.parametrize("fault", [failing, overrun, silent, broken_off, aborted], ids=lambda fault: fault.__name__)
def test_a_fault_that_passes_costs_no_leaf_and_no_turn_twice(
    small: VLLMServer, nano: tuple[PreTrainedModel, ChatRenderer], steps: list[str], fault: Fault
) -> None:
    async def task(policy: VLLMPolicy) -> list[RolloutTree]:
        await policy.push(nano[0], 7)
        return await rollouts(policy)

    proxy = Proxy(small.url, fault)
    routes = [Route("/{path:path}", proxy.answer, methods=["GET", "POST"])]
    with listening(Starlette(routes=routes)) as url:
        trees = played([url], "nano", nano[1], task, push=files, timeout=2.0, patience=60.0)
    assert proxy.count > len(steps)
    assert whole(trees, steps, 7)
    assert httpx2.get(f"{small.url}/weight_info").json()["weight_version"] == "7"
    assert max(off(nano[0], tree) for tree in trees) < TOLERANCE


def test_what_a_server_cannot_do_is_refused_before_anything_is_asked_of_it(
    small: VLLMServer, nano: tuple[PreTrainedModel, ChatRenderer]
) -> None:
    def refusal(name: str, sampling: Sampling, entropy_top: int = 0) -> str:
        with pytest.raises(ServerRefused) as refused:
            played([small.url], name, nano[1], lambda policy: policy.open(sampling), entropy_top=entropy_top)
        return str(refused.value)

    assert refusal("other", TURNS).endswith("serves nano, not other")
    assert "--max-model-len 2048" in refusal("nano", Sampling())
    assert "--max-logprobs" in refusal("nano", TURNS, 65)


def test_an_adapter_that_a_server_refuses_leaves_it_as_it_was(
    small: VLLMServer, nano: tuple[PreTrainedModel, ChatRenderer]
) -> None:
    adapted = copy.deepcopy(nano[0])
    add_lora(adapted, 4, 8, seed=0)

    async def task(policy: VLLMPolicy) -> None:
        await policy.push(nano[0], 8)
        async with connected(small.url) as server:
            with pytest.raises(PushFailed, match="load_lora_adapter"):
                await push(server, Lora(), adapted, 9)
            assert deviation(await continued(server, "nano", [5, 6]), nano[0], [5, 6]) < TOLERANCE
            assert (await server.ask("weight_info"))["weight_version"] == "8"

    played([small.url], "nano", nano[1], task, push=files)


def test_a_context_that_is_longer_than_the_server_takes_ends_its_branches_alone(
    small: VLLMServer, nano: tuple[PreTrainedModel, ChatRenderer], steps: list[str]
) -> None:
    async def task(policy: VLLMPolicy) -> list[RolloutTree]:
        return await grow_trees(LOOKUPS, Chains(4), policy, policy.renderer, sampling, seed=5)

    sampling = replace(TURNS, max_tokens=160, max_context=4096)
    trees = played([small.url], "nano", nano[1], task)
    ends = [tree.nodes[leaf] for tree in trees for leaf in tree.leaves]
    assert len(ends) == 4 * len(LOOKUPS) and len(steps) == sum(len(tree.nodes) for tree in trees)
    assert {end.info.get("cause") for end in ends if end.truncated} >= {"context length"}


# temperatures


@pytest.fixture(scope="module")
def other(nano: tuple[PreTrainedModel, ChatRenderer]) -> Iterator[VLLMServer]:
    with launch(serving(nano[0])) as server:
        yield server


def at_half(url: str, nano: PreTrainedModel, folder: Path) -> list[dict[str, Any]]:
    """The rows of two steps at temperature 0.5."""
    changes = (
        f"model={{name: {nano.name_or_path}, dtype: float32}}",
        "environment.settings={hops: [1]}",
        "algorithm={name: grpo, parameters: {n: 8}}",
        "sampling={temperature: 0.5, max_tokens: 8, max_context: 512}",
        "warmup={demonstrations: 200}",
        "improvement={steps: 2, tasks_per_step: 8}",
        "heldout={tasks: 8, untrained: 0}",
        f"serving={{engine: vllm, urls: ['{url}#nano']}}",
    )
    train(load_scenario("lookup", changes), folder)
    return [row for row in Run(folder).metrics() if row["stage"] == "improvement"]


def test_a_temperature_is_trained_with_log_probabilities_of_what_was_sampled_and_refused_without(
    small: VLLMServer, other: VLLMServer, nano: tuple[PreTrainedModel, ChatRenderer], tmp_path: Path
) -> None:
    rows = at_half(small.url, nano[0], tmp_path / "processed")
    assert max(row["sampler_deviation"] for row in rows) < 1e-4 and any(row["grad_norm"] > 0 for row in rows)
    with pytest.raises(ServerRefused, match="start it with --logprobs-mode processed_logprobs"):
        at_half(other.url, nano[0], tmp_path / "raw")


# servers that are killed


@contextlib.contextmanager
def killing(pid: int, moment: Callable[[], bool]) -> Iterator[None]:
    """Kills a process of a server when the moment has come."""
    over = threading.Event()

    def wait() -> None:
        while not moment():
            if over.wait(0.01):
                return
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def worker_of(session: int) -> int:
    """The process of a server that computes."""
    [found] = [pid for pid in guard.members(session) if "VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


def test_the_trees_of_a_killed_server_end_at_another(
    small: VLLMServer, other: VLLMServer, nano: tuple[PreTrainedModel, ChatRenderer], steps: list[str]
) -> None:
    async def task(policy: VLLMPolicy) -> list[RolloutTree]:
        await policy.push(nano[0], 11)
        with killing(other.pid, lambda: len(steps) >= 4):
            return await rollouts(policy)

    trees = played([small.url, other.url], "nano", nano[1], task, push=files)
    assert whole(trees, steps, 11)
    other.stop()
    assert guard.members(other.pid) == [] and max(off(nano[0], tree) for tree in trees) < TOLERANCE


class KilledOnce(Files):
    """The server is killed once, after an update began."""

    pid = 0

    async def load(self, server: Server, load: Load, model: PreTrainedModel, version: int, seconds: float) -> None:
        if KilledOnce.pid:
            await begin(server, seconds)
            os.kill(KilledOnce.pid, signal.SIGKILL)
            KilledOnce.pid = 0
        await super().load(server, load, model, version, seconds)


def test_a_server_of_ones_own_is_started_anew_with_the_present_weights(
    nano: tuple[PreTrainedModel, ChatRenderer], steps: list[str]
) -> None:
    """Killed in mid-rollout, worker or whole, and in the middle of a push."""
    model, renderer = nano
    sessions: list[int] = []

    async def pushed(server: Server, model: PreTrainedModel, version: int) -> str:
        return await push(server, KilledOnce(), model, version)

    def session() -> int:
        assert owned.running
        sessions.append(owned.running.pid)
        return sessions[-1]

    async def task() -> None:
        await policy.open(TURNS)
        await policy.push(model, 21)
        for process in (worker_of, int):  # a session has the number of its first process
            steps.clear()
            with killing(process(session()), lambda: len(steps) >= 4):
                assert whole(trees := await rollouts(policy), steps, 21)
            assert max(off(model, tree) for tree in trees) < TOLERANCE
        KilledOnce.pid = session()
        await policy.push(model, 22)
        steps.clear()
        assert whole(await rollouts(policy), steps, 22)
        session()
        await policy.close()

    owned = Owned(serving(model), patience=60.0)
    policy = VLLMPolicy((), "nano", renderer, owned=owned, push=pushed, hop=2.0)
    asyncio.run(task())
    assert len(set(sessions)) == 4 and not any(guard.members(session) for session in sessions)
