"""`treegym runs`: lists runs and their trees, converts, repairs and migrates them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ..errors import ScenarioError
from ..folders import begun, who
from ..modules import bring_module
from ..terminal import AsJson, UsageError, console, say, told
from .conditions import Cause, Env, Returns, Rollouts, Stage, Steps, Success, Terms, Text, conditions, where

if TYPE_CHECKING:
    from ...agents import EpisodeStore, Run
    from ...agents.store import TreeSummary


class ListByDefault(typer.core.TyperGroup):
    """`treegym runs FOLDER` is `treegym runs list FOLDER`."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        if not arguments or (arguments[0] not in self.commands and not arguments[0].startswith("-")):
            arguments = ["list", *arguments]
        return super().parse_args(context, arguments)


class Format(StrEnum):
    """The formats of agents/exchange.py."""

    atif = "atif"
    openai = "openai"
    verifiers = "verifiers"


runs_app = typer.Typer(
    cls=ListByDefault, help="The runs, and the trees in them. `treegym runs FOLDER` lists the runs of a folder."
)
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/first.")]


@runs_app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs with their held-out success by stage. This is what `treegym runs` does without a command."""
    from ...agents import Run

    if as_json:
        for path in sorted(path.parent for path in folder.glob("*/scenario.yaml")):
            say(json.dumps(_row(path), ensure_ascii=False))
        return
    lines, faults = [], []
    for path in sorted(path.parent for path in folder.glob("*/scenario.yaml")):
        try:
            lines.append((path.name, who(path), *_came_of(Run(path))))
        except (OSError, ValueError, LookupError, TypeError) as error:  # the other runs are shown all the same
            lines.append((path.name, who(path), "damaged", dict[str, str](), "-"))
            faults.append(f"{path / 'summary.json'} cannot be read: {told(error)}")
    longest_first = sorted((successes for _, _, _, successes, _ in lines), key=len, reverse=True)
    stages = dict.fromkeys(stage for successes in longest_first for stage in successes)
    titles = {"model": "evaluated"}  # of an evaluation, whose stage is named after who plays
    columns = [Column(escape(titles.get(stage, stage)), min_width=6, overflow="fold") for stage in stages]
    state = Column("state", min_width=len("unfinished"), overflow="fold")
    name = Column("run", min_width=10, overflow="fold")
    gain = Column("gain (95%)", min_width=12, overflow="fold")
    player = Column("model", min_width=8, overflow="fold")
    columns = [name, player, state, *columns, gain]
    table = Table(*columns, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for title, plays, came_of, successes, change in lines:
        cells = [successes.get(stage, "-") for stage in stages]
        table.add_row(escape(title), escape(plays) or "-", came_of, *cells, change)
    console.print(table if lines else f"no runs in {folder}")
    for fault in faults:
        say(fault)


def _row(path: Path) -> dict[str, Any]:
    """A run as JSON: success of each stage and gain with their intervals, and what is wrong with it."""
    from ...agents import Run

    row: dict[str, Any] = {"run": path.name, "model": who(path), "state": "unfinished", "success": {}, "gain": None}
    try:
        if summary := Run(path).summary():
            successes = {stage: result["success"] for stage, result in summary["stages"].items()}
            row |= {"state": "finished", "success": successes, "gain": summary["gain"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        row |= {"state": "damaged", "fault": told(error)}
    return row


def _came_of(run: Run) -> tuple[str, dict[str, str], str]:
    """A run's state, the success of each of its stages, and its gain, as texts."""
    from ...agents.store.folder import count_failures

    summary, failures = run.summary(), count_failures(run.path)
    stages = summary["stages"] if summary else {}
    successes = {
        stage: f"{result['success']['mean']:.1%}"
        for stage, result in stages.items()
        if stage != "demonstrations"  # which are the oracle's
    }
    gain = summary and summary["gain"]
    change = f"{gain['mean']:+.1%} ({gain['low']:+.1%} … {gain['high']:+.1%})" if gain else "-"
    state = "finished" if summary else "unfinished"
    return f"{state}, {failures} failed" if failures else state, successes, change


@runs_app.command()
def show(
    run: RunFolder,
    stage: Stage = None,
    steps: Steps = None,
    env: Env = None,
    returns: Returns = None,
    term: Terms = None,
    rollouts: Rollouts = None,
    success: Success = None,
    cause: Cause = None,
    text: Text = None,
) -> None:
    """List the trees of a run, the first ones at once.

    Example: treegym runs show runs/first --stage improvement --steps 10: --term exact=0.5:1
    """
    from ..viewer.shelf import success_term

    given = conditions(stage, steps, env, returns, term, rollouts, success, cause, text)
    chosen = where(given, success_term(run))
    with _trees(run) as store:
        say(_HEADING)
        shown = 0
        for summary in store.summaries(chosen):
            say(_line(summary))
            shown += 1
        say(f"{shown} trees" if shown != 1 else "1 tree")
        if store.cut_off:
            say(f"the last record is being written, or was cut off: {store.cut_off} bytes are left out")


@runs_app.command("export")
def export_trees(
    run: RunFolder,
    format: Annotated[Format, typer.Option(help="The format of the episodes.")],
    out: Annotated[Path, typer.Option(help="The file to write: JSON lines, one for each rollout.")],
    stage: Stage = None,
    steps: Steps = None,
    env: Env = None,
    returns: Returns = None,
    term: Terms = None,
    rollouts: Rollouts = None,
    success: Success = None,
    cause: Cause = None,
    text: Text = None,
) -> None:
    """Write a run's episodes in another format: atif (ATIF 1.7), openai (chat messages for fine-tuning), verifiers.

    Example: treegym runs export runs/first --format openai --out sft.jsonl --stage trained --term exact=1:
    """
    from ...agents.exchange import EXCHANGES
    from ...agents.store.folder import whole
    from ...agents.store.records import json_line
    from ..viewer.shelf import success_term

    given = conditions(stage, steps, env, returns, term, rollouts, success, cause, text)
    chosen = where(given, success_term(run))
    try:
        bring_module(run)
    except ScenarioError as error:
        say(f"the environment cannot be made, so actions are written as plain texts: {error}")
    written = 0
    with _trees(run) as store, whole(out) as part, part.open("wb") as file:
        numbers = [summary.number for summary in store.summaries(chosen)]
        with _bar("exporting trees", len(numbers)) as advance:
            for number in numbers:
                for row in EXCHANGES[format].write(store.record(number)):
                    file.write(json_line(row))
                    written += 1
                advance(1)
        file.flush()
    say(f"{written} episodes in {out}")


@runs_app.command("import")
def import_trees(
    file: Annotated[Path, typer.Argument(help="JSON lines, or one JSON object.")],
    format: Annotated[Format, typer.Option(help="The format of the episodes.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The new run's directory.")],
) -> None:
    """Read episodes of another format into a new run.

    Example: treegym runs import trajectory.json --format atif --out runs/theirs
    """
    from ...agents import EpisodeStore
    from ...agents.exchange import read_episodes
    from ...agents.store.folder import trees_file

    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    store = EpisodeStore(trees_file(out))
    if store.path.exists():
        raise UsageError(f"{out} holds trees already: --out names a new run")
    count = 0
    with begun(out), contextlib.closing(store), _bar("importing trees", None) as advance:
        out.mkdir(parents=True, exist_ok=True)
        for record in read_episodes(file, format):
            store.append(record.tree, record.advantages, record.values, record.lessons, **record.labels)
            count += 1
            advance(1)
        if not count:
            raise UsageError(f"{file} holds no episodes")
    say(f"{count} trees in {store.path}")


@runs_app.command()
def repair(run: RunFolder) -> None:
    """Keep the trees of a damaged run that can be read, and say what was lost. The damaged file is kept beside them.

    Example: treegym runs repair runs/first
    """
    from ...agents.store import salvage

    with _trees(run) as store, _bar("reading trees", None) as advance:
        losses, damaged = salvage(store, advance)
        left = len(store)
    for loss in losses:
        lost = f"records {loss.records[0]} to {loss.records[-1]}" if len(loss.records) > 1 else ""
        lost = lost or (f"record {loss.records[0]}" if loss.records else "no record")
        say(f"lost {lost}: {loss.size} bytes from byte {loss.offset} on: {loss.why}")
    say(f"{left} trees are whole" + ("" if losses else "; nothing was lost"))
    if damaged is not None:
        say(f"the damaged file is {damaged}; trees behind a loss have lower numbers now")
        if (run / "checkpoints").exists():
            say("the run's checkpoint is of the damaged file: train anew in place of --resume")


@runs_app.command("migrate")
def migrate_trees(run: RunFolder) -> None:
    """Rewrite a run's trees.jsonl, of an older schema, as trees.jsonl.zst.

    The old file is removed once the new one is found to hold the same trees.

    Example: treegym runs migrate runs/old
    """
    from ...agents.store import migrate
    from ...agents.store.folder import trees_file

    if trees_file(run) != run / "trees.jsonl":
        raise UsageError(f"{run} holds no trees.jsonl: there is nothing to migrate")
    if (run / "checkpoints").exists():
        raise UsageError(
            f"the run in {run} is not finished: `treegym train --resume --out {run}` goes on with its file"
        )
    with _trees(run) as store:
        before, new = store.size, run / "trees.jsonl.zst"
        with _bar("migrating trees", len(store)) as advance:
            migrate(store, new, advance)
    say(f"{new}: {before:,} bytes became {new.stat().st_size:,}")


_HEADING = f"{'tree':>7}  {'stage':<14}{'step':>6}  {'environment':<26}rollouts  turns   return    best  terms"


def _line(s: TreeSummary) -> str:
    stage, step = (str(s.labels.get(name, "-")) for name in ("stage", "step"))
    terms = " ".join(f"{name} {value:.2f}" for name, value in s.terms.items())
    numbers = f"{s.rollouts:>8}{s.nodes:>7}{s.mean_return:>9.3f}{s.best_return:>8.3f}"
    return f"{s.number:>7}  {stage:<14}{step:>6}  {s.env:<26}{numbers}  {terms}"


@contextlib.contextmanager
def _trees(run: Path) -> Iterator[EpisodeStore]:
    """The store with the trees of a run's directory, closed at the end. UsageError if there is none."""
    from ...agents import EpisodeStore
    from ...agents.store.folder import trees_file

    path = trees_file(run)
    if not path.exists():
        raise UsageError(f"{run} holds no trees: there is no {path}")
    with contextlib.closing(EpisodeStore(path)) as store:
        yield store


@contextlib.contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal. Gives the function that advances it by a count."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.update(task, advance=count)
