"""Wrappers: a TextEnv around a TextEnv, which changes what is told, scored or ended, and forks with it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from ..tools import Cassette
from ..tools.named import call_with, named, split_name
from .base import Message, TextEnv
from .notes import PLACES, Note, Place, listed, mentioned, read_notes
from .rewards import RewardTerms, added, weighed
from .toolenv import TURN_LIMIT, digest, forked, observation_of


@dataclass(frozen=True, slots=True)
class Step:
    """What an action led to, as the hooks of a wrapper see it."""

    action: str
    messages: tuple[Message, ...]  # the environment's answer
    reward: float
    terms: RewardTerms
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]

    @property
    def over(self) -> bool:
        return self.terminated or self.truncated


class TextWrapper(gymnasium.Wrapper[str, str, str, str], TextEnv):
    """An environment around another one, `env`; the innermost is `unwrapped`.

    Subclasses override hooks: `start` for reset, and for each step `score`, `tell` and `stop`, called in this order.
    They keep their state in plain attributes, set in `start`; a fork copies them with the environment. The terms that
    they add have weights in `reward_weights`, which in an instance holds those of `env` too.
    """

    shared: ClassVar[frozenset[str]] = frozenset({"reward_weights", "_cached_spec"})  # attributes that forks share

    def __init__(self, env: gymnasium.Env[str, str], reward_weights: Mapping[str, float] | None = None) -> None:
        inner = text_env(env, type(self).__name__)
        super().__init__(inner)
        self.env: TextEnv = inner
        weights = self.reward_weights if reward_weights is None else reward_weights
        if twice := sorted(weights.keys() & inner.reward_weights.keys()):
            raise ValueError(f"{type(self).__name__}: the term {twice[0]!r} has a weight already; name another one")
        self.reward_weights = {**inner.reward_weights, **weights}
        self.can_fork, self.runs_code = inner.can_fork, inner.runs_code
        self.over = True

    # hooks

    def start(self, messages: Sequence[Message]) -> Sequence[Message]:
        """After reset: what the agent is told, from what the environment tells."""
        return messages

    def score(self, step: Step) -> RewardTerms:
        """Terms to add to those of the step."""
        return {}

    def tell(self, step: Step) -> Sequence[Message]:
        """What the agent is told after the step."""
        return step.messages

    def stop(self, step: Step) -> str | None:
        """Why the episode, which could go on, is truncated after the step; None lets it go on."""
        return None

    # the environment

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return self.begun(*self.env.reset(seed=seed, options=options))

    def begun(self, observation: str, info: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """What `reset` returns where that of `env` has returned this; so one can wrap what has been reset already."""
        before = _messages(observation, info)
        messages = tuple(self.start(before))
        self.over = False
        return _told(observation, before, messages), {**info, "messages": list(messages)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.over:
            raise ResetNeeded("the episode is over, or none has begun: call reset() before step()")
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, terms = _messages(observation, info), dict(info.get("reward_terms", {}))
        step = Step(action, before, float(reward), terms, terminated, truncated, info)
        if own := self.score(step):
            step = replace(step, reward=step.reward + weighed(own, self.reward_weights), terms=added(terms, own))
        messages = tuple(self.tell(step))
        info = {**info, "messages": list(messages), "reward_terms": dict(step.terms)}
        if not step.over and (cause := self.stop(step)):
            truncated, info["cause"] = True, cause
        self.over = terminated or truncated
        return _told(observation, before, messages), step.reward, terminated, truncated, info

    def fork(self) -> Self:
        return forked(self, self.shared)

    def state_key(self) -> str:
        """The environment's key. A wrapper whose own state makes a difference to the situation adds it to the key."""
        return self.env.state_key()

    @property
    def outside(self) -> tuple[str, ...]:
        return self.env.outside

    def tape(self, cassette: Cassette) -> None:
        self.env.tape(cassette)

    def oracle(self) -> str | None:
        return None if self.over else self.env.oracle()

    def notes(self) -> Sequence[Note]:
        return self.env.notes()


class Hint(TextWrapper):
    """Adds a text to the task's message."""

    def __init__(self, env: gymnasium.Env[str, str], text: str) -> None:
        super().__init__(env)
        self.text = text

    def start(self, messages: Sequence[Message]) -> Sequence[Message]:
        *before, task = messages
        return [*before, Message(task.role, f"{task.text}\n{self.text}")]


class StepPenalty(TextWrapper):
    """A reward term that is 1.0 in every turn, so that its sum is the number of turns."""

    def __init__(self, env: gymnasium.Env[str, str], weight: float = -0.01, term: str = "turns") -> None:
        super().__init__(env, {term: weight})
        self.term = term

    def score(self, step: Step) -> RewardTerms:
        return {self.term: 1.0}


class TurnLimit(TextWrapper):
    """Truncates the episode after so many turns, as Gymnasium's TimeLimit does."""

    def __init__(self, env: gymnasium.Env[str, str], turns: int) -> None:
        if turns < 1:
            raise ValueError(f"a limit of {turns} turns: expected 1 or more")
        super().__init__(env)
        self.turns, self.turn = turns, 0

    def start(self, messages: Sequence[Message]) -> Sequence[Message]:
        self.turn = 0
        return messages

    def stop(self, step: Step) -> str | None:
        self.turn += 1
        return TURN_LIMIT if self.turn >= self.turns else None


class WithNotes(TextWrapper):
    """Tells notes of earlier attempts, each once an episode, behind what the environment says.

    Notes without a phrase stand in a list in the prompt; the others follow the first message of reset or step in which
    their phrase stands. With the place "prompt" all stand in the list. `own_text` takes them off again. The `info` of
    reset and step has under "notes" the ids of those that were told with it.
    """

    shared = TextWrapper.shared | {"given"}

    def __init__(
        self, env: gymnasium.Env[str, str], notes: Sequence[Note | Mapping[str, str]], place: Place = "turn"
    ) -> None:
        super().__init__(env)
        if place not in PLACES:
            raise ValueError(f"notes in the place {place!r}: expected one of {', '.join(PLACES)}")
        self.given, self.place = read_notes(notes), place
        self.left = self.now = self.since = tuple[Note, ...]()  # not told yet; told last; told after reset

    def begun(self, observation: str, info: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        observation, info = super().begun(observation, info)
        return observation, self._noted(info)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, self._noted(info)

    def start(self, messages: Sequence[Message]) -> Sequence[Message]:
        first = tuple(note for note in self.given if self.place == "prompt" or not note.when)
        self.left, self.since = tuple(note for note in self.given if note not in first), ()
        due = self._due(messages)
        self.now = (*first, *due)
        return _behind(messages, listed(first) + mentioned(due))

    def tell(self, step: Step) -> Sequence[Message]:
        self.now = () if step.over else self._due(step.messages)
        self.since += self.now
        return _behind(step.messages, mentioned(self.now))

    def state_key(self) -> str:
        """The environment's key, with the notes that steps have brought; those of reset belong to the task."""
        key = super().state_key()
        return digest([key, sorted([note.when, note.text] for note in self.since)]) if self.since else key

    def _due(self, messages: Sequence[Message]) -> tuple[Note, ...]:
        """The notes whose phrase stands in the messages; they are not told again."""
        said = observation_of(messages)
        due = tuple(note for note in self.left if note.when in said)
        self.left = tuple(note for note in self.left if note not in due)
        return due

    def _noted(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "notes": [*info.get("notes", ()), *(note.id for note in self.now)]} if self.now else info


WRAPPERS: Mapping[str, type[TextWrapper]] = {kind.__name__: kind for kind in (Hint, StepPenalty, TurnLimit, WithNotes)}


def wrapped(env: TextEnv, name: str, arguments: Mapping[str, Any]) -> TextEnv:
    """The environment within a wrapper: one of `WRAPPERS`, module:Name or path/to/file.py:Name.

    ValueError, TypeError or PartNotFound say what it should be instead.
    """
    what = f"the wrapper {name}"
    return text_env(call_with(find_wrapper(name), what, arguments, env), what)


def find_wrapper(name: str) -> Callable[..., Any]:
    """The class, or function, that a wrapper's name names. ValueError, PartNotFound."""
    if name in WRAPPERS:
        return WRAPPERS[name]
    if not split_name(name)[0]:
        near = difflib.get_close_matches(name, WRAPPERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(WRAPPERS)}."
        raise ValueError(f"no wrapper {name!r}; {hint} One of your own is module:Name or path/to/file.py:Name")
    found = named(name)
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}: name a TextWrapper, or a function that makes one")
    return found  # type: ignore[no-any-return]


CHECKS = (OrderEnforcing, PassiveEnvChecker)  # wrappers that only check what a TextEnv, or check_env, checks itself
_INSTEAD: Mapping[type, str] = {
    gymnasium.ObservationWrapper: "write a TextWrapper that changes what is told in `start` and `tell`",
    gymnasium.RewardWrapper: "write a TextWrapper that adds terms in `score`",
    gymnasium.ActionWrapper: "write a TextWrapper whose `step` changes the action",
    gymnasium.wrappers.RecordEpisodeStatistics: "leave it out, trees record the return and the turns of every rollout",
    gymnasium.Wrapper: "derive it from treegym.envs.TextWrapper, or leave it out",
}


def text_env(env: gymnasium.Env[Any, Any], what: str) -> TextEnv:
    """The environment as a TextEnv, where Gymnasium's wrappers may be around it; errors begin with `what`.

    Wrappers that only check are left out, TimeLimit becomes a TurnLimit. TypeError for others, which cannot fork.
    """
    if isinstance(env, TextEnv):
        return env
    if not isinstance(env, gymnasium.Wrapper):
        raise TypeError(f"{what} is a {type(env).__name__}, not a TextEnv")
    inner = text_env(env.env, what)
    if type(env) in CHECKS:
        return inner
    if type(env) is TimeLimit:
        return TurnLimit(inner, env._max_episode_steps)
    instead = next(text for kind, text in _INSTEAD.items() if isinstance(env, kind))
    raise TypeError(f"{what}: {type(env).__name__} is a gymnasium.Wrapper, which cannot fork; {instead}")


def _messages(observation: str, info: Mapping[str, Any]) -> tuple[Message, ...]:
    return tuple(info["messages"]) if "messages" in info else (Message("user", observation),)


def _told(observation: str, before: tuple[Message, ...], messages: tuple[Message, ...]) -> str:
    return observation if messages == before else observation_of(messages)


def _behind(messages: Sequence[Message], text: str) -> Sequence[Message]:
    """The messages with the text behind the last one."""
    return [*messages[:-1], replace(messages[-1], text=messages[-1].text + text)] if text else messages
