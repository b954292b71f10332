"""VLLMPolicy before servers that speak vLLM's protocol and have a model of this process behind them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("httpx2", reason="pip install 'treegym[search]'")
from listening import listening
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from treegym.agents import ChatRenderer, Context, RolloutTree, Sample, Sampling, TokenPolicy, derive_seed, grow_trees
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.policies.vllm import ServerRefused, VLLMPolicy
from treegym.agents.rollouts import Chains, EntropyBranching, FailureCause
from treegym.agents.serving import Server, ServerError
from treegym.envs import Task, lookup

TASKS = [Task("treegym/Lookup-v0", seed) for seed in range(3)]
SAMPLING = Sampling(max_tokens=6)
Handler = Callable[[dict[str, Any], dict[str, str]], Awaitable[Response]]


@pytest.fixture(scope="module")
def nano() -> tuple[TransformersPolicy, ChatRenderer]:
    model, tokenizer = build_nano(lookup.vocabulary())
    renderer = ChatRenderer(tokenizer)
    return TransformersPolicy(model, renderer, dtype=torch.float32), renderer


class Fake:
    """What vLLM answers, from a policy in this process; notes what it was asked, and by which session."""

    def __init__(
        self, policy: TokenPolicy, *, model: str = "nano", longest: int = 4096, processed: bool = True
    ) -> None:
        self.policy, self.model, self.longest, self.processed = policy, model, longest, processed
        self.seen: list[dict[str, Any]] = []
        self.sessions: list[str] = []
        self.faults: list[Response] = []  # answered first
        self.version: int | str = 0
        self.down = self.paused = False
        self.versions: list[int | str] = []  # of the weights, by request
        self.url = ""

    async def is_paused(self, request: Request) -> Response:
        return JSONResponse({"is_paused": self.paused})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": self.model, "max_model_len": self.longest}]})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        if self.down:
            return JSONResponse({"error": "down"}, 503)
        if self.faults:
            return self.faults.pop(0)
        self.seen.append(body)
        self.versions.append(self.version)
        self.sessions.append(request.headers.get("X-Session-ID", ""))
        params = body["sampling_params"]
        top = params["logprobs"]
        if top > 20:
            return JSONResponse({"error": {"message": f"logprobs of {top}, greater than max allowed: 20"}}, 400)
        heat = params["temperature"] if self.processed else 1.0
        sampling = Sampling(temperature=heat, max_tokens=params["max_tokens"], entropy=top > 0)
        sample = await self.policy.sample(Context(tuple(body["token_ids"])), params["seed"], sampling)
        completion = sample.completion
        rows = zip(completion.token_ids, completion.logprobs, strict=True)
        content = [{"token_id": t, "logprob": p, "top_logprobs": spread(t, p, top, heat)} for t, p in rows]
        versions = [{"version": str(self.version), "start": 0, "end": len(content)}]
        choice = {"token_ids": list(completion.token_ids), "logprobs": {"content": content}, "finish_reason": "stop"}
        return JSONResponse({"choices": [{**choice, "weight_versions": versions}]})

    @contextlib.contextmanager
    def listening(self) -> Iterator[Fake]:
        routes = [
            Route("/v1/models", self.models),
            Route("/is_paused", self.is_paused),
            Route("/inference/v1/generate", self.generate, methods=["POST"]),
        ]
        with listening(Starlette(routes=routes)) as self.url:
            yield self


def spread(token: int, logprob: float, top: int, heat: float = 1.0) -> list[dict[str, Any]]:
    """So many tokens, as vLLM lists them: the sampled one first, then the likeliest, here each a step more likely
    than it is."""
    others = [{"token_id": token + i, "logprob": logprob + (top - i) / heat} for i in range(1, top)]
    return [{"token_id": token, "logprob": logprob}, *others] if top else []


class Pushes:
    """Gives these servers weights, after a while: in truth only their version. Notes what was pushed, by server."""

    def __init__(self, *fakes: Fake, adapters: bool = False) -> None:
        self.fakes, self.adapters = fakes, adapters
        self.done: list[tuple[Fake, int]] = []
        self.broken: set[Fake] = set()

    async def __call__(self, server: Server, model: Any, version: int) -> str:
        [fake] = [fake for fake in self.fakes if fake.url == server.url]
        await asyncio.sleep(0.05)
        if fake in self.broken:
            raise ServerError(f"{server.url} cannot be reached")
        self.done.append((fake, version))
        if self.adapters:
            return f"nano-{version}"
        fake.version = version
        return fake.model


class Owns:
    """Has one server after the other, each of which it is said to start."""

    def __init__(self, *fakes: Fake) -> None:
        self.fakes, self.starts, self.failures = fakes, 0, 0
        self.client: Server | None = None

    async def start(self) -> Server:
        await self.stop()
        await asyncio.sleep(0.05)
        if self.failures:
            self.failures -= 1
            raise ServerError("it died while it started", FailureCause.CRASHED)
        self.client = Server(self.fakes[self.starts].url, patience=0.2)
        self.starts += 1
        return self.client

    async def stop(self) -> None:
        if self.client:
            await self.client.close()


def run(*fakes: Fake, task: Callable[[VLLMPolicy], Awaitable[Any]], renderer: ChatRenderer, **settings: Any) -> Any:
    """What the task gives with a policy before these servers."""

    async def main() -> Any:
        servers = [Server(fake.url, patience=settings.pop("patience", 1.0)) for fake in fakes]
        policy = VLLMPolicy([] if "owned" in settings else servers, "nano", renderer, **settings)
        try:
            return await task(policy)
        finally:
            await policy.close()

    return asyncio.run(main())


def growing(renderer: ChatRenderer, sampling: Sampling = SAMPLING) -> Callable[[VLLMPolicy], Awaitable[Any]]:
    return lambda policy: grow_trees(TASKS, Chains(3), policy, renderer, sampling, seed=1)


class SeededByTurn:
    """Draws as a server is told to."""

    def __init__(self, policy: TokenPolicy) -> None:
        self._policy = policy

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        return await self._policy.sample(context, derive_seed(seed, context.length), sampling)


def said(trees: list[RolloutTree]) -> list[list[tuple[int, ...]]]:
    return [[tree.tokens(path) for path in tree.paths] for tree in trees]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_served_model_plays_as_it_does_here(
    nano: tuple[TransformersPolicy, ChatRenderer], temperature: float
) -> None:
    policy, renderer = nano
    sampling = Sampling(max_tokens=6, temperature=temperature)
    with Fake(policy).listening() as fake:
        fake.version = 7
        trees = run(fake, task=growing(renderer, sampling), renderer=renderer)
    here = asyncio.run(grow_trees(TASKS, Chains(3), SeededByTurn(policy), renderer, sampling, seed=1))
    assert said(trees) == said(here)
    for one, other in zip(trees, here, strict=True):
        for a, b in zip(one.nodes, other.nodes, strict=True):
            assert a.action.logprobs == pytest.approx(b.action.logprobs, abs=1e-4)
            assert a.action.weights_version == 7 and a.action.last_weights_version is None
    assert fake.seen[0]["sampling_params"]["stop_token_ids"] == [renderer.end_of_turn]
    assert {body["cache_salt"] for body in fake.seen} == {"0"} and {body["model"] for body in fake.seen} == {"nano"}


def test_a_tree_asks_one_server_and_goes_on_at_another_when_that_is_gone(
    nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    policy, renderer = nano
    with Fake(policy).listening() as one, Fake(policy).listening() as other:
        trees = run(one, other, task=growing(renderer), renderer=renderer)
        assert one.seen and other.seen
        assert not set(one.sessions) & set(other.sessions) and len({*one.sessions, *other.sessions}) == len(TASKS)

        class Dies(list[str]):
            def append(self, session: str) -> None:
                super().append(session)
                one.down = len(self) >= 4

        one.sessions, asked = Dies(), len(other.seen)
        again = run(one, other, task=growing(renderer), renderer=renderer, hop=0.1)
    assert said(again) == said(trees) and len(one.sessions) == 4
    assert len(other.seen) - asked == sum(len(path) for tree in trees for path in tree.paths) - 4


def test_a_server_that_is_alone_and_gone_ends_its_branches_after_patience(
    nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    with Fake(nano[0]).listening() as fake:
        fake.down = True
        with pytest.raises(ServerError, match=r"answered 503: down; .* attempts"):
            run(fake, task=growing(nano[1]), renderer=nano[1], patience=0.2)


def test_passing_faults_change_nothing(
    nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aborted request, a reply that is cut, 429 and 500 are asked again with the same seed."""
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    policy, renderer = nano
    choice = {"token_ids": [5], "logprobs": {"content": [{"token_id": 5, "logprob": -1.0}]}, "finish_reason": "abort"}
    with Fake(policy).listening() as fake:
        trees = run(fake, task=growing(renderer), renderer=renderer)
        fake.faults = [
            JSONResponse({"choices": [choice]}),
            Response('{"choices": [{"token_', media_type="application/json"),
            JSONResponse({}, 429),
            JSONResponse({}, 500),
        ]
        again = run(fake, task=growing(renderer), renderer=renderer)
    assert again == trees


def test_entropies_sum_over_the_likeliest_tokens_by_their_ids(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    policy, renderer = nano
    sampling = Sampling(max_tokens=4, entropy=True, entropy_top=3)
    with Fake(policy).listening() as fake:
        sample = run(fake, task=lambda p: p.sample(Context((5, 6)), 0, sampling), renderer=renderer)
        for logprob, entropy in zip(sample.completion.logprobs, sample.completion.entropies, strict=True):
            listed = [logprob + 3, logprob + 2, logprob + 1]  # not the sampled one, which is less likely
            assert entropy == pytest.approx(-sum(math.exp(p) * p for p in listed))
        with pytest.raises(ValueError, match="set the strategy's `top`"):
            run(
                fake,
                task=lambda p: grow_trees(TASKS[:1], EntropyBranching(1, 2), p, renderer, SAMPLING),
                renderer=renderer,
            )


@pytest.mark.parametrize(
    ("settings", "sampling", "entropy_top", "says"),
    [
        ({"model": "other"}, SAMPLING, 0, "serves other, not nano"),
        ({"longest": 100}, SAMPLING, 0, r"takes 100 tokens, sampling.max_context is 2048: start it with --max-model"),
        ({"processed": False}, Sampling(temperature=0.5), 0, "start it with --logprobs-mode processed_logprobs"),
        ({}, SAMPLING, 50, r"start it with --max-logprobs, or take entropies over at most 19 tokens"),
    ],
)
def test_what_a_server_cannot_do_is_said_in_one_line(
    settings: dict[str, Any],
    sampling: Sampling,
    entropy_top: int,
    says: str,
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    with Fake(nano[0], **settings).listening() as fake, pytest.raises(ServerRefused, match=says) as refused:
        run(fake, task=lambda policy: policy.open(sampling), renderer=nano[1], entropy_top=entropy_top)
    assert "\n" not in str(refused.value)


def test_a_server_that_can_do_all_is_taken(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    with Fake(nano[0]).listening() as fake:
        run(
            fake,
            task=lambda policy: policy.open(Sampling(temperature=0.5)),
            renderer=nano[1],
            entropy_top=19,
        )
        fake.faults = [JSONResponse({"detail": "Not Found"}, 404)]
        with pytest.raises(ServerRefused, match="start vLLM with --enable-scale-out"):
            run(fake, task=lambda policy: policy.open(SAMPLING), renderer=nano[1])


def test_a_server_that_a_broken_push_left_paused_is_not_asked_before_the_next_push(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    with Fake(nano[0]).listening() as fake:
        fake.paused = True
        run(fake, task=lambda policy: policy.open(SAMPLING), renderer=nano[1], push=Pushes(fake))
        assert not fake.seen


def test_a_push_that_is_there_is_none_and_a_lost_server_is_no_end(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    """Weights go to every server once a version; trees that begin afterwards carry it as salt and as version."""
    policy, renderer = nano
    pushed: list[tuple[str, int]] = []
    broken: set[str] = set()

    async def push(server: Server, model: Any, version: int) -> str:
        if server.url in broken:
            raise ServerError(f"{server.url} cannot be reached")
        pushed.append((server.url, version))
        return f"nano-{version}"

    async def steps(served: VLLMPolicy) -> None:
        model: Any = object()
        await served.push(model, 0)
        await served.push(model, 0)
        assert pushed == [(one.url, 0), (other.url, 0)]
        broken.add(one.url)
        await served.push(model, 1)
        assert pushed[2:] == [(other.url, 1)] and served.weights_version == 1
        await grow_trees(TASKS, Chains(2), served, renderer, SAMPLING)
        assert not one.seen and {(body["model"], body["cache_salt"]) for body in other.seen} == {("nano-1", "1")}
        broken.clear()
        await served.push(model, 1)  # for the one that has come back
        assert pushed[3:] == [(one.url, 1)]
        broken.update((one.url, other.url))
        with pytest.raises(ServerError):
            await served.push(model, 2)
        assert served.weights_version == 1

    with Fake(policy).listening() as one, Fake(policy).listening() as other:
        run(one, other, task=steps, renderer=renderer, push=push)


# servers that are started anew


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.01)


MODEL: Any = object()  # what is pushed: `Pushes` looks at its version only


@pytest.mark.usefixtures("hasty")
def test_a_server_that_is_started_anew_is_asked_once_it_has_the_weights(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    """Rollouts that wait for it, and those that ask while it is started, all end as without its death."""
    policy, renderer = nano
    with Fake(policy).listening() as one, Fake(policy).listening() as other:
        owned, push = Owns(one, other), Pushes(one, other)
        other.version = "default"  # that of the weights a server begins with
        late: list[asyncio.Task[Sample]] = []  # begin while the new server is given weights

        async def slow(server: Server, model: Any, version: int) -> str:
            if owned.starts == 2:
                late.append(asyncio.create_task(policy_of[0].sample(Context((5, 6)), 0, SAMPLING)))
                await asyncio.sleep(0.5)
            return await push(server, model, version)

        policy_of: list[VLLMPolicy] = []

        async def task(served: VLLMPolicy) -> None:
            policy_of.append(served)
            await served.open(SAMPLING)
            asked = len(one.seen)
            await served.push(MODEL, 3)
            trees = await growing(renderer)(served)
            one.down = True
            again = await growing(renderer)(served)
            assert said(again) == said(trees) and (await late[0]).completion.weights_version == 3
            assert len(one.seen) > asked and set(one.versions[asked:]) == {3}
            assert set(other.versions) == {3} and {body["cache_salt"] for body in other.seen} == {"3"}

        run(task=task, renderer=renderer, owned=owned, push=slow)
    assert push.done == [(one, 3), (other, 3)] and owned.starts == 2


@pytest.mark.usefixtures("hasty")
def test_no_server_is_given_weights_that_have_moved_since_the_last_push(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    """One that is gone while they move waits for the next push, and so do its rollouts."""
    policy, renderer = nano
    with Fake(policy).listening() as one, Fake(policy).listening() as other:
        push = Pushes(one, other)

        async def task(served: VLLMPolicy) -> None:
            await served.open(SAMPLING)
            await served.push(MODEL, 1)
            one.down = True
            async with served.moving():
                sampling = asyncio.create_task(served.sample(Context((5, 6)), 0, SAMPLING))
                await asyncio.sleep(0.5)  # more than its patience, its start and a push take
            await asyncio.sleep(0.2)
            assert push.done == [(one, 1)] and not sampling.done()
            push.broken.add(one)
            await served.push(MODEL, 2)
            sample = await sampling
            assert sample.completion.weights_version == 2

        run(task=task, renderer=renderer, owned=Owns(one, other), push=push)
    assert push.done == [(one, 1), (other, 2)]


@pytest.mark.usefixtures("hasty")
def test_a_rollout_that_is_cancelled_does_not_stop_the_start_that_others_wait_for(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    policy, renderer = nano
    with Fake(policy).listening() as one, Fake(policy).listening() as other:
        owned = Owns(one, other)

        async def task(served: VLLMPolicy) -> None:
            await served.open(SAMPLING)
            one.down = True
            first, second = (asyncio.create_task(served.sample(Context((5,)), i, SAMPLING)) for i in range(2))
            while not served._hosts[0].mending:
                await asyncio.sleep(0.001)
            first.cancel()
            assert (await second).completion.token_ids and first.cancelled()

        run(task=task, renderer=renderer, owned=owned)
    assert owned.starts == 2


@pytest.mark.usefixtures("hasty")
def test_a_request_under_which_every_server_dies_ends(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    policy, renderer = nano
    with Fake(policy).listening() as fake:
        owned = Owns(*[fake] * 9)

        async def task(served: VLLMPolicy) -> None:
            await served.open(SAMPLING)
            fake.down = True
            with pytest.raises(ServerError, match="answered 503"):
                await served.sample(Context((5,)), 0, SAMPLING)

        run(task=task, renderer=renderer, owned=owned)
    assert owned.starts == 3


def test_a_server_that_has_ended_is_not_waited_for() -> None:
    async def asked() -> None:
        server = Server("http://127.0.0.1:9", patience=3600.0, alive=lambda: False)
        async with server.aside() as control:
            for each in (server, control):
                with pytest.raises(ServerError, match="; 1 attempts"):
                    await each.ask("health")
        await server.close()

    asyncio.run(asked())


@pytest.mark.usefixtures("hasty")
def test_a_start_that_fails_ends_the_rollouts_that_wait_and_is_tried_again_for_others(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    policy, renderer = nano
    with Fake(policy).listening() as one, Fake(policy).listening() as other:
        owned = Owns(one, other)

        async def task(served: VLLMPolicy) -> None:
            await served.open(SAMPLING)
            one.down, owned.failures = True, 1
            waiting = (served.sample(Context((5,)), i, SAMPLING) for i in range(3))
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            assert sum(isinstance(error, ServerError) for error in ended) >= 1
            assert all(isinstance(one, ServerError | Sample) for one in ended)
            assert (await served.sample(Context((5,)), 0, SAMPLING)).completion.token_ids

        run(task=task, renderer=renderer, owned=owned)
    assert owned.starts == 2


def test_a_server_that_somebody_else_started_anew_is_given_the_weights_again(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    """What it answered with the weights that it began with is no turn."""
    policy, renderer = nano
    with Fake(policy).listening() as fake:
        push = Pushes(fake)

        async def task(served: VLLMPolicy) -> None:
            await served.push(MODEL, 4)
            fake.version = "default"
            trees = await growing(renderer)(served)
            assert {node.action.weights_version for tree in trees for node in tree.nodes} == {4}

        run(fake, task=task, renderer=renderer, push=push)
    assert push.done == [(fake, 4), (fake, 4)]


@pytest.mark.usefixtures("hasty")
def test_a_server_that_missed_a_push_is_not_asked_before_it_has_the_weights(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    policy, renderer = nano
    with Fake(policy).listening() as one, Fake(policy).listening() as other:
        push = Pushes(one, other)

        async def task(served: VLLMPolicy) -> None:
            await served.push(MODEL, 1)
            push.broken.add(one)
            await served.push(MODEL, 2)
            push.broken.clear()
            other.down = True
            with pytest.raises(ServerError, match="503"):
                await growing(renderer)(served)
            assert not one.seen
            await served.push(MODEL, 3)
            one.seen.clear()
            other.seen.clear()
            await growing(renderer)(served)
            assert one.versions and set(one.versions) == {3}

        run(one, other, task=task, renderer=renderer, push=push, hop=0.1)


def test_a_turn_of_an_adapter_has_the_version_that_was_asked_for(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    """Though a newer one is pushed while the server writes: adapters do not wait for each other."""
    policy, renderer = nano
    answer, asked = threading.Event(), threading.Event()

    class Slow(Fake):
        async def generate(self, request: Request) -> Response:
            asked.set()
            while not answer.is_set():
                await asyncio.sleep(0.001)
            return await super().generate(request)

    with Slow(policy).listening() as fake:
        fake.version = "default"

        async def task(served: VLLMPolicy) -> None:
            await served.push(MODEL, 1)
            sampling = asyncio.create_task(served.sample(Context((5, 6)), 0, SAMPLING))
            while not asked.is_set():
                await asyncio.sleep(0.001)
            await served.push(MODEL, 2)
            answer.set()
            completion = (await sampling).completion
            assert completion.weights_version == 1 and completion.last_weights_version is None
            assert (await served.sample(Context((5, 6)), 0, SAMPLING)).completion.weights_version == 2

        run(fake, task=task, renderer=renderer, push=Pushes(fake, adapters=True))
    assert [body["model"] for body in fake.seen] == ["nano-1", "nano-2"]
