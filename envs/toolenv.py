"""ToolEnv: an environment of tool calls and a final answer, scored by named terms."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import chain
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from gymnasium.error import ResetNeeded

from ..tools import (
    Cassette,
    EpisodeLost,
    FunctionTool,
    Playhead,
    Recorded,
    Stateful,
    Tool,
    ToolCall,
    Toolkit,
    ToolResult,
    call_tools,
)
from ..tools.protocol import encodable
from .base import Message, TextEnv
from .formats.actions import Action, FormatError
from .formats.tagged import DEFAULT, action_format
from .rewards import RewardTerms, added, weighed
from .spaces import AnyText
from .toolparts import Named, given_term, given_tool

MAX_TURNS = 8
TURN_LIMIT = "turn limit"  # the cause of a truncation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A call and what came of it."""

    call: ToolCall
    result: ToolResult


class ToolEnv(TextEnv):
    """Subclasses give `begin`, their `@tool` methods and `score`, and keep their state in plain attributes.

    An episode ends with an answer (terminated), or when the turns run out (truncated, info["cause"] says so), or when a
    tool raises EpisodeLost (truncated, info["cause"] has its cause and info["lost"] its text).
    A turn's reward is the sum of its terms times `reward_weights`. The last turn has the terms of `score`, and
    `format`, which is 1.0 if the episode ended with an answer and every turn before was an action of known tools with
    valid arguments. Every turn has those of `score_step` and of the functions in `terms`; a term that several of these
    give is their sum.

    In an episode a subclass reads `transcript`, the calls so far with their results; `turn`, how many there were;
    `answered`, the answer or None; `well_formed`, whether no turn was at fault; `over`; `seed_key`, a text that names
    seed and options; and `said`, the messages of reset or of the last step.

    `tools` are tools and toolkits, or names of them: "module:Name", or {"module:Name": {arguments}}, which is called.
    `terms` are functions of the environment, or their names "module:function". Each is called after every turn, the
    last one too, and gives a number, or None where it has nothing to say.
    """

    instructions: str = ""  # opens the system message; the action format's own follow
    max_turns: int = MAX_TURNS
    reward_weights: Mapping[str, float] = {"exact": 1.0, "format": 0.1}
    sources: ClassVar[tuple[str, ...]] = ()  # names of the outside sources that it consults
    # attributes that forks share
    shared: ClassVar[frozenset[str]] = frozenset({"spec", "format", "reward_weights", "given_terms"})

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 1}  # type: ignore[misc]

    _tool_methods: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for name, (kinds, wanted) in _RETURNS.items():
            if (said := _said_to_return(vars(cls).get(name))) in kinds:
                raise TypeError(f"{cls.__name__}.{name} says that it returns {said}: {wanted}")
        names = dict.fromkeys(name for base in reversed(cls.__mro__) for name in vars(base))  # base classes' first
        cls._tool_methods = tuple(name for name in names if isinstance(getattr(cls, name), FunctionTool))

    def __init__(
        self,
        *,
        tools: Sequence[Tool | Toolkit | Named] = (),
        format: str = DEFAULT,
        max_turns: int | None = None,
        reward_weights: Mapping[str, float] | None = None,
        terms: Mapping[str, str | Callable[[Any], float | None]] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        for name, (_, wanted) in _RETURNS.items():
            if getattr(type(self), name) is getattr(ToolEnv, name):
                raise TypeError(f"{type(self).__name__} has no {name}(): {wanted}")
        self.format = action_format(format)
        self.given_tools = tuple(map(given_tool, tools))
        names = [*(tool.name for tool in self._flat()), *self._tool_methods]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two tools are named {twice!r}: rename one; MCPServer takes a prefix for its tools")
        if not all(getattr(tool, "can_fork", True) for tool in self.given_tools):
            self.can_fork = False
        self.max_turns = self.max_turns if max_turns is None else max_turns
        self.reward_weights = dict(self.reward_weights if reward_weights is None else reward_weights)
        self.given_terms = {name: given_term(name, given) for name, given in (terms or {}).items()}
        if weightless := sorted(self.given_terms.keys() - self.reward_weights.keys()):
            raise ValueError(
                f"terms: {weightless[0]!r} has no weight: add it to reward_weights, {self.reward_weights}; "
                "with 0.0 it is recorded alone"
            )
        self.playhead: Playhead | None = None
        self._clear()
        self._check_names(format)

    def _check_names(self, format: str) -> None:
        """ValueError where a call of a tool would not be read as one: its name means something else in the format."""
        tools = self.tools
        for name in tools:
            parsed = self.format.parse(self.format.render(Action((ToolCall(name, {}),)), tools), tools)
            if not isinstance(parsed, Action) or [call.name for call in parsed.calls] != [name]:
                raise ValueError(
                    f"a tool named {name!r} cannot be called in the action format {format}, where the name means "
                    f"something else or cannot be written: rename it (MCPServer takes a prefix), or take another format"
                )

    def _clear(self) -> None:
        self.seed_key = ""
        self.options_read: frozenset[str] = frozenset()  # names that `begin` asked for
        self.turn, self.over, self.well_formed = 0, True, True
        self.transcript: tuple[Exchange, ...] = ()
        self.answered: str | None = None
        self.lost: EpisodeLost | None = None
        self.said: tuple[Message, ...] = ()  # by reset or the last step

    def begin(self, options: Mapping[str, Any]) -> str:
        """Draws the task with `self.np_random`; the text of the user's message."""
        raise NotImplementedError

    def score(self, answer: str) -> dict[str, float]:
        """The terms of an answer, all but `format`."""
        raise NotImplementedError

    def score_unanswered(self) -> dict[str, float]:
        """The terms when the turns ran out; those that it leaves out are zero."""
        return {}

    def score_step(self, exchanges: Sequence[Exchange]) -> RewardTerms:
        """Terms of the turn that has just ended, from its calls and their results.

        It is called after every turn; a malformed turn and an answer have no calls.
        """
        return {}

    def details(self) -> dict[str, Any]:
        """What reset adds to its info."""
        return {}

    @property
    def tools(self) -> dict[str, Tool]:
        """The tools by name: those given, then the methods marked @tool."""
        methods = (getattr(self, name) for name in self._tool_methods)
        return {tool.name: self._taped(tool) for tool in (*self._flat(), *methods)}

    def _taped(self, tool: Tool) -> Tool:
        return tool if self.playhead is None or not getattr(tool, "outside", "") else Recorded(tool, self.playhead)

    @property
    def outside(self) -> tuple[str, ...]:
        named = (*self.sources, *(getattr(tool, "outside", "") for tool in self._flat()))
        return () if self.playhead else tuple(dict.fromkeys(filter(None, named)))

    def tape(self, cassette: Cassette) -> None:
        if self.outside:
            self.playhead = Playhead(cassette)

    def consult(self, source: str, question: Any, ask: Callable[[], Any]) -> Any:
        """What one of `sources` (a judge, a simulated user) answers to a question. Question and answer are JSON.

        The question holds all that the answer depends on: with a cassette, a replay takes the answer from the tape.
        """
        return self.playhead.ask(source, question, ask) if self.playhead else ask()

    def _flat(self) -> Iterator[Tool]:
        """The given tools and those of the toolkits among them."""
        return chain.from_iterable(
            given.tools if isinstance(given, Toolkit) else (given,) for given in self.given_tools
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        if "given_tools" not in vars(self):
            raise TypeError(f"{type(self).__name__}.__init__ does not call super().__init__(**settings): let it")
        super().reset(seed=seed)
        self._clear()
        self.seed_key = digest([str(self.np_random.bit_generator.state), options or {}])
        if self.playhead:
            self.playhead.rewind(self.seed_key)
        for tool in self.given_tools:
            if isinstance(tool, Stateful):
                tool.reset(int(self.np_random.integers(2**32)))
        asked = Asked(options or {})
        task = self.begin(asked)
        if not isinstance(task, str):
            raise TypeError(f"{type(self).__name__}.begin returned {task!r:.80}: {_RETURNS['begin'][1]}")
        self.options_read = frozenset(asked.read)
        self.over = False
        system = "\n".join(filter(None, [self.instructions, self.format.instructions(self.tools)]))
        messages = [Message("system", system), Message("user", task)]
        self.said = tuple(messages)
        return observation_of(messages), {"messages": messages, "reward_terms": {}, **self.details()}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.over:
            raise ResetNeeded("the episode is over, or none has begun: call reset() before step()")
        self.turn += 1
        before = len(self.transcript)
        parsed = self.format.parse(encodable(action), self.tools)
        messages = self._act(parsed)
        self.said = tuple(messages)
        terminated = self.answered is not None
        truncated = not terminated and (self.lost is not None or self.turn >= self.max_turns)
        self.over = terminated or truncated
        terms = self._terms(self.transcript[before:])
        calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in _calls(parsed)]
        info: dict[str, Any] = {"messages": messages, "reward_terms": terms, "tool_calls": calls}
        info |= self._counts(parsed)
        if truncated:
            info["cause"] = TURN_LIMIT if self.lost is None else self.lost.cause
        if self.lost is not None:
            info["lost"] = self.lost.text
        return observation_of(messages), weighed(terms, self.reward_weights), terminated, truncated, info

    def _act(self, parsed: Action | FormatError) -> list[Message]:
        """Does what the agent wrote; the messages that answer it."""
        if isinstance(parsed, FormatError):
            self.well_formed = False
            return [Message("user", parsed.text)]
        if parsed.answer is not None:
            self.answered = parsed.answer
            return []
        try:
            results = call_tools(parsed.calls, self.tools)
        except EpisodeLost as error:
            self.lost = error
            results = [ToolResult(f"{error}; the episode ends here", failed=True)] * len(parsed.calls)
        exchanges = tuple(map(Exchange, parsed.calls, results))
        self.well_formed &= not any(exchange.result.failed for exchange in exchanges)
        self.transcript += exchanges
        return [Message("tool", exchange.result.text) for exchange in exchanges]

    def _counts(self, parsed: Action | FormatError) -> dict[str, int]:
        calls = len(_calls(parsed))
        failed = sum(exchange.result.failed for exchange in self.transcript[-calls:]) if calls else 0
        return {"calls": calls, "failed_calls": failed, "malformed": int(isinstance(parsed, FormatError))}

    def _terms(self, exchanges: Sequence[Exchange]) -> RewardTerms:
        """The terms of a turn with these exchanges."""
        terms = added(self._last_terms() if self.over else {}, self.score_step(exchanges))
        return added(terms, {name: function(self) for name, function in self.given_terms.items()})

    def _last_terms(self) -> RewardTerms:
        if self.answered is None:
            return {**dict.fromkeys(self.reward_weights, 0.0), **self.score_unanswered()}
        terms = self.score(self.answered)
        if not isinstance(terms, Mapping):
            raise TypeError(f"{type(self).__name__}.score returned {terms!r:.80}: {_RETURNS['score'][1]}")
        return {**terms, "format": float(self.well_formed)}

    def render(self) -> str | None:
        """What reset or the last step said, with `render_mode` "ansi"; a line names each message's role."""
        if self.render_mode is None:
            return None
        return "\n".join(f"[{message.role}]\n{message.text}" for message in self.said)

    def fork(self) -> Self:
        return forked(self, self.shared)

    def close(self) -> None:
        for tool in self.given_tools:
            if isinstance(tool, Stateful):
                tool.close()

    def situation(self) -> Any:
        """What tells this task from others, as JSON: the generator's state at reset, unless a subclass knows better."""
        return self.seed_key

    def state_key(self) -> str:
        calls = [[e.call.name, dict(e.call.arguments), e.result.text] for e in self.transcript]
        return digest([self.situation(), calls, self.answered, self.over])

    def write_call(self, tool: str, **arguments: Any) -> str:
        """The action text of a tool call, for oracles."""
        return self.format.render(Action(calls=(ToolCall(tool, arguments),)), self.tools)

    def write_answer(self, text: str) -> str:
        """The action text of a final answer, for oracles."""
        return self.format.render(Action(answer=text), self.tools)

    @functools.cached_property
    def action_space(self) -> AnyText:  # type: ignore[override]
        return AnyText()

    @functools.cached_property
    def observation_space(self) -> AnyText:  # type: ignore[override]
        return AnyText()


_RETURNS = {  # methods that every environment has: the types that are no good, and what is
    "begin": (("int", "float", "bool", "None"), "return the text of the user's message"),
    "score": (("int", "float", "bool", "None"), 'return the terms of an answer by name, such as {"exact": 1.0}'),
}


def _said_to_return(method: Any) -> str:
    """The type in the annotation of a method's result."""
    said = getattr(method, "__annotations__", {}).get("return", "")
    return said if isinstance(said, str) else getattr(said, "__name__", str(said))


class Asked(Mapping[str, Any]):
    """The options of a reset, which remember the names that were read."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options, self.read = options, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)


_SPACES = frozenset({"action_space", "observation_space"})  # a fork samples from its own, made at first use
_ATOMS = (str, int, float, bool, bytes, type(None), frozenset)


def forked(env: T, shared: frozenset[str] = frozenset()) -> T:
    """A copy of an environment. Attributes in `shared` are the same objects in both; spaces are left out.

    Attributes are copied deeply, but for frozen dataclasses; those that have a `fork` are forked.
    """
    twin: T = object.__new__(type(env))
    memo: dict[int, Any] = {}
    for name, value in vars(env).items():
        if name not in _SPACES:
            vars(twin)[name] = value if name in shared else _copy(value, memo)
    return twin


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that is quick for what episodes are made of; frozen dataclasses count as immutable."""
    kind = type(value)
    if kind in _ATOMS or (is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        return value
    if kind is tuple:
        return tuple(_copy(item, memo) for item in value)
    if kind is np.random.Generator:
        return _copy_generator(value)
    return value.fork() if hasattr(value, "fork") else copy.deepcopy(value, memo)


def _copy_generator(generator: np.random.Generator) -> np.random.Generator:
    bits = type(generator.bit_generator)(0)
    bits.state = generator.bit_generator.state
    return np.random.Generator(bits)


def _calls(parsed: Action | FormatError) -> Sequence[ToolCall]:
    return parsed.calls if isinstance(parsed, Action) else ()


def observation_of(messages: Sequence[Message]) -> str:
    return "\n".join(message.text for message in messages)


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
