"""Response: what an environment said at reset or to an action, and where two responses differ."""

from __future__ import annotations

import contextlib
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...envs import Message, Task, TextEnv, TextWrapper
from ...envs.task import Wrappers
from ...envs.toolenv import observation_of
from ...envs.wrappers import wrapped
from ...tools import Cassette, ToolCall
from ..tree import Node, RolloutTree

_CHAT = ("messages", "reward_terms", "tool_calls")  # keys of info that have a field of their own
LARGEST_REWARD = 1e15  # squares of rewards, and their sums over a batch, stay finite in float32
TOLERANCE = 1e-6  # relative and absolute, between numbers that a lenient Strictness calls equal
LONGEST_ACTION = 400  # characters of an action that an error shows
LAST_CALLS = 3  # of a traceback that an error shows


class EpisodeError(RuntimeError):
    """An environment raised an error, or gave a reward that nothing can be learned from."""

    def __init__(self, task: Task, turn: int, why: str, action: str = "", trace: str = "") -> None:
        """`action` is what the environment was given in that turn, `trace` where it raised, in lines."""
        options = f", options {dict(task.options)}" if task.options else ""
        super().__init__(f"{task.env}, seed {task.seed}{options}, turn {turn}: {why}")
        self.task, self.turn, self.why, self.action, self.trace = task, turn, why, action, trace

    def in_full(self) -> str:
        """The error with the action and the trace, in lines."""
        action = f"the action: {self.action[:LONGEST_ACTION]!r}" if self.action else ""
        return "\n".join(filter(None, [str(self), action, self.trace]))


class ReplayMismatch(RuntimeError):
    """An environment that was played again answered otherwise than the first time."""


class OutsideSource(RuntimeError):
    """A tree cannot be played again, because its environment reads from outside and there is no tape."""


@dataclass(frozen=True, slots=True)
class Response:
    """What reset or step gave; its fields are also those of a node."""

    messages: tuple[Message, ...]
    state_key: str
    info: Mapping[str, Any] = field(default_factory=dict)  # JSON
    reward: float = 0.0
    reward_terms: Mapping[str, float | None] = field(default_factory=dict)
    terminated: bool = False
    truncated: bool = False
    calls: tuple[ToolCall, ...] = ()  # that the environment read in the action

    @property
    def over(self) -> bool:
        return self.terminated or self.truncated

    def cut(self, cause: str) -> Response:
        """This response as the last one of an episode that is ended from outside the environment."""
        return replace(self, truncated=True, info={**self.info, "cause": cause})


Recall = Callable[[Task, TextEnv, Response], Wrappers]  # what is put around a task's environment, once it was reset


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that a replay gave otherwise than was recorded."""

    field: str  # such as "messages[0]", "reward_terms.exact"
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return f"{self.field} differs from what was recorded\nrecorded: {self.recorded}\nreplayed: {self.replayed}"


@dataclass(frozen=True, slots=True)
class Strictness:
    """Which fields of two responses must be the same, and whether roughly will do."""

    fields: tuple[str, ...]
    lenient: bool = False  # runs of white space count as one blank, numbers as equal up to TOLERANCE

    def first(self, recorded: Response, replayed: Response) -> Difference | None:
        """The first field that differs."""
        for group in self.fields:
            before, now = (dict(_values(group, getattr(response, group))) for response in (recorded, replayed))
            for name in {**before, **now}:
                if name not in before or name not in now or not self._same(before[name], now[name]):
                    return Difference(name, _shown(before, name), _shown(now, name))
        return None

    def _same(self, one: Any, other: Any) -> bool:
        if _json(one) == _json(other):
            return True
        if self.lenient and isinstance(one, str) and isinstance(other, str):
            return one.split() == other.split()
        if self.lenient and isinstance(one, int | float) and isinstance(other, int | float):
            return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return False


STRICT = Strictness(("messages", "reward", "reward_terms", "terminated", "truncated", "state_key", "info"))
LENIENT = Strictness(("messages", "reward", "reward_terms", "terminated", "truncated"), lenient=True)
STATE = Strictness(("messages", "state_key"))  # what a policy that goes on from here depends on


def _values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values under a field, by name."""
    if isinstance(value, Mapping):
        yield from ((f"{name}.{key}", part) for key, part in value.items())
    elif isinstance(value, tuple):
        yield from ((f"{name}[{i}]", f"[{message.role}] {message.text}") for i, message in enumerate(value))
    else:
        yield name, value


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "(nothing)"
    return values[name] if isinstance(values[name], str) else _json(values[name])


def _json(value: Any) -> str:
    """The value as a store writes it: tuples are lists there, and NaN equals NaN."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def response_of(recorded: Node | RolloutTree) -> Response:
    """What the environment said in that turn, or to that tree's reset."""
    if isinstance(recorded, RolloutTree):
        return Response(recorded.messages, recorded.state_key, recorded.info)
    return Response(**{name: getattr(recorded, name) for name in STRICT.fields})


def open_task(task: Task, cassette: Cassette | None = None, *, sealed: bool = False) -> tuple[TextEnv, Response]:
    """Makes and resets the environment, which takes the answers of outside sources from the cassette.

    OutsideSource where it is `sealed`, has no cassette and would read from outside.
    """
    env = task.make()
    with closed_on_error(env):
        if cassette:
            env.tape(cassette)
        if sealed and env.outside:
            raise OutsideSource(f"{task.env} reads from {', '.join(env.outside)}, and there is no tape")
        observation, info = env.reset(seed=task.seed, options=dict(task.options))
        return env, _opened(env, observation, info)


def open_recalled(
    task: Task, recall: Recall | None, cassette: Cassette | None = None
) -> tuple[Task, TextEnv, Response]:
    """As `open_task`, within the wrappers that recall chooses; and the task that has them."""
    env, response = open_task(task, cassette)
    with closed_on_error(env):
        added = recall(task, env, response) if recall else ()
        for name, arguments in added:
            env = wrapped(env, name, arguments)
            assert isinstance(env, TextWrapper), f"{name} is to be put around an environment after its reset"
            told = env.begun(observation_of(response.messages), {**response.info, "messages": list(response.messages)})
            response = _opened(env, *told)
        return replace(task, wrappers=(*task.wrappers, *added)), env, response


def _opened(env: TextEnv, observation: str, info: Mapping[str, Any]) -> Response:
    return Response(_messages(observation, info), env.state_key(), _rest(info))


def act(env: TextEnv, action: str) -> Response:
    """One step."""
    observation, reward, terminated, truncated, info = env.step(action)
    return Response(
        _messages(observation, info),
        env.state_key(),
        _rest(info),
        float(reward),
        dict(info.get("reward_terms", {})),
        terminated,
        truncated,
        tuple(ToolCall(**call) for call in info.get("tool_calls", ())),
    )


def _messages(observation: str, info: Mapping[str, Any]) -> tuple[Message, ...]:
    return tuple(info.get("messages") or (Message("user", observation),))


def _rest(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key not in _CHAT}


@contextlib.contextmanager
def closed_on_error(env: TextEnv) -> Iterator[None]:
    try:
        yield
    except BaseException:
        env.close()
        raise


@contextlib.contextmanager
def episode_errors(task: Task, turn: int, action: str = "") -> Iterator[None]:
    """Errors of the task's environment at this turn (0: the reset), in which it was given this, become an EpisodeError.

    Errors that name the episode already, such as a ReplayMismatch, stay as they are.
    """
    try:
        yield
    except (EpisodeError, ReplayMismatch, OutsideSource):
        raise
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)
        path, line, function, _ = calls[-1]
        why = f"{type(error).__name__}: {error} ({Path(path).name}:{line}, in {function})"
        trace = "".join(traceback.format_list(calls[-LAST_CALLS:])).rstrip()
        raise EpisodeError(task, turn, why, action, trace) from error


def check_rewards(task: Task, turn: int, response: Response) -> None:
    """EpisodeError where a reward, or a term of it, is not finite or beyond LARGEST_REWARD."""
    named = {"reward": response.reward, **{f"term {name!r}": value for name, value in response.reward_terms.items()}}
    for name, value in named.items():
        if value is not None and not abs(value) <= LARGEST_REWARD:  # so that NaN is refused too
            limits = f"rewards must be finite and at most {LARGEST_REWARD:.0e} in size"
            raise EpisodeError(task, turn, f"the {name} is {value}; {limits}")
