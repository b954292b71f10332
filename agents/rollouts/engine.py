"""Grows rollout trees: live branches ask the policy, step their environments and become nodes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import inspect
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ...envs import Message, Task, TextEnv
from ...tools import Cassette, EpisodeLost
from ...tools.protocol import encodable
from ..chat import ChatRenderer
from ..policy import (
    Completion,
    Context,
    ContextLengthExceeded,
    CutReply,
    Lockstep,
    Policy,
    Sample,
    Sampling,
    TextPolicy,
    TokenPolicy,
    derive_seed,
)
from ..tree import ROOT, Cost, Node, RolloutTree, tool_results, turn_key
from .failure import Failure, FailureCause, failure_cause
from .response import (
    STATE,
    EpisodeError,
    Recall,
    ReplayMismatch,
    Response,
    act,
    check_rewards,
    closed_on_error,
    episode_errors,
    open_recalled,
    open_task,
    response_of,
)

if TYPE_CHECKING:
    from .strategies import RolloutStrategy

T = TypeVar("T")

CUTS = ("context length", "call limit", "time limit")  # causes for which the engine ends an episode that could go on


@dataclass(slots=True, eq=False)
class Turn:
    """A turn of a growing tree; the first one, without parent, is the prompt."""

    context: Context  # what the policy sees next
    env: TextEnv | None  # in the state the turn led to; None after the end, or where a child took it over
    node: Node | None = None  # parent index not yet known
    parent: Turn | None = None
    children: dict[Hashable, asyncio.Task[Turn]] = field(default_factory=dict)  # by turn_key
    calls: int = 0  # tool results on the way here
    last: Turn | None = None  # this turn as the end of an episode that is ended from outside

    @property
    def done(self) -> bool:
        return self.node is not None and (self.node.terminated or self.node.truncated)

    @property
    def depth(self) -> int:
        """Number of actions up to here."""
        return 0 if self.parent is None else self.parent.depth + 1

    def cut(self, cause: str) -> Turn:
        """This turn as the last one, truncated; the same for all rollouts that end so here."""
        if self.last is None:
            assert self.node is not None
            info = {**self.node.info, "cause": cause}
            node = replace(self.node, observation=(), truncated=True, info=info)
            self.last = Turn(self.context, None, node, self.parent, calls=self.calls)
        return self.last


class GrowingTree:
    """What a rollout strategy works on: it extends turns and ends with rollouts."""

    def __init__(
        self,
        task: Task,
        prompt: Prompt,
        policy: Policy,
        renderer: ChatRenderer,
        sampling: Sampling,
        seed: int,
        on_failure: Callable[[Failure], None],
        cassette: Cassette | None = None,
        executor: Executor | None = None,
        ends_at: float | None = None,
    ) -> None:
        self.task = task
        self.root = Turn(prompt.context, prompt.env)
        self._unsaid = Turn(prompt.context, None, Node(ROOT, Completion(""), truncated=True), self.root)  # see _overdue
        self.rollouts: dict[int, Turn] = {}  # by number; the leaves of the finished tree, in this order
        self.origins: dict[int, int] = {}  # by number too
        self.cost = Cost(prefill_tokens=prompt.context.length)
        self.failed = False  # whether a rollout failed
        self.prompt = prompt
        self._policy = policy
        self._expect = expecting(policy)
        self.renderer = renderer
        self._sampling = sampling
        self._seed = seed
        self._cassette = cassette
        self._on_failure = on_failure
        self._ends_at = ends_at  # of the event loop's clock; None: whenever its rollouts do
        self._in_thread = functools.partial(in_thread, executor)

    async def together(self, *branches: Awaitable[T]) -> list[T]:
        """Runs branches side by side and returns their results, in their order."""
        if any(not inspect.isawaitable(branch) for branch in branches):
            raise TypeError("together takes branches one by one: `await tree.together(*branches)`")
        left = len(branches)
        self._expect(max(left - 1, 0))  # the tree itself is announced as one caller already

        async def run(branch: Awaitable[T]) -> T:
            nonlocal left
            try:
                return await branch
            finally:
                left -= 1
                self._expect(-1 if left else 0)

        tasks = [asyncio.create_task(run(branch)) for branch in branches]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self._expect(-max(left - 1, 0))  # those that were cancelled before they began

    async def rollout(self, start: Turn, number: int, origin: int | None = None) -> Turn:
        """Plays on from a turn to the end of the episode; `number` names the rollout and seeds it. `origin` is the
        number of the first rollout that started from the same root; rollouts that fork from it share it.

        A failure of the world ends the rollout at the turn that this returns, and leaves it out of the tree. An error
        of code has a note that says where it happened.
        """
        turn = start
        try:
            while not turn.done:
                turn = await self.extend(turn, number)
        except Exception as error:
            failure = failure_of(error, self.task, number, turn.depth + 1)
            if failure is None:
                raise
            self.failed = True
            self._on_failure(failure)
            return turn
        self.end(number, turn, origin)
        return turn

    async def grow_more(self, strategy: RolloutStrategy, round: int) -> None:
        """Lets a strategy grow from the prompt once more, with the seeds of `round`; its rollouts come after the
        present ones."""
        part = copy.copy(self)
        part.rollouts, part.origins, part._seed = {}, {}, self.seed("round", round)
        await strategy.grow(part)
        self.failed |= part.failed
        base = max(self.rollouts, default=-1) + 1
        self.rollouts |= {base + number: turn for number, turn in part.rollouts.items()}
        self.origins |= {base + number: base + origin for number, origin in part.origins.items()}

    async def extend(self, turn: Turn, number: int, *, entropy: bool = False, entropy_top: int = 0) -> Turn:
        """One more turn, sampled from the policy, with the entropies of its tokens if they are wanted.

        Where the prompt leaves no room for a reply, the reply is empty, and its turn the last. When the tree's time is
        over, the turn to extend is the last one, truncated.
        """
        if self._limit(turn.context.length, 0) == "context length":
            return await self._cut(turn)
        if self.out_of_time:
            return self._overdue(turn)
        sampling = self._sampling
        if entropy:
            sampling = replace(sampling, entropy=True, entropy_top=entropy_top)
        try:
            async with asyncio.timeout_at(self._ends_at) as limit:
                sample = await self._sample(turn, derive_seed(self._seed, self.task.seed, number), sampling)
                return await self.attach(turn, sample)
        except ContextLengthExceeded:
            return await self._cut(turn)
        except TimeoutError:
            if not limit.expired():  # somebody else's
                raise
            return self._overdue(turn)

    @property
    def out_of_time(self) -> bool:
        """Whether the tree's time is over: no rollout takes another turn."""
        return self._ends_at is not None and asyncio.get_running_loop().time() >= self._ends_at

    def _overdue(self, turn: Turn) -> Turn:
        """Ends an episode because the tree's time is over. Where there is only a prompt, `end` leaves it out."""
        return self._unsaid if turn.node is None else turn.cut(CUTS[2])

    async def _cut(self, turn: Turn) -> Turn:
        """Ends an episode that the policy's context cannot hold; where there is only a prompt, with an empty reply."""
        if turn.node is None:
            turn = await self.attach(turn, Sample(Completion("", stop_reason="length"), turn.context))
        return turn if turn.done else turn.cut(CUTS[0])

    def end(self, number: int, turn: Turn, origin: int | None = None) -> None:
        """Ends a rollout with this turn, which becomes a leaf of the finished tree. One that had no time for a single
        turn is a failure, and is left out. ValueError where one of this number has ended before."""
        if number in self.rollouts:
            raise ValueError(f"rollout {number} has ended before: each rollout of a tree has a number of its own")
        if turn is self._unsaid:
            error = TimeoutError("the tree's time was over before the first turn")
            self.failed = True
            self._on_failure(Failure(self.task, number, 1, FailureCause.TIMEOUT, str(error), error))
            return
        self.cost.leaves += 1
        self.rollouts[number] = turn
        self.origins[number] = number if origin is None else origin

    def turns(self, origin: int) -> list[Turn]:
        """The prompt, then the turns of the ended rollouts of an origin, by depth."""
        ended = [turn for number, turn in sorted(self.rollouts.items()) if self.origins[number] == origin]
        paths = [_path(turn) for turn in ended or [self.root]]
        deepest = max(map(len, paths))
        return list(dict.fromkeys(path[i] for i in range(deepest) for path in paths if i < len(path)))

    def seed(self, *parts: int | str) -> int:
        """A seed of this tree for what the parts name."""
        return derive_seed(self._seed, self.task.seed, *parts)

    async def attach(self, turn: Turn, sample: Sample) -> Turn:
        """Steps the environment with a sampled reply. Siblings with the same tokens, sampled by the same versions of
        the weights, are one turn: tasks carry their randomness, so the episode would be the same to the byte."""
        key = turn_key(sample.completion)
        if key in turn.children:
            child = await turn.children[key]
            self.cost.repeated_tokens += len(sample.completion.token_ids)
            self.cost.repeated_calls += tool_results(child.node.messages) if child.node else 0
            return child
        turn.children[key] = asyncio.create_task(self._step(turn, sample.completion, sample.context))
        return await turn.children[key]

    async def _sample(self, turn: Turn, seed: int, sampling: Sampling) -> Sample:
        if isinstance(self._policy, TokenPolicy):
            return await result_of(self._policy.sample(turn.context, seed, sampling), Sample, self._policy, "sample")
        return await self._written(self._policy, turn, seed)

    async def _written(self, policy: TextPolicy, turn: Turn, seed: int) -> Sample:
        """The reply of a policy that writes words, as tokens."""
        messages = [*self.prompt.response.messages]
        for past in _path(turn):
            if past.node is not None:
                messages += [Message("assistant", past.node.action.text), *past.node.messages]
        if turn.env is not None:
            text = await result_of(policy.act(messages, turn.env, seed), str, policy, "act")
        else:  # a sibling took it over
            self.cost.replays += 1
            with contextlib.closing(await self._in_thread(self._replay, turn, undo=lambda env: env.close())) as env:
                text = await result_of(policy.act(messages, env, seed), str, policy, "act")
        cut = isinstance(text, CutReply)
        text = encodable(text)
        tokens = self.renderer.reply(text)[: -1 if cut else None]  # without the one that ends a turn
        return Sample(Completion(text, tokens, stop_reason="length" if cut else "stop"), Context(tokens, turn.context))

    async def _env(self, turn: Turn) -> TextEnv:
        """The environment after a turn, for a child to step: a copy, or itself, or one that was played up to there."""
        if turn.env is None:
            self.cost.replays += 1
            return await self._in_thread(self._replay, turn, undo=lambda env: env.close())
        if turn.env.can_fork:
            self.cost.forks += 1
            with episode_errors(self.task, turn.depth):
                return turn.env.fork()
        env, turn.env = turn.env, None
        return env

    def _replay(self, turn: Turn) -> TextEnv:
        """Plays a fresh environment up to a turn. ReplayMismatch where it answers otherwise than the first time."""
        with episode_errors(self.task, 0):
            env, response = open_task(self.prompt.task, self._cassette)
        with closed_on_error(env):
            self._compare(0, self.prompt.response, response)
            for depth, past in enumerate(_path(turn)[1:], start=1):
                assert past.node is not None
                with episode_errors(self.task, depth, past.node.action.text):
                    response = act(env, past.node.action.text)
                self._compare(depth, response_of(past.node), response)
        return env

    def _compare(self, depth: int, recorded: Response, replayed: Response) -> None:
        if lost := replayed.info.get("lost"):
            raise EpisodeLost(str(replayed.info.get("cause")), f"a replay was lost in turn {depth}: {lost}")
        if difference := STATE.first(recorded, replayed):
            place = f"{self.task.env}, seed {self.task.seed}, turn {depth}"
            raise ReplayMismatch(f"{place}: the replay's {difference}")

    async def _step(self, turn: Turn, completion: Completion, context: Context) -> Turn:
        env = await self._env(turn)
        with closed_on_error(env):
            return await self._advance(turn, env, completion, context)

    async def _advance(self, turn: Turn, env: TextEnv, completion: Completion, context: Context) -> Turn:
        with episode_errors(self.task, turn.depth + 1, completion.text):
            response = await self._in_thread(act, env, completion.text)
        check_rewards(self.task, turn.depth + 1, response)
        made = tool_results(response.messages)
        tokens: tuple[int, ...] = ()
        if not response.over:
            tokens = self.renderer.observation(response.messages, ended=self.renderer.ended(completion.token_ids))
            if cause := self._limit(context.length + len(tokens), turn.calls + made):
                tokens, response = (), response.cut(cause)
        self.cost.sampled_tokens += len(completion.token_ids)
        self.cost.prefill_tokens += len(tokens)
        self.cost.tool_calls += made
        node = Node(
            parent=ROOT,
            action=completion,
            observation=tokens,
            messages=response.messages,
            reward=response.reward,
            reward_terms=response.reward_terms,
            terminated=response.terminated,
            truncated=response.truncated,
            state_key=response.state_key,
            info=response.info,
            calls=response.calls,
            speaker=str((turn.node.info if turn.node else self.prompt.response.info).get("speaker", "")),
        )
        if response.over:
            env.close()  # nothing goes on from here
            return Turn(context, None, node, turn, calls=turn.calls + made)
        return Turn(Context(tokens, context), env, node, turn, calls=turn.calls + made)

    def _limit(self, tokens: int, calls: int) -> str | None:
        """Why an episode of so many tokens and calls cannot go on; None if it can."""
        if tokens + self._sampling.max_tokens > self._sampling.max_context:
            return "context length"
        return "call limit" if self._sampling.max_calls is not None and calls >= self._sampling.max_calls else None

    def finish(self) -> RolloutTree:
        """The tree as a value; nodes in the order in which the rollouts visit them."""
        nodes: list[Node] = []
        index: dict[Turn, int] = {self.root: ROOT}
        leaves = [self.rollouts[number] for number in sorted(self.rollouts)]
        for leaf in leaves:
            for turn in _path(leaf):
                if turn not in index and turn.node is not None and turn.parent is not None:
                    index[turn] = len(nodes)
                    nodes.append(replace(turn.node, parent=index[turn.parent]))
        return RolloutTree(
            task=self.prompt.task,
            prompt=tuple(self.prompt.context.tokens()),
            messages=self.prompt.response.messages,
            nodes=tuple(nodes),
            leaves=tuple(index[leaf] for leaf in leaves),
            origins=tuple(self.origins[number] for number in sorted(self.rollouts)),
            state_key=self.prompt.response.state_key,
            info=self.prompt.response.info,
            cost=self.cost,
        )

    def close(self) -> None:
        """Closes the environments of all turns, pruned ones too, and lets go of what the turns hold."""
        for turn in list(self._grown(self.root)):
            if turn.env is not None:
                turn.env.close()
            turn.children.clear()  # parents and children hold each other, and the contexts' keys and values

    def _grown(self, turn: Turn) -> Iterator[Turn]:
        yield turn
        for child in turn.children.values():
            if child.done() and not child.cancelled() and child.exception() is None:
                yield from self._grown(child.result())


async def result_of(answer: Awaitable[T], kind: type[T], part: Any, method: str) -> T:
    """What a user's method gives. TypeError, with its name, where it is no coroutine or gives something else."""
    name = f"{type(part).__name__}.{method}"
    if not inspect.isawaitable(answer):
        raise TypeError(f"{name} must be `async def`: it returned {type(answer).__name__}")
    value = await answer
    if not isinstance(value, kind):
        raise TypeError(f"{name} returned {type(value).__name__}, not {kind.__name__}")
    return value


def _path(turn: Turn) -> list[Turn]:
    path = [turn]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    return path[::-1]


def failure_of(
    error: BaseException, task: Task, rollout: int | None, turn: int, *, otherwise: FailureCause | None = None
) -> Failure | None:
    """The error as a failure of the world. None for an error of code, which gets a note of where it happened. With
    `otherwise`, an error of an environment's code is a failure too, and this its cause."""
    cause = failure_cause(error)
    if cause is None and isinstance(error, EpisodeError):
        cause = otherwise
    if cause is not None:
        raised = error.__cause__ if isinstance(error, EpisodeError) else error  # a Failure has the place itself
        text = f"{type(raised).__name__}: {raised}" if raised else str(getattr(error, "why", error))
        return Failure(task, rollout, turn, cause, text, error)
    if not isinstance(error, EpisodeError) and not hasattr(error, "__notes__"):  # siblings may raise the same one
        error.add_note(f"in {task.env}, seed {task.seed}, turn {turn}")
    return None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task after reset."""

    task: Task  # as trees record it: with what recall has put around it
    env: TextEnv
    response: Response
    context: Context


class PromptContexts:
    """The contexts of prompts. Prompts that differ in their last message alone share what comes before it as one
    parent context, so that a policy computes it once."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._heads: dict[tuple[Message, ...], Context] = {}  # by all messages but the last

    def context(self, messages: Sequence[Message]) -> Context:
        tokens, key = self._renderer.prompt(messages), tuple(messages[:-1])
        if key not in self._heads:
            self._heads[key] = Context(self._head(messages, tokens))
        head = self._heads[key]
        if not head.length or tokens[: head.length] != head.token_ids:
            return Context(tokens)
        return Context(tokens[head.length :], head)

    def _head(self, messages: Sequence[Message], tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that do not depend on the last message."""
        *before, last = messages
        other = Message(last.role, "!" if last.text.startswith("?") else "?")
        return tuple(os.path.commonprefix([tokens[:-1], self._renderer.prompt([*before, other])]))


async def in_thread(
    executor: Executor | None,  # None: the event loop's own
    function: Callable[..., T],
    *arguments: Any,
    undo: Callable[[T], None] = lambda value: None,
) -> T:
    """The function's value, from a thread. Nothing can stop a thread: when this is cancelled, it waits for the thread
    and has `undo` undo what was done."""
    call = functools.partial(contextvars.copy_context().run, function, *arguments)
    work: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):  # each rollout that waits for a turn cancels it once
                await asyncio.wait([work])
        if not work.cancelled() and work.exception() is None:
            undo(work.result())
        raise


def expecting(policy: Policy) -> Callable[[int], None]:
    """What announces callers to a policy; policies that do not run in lockstep need not know."""
    return policy.expect if isinstance(policy, Lockstep) else lambda callers: None


async def grow(
    tasks: Sequence[Task],
    strategy: RolloutStrategy,
    policy: Policy,
    renderer: ChatRenderer,
    sampling: Sampling,
    *,
    seed: int = 0,
    cassette: Cassette | None = None,
    executor: Executor | None = None,
    at_once: int | None = None,
    skip_errors: bool = False,
    tree_seconds: float | None = None,
    recall: Recall | None = None,
) -> AsyncGenerator[tuple[int, RolloutTree | Failure], None]:
    """Grows a tree for each task, all at once or `at_once` at a time, and yields each tree when it is finished and each
    failure of the world when it happens, with the number of its task.

    A rollout that failed is missing from its tree, and a task of which no rollout came to its end has no tree. An error
    of code propagates once the other trees are closed. With `skip_errors`, an error of an environment's code costs its
    tree alone, and is a failure too. `tree_seconds` after a tree began, those of its rollouts that still go on end with
    their last turn, truncated, and those without a turn fail. What environments read from outside goes over the
    cassette. Their calls block, so they run in the executor's threads, by default in those of the event loop.
    """
    outcomes: asyncio.Queue[tuple[int, RolloutTree | Failure] | asyncio.Task[None]] = asyncio.Queue()
    contexts, expect = PromptContexts(renderer), expecting(policy)
    slots = asyncio.Semaphore(at_once or max(len(tasks), 1))

    async def open_prompt(task: Task) -> Prompt:
        with episode_errors(task, 0):
            noted, env, response = await in_thread(
                executor, open_recalled, task, recall, cassette, undo=lambda opened: opened[1].close()
            )
        with closed_on_error(env):
            return Prompt(noted, env, response, contexts.context(response.messages))

    async def play(task: Task, tell: Callable[[RolloutTree | Failure], None]) -> None:
        ends_at = None if tree_seconds is None else asyncio.get_running_loop().time() + tree_seconds
        tree = GrowingTree(
            task, await open_prompt(task), policy, renderer, sampling, seed, tell, cassette, executor, ends_at,
        )  # fmt: skip
        try:
            try:
                await result_of(strategy.grow(tree), type(None), strategy, "grow")
            except Exception as error:
                if not isinstance(error, EpisodeError) and not hasattr(error, "__notes__"):
                    error.add_note(f"in {type(strategy).__name__}.grow, a tree of {task.env}, seed {task.seed}")
                raise
            if tree.rollouts:
                tell(tree.finish())
            elif not tree.failed:
                raise ValueError(
                    f"{type(strategy).__name__}.grow ended no rollout of {task.env}, seed {task.seed}: "
                    "await tree.rollout(…), or call tree.end(number, turn) after tree.extend"
                )
        finally:
            tree.close()

    async def attempt(number: int, task: Task) -> None:
        def tell(outcome: RolloutTree | Failure) -> None:
            outcomes.put_nowait((number, outcome))

        async with slots:
            expect(1)
            try:
                await play(task, tell)
            except Exception as error:
                turn = error.turn if isinstance(error, EpisodeError) else 0
                failure = failure_of(error, task, None, turn, otherwise=FailureCause.ERROR if skip_errors else None)
                if failure is None:
                    raise
                tell(failure)
            finally:
                expect(-1)

    growing = [asyncio.create_task(attempt(number, task)) for number, task in enumerate(tasks)]
    for one in growing:
        one.add_done_callback(outcomes.put_nowait)
    try:
        left = len(growing)
        while left:
            outcome = await outcomes.get()
            if isinstance(outcome, asyncio.Task):
                left -= 1
                outcome.result()
            else:
                yield outcome
    finally:
        for one in growing:
            one.cancel()
        await asyncio.gather(*growing, return_exceptions=True)


async def grow_trees(
    tasks: Sequence[Task],
    strategy: RolloutStrategy,
    policy: Policy,
    renderer: ChatRenderer,
    sampling: Sampling,
    *,
    seed: int = 0,
    cassette: Cassette | None = None,
    recall: Recall | None = None,
) -> list[RolloutTree]:
    """One tree for each task, in the tasks' order, as `grow` grows them. A failure of the world raises its error."""
    grown: dict[int, RolloutTree] = {}
    outcomes = grow(tasks, strategy, policy, renderer, sampling, seed=seed, cassette=cassette, recall=recall)
    async with contextlib.aclosing(outcomes):
        async for number, outcome in outcomes:
            if isinstance(outcome, Failure):
                raise outcome.raised
            grown[number] = outcome
    return [grown[number] for number in range(len(tasks))]
