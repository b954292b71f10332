"""Grows rollout trees: live branches ask the policy, step their environments and become nodes."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..envs import Message, Task, TextEnv
from ..tools import Cassette
from ..tools.protocol import encodable
from .answer import (
    STATE,
    Answer,
    EpisodeError,
    ReplayMismatch,
    act,
    answer_of,
    check_rewards,
    closed_on_error,
    episode_errors,
    open_task,
)
from .chat import ChatRenderer
from .failure import Failure, failure_cause
from .policy import Completion, Context, ContextLengthExceeded, CutReply, Player, Policy, Sample, Sampling, derive_seed
from .tree import ROOT, Cost, Node, RolloutTree, tool_results

if TYPE_CHECKING:
    from .strategies import RolloutStrategy

T = TypeVar("T")

CUTS = ("context length", "call limit")  # causes for which the engine ends an episode that could go on


@dataclass(slots=True, eq=False)
class Turn:
    """A turn of a growing tree; the first one, without parent, is the prompt."""

    context: Context  # what the policy sees next
    env: TextEnv | None  # in the state the turn led to; None after the end, or where a child went on with it
    node: Node | None = None  # parent index not yet known
    parent: Turn | None = None
    children: dict[tuple[int, ...], asyncio.Task[Turn]] = field(default_factory=dict)
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
        cassette: Cassette | None = None,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> None:
        self.task = task
        self.root = Turn(prompt.context, prompt.env)
        self.rollouts: dict[int, Turn] = {}  # by number; the leaves of the finished tree, in this order
        self.origins: dict[int, int] = {}  # of each of them
        self.cost = Cost(prefill_tokens=prompt.context.length)
        self.prompt = prompt
        self._policy = policy
        self.renderer = renderer
        self._sampling = sampling
        self._seed = seed
        self._cassette = cassette
        self._on_failure = on_failure

    async def together(self, *branches: Awaitable[T]) -> list[T]:
        """Runs branches side by side; what they give, in their order."""
        left = len(branches)
        self._policy.expect(max(left - 1, 0))  # the tree's own place goes to the last branch that is at work

        async def run(branch: Awaitable[T]) -> T:
            nonlocal left
            try:
                return await branch
            finally:
                left -= 1
                self._policy.expect(-1 if left else 0)

        tasks = [asyncio.create_task(run(branch)) for branch in branches]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self._policy.expect(-max(left - 1, 0))  # those that were cancelled before they began

    async def rollout(self, start: Turn, number: int, origin: int | None = None) -> Turn:
        """Plays on from a turn to the end of the episode; `number` names the rollout and seeds it, `origin` is that
        of the first rollout of its kin.

        A failure of the world ends the rollout where it is, and leaves it out of the tree, if somebody hears of
        failures. Errors of code have a note that says where they happened.
        """
        turn = start
        try:
            while not turn.done:
                turn = await self.extend(turn, number)
        except Exception as error:
            if not _report(self._on_failure, error, self.task, number, turn.depth + 1):
                raise
            return turn
        self.end(number, turn, origin)
        return turn

    async def grow_more(self, strategy: RolloutStrategy, round: int) -> None:
        """Lets a strategy grow from the prompt once more, with the seeds of `round`; its rollouts come after the
        present ones."""
        part = copy.copy(self)
        part.rollouts, part.origins, part._seed = {}, {}, self.seed("round", round)
        await strategy.grow(part)
        base = max(self.rollouts, default=-1) + 1
        self.rollouts |= {base + number: turn for number, turn in part.rollouts.items()}
        self.origins |= {base + number: base + origin for number, origin in part.origins.items()}

    async def extend(self, turn: Turn, number: int, *, entropy: bool = False, entropy_top: int = 0) -> Turn:
        """One more turn, sampled from the policy, with the entropies of its tokens if they are wanted.

        Where the prompt leaves no room for a reply, the reply is empty, and its turn the last.
        """
        if self._limit(turn.context.length, 0) == "context length":
            return await self._cut(turn)
        seed = derive_seed(self._seed, self.task.seed, number)
        sampling = self._sampling
        if entropy:
            sampling = replace(sampling, entropy=True, entropy_top=entropy_top)
        try:
            if isinstance(self._policy, Player):
                sample = await self._said(self._policy, turn, seed)
            else:
                sample = await self._policy.sample(turn.context, seed, sampling)
        except ContextLengthExceeded:
            return await self._cut(turn)
        return await self.attach(turn, sample)

    async def _cut(self, turn: Turn) -> Turn:
        """The end of an episode that the policy's context cannot hold; after the prompt alone, an empty reply is it."""
        if turn.node is None:
            turn = await self.attach(turn, Sample(Completion("", stop_reason="length"), turn.context))
        return turn if turn.done else turn.cut(CUTS[0])

    def end(self, number: int, turn: Turn, origin: int | None = None) -> None:
        """A rollout is a leaf of the finished tree."""
        self.cost.leaves += 1
        self.rollouts[number] = turn
        self.origins[number] = number if origin is None else origin

    def turns(self, origin: int) -> list[Turn]:
        """The prompt, then the turns of the ended rollouts of an origin, by depth."""
        paths = [_path(turn) for number, turn in sorted(self.rollouts.items()) if self.origins[number] == origin]
        deepest = max(map(len, paths), default=1)
        return list(dict.fromkeys(path[i] for i in range(deepest) for path in paths if i < len(path)))

    def seed(self, *parts: int | str) -> int:
        """A seed of this tree for what the parts name."""
        return derive_seed(self._seed, self.task.seed, *parts)

    async def attach(self, turn: Turn, sample: Sample) -> Turn:
        """Steps the environment with a sampled reply. Siblings with the same tokens are one turn:
        tasks carry their randomness, so the episode would be the same to the byte."""
        tokens = sample.completion.token_ids
        if tokens in turn.children:
            child = await turn.children[tokens]
            self.cost.repeated_tokens += len(tokens)
            self.cost.repeated_calls += tool_results(child.node.messages) if child.node else 0
            return child
        turn.children[tokens] = asyncio.create_task(self._step(turn, sample.completion, sample.context))
        return await turn.children[tokens]

    async def _said(self, player: Player, turn: Turn, seed: int) -> Sample:
        """A player's reply, as tokens."""
        chat = [*self.prompt.answer.messages]
        for past in _path(turn):
            if past.node is not None:
                chat += [Message("assistant", past.node.action.text), *past.node.messages]
        if turn.env is not None:
            text = await player.act(turn.env, chat, seed)
        else:  # a sibling went on with it
            self.cost.replays += 1
            with contextlib.closing(await in_thread(self._replay, turn, undo=lambda env: env.close())) as env:
                text = await player.act(env, chat, seed)
        cut = isinstance(text, CutReply)
        text = encodable(text)
        tokens = self.renderer.reply(text)[: -1 if cut else None]  # without the one that ends a turn
        return Sample(Completion(text, tokens, stop_reason="length" if cut else "stop"), Context(tokens, turn.context))

    async def _env(self, turn: Turn) -> TextEnv:
        """The environment after a turn, for a child to step: a copy, or itself, or one that was played up to there."""
        if turn.env is None:
            self.cost.replays += 1
            return await in_thread(self._replay, turn, undo=lambda env: env.close())
        if turn.env.can_fork:
            self.cost.forks += 1
            with episode_errors(self.task, turn.depth):
                return turn.env.fork()
        env, turn.env = turn.env, None
        return env

    def _replay(self, turn: Turn) -> TextEnv:
        """Plays a fresh environment up to a turn. ReplayMismatch where it answers otherwise than the first time."""
        env, answer = open_task(self.task, self._cassette)
        with closed_on_error(env):
            self._compare(0, self.prompt.answer, answer)
            for depth, past in enumerate(_path(turn)[1:], start=1):
                assert past.node is not None
                self._compare(depth, answer_of(past.node), act(env, past.node.action.text))
        return env

    def _compare(self, depth: int, recorded: Answer, replayed: Answer) -> None:
        if difference := STATE.first(recorded, replayed):
            place = f"{self.task.env}, seed {self.task.seed}, turn {depth}"
            raise ReplayMismatch(f"{place}: the replay's {difference}")

    async def _step(self, turn: Turn, completion: Completion, context: Context) -> Turn:
        env = await self._env(turn)
        with closed_on_error(env):
            return await self._advance(turn, env, completion, context)

    async def _advance(self, turn: Turn, env: TextEnv, completion: Completion, context: Context) -> Turn:
        with episode_errors(self.task, turn.depth + 1):
            answer = await in_thread(act, env, completion.text)
        check_rewards(self.task, turn.depth + 1, answer)
        made = tool_results(answer.messages)
        tokens: tuple[int, ...] = ()
        if not answer.over:
            tokens = self.renderer.observation(answer.messages, ended=self.renderer.ended(completion.token_ids))
            if cause := self._limit(context.length + len(tokens), turn.calls + made):
                tokens, answer = (), answer.cut(cause)
        self.cost.sampled_tokens += len(completion.token_ids)
        self.cost.prefill_tokens += len(tokens)
        self.cost.tool_calls += made
        node = Node(
            parent=ROOT,
            action=completion,
            observation=tokens,
            messages=answer.messages,
            reward=answer.reward,
            reward_terms=answer.reward_terms,
            terminated=answer.terminated,
            truncated=answer.truncated,
            state_key=answer.state_key,
            info=answer.info,
        )
        if answer.over:
            env.close()  # nothing goes on from here
            return Turn(context, None, node, turn, calls=turn.calls + made)
        return Turn(Context(tokens, context), env, node, turn, calls=turn.calls + made)

    def _limit(self, tokens: int, calls: int) -> str | None:
        """Why an episode of so many tokens and calls cannot go on."""
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
            task=self.task,
            prompt=tuple(self.prompt.context.tokens()),
            messages=self.prompt.answer.messages,
            nodes=tuple(nodes),
            leaves=tuple(index[leaf] for leaf in leaves),
            origins=tuple(self.origins[number] for number in sorted(self.rollouts)),
            state_key=self.prompt.answer.state_key,
            info=self.prompt.answer.info,
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


def _path(turn: Turn) -> list[Turn]:
    path = [turn]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    return path[::-1]


def _report(
    hear: Callable[[Failure], None] | None, error: BaseException, task: Task, rollout: int | None, turn: int
) -> bool:
    """Whether the error is a failure of the world of which somebody hears; else it gets a note of where it happened."""
    cause = failure_cause(error)
    if hear is not None and cause is not None:
        raised = error.__cause__ or error if isinstance(error, EpisodeError) else error  # the place is told beside it
        hear(Failure(task, rollout, turn, cause, f"{type(raised).__name__}: {raised}"))
        return True
    if not isinstance(error, EpisodeError) and not hasattr(
        error, "__notes__"
    ):  # siblings that share the turn raise the same error
        error.add_note(f"in {task.env}, seed {task.seed}, turn {turn}")
    return False


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task after reset."""

    env: TextEnv
    answer: Answer
    context: Context


async def in_thread(function: Callable[..., T], *arguments: Any, undo: Callable[[T], None] = lambda value: None) -> T:
    """The function's value, from a thread. Cancelled, it waits for the thread, which nothing can stop, and undoes what
    it did."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        if not work.cancelled() and work.exception() is None:
            undo(work.result())
        raise


def share_prefix(prompts: Sequence[tuple[int, ...]]) -> list[Context]:
    """A context per prompt; what all of them begin with is one parent context, computed once."""
    shared = os.path.commonprefix(list(prompts))[: min(map(len, prompts)) - 1] if len(prompts) > 1 else ()
    parent = Context(tuple(shared)) if shared else None
    return [Context(tuple(prompt[len(shared) :]), parent) for prompt in prompts]


async def _open(
    tasks: Sequence[Task], cassette: Cassette | None, on_failure: Callable[[Failure], None] | None
) -> list[tuple[TextEnv, Answer] | None]:
    """What open_task gives for each, None where it failed and somebody heard of it; all are closed again where one
    raises another error."""

    def opened_task(task: Task) -> tuple[TextEnv, Answer]:
        with episode_errors(task, 0):
            return open_task(task, cassette)

    found = await asyncio.gather(
        *(in_thread(opened_task, task, undo=lambda each: each[0].close()) for task in tasks),
        return_exceptions=True,
    )
    opened = [None if isinstance(each, BaseException) else each for each in found]
    for task, each in zip(tasks, found, strict=True):
        if isinstance(each, BaseException) and not _report(on_failure, each, task, None, 0):
            for env, _ in filter(None, opened):
                env.close()
            raise each
    return opened


async def grow_trees(
    tasks: Sequence[Task],
    strategy: RolloutStrategy,
    policy: Policy,
    renderer: ChatRenderer,
    sampling: Sampling,
    *,
    seed: int = 0,
    on_tree: Callable[[RolloutTree], None] = lambda tree: None,
    cassette: Cassette | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> list[RolloutTree]:
    """One tree per task, in the tasks' order; all are grown at once. `on_tree` hears of each as it is done. What
    environments read from outside goes over the cassette.

    Where `on_failure` hears of failures of the world, a tree lacks the rollouts that failed, perhaps all; without it
    the first one propagates, as errors of code do.
    """
    begun = await _open(tasks, cassette, on_failure)
    opened = [each for each in begun if each is not None]
    contexts = share_prefix([renderer.prompt(answer.messages) for _, answer in opened]) if opened else []

    left = len(opened)

    async def grow(task: Task, prompt: Prompt) -> RolloutTree:
        nonlocal left
        tree = GrowingTree(task, prompt, policy, renderer, sampling, seed, cassette, on_failure)
        try:
            await strategy.grow(tree)
            finished = tree.finish()
        finally:
            left -= 1
            policy.expect(-1)
            tree.close()
        on_tree(finished)
        return finished

    prompts = (Prompt(env, answer, context) for (env, answer), context in zip(opened, contexts, strict=True))
    those = [task for task, each in zip(tasks, begun, strict=True) if each is not None]
    policy.expect(left)
    try:
        async with asyncio.TaskGroup() as group:
            growing = [group.create_task(grow(task, prompt)) for task, prompt in zip(those, prompts, strict=True)]
    finally:
        policy.expect(-left)  # those that were cancelled before they began
    grown = iter([growth.result() for growth in growing])
    pairs = zip(tasks, begun, strict=True)
    return [RolloutTree(task, (), (), (), ()) if each is None else next(grown) for task, each in pairs]
