"""treegym lessons: lists, shows and changes the lessons of a run or of a file of their own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from ..folders import LESSONS
from ..terminal import AsJson, UsageError, console, say

if TYPE_CHECKING:
    from ...agents import RolloutTree
    from ...agents.memory import Lesson, LessonStore, State
    from ...agents.rollouts import Recall
    from ...envs import Task

lessons_app = typer.Typer(help="The lessons that agents are told: listed, shown, written and retired.")


class States(StrEnum):
    """The states of lessons; those in force are proposed or active."""

    in_force = "in-force"
    proposed = "proposed"
    active = "active"
    retired = "retired"
    replaced = "replaced"
    all = "all"


Store = Annotated[Path, typer.Argument(metavar="STORE", help=f"A run's directory, or a file such as {LESSONS}.")]
Id = Annotated[int, typer.Argument(help="The lesson's number.")]
Reason = Annotated[str, typer.Option(help="Why, in a line that goes on record.")]
Author = Annotated[str, typer.Option(help="Who is written down for it.")]
Only = Annotated[States, typer.Option("--state", help="Only lessons in this state.")]


@lessons_app.command("list")
def list_lessons(
    store: Store,
    env: Annotated[str | None, typer.Option(help="Only those of this environment.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only those with this tag; repeatable.")] = None,
    state: Only = States.in_force,
    as_json: AsJson = False,
) -> None:
    """List lessons with their effect and the number of pieces of their evidence.

    Example: treegym lessons list runs/training-free --tag site:elm --state all
    """
    with _opened(store, write=False) as opened:
        named = set(tag or ())
        found = [each for each in opened.lessons(env=env, states=_states(state)) if named <= set(each.tags)]
    if as_json:
        for each in found:
            say(json.dumps(asdict(each), ensure_ascii=False))
        return
    text = Column("lesson", min_width=24, overflow="fold")
    where = Column("where", overflow="fold")
    table = Table("id", "state", "effect", "seen", where, text, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for each in found:
        told = f'when "{each.when}": {each.text}' if each.when else each.text
        place = " ".join((each.env, *each.tags))
        table.add_row(str(each.id), each.state, _effect(each), str(len(each.evidence)), escape(place), escape(told))
    console.print(table if found else f"no such lessons in {escape(str(store))}")


@lessons_app.command()
def show(store: Store, id: Id) -> None:
    """Show a lesson with its evidence and everything that has been changed of it.

    Example: treegym lessons show runs/training-free 3
    """
    with _opened(store, write=False) as opened:
        past = opened.history(id)
        lesson = None if past and past[-1].kind == "forget" else opened.get(id)
    if lesson is not None:
        say(f"{lesson.text}\n")
        state = f"replaced by {lesson.replaced_by}" if lesson.replaced_by else lesson.state
        facts = {"when": lesson.when, "env": lesson.env, "tags": " ".join(lesson.tags), "state": state}
        for name, value in (facts | {"effect": _effect(lesson), "author": lesson.author}).items():
            say(f"{name:<10}{value or '-'}")
        for piece in lesson.evidence:
            (one, other), (n, m) = piece.returns, piece.counts
            returned = f"{one:.2f} in {n} of {n + m} rollouts, {other:.2f} in the rest"
            say(f"{'evidence':<10}{piece.run} tree {piece.tree}: {returned}")
    say("")
    for change in past:
        when = f"{datetime.fromtimestamp(change.time):%Y-%m-%d %H:%M}"
        names = ", ".join(change.fields) if change.kind == "change" else ""
        say(f"{change.number:>6}  {when}  {change.author or '-'}: {change.kind} {names} {change.reason}".rstrip())


@lessons_app.command()
def add(
    store: Store,
    text: Annotated[str, typer.Argument(help="What the agent is told, in a line.")],
    env: Annotated[str, typer.Option(help="The environment, such as treegym/Lookup-v0.")],
    when: Annotated[str, typer.Option(help="Tell it where the environment says this. Default: in the prompt.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Only for tasks with this tag; repeatable.")] = None,
    reason: Reason = "",
    author: Author = "by hand",
) -> None:
    """Add a lesson. Where one in force says nearly the same, nothing is added.

    Example: treegym lessons add house.sqlite "Choose amber." --env treegym/HouseRules-v0 --tag site:elm
    """
    from ...agents.memory import Lesson

    with _opened(store, author, make=True) as opened:
        before = opened.revision
        added = opened.add(Lesson(text, env, when, tuple(tag or ()), author), reason)
        say(f"lesson {added.id}" if opened.revision > before else f"lesson {added.id} says so already")


@lessons_app.command()
def edit(
    store: Store,
    id: Id,
    reason: Reason,
    text: Annotated[str | None, typer.Option(help="What the agent is told instead.")] = None,
    when: Annotated[str | None, typer.Option(help="The phrase behind which it is told; '' for the prompt.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="The tags that it has then; repeatable.")] = None,
    state: Annotated[States | None, typer.Option(help="proposed, active or retired.")] = None,
    author: Author = "by hand",
) -> None:
    """Change a lesson. What it was stays on record.

    Example: treegym lessons edit house.sqlite 3 --text "Choose blue." --reason "amber is of last year"
    """
    given = {"text": text, "when": when, "tags": tuple(tag) if tag else None, "state": state and state.value}
    fields = {name: value for name, value in given.items() if value is not None}
    if not fields:
        raise UsageError("nothing to change: --text, --when, --tag or --state says what")
    with _opened(store, author) as opened:
        opened.change(id, reason=reason, **fields)


@lessons_app.command()
def retire(
    store: Store,
    id: Id,
    reason: Reason,
    replaced_by: Annotated[int | None, typer.Option(help="The number of the lesson that says it better.")] = None,
    author: Author = "by hand",
) -> None:
    """Take a lesson out of force. It stays on record.

    Example: treegym lessons retire house.sqlite 3 --reason "it misleads at the mill"
    """
    with _opened(store, author) as opened:
        opened.retire(id, reason, replaced_by)


@lessons_app.command()
def forget(store: Store, id: Id, reason: Reason, author: Author = "by hand") -> None:
    """Erase the texts of a lesson from the file for good; their SHA-256 stays. Trees in which it was told keep it.

    Example: treegym lessons forget house.sqlite 3 --reason "it names a person"
    """
    with _opened(store, author) as opened:
        opened.forget(id, reason)


@lessons_app.command("export")
def export_lessons(
    store: Store,
    out: Annotated[Path, typer.Option(help="The file to write: JSON lines.")],
    state: Only = States.all,
) -> None:
    """Write lessons as JSON lines.

    Example: treegym lessons export runs/training-free --out house.jsonl --state in-force
    """
    with _opened(store, write=False) as opened:
        say(f"{opened.export(out, _states(state))} lessons in {out}")


@lessons_app.command("import")
def import_lessons(
    store: Store,
    file: Annotated[Path, typer.Argument(help="JSON lines, as `treegym lessons export` writes them.")],
    reason: Reason = "",
    author: Author = "by hand",
) -> None:
    """Add the lessons of a file, all or none. They are proposed, and their effect has yet to be measured.

    Example: treegym lessons import house.sqlite theirs.jsonl
    """
    with _opened(store, author, make=True) as opened:
        say(f"{len(opened.import_(file, reason))} lessons taken")


@lessons_app.command()
def measure(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, with a scenario and lessons.")],
    ids: Annotated[list[int] | None, typer.Argument(help="Lessons. Default: all in force without an effect.")] = None,
    policy: Annotated[str | None, typer.Option(help="Who plays. Default: the run's model.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of groups of rollouts, at most, for each lesson.")] = 200,
    rollouts: Annotated[int, typer.Option(min=1, help="Rollouts in a group.")] = 4,
) -> None:
    """Play tasks with a lesson and without, until it is clear whether it helps; retire what does harm.

    Example: treegym lessons measure runs/training-free 3 7 --pairs 50
    """
    from ...agents import run_to_end

    with _opened(run, "measure") as store:
        chosen = ids or [lesson.id for lesson in store.lessons() if lesson.effect is None]
        run_to_end(_measured(run, store, chosen, policy, pairs, rollouts))


async def _measured(
    run: Path, store: LessonStore, ids: Sequence[int], policy: str | None, pairs: int, rollouts: int
) -> None:
    from ...agents import grow_trees
    from ...agents.memory.trials import Trial
    from ...agents.rollouts import Chains
    from ..memory import measured, memory_of
    from ..policies import open_policy
    from ..schema import load_scenario

    scenario = load_scenario(run)
    opened = open_policy(policy or str(run), scenario)

    async def play(tasks: Sequence[Task], recall: Recall) -> Sequence[RolloutTree]:
        group, seed = Chains(rollouts), scenario.seed
        return await grow_trees(tasks, group, opened.policy, opened.renderer, opened.sampling, seed=seed, recall=recall)

    try:
        async for each in measured(scenario, memory_of(scenario, store, opened.renderer), play, ids, Trial(pairs)):
            lesson, effect = each.lesson, each.lesson.effect
            found = f"{_effect(lesson)} in {effect.pairs} pairs" if effect else "too few pairs"
            say(f"lesson {lesson.id}: {each.verdict}, {found}; {lesson.text}")
    finally:
        await opened.close()


@contextlib.contextmanager
def _opened(place: Path, author: str = "", *, write: bool = True, make: bool = False) -> Iterator[LessonStore]:
    """The store of a run's directory, or of a file; `make`: a file that is missing is made. What the store refuses is a
    UsageError."""
    from ...agents.memory import LessonRefused, LessonStore

    path = place / LESSONS if place.is_dir() else place
    if write and not make and not path.is_file():
        raise UsageError(f"{path}: there is no store of lessons; `treegym lessons add` makes one")
    try:
        with LessonStore(path, author) if write else LessonStore.read(path) as store:
            yield store
    except LessonRefused as refused:
        raise UsageError(str(refused)) from None
    if write and (path.parent / "checkpoints").exists():
        say("this run is not finished: when it is resumed, its lessons are again those of its checkpoint")


def _states(chosen: States) -> Collection[State] | None:
    """The states that are meant, as a store takes them."""
    from ...agents.memory import IN_FORCE
    from ...agents.memory.lesson import STATES

    if chosen is States.all:
        return None
    return IN_FORCE if chosen is States.in_force else [state for state in STATES if state == chosen.value]


def _effect(lesson: Lesson) -> str:
    effect = lesson.effect
    return f"{effect.mean:+.2f} ({effect.low:+.2f} … {effect.high:+.2f})" if effect else "-"
