"""A policy behind a server: the tokens and log-probabilities of this process, and clear words where it fails."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
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
from treegym.agents.models.registry import load
from treegym.agents.policies import ChatPlayer, OpenAIPolicy, Server, ServerError
from treegym.agents.policies.messages import read_message
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.rollouts import Chains
from treegym.envs import Action, Message, Task, ToolEnv, lookup
from treegym.tools import ToolCall
from treegym.tools.search.server import bind

TASKS = [Task("treegym/Lookup-v0", seed) for seed in range(3)]
SAMPLING = Sampling(max_tokens=6)
Answer = Callable[[dict[str, Any]], Awaitable[Response]]


@pytest.fixture(scope="module")
def nano() -> tuple[TransformersPolicy, ChatRenderer]:
    model, tokenizer = build_nano(lookup.vocabulary())
    renderer = ChatRenderer(tokenizer)
    return TransformersPolicy(model, renderer, dtype=torch.float32), renderer


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server in a thread that answers every POST so, and the bodies it got."""
    seen: list[dict[str, Any]] = []

    async def post(request: Request) -> Response:
        seen.append(await request.json())
        return await answer(seen[-1])

    routes = [Route("/v1/completions", post, methods=["POST"]), Route("/v1/chat/completions", post, methods=["POST"])]
    with listening(Starlette(routes=routes)) as url:
        yield f"{url}/v1", seen


def completions(policy: TokenPolicy) -> Answer:
    """What vLLM's /completions gives, from a policy in this process."""

    async def answer(body: dict[str, Any]) -> Response:
        sampling = Sampling(temperature=body["temperature"], max_tokens=body["max_tokens"])
        completion = (await policy.sample(Context(tuple(body["prompt"])), body["seed"], sampling)).completion
        choice = {
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "logprobs": {"token_logprobs": list(completion.logprobs)},
            "finish_reason": completion.stop_reason,
        }
        return JSONResponse({"choices": [choice]})

    return answer


@asynccontextmanager
async def connected(url: str, **settings: Any) -> AsyncIterator[Server]:
    server = Server(url, **settings)
    try:
        yield server
    finally:
        await server.close()


async def grown(url: str, renderer: ChatRenderer, sampling: Sampling = SAMPLING, **settings: Any) -> list[RolloutTree]:
    async with connected(url, **settings) as server:
        policy = OpenAIPolicy(server, "nano", renderer)
        return await grow_trees(TASKS, Chains(3), policy, renderer, sampling, seed=1)


class SeededByTurn:
    """Draws as a server is told to."""

    def __init__(self, policy: TokenPolicy) -> None:
        self._policy = policy

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        return await self._policy.sample(context, derive_seed(seed, context.length), sampling)


def test_a_served_model_plays_as_it_does_here(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    policy, renderer = nano
    with serving(completions(policy)) as (url, seen):
        served = asyncio.run(grown(url, renderer, at_once=4))
        again = asyncio.run(grown(url, renderer, at_once=2))
        greedy = asyncio.run(grown(url, renderer, Sampling(temperature=0, max_tokens=6)))
        warm = asyncio.run(grown(url, renderer, Sampling(temperature=0.5, max_tokens=6)))
    here = asyncio.run(grow_trees(TASKS, Chains(3), SeededByTurn(policy), renderer, SAMPLING, seed=1))
    assert [said(tree) for tree in served] == [said(tree) for tree in again] == [said(tree) for tree in here]
    for one, other in zip(served, here, strict=True):
        for a, b in zip(one.nodes, other.nodes, strict=True):
            assert a.action.logprobs == pytest.approx(b.action.logprobs, abs=1e-4)
    assert all(len({path for path in tree.paths}) == 1 for tree in greedy)
    assert not any(node.action.logprobs for tree in warm for node in tree.nodes)  # not of what was sampled from
    asked = seen[0]
    assert asked["stop_token_ids"] == [renderer.end_of_turn] and asked["ignore_eos"] and asked["top_p"] == 1


def said(tree: RolloutTree) -> list[tuple[int, ...]]:
    return [tree.tokens(path) for path in tree.paths]


def test_an_aborted_request_is_asked_again_and_a_cut_reply_too(
    nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is paused for new weights answers 200 with what it has of the turn; that is no turn."""
    policy, renderer = nano
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    calls, answer = 0, completions(policy)

    async def interrupted(body: dict[str, Any]) -> Response:
        nonlocal calls
        calls += 1
        whole = json.loads(bytes((await answer(body)).body))
        if calls % 3 == 1:
            [choice] = whole["choices"]
            short = {**choice, "token_ids": choice["token_ids"][:1], "logprobs": {"token_logprobs": [-1.0]}}
            return JSONResponse({"choices": [{**short, "finish_reason": "abort"}]})
        return Response(json.dumps(whole)[: -9 if calls % 3 == 2 else None], media_type="application/json")

    with serving(interrupted) as (url, seen):
        sample = asyncio.run(one(url, renderer))
    here = asyncio.run(SeededByTurn(policy).sample(Context((5, 6)), 0, SAMPLING))
    assert sample.completion.token_ids == here.completion.token_ids
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]  # the seed too


def test_no_more_requests_at_a_time_than_allowed(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    policy, renderer = nano
    under_way, most = 0, 0
    answer = completions(policy)

    async def counted(body: dict[str, Any]) -> Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await answer(body)
        finally:
            under_way -= 1

    with serving(counted) as (url, _):
        asyncio.run(grown(url, renderer, at_once=2))
    assert 1 <= most <= 2


def test_passing_faults_are_tried_again(
    nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, renderer = nano
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    calls, answer = 0, completions(policy)

    async def flaky(body: dict[str, Any]) -> Response:
        nonlocal calls
        calls += 1
        if calls % 2:
            return JSONResponse({"error": {"message": "overrun"}}, 503 if calls % 3 else 429)
        return await answer(body)

    with serving(flaky) as (url, _):
        trees = asyncio.run(grown(url, renderer, at_once=1))
    here = asyncio.run(grow_trees(TASKS, Chains(3), SeededByTurn(policy), renderer, SAMPLING, seed=1))
    assert [said(tree) for tree in trees] == [said(tree) for tree in here]


def test_a_server_is_left_alone_for_as_long_as_it_asks_for_within_reason(
    nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    monkeypatch.setattr("treegym.agents.serving.client.LONGEST_WAIT", 0.5)
    answer, times = completions(nano[0]), []

    async def busy(body: dict[str, Any]) -> Response:
        times.append(time.monotonic())
        headers = {1: {"Retry-After": "3600"}, 2: {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}}.get(len(times))
        return JSONResponse({}, 429, headers) if headers else await answer(body)

    with serving(busy) as (url, _):
        asyncio.run(one(url, nano[1]))
    assert len(times) == 3 and times[1] - times[0] >= 0.5


async def one(url: str, renderer: ChatRenderer, **settings: Any) -> Sample:
    async with connected(url, **settings) as server:
        return await OpenAIPolicy(server, "nano", renderer).sample(Context((5, 6)), 0, SAMPLING)


TEXT_ALONE = {"choices": [{"text": "hello", "logprobs": None}]}


@pytest.mark.parametrize(
    ("status", "reply", "says"),
    [
        (200, TEXT_ALONE, r"gives no token ids .* vLLM does \(return_token_ids\)\. Text alone: chat\+http://127"),
        (200, {"choices": []}, "answered in another shape: IndexError"),
        (200, {"choices": [{"token_ids": [], "logprobs": {"token_logprobs": []}}]}, "gave 0 tokens and 0 log-prob"),
        (200, {"choices": [{"token_ids": [1], "logprobs": None}]}, "answered in another shape: TypeError"),
        (200, [1], r"something else than a JSON object: '\[1\]'"),
        (404, {"error": {"message": "The model `nano`\ndoes not exist."}}, "answered 404: The model `nano` does not"),
        (400, {"error": "too long"}, "answered 400: too long"),
        (500, {"detail": "down"}, r"answered 500: \{\"detail\":\"down\"\}; \d+ attempts"),
    ],
)
def test_wrong_answers_are_one_line(
    status: int, reply: Any, says: str, nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)

    async def answer(body: dict[str, Any]) -> Response:
        return JSONResponse(reply, status)

    with serving(answer) as (url, seen), pytest.raises(ServerError, match=says) as caught:
        asyncio.run(one(url, nano[1], patience=0.3))
    assert "\n" not in str(caught.value) and (len(seen) > 1 if status == 500 else len(seen) == 1)


def test_silence_and_absence_are_told_apart(
    nano: tuple[TransformersPolicy, ChatRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(ServerError, match="cannot be reached"):  # nobody listens
            asyncio.run(one(url, nano[1], patience=0.3))
        listener.listen()
        with pytest.raises(ServerError, match=r"has not answered within 0\.2 s; \d attempts"):
            asyncio.run(one(url, nano[1], patience=0.3, timeout=0.2))


def test_a_chat_server_is_asked_for_text(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    """It gets the chat so far, tool results as the user's words; what it writes is what is done."""

    async def oracle(body: dict[str, Any]) -> Response:
        messages = body["messages"]
        env = next(task.make() for task in TASKS if prompt(task) == messages[: len(prompt(task))])
        env.reset(seed=next(task.seed for task in TASKS if prompt(task) == messages[: len(prompt(task))]))
        for message in messages:
            if message["role"] == "assistant":
                env.step(message["content"])
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": env.oracle()}}]})

    async def play(url: str) -> list[RolloutTree]:
        async with connected(url) as server:
            return await grow_trees(TASKS, Chains(2), ChatPlayer(server, "m", SAMPLING), nano[1], Sampling(), seed=1)

    with serving(oracle) as (url, seen):
        trees = asyncio.run(play(url))
    assert all(tree.term("exact") == (1.0, 1.0) for tree in trees)
    assert {message["role"] for body in seen for message in body["messages"]} == {"system", "user", "assistant"}


def test_a_chat_server_s_replies_are_cut_as_it_says(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    renderer = nano[1]

    async def breaks_off(body: dict[str, Any]) -> Response:
        text = "" if len(body["messages"]) > 2 else "hm"
        return JSONResponse({"choices": [{"message": {"content": text}, "finish_reason": "length"}]})

    async def play(url: str) -> list[RolloutTree]:
        async with connected(url) as server:
            return await grow_trees(TASKS[:1], Chains(1), ChatPlayer(server, "m", SAMPLING), renderer, Sampling())

    with serving(breaks_off) as (url, _):
        [tree] = asyncio.run(play(url))
    assert [node.action.text for node in tree.nodes] == ["hm", *[""] * (len(tree.nodes) - 1)] and len(tree.nodes) > 1
    assert {node.action.stop_reason for node in tree.nodes} == {"length"}
    chat = [*tree.messages, Message("assistant", "hm"), *tree.nodes[0].messages]
    assert tree.tokens(tree.paths[0][:1]) == renderer.prompt(chat)  # the reply is ended once


def message_of(env: ToolEnv, action: str) -> tuple[str, list[ToolCall], str | None]:
    """(thought, calls, answer) of what an oracle would write."""
    parsed = env.format.parse(action, env.tools)
    assert isinstance(parsed, Action)
    return parsed.thought, list(parsed.calls), parsed.answer


def as_openai(env: ToolEnv, action: str) -> dict[str, Any]:
    """Arguments as a text, content null beside calls."""
    _, calls, answer = message_of(env, action)
    tool_calls = [
        {"id": f"id-{i}", "type": "function", "function": {"name": c.name, "arguments": json.dumps(dict(c.arguments))}}
        for i, c in enumerate(calls)
    ]
    return {"role": "assistant", "content": answer, **({"tool_calls": tool_calls} if calls else {})}


def as_local_server(env: ToolEnv, action: str) -> dict[str, Any]:
    """Content in parts, reasoning apart, arguments as an object, no ids."""
    _, calls, answer = message_of(env, action)
    parts = [{"type": "text", "text": piece} for piece in (answer or "").partition(" ") if piece]
    tool_calls = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls]
    return {"role": "assistant", "content": parts, "reasoning": "Let me see.", "tool_calls": tool_calls}


def as_older_server(env: ToolEnv, action: str) -> dict[str, Any]:
    _, calls, answer = message_of(env, action)
    call = {"name": calls[0].name, "arguments": json.dumps(dict(calls[0].arguments))} if calls else None
    return {"role": "assistant", "content": answer, "function_call": call}


Habit = Callable[[ToolEnv, str], dict[str, Any]]


def oracle_server(tasks: Sequence[Task], habit: Habit) -> Answer:
    """Answers as the oracle of the task whose question it is asked, in its own habit."""

    async def answer(body: dict[str, Any]) -> Response:
        messages = body["messages"]
        asked = next(message["content"] for message in messages if message["role"] == "user")
        for task in tasks:
            env = task.make()
            assert isinstance(env, ToolEnv)
            if env.reset(seed=task.seed)[1]["messages"][1].text == asked:
                break
        for _ in range(sum(message["role"] == "assistant" for message in messages)):
            env.step(env.oracle() or "")
        return JSONResponse({"choices": [{"message": habit(env, env.oracle() or "")}]})

    return answer


async def chatted(url: str, renderer: ChatRenderer, tasks: Sequence[Task], **settings: bool) -> list[RolloutTree]:
    async with connected(url) as server:
        player = ChatPlayer(server, "m", SAMPLING, **settings)
        return await grow_trees(tasks, Chains(1), player, renderer, Sampling(), seed=1)


@pytest.mark.parametrize("habit", [as_openai, as_local_server, as_older_server])
@pytest.mark.parametrize("format", ["openai", "tagged", "hermes"])
def test_native_calls_go_both_ways(habit: Habit, format: str, nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    tasks = [Task(task.env, task.seed, settings={"format": format}) for task in TASKS]
    with serving(oracle_server(tasks, habit)) as (url, seen):
        trees = asyncio.run(chatted(url, nano[1], tasks, tools=True))
    assert all(tree.term("exact") == (1.0,) and tree.term("format") == (1.0,) for tree in trees)
    assert all([t["function"]["name"] for t in body["tools"]] == ["lookup"] for body in seen)
    for body in seen:
        calls = [call for message in body["messages"] for call in message.get("tool_calls", ())]
        results = [message["tool_call_id"] for message in body["messages"] if message["role"] == "tool"]
        assert [call["id"] for call in calls] == results and all(results)
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
        assert not any("<answer>" in message["content"] for message in body["messages"] if message["role"] == "system")
    assert any(len(body["messages"]) > 3 for body in seen)


def test_calls_are_read_and_parts_joined_where_only_text_is_asked_for(
    nano: tuple[TransformersPolicy, ChatRenderer],
) -> None:
    def spoken(env: ToolEnv, action: str) -> dict[str, Any]:
        if message_of(env, action)[1]:
            return as_local_server(env, action)
        return {"content": [{"type": "text", "text": part} for part in action.partition(">")]}

    with serving(oracle_server(TASKS, spoken)) as (url, seen):
        trees = asyncio.run(chatted(url, nano[1], TASKS))
    assert all(tree.term("exact") == (1.0,) for tree in trees)
    assert not any("tools" in body for body in seen)


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize("sent", [True, False])
def test_reasoning_is_recorded_and_sent_back_where_it_is_wanted(
    tools: bool, sent: bool, nano: tuple[TransformersPolicy, ChatRenderer]
) -> None:
    def thinks(env: ToolEnv, action: str) -> dict[str, Any]:
        return {**(as_openai(env, action) if tools else {"content": action}), "reasoning_content": "Let me see."}

    with serving(oracle_server(TASKS, thinks)) as (url, seen):
        trees = asyncio.run(chatted(url, nano[1], TASKS, tools=tools, reasoning=sent))
    assert all(tree.term("exact") == (1.0,) for tree in trees)
    assert all("Let me see." in node.action.text for tree in trees for node in tree.nodes)
    replies = [message for body in seen for message in body["messages"] if message["role"] == "assistant"]
    assert replies and {message.get("reasoning_content") for message in replies} == {"Let me see." if sent else None}
    assert not any("Let me see." in (message["content"] or "") for message in replies)


def test_a_call_that_cannot_be_read_is_the_agent_s_to_mend(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    function = {"name": "lookup", "arguments": '{"word": '}

    async def broken(body: dict[str, Any]) -> Response:
        return JSONResponse({"choices": [{"message": {"content": None, "tool_calls": [{"function": function}]}}]})

    tasks = [Task("treegym/Lookup-v0", 0, settings={"format": "openai", "max_turns": 2})]
    with serving(broken) as (url, seen):
        [tree] = asyncio.run(chatted(url, nano[1], tasks, tools=True))
    assert [node.info["malformed"] for node in tree.nodes] == [1, 1]
    assert [message["role"] for message in seen[1]["messages"]][-2:] == ["assistant", "user"]
    assert "tool_calls" not in seen[1]["messages"][-2]


def test_a_cut_reply_is_no_answer(nano: tuple[TransformersPolicy, ChatRenderer]) -> None:
    async def breaks_off(body: dict[str, Any]) -> Response:
        return JSONResponse({"choices": [{"message": {"content": "The answer is"}, "finish_reason": "length"}]})

    tasks = [Task("treegym/Lookup-v0", 0, settings={"format": "openai", "max_turns": 1})]
    with serving(breaks_off) as (url, _):
        [tree] = asyncio.run(chatted(url, nano[1], tasks, tools=True))
    assert tree.nodes[0].info["malformed"] == 1 and tree.nodes[0].action.stop_reason == "length"


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"content": "ab"}),
        ({"content": ["a", {"type": "image_url", "image_url": {}}]}, {"content": "a[image_url]"}),
        ({"content": None, "refusal": "No."}, {"content": "No."}),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "t"}]},
                    {"type": "text", "text": "a"},
                ]
            },
            {"content": "a", "reasoning_content": "t"},
        ),
        ({"content": "", "reasoning": "t", "tool_calls": None}, {"reasoning_content": "t"}),
        (
            {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        ),
    ],
)
def test_messages_are_read_in_every_shape(message: dict[str, Any], read: dict[str, Any]) -> None:
    assert read_message(message) == read


def prompt(task: Task) -> Sequence[dict[str, str]]:
    messages: list[Message] = task.make().reset(seed=task.seed)[1]["messages"]
    return [{"role": message.role, "content": message.text} for message in messages]


VLLM = os.environ.get("TREEGYM_VLLM_URL", "")  # http://127.0.0.1:8000/v1#MODEL, which serves smollm2 in float32


@pytest.mark.skipif(not VLLM, reason="TREEGYM_VLLM_URL names no vLLM server of smollm2, as http://HOST:PORT/v1#MODEL")
def test_vllm_samples_what_this_process_would() -> None:
    model, tokenizer = load("smollm2")
    renderer = ChatRenderer(tokenizer)
    url, _, name = VLLM.partition("#")

    async def ask(sampling: Sampling) -> list[RolloutTree]:
        async with connected(url, at_once=8) as server:
            policy = OpenAIPolicy(server, name, renderer)
            return await grow_trees(tasks, Chains(3), policy, renderer, sampling, seed=1)

    tasks = [Task("treegym/Lookup-v0", 0, settings={"max_turns": 2})]
    sampling = Sampling(max_tokens=8)
    trees = asyncio.run(ask(sampling))
    assert [said(tree) for tree in asyncio.run(ask(sampling))] == [said(tree) for tree in trees]
    assert all(len({tree.nodes[path[0]].action.text for path in tree.paths}) > 1 for tree in trees)
    for tree in trees:
        for path in tree.paths:
            check_logprobs(model, tree, path)
    greedy = Sampling(temperature=0, max_tokens=8)
    policy = TransformersPolicy(model, renderer, dtype=torch.float32)
    here = asyncio.run(grow_trees(tasks, Chains(1), policy, renderer, greedy, seed=1))
    served = asyncio.run(ask(greedy))
    assert [said(tree)[0] for tree in served] == [said(tree)[0] for tree in here]


@torch.no_grad()
def check_logprobs(model: Any, tree: RolloutTree, path: tuple[int, ...]) -> None:
    """The server's log-probabilities are those of the model's own forward pass."""
    tokens = torch.tensor(tree.tokens(path))
    expected = torch.log_softmax(model(tokens[None]).logits[0].float(), -1)
    place = len(tree.prompt)
    for node in (tree.nodes[i] for i in path):
        ids = torch.tensor(node.action.token_ids)
        found = expected[place - 1 : place - 1 + len(ids)].gather(1, ids[:, None])[:, 0]
        assert node.action.logprobs == pytest.approx(found.tolist(), abs=2e-3)
        place += len(ids) + len(node.observation)
