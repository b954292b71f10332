"""check_env: what every text environment promises, tried out."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
Record = tuple[Any, ...]  # what one reset or step returned, and the state key after it


def check_env(
    make: Callable[[], TextEnv] | str, *, options: Mapping[str, Any] | None = None, seeds: Iterable[int] = range(3)
) -> None:
    """Raises AssertionError, naming the promise, if the environment breaks Gymnasium's contract or ours.

    `make` is a function that gives new environments, or a Gymnasium id; `options` go to every reset. A warning says
    where fresh interpreters cannot make the environment, so that its dependence on the hash seed was not tried.
    """
    new = Task(make, 0).make if isinstance(make, str) else make
    check_gymnasium_contract(new)
    runs = [_Run(new, dict(options or {}), seed) for seed in seeds]
    for run in runs:
        for law in LAWS:
            law(run)
    hash_seed_changes_nothing(runs)


class _Run:
    """Makes environments and plays them, always with the same seed and options."""

    def __init__(self, new: Callable[[], TextEnv], options: dict[str, Any], seed: int) -> None:
        self.new, self.options, self.seed = new, options, seed

    def begin(self) -> tuple[TextEnv, Record]:
        env = self.new()
        observation, info = env.reset(seed=self.seed, options=dict(self.options))
        return env, (observation, info, env.state_key())

    def require(self, holds: bool, promise: str) -> None:
        if not holds:
            raise AssertionError(f"{type(self.new()).__name__}, seed {self.seed}: {promise}")


def _step(env: TextEnv, turn: int, hostile: bool) -> Record:
    return (*env.step(_choose(env, turn, hostile)), env.state_key())


def _choose(env: TextEnv, turn: int, hostile: bool = True) -> str:
    """The oracle's action, or a hostile one on odd turns and where there is no oracle."""
    action = None if hostile and turn % 2 else env.oracle()
    return HOSTILE[turn % len(HOSTILE)] if action is None else action


def _finish(env: TextEnv, turn: int = 0, hostile: bool = True) -> list[Record]:
    records: list[Record] = []
    while not records or not (records[-1][2] or records[-1][3]):
        records.append(_step(env, turn + len(records), hostile))
        assert len(records) < 10_000, f"{type(env).__name__}: an episode of 10,000 turns has no end"
    return records


def _episode(run: _Run) -> list[Record]:
    env, first = run.begin()
    return [first, *_finish(env)]


def check_gymnasium_contract(new: Callable[[], TextEnv]) -> None:
    """Gymnasium's own checker finds nothing to complain or warn about."""
    env = new()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* is different from the unwrapped version")
        # a wrapper's spec cannot make it again; endings_are_exclusive_and_final closes it twice
        check_gymnasium(env, skip_render_check=True, skip_close_check=env.unwrapped is not env)


def same_seed_same_bytes(run: _Run) -> None:
    run.require(_episode(run) == _episode(run), "the same seed and actions gave two different episodes")
    env, first = run.begin()
    _finish(env)
    observation, info = env.reset(seed=run.seed, options=dict(run.options))
    run.require((observation, info, env.state_key()) == first, "a second reset with the seed gave another episode")


def hash_seed_changes_nothing(runs: Sequence[_Run]) -> None:
    """Fresh interpreters with other hash seeds play the same episodes."""
    if not runs:
        return
    first = runs[0]
    try:
        elsewhere = told_elsewhere(_told, first.new, first.options, [run.seed for run in runs])
    except NotMade as error:
        warnings.warn(
            f"{type(first.new()).__name__} was not tried in a fresh interpreter with another hash seed, which "
            f"cannot make it ({error}); define it in a module that can be imported",
            stacklevel=3,
        )
        return
    for place, run in enumerate(runs):
        here = _told(run.new, run.options, run.seed)
        for there in elsewhere:
            difference = _first_difference(here, there[place])
            run.require(not difference, f"in a fresh interpreter with another hash seed, {difference}")


def _told(new: Callable[[], TextEnv], options: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """What two episodes say, the oracle's and one with hostile actions, as JSON with the actions that were taken."""
    return [facts for hostile in (False, True) for facts in _told_turns(new(), options, seed, hostile)]


def _told_turns(env: TextEnv, options: dict[str, Any], seed: int, hostile: bool) -> Iterator[dict[str, Any]]:
    observation, info = env.reset(seed=seed, options=dict(options))
    yield {"turn": 0, "observation": observation, **_facts(env, info)}
    turn, over = 0, False
    while not over:
        action = _choose(env, turn, hostile)
        observation, reward, terminated, truncated, info = env.step(action)
        turn, over = turn + 1, terminated or truncated
        ends = {"reward": float(reward), "terminated": terminated, "truncated": truncated}
        yield {"turn": turn, "action": action, "observation": observation, **ends, **_facts(env, info)}
    env.close()


def _facts(env: TextEnv, info: Mapping[str, Any]) -> dict[str, Any]:
    messages = [(message.role, message.text) for message in info["messages"]]
    return {**as_json(info), "messages": messages, "state_key": env.state_key()}


def _first_difference(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> str:
    """Turn, field and both values; empty where there is none."""
    for ours, theirs in zip(here, there, strict=False):
        for name in ours | theirs:
            one, other = (json.dumps(told.get(name), ensure_ascii=False, sort_keys=True) for told in (ours, theirs))
            if one != other:
                start = max(0, len(os.path.commonprefix([one, other])) - 40)
                place = f"turn {ours['turn']}: {name} is another (is a set iterated over?)"
                return f"{place}\nhere:  {one[start : start + 80]}\nthere: {other[start : start + 80]}"
    return "" if len(here) == len(there) else f"there are {len(there)} turns instead of {len(here)}"


def messages_are_recorded(run: _Run) -> None:
    for record in _episode(run):
        info = record[1] if len(record) == 3 else record[4]
        messages = info.get("messages")
        run.require(
            isinstance(messages, list) and all(isinstance(m, Message) for m in messages),
            'info["messages"] is not a list of Message',
        )
        run.require(isinstance(info.get("reward_terms"), dict), 'info["reward_terms"] is not a dict')


def instances_are_separate(run: _Run) -> None:
    alone = _episode(run)
    (one, first), (two, second) = run.begin(), run.begin()
    interleaved: tuple[list[Record], list[Record]] = ([first], [second])
    for turn in range(len(alone) - 1):
        interleaved[0].append(_step(one, turn, True))
        interleaved[1].append(_step(two, turn, True))
    run.require(interleaved == (alone, alone), "two instances in turns disturbed each other")
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda _: _episode(run), range(8)))
    run.require(all(episode == alone for episode in threaded), "eight threads disturbed each other")


def forks_are_independent(run: _Run) -> None:
    if not run.new().can_fork:
        return  # the engine replays instead, which same_seed_same_bytes allows
    played = _episode(run)[1:]
    for depth in range(len(played)):
        env, _ = run.begin()
        for turn in range(depth):
            _step(env, turn, True)
        key, twin, third = env.state_key(), env.fork(), env.fork()
        run.require(twin.state_key() == key, "a fork has another state key than its original")
        for action in HOSTILE:  # another future than the original's
            if any(third.step(action)[2:4]):
                break
        run.require(env.state_key() == key, "stepping a fork changed the original")
        run.require(_finish(twin, depth) == played[depth:], "a fork's future differs from its original's")
        run.require(_finish(env, depth) == played[depth:], "the original's future changed after it was forked")


def pickles_in_mid_episode(run: _Run) -> None:
    if not run.new().can_fork:
        return
    played = _episode(run)[1:]
    for depth in range(len(played)):
        env, _ = run.begin()
        for turn in range(depth):
            _step(env, turn, True)
        restored = pickle.loads(pickle.dumps(env))
        run.require(_finish(restored, depth) == played[depth:], "an unpickled environment has another future")


def hostile_actions_are_answered(run: _Run) -> None:
    env, _ = run.begin()
    over = False
    for action in (*HOSTILE, *_tool_texts(env)):
        if over:
            env, _ = run.begin()
        observation, reward, terminated, truncated, _ = env.step(action)
        run.require(observation in env.observation_space, f"the observation after {action[:40]!r} is not in its space")
        run.require(isinstance(reward, float), f"the reward after {action[:40]!r} is no float")
        run.require(not (terminated and truncated), "an episode was both terminated and truncated")
        run.require(bool(observation) or terminated, f"{action[:40]!r} got no answer")
        over = terminated or truncated


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
    env, _ = run.begin()
    terminated, truncated = _finish(env)[-1][2:4]
    run.require(terminated is not truncated, "an episode ended both terminated and truncated")
    for _ in range(2):
        try:
            env.step("more")
        except gymnasium.error.ResetNeeded:
            continue
        run.require(False, "step() after the end did not raise gymnasium.error.ResetNeeded")
    env.close()
    env.close()


def global_randomness_is_untouched(run: _Run) -> None:
    def states() -> str:
        return repr((random.getstate(), np.random.get_state()))

    before = states()
    _episode(run)
    run.require(states() == before, "an episode changed the state of random or numpy.random")


def oracle_succeeds(run: _Run) -> None:
    env, _ = run.begin()
    if env.oracle() is None:
        return
    records = _finish(env, hostile=False)
    run.require(bool(records[-1][2]), "the oracle's episode did not end by itself")
    run.require(sum(record[1] for record in records) > 0, "the oracle's episode earned nothing")
    run.require(records[-1][4]["reward_terms"].get("exact", 1.0) == 1.0, "the oracle's answer is not exact")
    if isinstance(env.unwrapped, ToolEnv):
        for _, reward, _, _, info, _ in records:
            same = abs(reward - weighed(info["reward_terms"], env.reward_weights)) < 1e-9
            run.require(same, "the reward is not the weighted sum of its terms")


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
