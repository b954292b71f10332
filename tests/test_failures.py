"""Samples that fail: counted and tried again, while the others go on; errors of code stop everything and say where."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from commands import command

pytest.importorskip("httpx2", reason="pip install 'treegym[search]'")
from starlette.responses import JSONResponse, PlainTextResponse, Response
from test_openai_policy import serving

from treegym.agents import ChatRenderer, Failure, RolloutTree, Run, Sampling, grow, joined
from treegym.agents.evaluation.run import failure_limit
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import ScriptedPolicy, ServerError
from treegym.agents.rollouts import Chains, EpisodeError, FailureCause, SomeChains, failure_cause, verify
from treegym.agents.rollouts.failure import context_exceeded
from treegym.envs import LookupEnv, Task, lookup
from treegym.tools import ServerUnavailable
from treegym.tools.sandbox import SandboxError, SandboxUnavailable

SCENARIO = """
environment: {id: treegym/Lookup-v0, settings: {hops: [2], max_turns: 3}}
model: {name: nano, max_rows: 4}
sampling: {max_tokens: 6}
heldout: {tasks: 4, rollouts: 2}
threads: 1
"""
TOO_LONG = {
    "openai": (400, {"message": "Your input exceeds the context window.", "code": "context_length_exceeded"}),
    "groq": (400, {"message": "Please reduce the length of the messages or completion.", "type": "invalid"}),
    "vllm": (400, {"message": "This model's maximum context length is 2048 tokens. However, you requested 2100."}),
    "vllm, nothing left": (400, {"message": "max_tokens must be at least 1, got -20."}),
    "llama.cpp": (400, {"message": "the request exceeds it", "type": "exceed_context_size_error", "n_ctx": 512}),
    "llama.cpp, older": (500, {"message": "the request exceeds the available context size. try increasing it"}),
    "sglang": (400, {"message": "The input (4100 tokens) is longer than the model's context length (4096 tokens)."}),
    "tgi": (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 and 200"),
    "tgi, prompt": (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000"),
    "anthropic": (400, {"message": "prompt is too long: 208310 tokens > 200000 maximum"}),
    "gemini": (400, {"message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."}),
    "mistral": (400, {"message": "Prompt contains 9 tokens, too large for model with 8 maximum context length"}),
}
OTHER = {
    "rate": (429, {"message": "Request too large on tokens per min: Limit 9, Requested 10. Reduce the length of it."}),
    "key": (401, {"message": "Incorrect API key provided"}),
    "template": (400, {"message": "Conversation roles must alternate user/assistant/user/assistant/..."}),
    "echo": (422, {"detail": [{"msg": "field required", "input": "What is a context length?"}]}),
    "setting": (400, {"message": "temperature must be at most 2"}),
}


@pytest.mark.parametrize("name", [*TOO_LONG, *OTHER])
def test_a_server_s_words_for_a_context_that_is_too_long_are_known(name: str) -> None:
    status, said = (TOO_LONG | OTHER)[name]  # type: ignore[operator]
    assert context_exceeded(status, json.dumps(said if name == "echo" else {"error": said})) is (name in TOO_LONG)


def test_words_that_are_no_json_are_read_too() -> None:
    assert context_exceeded(400, "maximum context length is 8") and not context_exceeded(
        502, "<html>Bad gateway</html>"
    )


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ServerError("x", FailureCause.OVERRUN), FailureCause.OVERRUN),
        (ConnectionRefusedError(), FailureCause.CONNECTION),
        (BrokenPipeError(), FailureCause.CONNECTION),
        (TimeoutError(), FailureCause.TIMEOUT),
        (subprocess.TimeoutExpired("x", 1), FailureCause.TIMEOUT),
        (ServerUnavailable("x"), FailureCause.TOOLS),
        (SandboxError("x"), FailureCause.SANDBOX),
        (OSError(errno.ENOSPC, "x"), FailureCause.RESOURCES),
        (SandboxUnavailable("x"), None),
        (FileNotFoundError(errno.ENOENT, "x"), None),
        (ValueError("x"), None),
        (KeyError("x"), None),
    ],
    ids=repr,
)
def test_failures_of_the_world_are_told_from_errors_of_code(error: Exception, cause: FailureCause | None) -> None:
    assert failure_cause(error) is cause
    wrapped = RuntimeError("an episode's error")
    wrapped.__cause__ = error
    assert failure_cause(wrapped) is cause


def test_a_limit_is_a_number_or_a_share() -> None:
    assert [failure_limit(text, 25) for text in ("0", "3", "10%", "0%", "100%", "0.1%")] == [0, 3, 3, 0, 25, 1]
    for text in ("", "%", "-1", "101%", "some", "1.5", "nan%"):
        with pytest.raises(ValueError, match="a number of samples or a share"):
            failure_limit(text, 25)


# rollouts


class Flaky(LookupEnv):
    """Fails as often as `faults` says, at the second turn of one task."""

    faults: list[Exception] = []  # noqa: RUF012

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.turn == 1 and self.faults and self.np_random_seed == 1:
            raise self.faults.pop()
        return super().step(action)

    def reset(self, **named: Any) -> tuple[str, dict[str, Any]]:
        if named["seed"] == 2 and self.faults:
            raise self.faults.pop()
        return super().reset(**named)


gymnasium.register("tests/Flaky-v0", Flaky)
CHAINS = Chains(3)


@pytest.fixture
def faults() -> Iterator[list[Exception]]:
    yield Flaky.faults
    Flaky.faults.clear()


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(build_nano(lookup.vocabulary())[1])


def outcomes(
    renderer: ChatRenderer, seeds: list[int], strategy: Any = CHAINS, **more: Any
) -> tuple[list[RolloutTree], list[Failure]]:
    """The trees by the seeds of their tasks, and the failures as they came."""
    tasks = [Task("tests/Flaky-v0", seed, settings={"hops": [2], "max_turns": 4}) for seed in seeds]

    def script(text: str, seed: int) -> str:
        return f"<lookup>moon {seed % 3}</lookup>"

    async def collect() -> list[RolloutTree | Failure]:
        policy = ScriptedPolicy(renderer, script)
        return [each async for each in grow(tasks, strategy, policy, renderer, Sampling(), **more)]

    found = asyncio.run(collect())
    trees = [each for each in found if isinstance(each, RolloutTree)]
    failures = [each for each in found if isinstance(each, Failure)]
    return sorted(trees, key=lambda tree: seeds.index(tree.task.seed)), failures


def grown(renderer: ChatRenderer, seeds: list[int], strategy: Any = CHAINS) -> list[RolloutTree]:
    return outcomes(renderer, seeds, strategy)[0]


def test_a_rollout_that_fails_leaves_its_siblings(renderer: ChatRenderer, faults: list[Exception]) -> None:
    whole = grown(renderer, [0, 1])
    faults.append(ConnectionResetError("gone"))
    some, heard = outcomes(renderer, [0, 1])
    assert some[0] == whole[0] and 0 < len(heard) <= 3
    assert {(f.task.seed, f.turn, f.cause, f.error) for f in heard} == {
        (1, 2, FailureCause.CONNECTION, "ConnectionResetError: gone")
    }
    missing = tuple(f.rollout for f in heard if f.rollout is not None)
    assert sorted([*some[1].origins, *missing]) == [0, 1, 2]
    [rest] = grown(renderer, [1], SomeChains(missing))
    both = joined([some[1], rest])
    assert (both.nodes, both.leaves, both.origins) == (whole[1].nodes, whole[1].leaves, whole[1].origins)


def test_an_environment_that_cannot_be_reset_leaves_the_others(renderer: ChatRenderer, faults: list[Exception]) -> None:
    faults.append(TimeoutError("slow"))
    some, heard = outcomes(renderer, [2, 0])
    assert some == grown(renderer, [0])
    assert [(f.task.seed, f.rollout, f.turn, f.cause) for f in heard] == [(2, None, 0, FailureCause.TIMEOUT)]


@pytest.mark.parametrize("seed", [1, 2])
def test_an_error_of_code_says_where(seed: int, renderer: ChatRenderer, faults: list[Exception]) -> None:
    faults.append(KeyError("moon"))
    with pytest.raises(EpisodeError) as raised:
        grown(renderer, [0, seed])
    error = raised.value
    assert str(error).startswith(f"tests/Flaky-v0, seed {seed}, turn {2 if seed == 1 else 0}: KeyError: 'moon' (test_")
    assert isinstance(error.__cause__, KeyError)


# evaluations

Answer = Callable[[dict[str, Any]], Awaitable[Response]]


def chat(text: str) -> Response:
    return JSONResponse({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


async def ordinary(body: Mapping[str, Any]) -> Response:
    return chat(f"<lookup>moon {body['seed'] % 3}</lookup>")


def failing(answer: Response, *, turn: int, often: int = 1 << 30) -> Answer:
    """Answers so from a turn on, to every other seed, as long as it is to fail."""
    left = often

    async def post(body: dict[str, Any]) -> Response:
        nonlocal left
        turns = sum(message["role"] == "assistant" for message in body["messages"])
        if left and turns >= turn and body["seed"] % 2:
            left -= 1
            return answer
        return await ordinary(body)

    return post


Ask = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Evaluates a server that answers so: exit status, all that was said, results."""
    monkeypatch.setattr("treegym.agents.serving.client.FIRST_WAIT", 0.0)
    (tmp_path / "some.yaml").write_text(SCENARIO + "serving: {patience: 0.01}\n")

    def asked(answer: Answer, *arguments: str, out: str = "out") -> tuple[int, str, dict[str, Any]]:
        folder = tmp_path / out
        with serving(answer) as (url, _):
            if "--resume" in arguments:
                setting = json.loads((folder / "evaluation.json").read_text())
                (folder / "evaluation.json").write_text(json.dumps({**setting, "policy": f"chat+{url}#m"}))
            else:
                arguments = (str(tmp_path / "some.yaml"), "--policy", f"chat+{url}#m", *arguments)
            status, *said = command(capsys, "eval", *arguments, "--out", str(folder))
        results = folder / "results.json"
        return status, "".join(said), json.loads(results.read_text()) if results.exists() else {}

    return asked


@pytest.mark.parametrize("turn", [0, 1])
def test_a_context_that_is_too_long_for_the_server_truncates(turn: int, ask: Ask, tmp_path: Path) -> None:
    refusal = JSONResponse({"error": TOO_LONG["vllm"][1]}, 400)
    status, said, result = ask(failing(refusal, turn=turn))
    assert status == 0 and result["failed"]["samples"] == 0 and result["rollouts"] == 8
    assert 0 < result["truncated"]["context length"] < 1 and "context length" in said
    for _, tree in Run(tmp_path / "out").trees:
        assert not verify(tree)


FAULTS = {
    "server error": JSONResponse({"error": {"message": "overloaded"}}, 503),
    "server overrun": JSONResponse({"error": {"message": "slow down"}}, 429),
    "request refused": JSONResponse({"error": {"message": "no such model"}}, 404),
    "malformed answer": PlainTextResponse("<html>"),
}


@pytest.mark.parametrize("cause", FAULTS)
def test_samples_that_fail_are_counted_and_played_when_the_evaluation_is_resumed(
    cause: str, ask: Ask, tmp_path: Path
) -> None:
    status, said, result = ask(failing(FAULTS[cause], turn=1), "--max-failures", "100%")
    failed = result["failed"]
    assert status == 0 and f"failed: {failed['samples']} of 8 samples ({failed['samples']} {cause})" in said
    assert 0 < failed["samples"] < 8 and failed["by_cause"] == {cause: failed["samples"]}
    assert result["rollouts"] == 8 - failed["samples"]
    assert all({"env", "seed", "sample", "turn", "cause", "error"} == row.keys() for row in failed["each"])
    status, _, resumed = ask(ordinary, "--resume")
    _, _, whole = ask(ordinary, out="whole")
    assert status == 0 and resumed == whole
    trees, others = ([tree for _, tree in Run(tmp_path / name).trees] for name in ("out", "whole"))
    by_seed = {tree.task.seed: tree for tree in trees}
    assert len(trees) == len(others) == 4
    for tree in others:
        assert (by_seed[tree.task.seed].nodes, by_seed[tree.task.seed].leaves) == (tree.nodes, tree.leaves)


def test_a_fault_that_passes_fails_nothing(ask: Ask) -> None:
    status, _, result = ask(failing(FAULTS["malformed answer"], turn=1, often=1), "--max-failures", "0")
    assert status == 0 and result == ask(ordinary, out="whole")[2]


def test_more_failures_than_allowed_stop_an_evaluation_that_then_goes_on(ask: Ask, tmp_path: Path) -> None:
    status, said, _ = ask(failing(FAULTS["server error"], turn=0))
    assert status == 2 and "of 8 samples failed, more than the 10% that may" in said
    assert "overloaded" in said and said.endswith(f"go on with: treegym eval --resume --out {tmp_path / 'out'}\n")
    status, said, _ = ask(failing(FAULTS["server error"], turn=0), "--resume")
    assert status == 2 and "of 8 samples failed" in said
    status, _, result = ask(ordinary, "--resume", "--max-failures", "0")
    assert status == 0 and result == ask(ordinary, out="whole")[2]


def test_a_limit_that_is_none_is_refused(ask: Ask, tmp_path: Path) -> None:
    status, said, _ = ask(ordinary, "--max-failures", "many")
    assert status == 2 and "a share such as 10%, got 'many'" in said and not (tmp_path / "out").exists()
