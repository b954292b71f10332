"""check_env: what every text environment promises, tried out."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env as check_gymnasium

from .base import Message, TextEnv
from .fresh import NotMade, as_json, told_elsewhere
from .rewards import weighed
from .task import Task
from .toolenv import ToolEnv

HOSTILE = (
    "",
    " \n\t",
    "no action here",
    "\x00\ud800 ünï©ode 漢字 🙂 \u202e",
    "<answer>",
    "</answer>",
    "<answer><answer>nested</answer></answer>",
    "<tool_call>{</tool_call>",
    '<tool_call>{"name": 1, "arguments": []}</tool_call>',
    "<tool_call>" + "[" * 100_000 + "</tool_call>",
    "Thought: x\nAction: \nAction Input: {",
    "```\n````answer\n```",
    '{"content": null, "tool_calls": [{"function": {"name": "x", "arguments": "{\\"self\\": 1}"}}]}',
    "huge " * 50_000,
)
THREADS = 4
FEW = 8  # tasks of either split that are compared
RANDOM = "randomness or a clock beside self.np_random, or a set that is iterated over"
KEPT = "an attribute that begin() does not set anew, or one that begin() changes in place"
GLOBAL = "a list or a dict on the class or in a module, which all instances share: make it in begin()"
UNCOPIED = (
    "an attribute that cannot be copied, or that a fork shares: keep the state in plain attributes, name those that no "
    "episode changes in `shared`, or say can_fork = False"
)
BUG = "ToolError is for an agent to read, and ends nothing; any other exception is a bug"


@dataclass(frozen=True)
class Turn:
    """What a reset (number 0) or a step gave, and the state key after it."""

    number: int
    observation: str
    info: Mapping[str, Any]
    state_key: str
    action: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False

    @property
    def over(self) -> bool:
        return self.terminated or self.truncated

    def facts(self) -> dict[str, Any]:
        return {**{name: value for name, value in vars(self).items() if name not in ("number", "info")}, **self.info}


def check_env(
    make: Callable[[], TextEnv] | str, *, options: Mapping[str, Any] | None = None, seeds: Iterable[int] = range(3)
) -> None:
    """Raises AssertionError if the environment breaks Gymnasium's contract or ours.

    It names the promise, seed and turn, what differed, the usual cause and the way out. `make` is a function that gives
    new environments, or a Gymnasium id; `options` go to every reset. Warnings say where fresh interpreters cannot make
    the environment, so that its dependence on the hash seed was not tried, and where train and held-out tasks are
    equal. Environments are used again for episode after episode, because making one may start a server: about ten are
    made in all.
    """
    new = Task(make, 0).make if isinstance(make, str) else make
    stock = _Stock(new)
    runs = [_Run(stock, dict(options or {}), seed) for seed in seeds]
    with _progress() as tell, contextlib.closing(stock):
        tell("Gymnasium's contract", 0)
        check_gymnasium_contract(new)
        options_are_read(runs)
        for number, (run, law) in enumerate(itertools.product(runs, LAWS)):
            tell(f"seed {run.seed}: {law.__name__.replace('_', ' ')}", number / (len(runs) * len(LAWS)))
            law(run)
        tell("other hash seeds", 1)
        hash_seed_changes_nothing(runs)
        heldout_tasks_are_others(runs)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """What says what is tried, and what share is done, where there is a terminal to say it in."""
    if not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(24), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


class _Stock:
    """Environments that play one episode after another."""

    def __init__(self, new: Callable[[], TextEnv]) -> None:
        self.new = new
        self._idle: list[TextEnv] = []

    @contextlib.contextmanager
    def lent(self) -> Iterator[TextEnv]:
        """One of them; it does not come back from an exception."""
        env = self._idle.pop() if self._idle else self.new()
        try:
            yield env
        except BaseException:
            with contextlib.suppress(Exception):
                env.close()
            raise
        self._idle.append(env)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class _Run:
    """Plays environments, always with the same seed and options."""

    def __init__(self, stock: _Stock, options: dict[str, Any], seed: int) -> None:
        self.stock, self.options, self.seed = stock, options, seed

    @contextlib.contextmanager
    def begun(self) -> Iterator[tuple[TextEnv, Turn]]:
        """An environment of the stock, after its reset."""
        with self.stock.lent() as env:
            yield env, self.reset(env)

    def reset(self, env: TextEnv) -> Turn:
        observation, info = env.reset(seed=self.seed, options=dict(self.options))
        return Turn(0, observation, info, env.state_key())

    def step(self, env: TextEnv, number: int, action: str) -> Turn:
        try:
            observation, reward, terminated, truncated, info = env.step(action)
        except Exception as error:
            said = f"step() raised {type(error).__name__}: {error}\nturn {number}, the action {action[:80]!r}"
            raise AssertionError(self.named(said, BUG)) from error
        self.require(
            isinstance(reward, float), f"turn {number}: the reward {reward!r} after {action[:40]!r} is no float"
        )
        return Turn(number, observation, info, env.state_key(), action, float(reward), terminated, truncated)

    def finish(self, env: TextEnv, after: int = 0, hostile: bool = True) -> list[Turn]:
        """The turns after so many until the end."""
        turns: list[Turn] = []
        while not turns or not turns[-1].over:
            self.require(len(turns) < 10_000, "an episode of 10,000 turns has no end")
            number = after + len(turns)
            turns.append(self.step(env, number + 1, choose(env, number, hostile)))
        return turns

    def episode(self, env: TextEnv) -> list[Turn]:
        return [self.reset(env), *self.finish(env)]

    def ahead(self, env: TextEnv, turns: int) -> None:
        """Takes so many turns from the beginning."""
        for number in range(turns):
            self.step(env, number + 1, choose(env, number))

    def played(self) -> list[Turn]:
        """An episode of an environment of the stock."""
        with self.stock.lent() as env:
            return self.episode(env)

    def require(self, holds: bool, promise: str, cause: str = "") -> None:
        if not holds:
            raise AssertionError(self.named(promise, cause))

    def require_same(self, first: Sequence[Turn], then: Sequence[Turn], promise: str, cause: str) -> None:
        if difference := first_difference([turn.facts() for turn in first], [turn.facts() for turn in then]):
            turn = first[0].number if first else 0
            place, what = difference
            raise AssertionError(self.named(f"{promise}\nturn {turn + place}: {what}", cause))

    def named(self, promise: str, cause: str) -> str:
        return f"{self.name}, seed {self.seed}: {promise}" + (f"\nusually: {cause}" if cause else "")

    @functools.cached_property
    def name(self) -> str:
        with self.stock.lent() as env:
            return type(env.unwrapped).__name__ if env.unwrapped is env else str(env)


def choose(env: TextEnv, turn: int, hostile: bool = True) -> str:
    """The oracle's action, or a hostile one on odd turns and where there is no oracle."""
    action = None if hostile and turn % 2 else env.oracle()
    return HOSTILE[turn % len(HOSTILE)] if action is None else action


def first_difference(first: Sequence[Mapping[str, Any]], then: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The place of the first turn that differs, and its field with both values."""
    for place, (one, other) in enumerate(zip(first, then, strict=False)):
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                return place, f"{name} is another\n{_excerpts(one.get(name), other.get(name))}"
    lengths = len(first), len(then)
    return None if lengths[0] == lengths[1] else (min(lengths), f"there are {lengths[1]} turns instead of {lengths[0]}")


def _excerpts(first: Any, then: Any) -> str:
    """Both values, from shortly before where they part."""
    one, other = (_written(value) for value in (first, then))
    start = max(0, len(os.path.commonprefix([one, other])) - 40)
    return f"first: {one[start : start + 80]}\nthen:  {other[start : start + 80]}"


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)


def check_gymnasium_contract(new: Callable[[], TextEnv]) -> None:
    """Gymnasium's own checker finds nothing to complain or warn about."""
    env = new()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* is different from the unwrapped version")
        # a wrapper's spec cannot make it again; endings_are_exclusive_and_final closes it twice
        check_gymnasium(env, skip_render_check=True, skip_close_check=env.unwrapped is not env)
    env.close()


def same_seed_same_bytes(run: _Run) -> None:
    with contextlib.closing(run.stock.new()) as fresh:
        first = run.episode(fresh)
        run.require_same(first, run.played(), "the same seed and actions gave two different episodes", RANDOM)
        again = run.episode(fresh)
    run.require_same(first, again, "a second reset with the seed gave another episode", KEPT)


def hash_seed_changes_nothing(runs: Sequence[_Run]) -> None:
    """Fresh interpreters with other hash seeds play the same episodes."""
    if not runs:
        return
    first = runs[0]
    seeds = [run.seed for run in runs]
    try:
        elsewhere = told_elsewhere(_told, first.stock.new, first.options, seeds)
    except NotMade as error:
        warnings.warn(
            f"{first.name} was not tried in a fresh interpreter with another hash seed, which "
            f"cannot make it ({error}); define it in a module that can be imported",
            stacklevel=3,
        )
        return
    here = _told(first.stock.new, first.options, seeds) if elsewhere else []
    for there in elsewhere:
        for run, ours, theirs in zip(runs, here, there, strict=True):
            if difference := first_difference(ours, theirs):
                place, what = difference
                turn = ours[min(place, len(ours) - 1)]["turn"]
                promise = f"in a fresh interpreter with another hash seed, turn {turn}: {what}"
                run.require(False, promise, "a set that is iterated over: sort it")


def _told(new: Callable[[], TextEnv], options: dict[str, Any], seeds: Sequence[int]) -> list[list[dict[str, Any]]]:
    """For each seed what two episodes say, the oracle's and one with hostile actions, as JSON."""
    with contextlib.closing(_Stock(new)) as stock:
        return [[*_as_told(_Run(stock, options, seed))] for seed in seeds]


def _as_told(run: _Run) -> Iterator[dict[str, Any]]:
    for hostile in (False, True):
        with run.begun() as (env, first):
            for turn in (first, *run.finish(env, hostile=hostile)):
                messages = [(message.role, message.text) for message in turn.info["messages"]]
                yield {"turn": turn.number, **as_json({**turn.facts(), "messages": messages})}


def heldout_tasks_are_others(runs: Sequence[_Run]) -> None:
    """A warning where options["split"] changes nothing, and held-out tasks are train tasks as well."""
    if not runs or "split" in runs[0].options:
        return
    stock, options = runs[0].stock, runs[0].options

    def episode(split: str, seed: int) -> tuple[tuple[str, str], ...]:
        run = _Run(stock, {**options, "split": split}, seed)
        with run.begun() as (env, first):
            return tuple((turn.action, turn.observation) for turn in (first, *run.finish(env, hostile=False)))

    with contextlib.suppress(ValueError, KeyError):  # it has other splits, or none
        if all(episode("train", run.seed) == episode("heldout", run.seed) for run in runs):
            train = {episode("train", seed) for seed in range(FEW)}
            shared = sum(episode("heldout", seed) in train for seed in range(FEW, 2 * FEW))
            if shared:
                warnings.warn(
                    f"{runs[0].name}: options['split'] changes nothing, and {shared} of {FEW} held-out tasks are also "
                    f"among the first {FEW} to train on: draw them from different ones (docs/environments.md, Splits)",
                    stacklevel=3,
                )


def options_are_read(runs: Sequence[_Run]) -> None:
    """Those that are given are known to the environment, if it tells what it reads."""
    read: set[str] = {"split"}
    for run in runs:
        with run.begun() as (env, _):
            if not isinstance(env.unwrapped, ToolEnv):
                return
            read |= env.unwrapped.options_read
    for run in runs[:1]:
        unread = sorted(run.options.keys() - read)
        run.require(not unread, f"begin() reads no option {', '.join(unread)}; it reads {', '.join(sorted(read))}")


def messages_are_recorded(run: _Run) -> None:
    for turn in run.played():
        messages = turn.info.get("messages")
        run.require(
            isinstance(messages, list) and all(isinstance(m, Message) for m in messages),
            f'turn {turn.number}: info["messages"] is not a list of Message',
        )
        run.require(
            isinstance(turn.info.get("reward_terms"), dict), f'turn {turn.number}: info["reward_terms"] is not a dict'
        )


def instances_are_separate(run: _Run) -> None:
    alone = run.played()
    with run.begun() as (one, first), run.begun() as (two, second):
        in_turns: tuple[list[Turn], list[Turn]] = ([first], [second])
        for number in range(len(alone) - 1):
            for env, turns in zip((one, two), in_turns, strict=True):
                turns.append(run.step(env, number + 1, choose(env, number)))
    for turns in in_turns:
        run.require_same(alone, turns, "two instances in turns disturbed each other", GLOBAL)
    with ThreadPoolExecutor(THREADS) as pool:
        for episode in pool.map(lambda _: run.played(), range(2 * THREADS)):
            run.require_same(alone, episode, "episodes in several threads disturbed each other", GLOBAL)


def forks_are_independent(run: _Run) -> None:
    played = run.played()[1:]
    for depth in range(len(played)):
        with run.begun() as (env, _):
            if not env.can_fork:
                return  # the engine replays instead, which same_seed_same_bytes allows
            run.ahead(env, depth)
            key, twin, third = env.state_key(), _forked(run, env, depth), _forked(run, env, depth)
            place = f"at turn {depth}"
            run.require(twin.state_key() == key, f"{place}: a fork has another state key than its original", UNCOPIED)
            for action in HOSTILE:  # another future than the original's
                if run.step(third, depth + 1, action).over:
                    break
            run.require(env.state_key() == key, f"{place}: stepping a fork changed the original", UNCOPIED)
            future = played[depth:]
            for other, promise in (
                (twin, "a fork's future differs from its original's"),
                (env, "the original's future changed after it was forked"),
            ):
                run.require_same(future, run.finish(other, depth), f"{place}: {promise}", UNCOPIED)
            twin.close()
            third.close()


def _forked(run: _Run, env: TextEnv, depth: int) -> TextEnv:
    try:
        return env.fork()
    except Exception as error:
        named = f" of {', '.join(names)}" if (names := _uncopied(env)) else ""
        said = f"at turn {depth}: fork() raised {type(error).__name__}{named}: {error}"
        raise AssertionError(run.named(said, UNCOPIED)) from error


def _uncopied(env: TextEnv) -> list[str]:
    """The attributes that cannot be copied."""
    names = []
    for name, value in vars(env.unwrapped).items():
        try:
            if not hasattr(value, "fork"):
                copy.deepcopy(value)
        except Exception:
            names.append(name)
    return names


def pickles_in_mid_episode(run: _Run) -> None:
    played = run.played()[1:]
    for depth in range(len(played)):
        with run.begun() as (env, _):
            if not env.can_fork:
                return
            run.ahead(env, depth)
            try:
                restored: TextEnv = pickle.loads(pickle.dumps(env))
            except Exception as error:
                said = f"at turn {depth}: pickling raised {type(error).__name__}: {error}"
                raise AssertionError(run.named(said, UNCOPIED)) from error
            promise = f"at turn {depth}: an unpickled environment has another future"
            run.require_same(played[depth:], run.finish(restored, depth), promise, UNCOPIED)
            restored.close()


def hostile_actions_are_answered(run: _Run) -> None:
    with run.begun() as (env, _):
        number, over = 0, False
        for action in (*HOSTILE, *_tool_texts(env)):
            if over:
                run.reset(env)
                number = 0
            number += 1
            turn, shown = run.step(env, number, action), f"{action[:40]!r}"
            inside = turn.observation in env.observation_space
            run.require(inside, f"turn {number}: the observation after {shown} is not in its space")
            run.require(not (turn.terminated and turn.truncated), "an episode was both terminated and truncated")
            run.require(bool(turn.observation) or turn.terminated, f"turn {number}: {shown} got no answer")
            over = turn.over


def _tool_texts(env: TextEnv) -> list[str]:
    """Nested, unclosed, parallel and empty calls of each of the environment's tools."""
    if not isinstance(env.unwrapped, ToolEnv):
        return []
    texts = []
    for name in env.unwrapped.tools:
        one = f"<{name}>x</{name}>"
        texts += [one, one * 3, one * 100, f"<{name}></{name}>", f"<{name}>{one}</{name}>", f"<{name}>x", f"x</{name}>"]
        texts += [f"<{name}>{'x ' * 50_000}</{name}>", f'<tool_call>{{"name": "{name}"}}</tool_call>' * 2]
        texts += [f'<tool_call>{{"name": "{name}", "arguments": {{"self": 1}}}}</tool_call>']
        texts += [f"Action: {name}\nAction Input: x\n" * 3, f"Action: {name}[{{}}]", f"```{name}\nx\n```\n" * 3]
        function = json.dumps({"name": name, "arguments": '{"self": 1}'})
        texts += [f'{{"tool_calls": [{{"function": {function}}}, {{"function": {function}}}]}}']
    return texts


def endings_are_exclusive_and_final(run: _Run) -> None:
    with contextlib.closing(run.stock.new()) as env:
        last = run.episode(env)[-1]
        run.require(last.terminated is not last.truncated, "an episode ended both terminated and truncated")
        for _ in range(2):
            try:
                env.step("more")
            except gymnasium.error.ResetNeeded:
                continue
            run.require(False, "step() after the end did not raise gymnasium.error.ResetNeeded")
        env.close()


def global_randomness_is_untouched(run: _Run) -> None:
    def states() -> str:
        return repr((random.getstate(), np.random.get_state()))

    before = states()
    run.played()
    cause = "random or numpy.random: draw from self.np_random"
    run.require(states() == before, "an episode changed the state of random or numpy.random", cause)


def oracle_succeeds(run: _Run) -> None:
    with run.begun() as (env, _):
        if env.oracle() is None:
            return
        turns = run.finish(env, hostile=False)
        last, weights = turns[-1], env.reward_weights
        checks = isinstance(env.unwrapped, ToolEnv)
    run.require(last.terminated, "the oracle's episode did not end by itself", "max_turns is too small for it")
    run.require(sum(turn.reward for turn in turns) > 0, "the oracle's episode earned nothing")
    run.require(last.info["reward_terms"].get("exact", 1.0) == 1.0, "the oracle's answer is not exact")
    for turn in turns if checks else ():
        same = abs(turn.reward - weighed(turn.info["reward_terms"], weights)) < 1e-9
        run.require(same, f"turn {turn.number}: the reward is not the weighted sum of its terms")


LAWS = (
    same_seed_same_bytes,
    messages_are_recorded,
    instances_are_separate,
    forks_are_independent,
    pickles_in_mid_episode,
    hostile_actions_are_answered,
    endings_are_exclusive_and_final,
    global_randomness_is_untouched,
    oracle_succeeds,
)
