"""treegym replay: recorded episodes shown, verified, scored anew, or continued by another policy."""

from __future__ import annotations

import difflib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ...tools.named import look_in, split_name
from ..folders import begun
from ..modules import bring_module, part_named
from ..terminal import UsageError, console, say

if TYPE_CHECKING:
    from ...agents import RolloutTree, Run
    from ...agents.rollouts import Continuation, Divergence, Episode, RewardTerm
    from ...envs import Task
    from ...tools import Cassette
    from ..schema import Scenario

SHOWN = 20  # numbers of trees that a list names


class SayWhatToWrite(typer.core.TyperGroup):
    """Refuses flags such as those of `treegym replay RUN --verify`, and says which command does that now."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        if arguments and arguments[0] not in self.commands and arguments[0] not in ("--help", "-h"):
            raise UsageError(f"write: treegym replay {' '.join(instead(arguments))}")
        return super().parse_args(context, arguments)


def instead(arguments: list[str]) -> list[str]:
    """The arguments of verify, rescore, continue or show that do what the old flags did."""
    left = [word for word in arguments if word != "--verify"]
    if "--verify" in arguments:
        return ["verify", *left]
    if "--rescore" in arguments:
        return ["rescore", *("--term" if word == "--rescore" else word for word in left)]
    return ["continue" if "--from" in arguments else "show", *left]


replay_app = typer.Typer(
    cls=SayWhatToWrite,
    help="Show recorded episodes, or play them again: verify them, score them anew, or continue them.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")]
One = Annotated[str, typer.Argument(metavar="EPISODE", help="TREE or TREE.ROLLOUT, counted from 0: 17, 17.3.")]
Every = Annotated[str | None, typer.Argument(metavar="EPISODE", help="TREE or TREE.ROLLOUT. Default: every tree.")]
Out = Annotated[Path | None, typer.Option(help="Write the new trees to this directory, as a run.")]


@replay_app.command("show")
def show_command(folder: Folder, episode: One) -> None:
    """Show an episode as a conversation, with every reward; or what a tree's rollouts came to.

    Example: treegym replay show runs/factsearch-0 17.3
    """
    run = _open(folder)
    number, rollout = _parse(episode, run)
    labels, tree = _read(run, number, rollout)
    _show(run, tree, number, rollout, labels)


@replay_app.command("verify")
def verify_command(
    folder: Folder,
    episode: Every = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--lenient",
            help="Compare every byte; or only messages, rewards and ends, without white space and the sixth decimal of "
            "numbers.",
        ),
    ] = True,
) -> None:
    """Take the recorded actions again and compare all that comes back.

    Status 0: all is as recorded. 1: something is not, or could not be verified. 2: misuse.

    Example: treegym replay verify runs/factsearch-0
    """
    run = _open(folder)
    bring_module(folder)
    raise typer.Exit(_verify(run, episode, strict=strict))


@replay_app.command("rescore")
def rescore_command(
    folder: Folder,
    tree: Annotated[str | None, typer.Argument(metavar="TREE", help="Its number. Default: every tree.")] = None,
    term: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="A new reward term, or FILE.py:FUNCTION; repeatable."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TERM=NUMBER",
            help="The weight of a new term (default 1) or of a recorded one (default 0); repeatable.",
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Take the actions again, for terms that ask for the environment.")
    ] = False,
    out: Out = None,
) -> None:
    """Score the stored trees with new reward terms, and compare.

    Example: treegym replay rescore runs/factsearch-0 --term rewards.py:brevity --weight exact=1 --weight brevity=0.1
    """
    if not term:
        raise UsageError("which terms? --term MODULE:FUNCTION or FILE.py:FUNCTION; repeatable")
    run = _open(folder)
    if live:  # the environment is made again
        bring_module(folder)
    with begun(out) if out else nullcontext():
        _rescore(run, tree, term, weight or [], live=live, out=out)


@replay_app.command("continue")
def continue_command(
    folder: Folder,
    episode: One,
    turn: Annotated[int, typer.Option("--from", min=0, help="Go on after this turn; 0: the prompt.")],
    policy: Annotated[str, typer.Option(help="Who goes on: recorded, a run, or what treegym eval takes.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How often; oracle and recorded play once.")] = 8,
    out: Out = None,
) -> None:
    """Restore the state after a turn, and let a policy go on from there.

    Example: treegym replay continue runs/factsearch-0 17.3 --from 2 --policy runs/factsearch-1 --n 8
    """
    run = _open(folder)
    bring_module(folder)
    number, rollout = _parse(episode, run)
    _, recorded = _read(run, number, rollout)
    with begun(out) if out else nullcontext():
        status = _continue(run, recorded, (number, rollout), turn, policy, n, out)
    raise typer.Exit(status)


def _open(folder: Path) -> Run:
    from ...agents import Run

    if not folder.is_dir():
        raise UsageError(f"no run {str(folder)!r}: there is no such directory")
    run = Run(folder)
    if next(iter(run.trees), None) is None:
        raise UsageError(f"{folder} holds no trees")
    return run


def _parse(episode: str, run: Run) -> tuple[int, int | None]:
    """(tree, rollout)"""
    tree, dot, rollout = episode.partition(".")
    if not tree.isdecimal() or (dot and not rollout.isdecimal()):
        raise UsageError(f"an episode is TREE or TREE.ROLLOUT, such as 17 or 17.3, not {episode!r}")
    return int(tree), int(rollout) if dot else None


def _read(run: Run, number: int, rollout: int | None) -> tuple[Mapping[str, Any], RolloutTree]:
    try:
        labels, tree = run.trees.read(number)
    except IndexError:
        raise UsageError(f"{run.path} has no tree {number}; it has {len(run.trees)}, counted from 0") from None
    if rollout is not None and rollout >= len(tree.leaves):
        raise UsageError(f"tree {number} has no rollout {rollout}; it has {len(tree.leaves)}, counted from 0")
    return labels, tree


def _chosen(run: Run, episode: str | None, doing: str) -> Iterator[tuple[int, Mapping[str, Any], RolloutTree]]:
    """The tree, or all trees, with a progress bar."""
    if episode is not None:
        number, rollout = _parse(episode, run)
        yield (number, *_read(run, number, rollout))
        return
    shown = track(run.trees, doing, len(run.trees), console=console, transient=True, disable=not console.is_terminal)
    for number, (labels, tree) in enumerate(shown):
        yield number, labels, tree


def _new_run(out: Path, source: Run) -> Run:
    """A new run with the scenario, the tokenizer and the tape of another one."""
    from ...agents import Run
    from ...agents.store.folder import tokenizer_file

    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; --out makes a new directory")
    run = Run(out)
    for file in (source.path / "scenario.yaml", tokenizer_file(source.path), source.cassette.path):
        if file.exists():
            shutil.copy(file, out)
    return run


def _tape(run: Run) -> Cassette | None:
    """The tape of what outside sources answered in the run, to be played; None where there is none."""
    from ...tools import Cassette

    return Cassette(run.cassette.path, "play") if run.cassette.path.exists() else None


# showing


def _show(run: Run, tree: RolloutTree, number: int, rollout: int | None, labels: Mapping[str, Any]) -> None:
    task = tree.task
    told = ", ".join(f"{name} {value}" for name, value in labels.items())
    say(f"tree {number}: {task.env}, seed {task.seed}, {json.dumps(dict(task.options))}; {told}")
    if rollout is None and len(tree.leaves) > 1:
        for which, path in enumerate(tree.paths):
            end = tree.nodes[path[-1]]
            why = "answered" if end.terminated else str(end.info.get("cause", "not ended"))
            say(f"  {number}.{which}: return {tree.returns[which]:.2f}, {len(path)} turns, {why}")
        say(f"treegym replay show {run.path} {number}.0 shows the first of them")
        return
    _header("prompt", "")
    _messages(tree.messages)
    _show_turns(tree, rollout or 0)


def _show_turns(tree: RolloutTree, rollout: int, after: int = 0) -> None:
    """The turns of a rollout after so many."""
    for turn, node in enumerate((tree.nodes[i] for i in tree.paths[rollout][after:]), after):
        _header("assistant", f"turn {turn + 1}" + ", cut at the token limit" * (node.action.stop_reason == "length"))
        say(node.action.text)
        _messages(node.messages)
        if node.reward or node.reward_terms:
            say(f"reward {node.reward:.2f} {dict(node.reward_terms)}")
        if node.truncated:
            say(f"truncated: {node.info.get('cause')}")
    say(f"return {tree.returns[rollout]:.2f}")


def _header(role: str, note: str) -> None:
    color = "green" if role == "assistant" else "cyan"
    console.print(f"[bold {color}]{escape(role)}[/] [dim]{escape(note)}[/]", highlight=False)


def _messages(messages: Iterable[Any]) -> None:
    for message in messages:
        if message.text:
            _header(message.role, "")
            say(message.text)


# verifying


def _verify(run: Run, episode: str | None, *, strict: bool) -> int:
    from ...agents.rollouts import LENIENT, STRICT, lost_turns, verify

    cassette = _tape(run)
    rollout = _parse(episode, run)[1] if episode else None
    trees = turns = 0
    differing: list[int] = []
    unknown: dict[str, list[int]] = {}  # trees by the reason for which they could not be played
    for number, _, tree in _chosen(run, episode, "verifying"):
        trees += 1
        try:
            found = verify(tree, STRICT if strict else LENIENT, cassette, rollout=rollout)
        except Exception as error:  # whatever the environment raises
            unknown.setdefault(f"{tree.task.env}: {_said(error)}", []).append(number)
            continue
        lost = lost_turns(tree, rollout)
        turns += (len(tree.nodes) if rollout is None else len(tree.paths[rollout])) - len(lost)
        for each in lost:
            say(f"not played again, tree {number}, rollout {each.rollout}, turn {each.turn}: {each.cause}")
        if found:
            if not differing:
                _show_divergence(number, tree, found[0])
            differing.append(number)
    for reason, numbers in unknown.items():
        say(f"not verified, {_listed(numbers)}: {reason}")
    if differing:
        say(f"not as recorded: {_listed(differing)}")
    equal = trees - len(differing) - sum(map(len, unknown.values()))
    say(f"{equal} of {trees} trees are as recorded ({'strict' if strict else 'lenient'}; {turns} turns compared)")
    return int(equal < trees)


def _said(error: Exception) -> str:
    from ...agents.rollouts import OutsideSource, ReplayMismatch
    from ...tools import NotOnTape

    ours = isinstance(error, OutsideSource | ReplayMismatch | NotOnTape)
    return str(error) if ours else f"{type(error).__name__}: {error}"


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN])) + ", …" * (len(numbers) > SHOWN)
    return f"{len(numbers)} {'tree' if len(numbers) == 1 else 'trees'} ({shown})"


def _show_divergence(number: int, tree: RolloutTree, found: Divergence) -> None:
    say(f"tree {number}, rollout {found.rollout}, turn {found.turn}: {found.difference.field} is not as recorded")
    say(f"({tree.task.env}, seed {tree.task.seed}; - recorded, + replayed)")
    before, now = found.difference.recorded.splitlines(), found.difference.replayed.splitlines()
    for line in difflib.ndiff(before, now):
        if not line.startswith("  "):
            say(line.rstrip("\n"))


# new rewards


def _rescore(
    run: Run, episode: str | None, functions: list[str], weighted: list[str], *, live: bool, out: Path | None
) -> None:
    from ...agents.evaluation import paired_difference
    from ...agents.rollouts import rescore

    if episode and _parse(episode, run)[1] is not None:
        raise UsageError(f"--term takes a whole tree, TREE, not {episode}")
    terms = [_term(function) for function in functions]
    weights = _weights(weighted, run, terms)
    new_run = _new_run(out, run) if out else None
    tape = _tape(run)
    old: list[RolloutTree] = []
    new: list[RolloutTree] = []
    for number, labels, tree in _chosen(run, episode, "scoring"):
        try:
            scored = rescore(tree, terms, weights, live=live, cassette=tape)
        except UsageError:
            raise
        except Exception as error:  # of the environment, or of a term that is no number
            raise UsageError(f"tree {number} cannot be scored: {_said(error)}") from error
        if new_run:
            new_run.trees.append(scored, **{**labels, "rescored": [term.name for term in terms]})
        old.append(tree)
        new.append(scored)
    table = Table("mean of the trees", "recorded", "new", "difference (95%, paired)")
    rows = [("return", [t.returns for t in old], [t.returns for t in new])]
    rows += [(term.name, [t.term(term.name) for t in old], [t.term(term.name) for t in new]) for term in terms]
    for name, before, now in rows:
        was, is_ = ([fmean(values) for values in side] for side in (before, now))  # of each tree
        cells = [f"{fmean(was):.3f}", "{:+.3f} ({:+.3f} … {:+.3f})".format(*paired_difference(is_, was))]
        if name != "return" and not any(name in node.reward_terms for tree in old for node in tree.nodes):
            cells = ["-", "-"]
        table.add_row(escape(name), cells[0], f"{fmean(is_):.3f}", cells[1])
    console.print(table)
    for term in terms:
        values = [node.reward_terms[term.name] for tree in new for node in tree.nodes]
        none = sum(value is None for value in values)
        if term.live and not live:
            say(f"{term.name} asks for the live environment and is None everywhere: --live plays the actions again")
        elif none:
            say(f"{term.name} is None on {none} of {len(values)} turns")


def _term(named: str) -> RewardTerm:
    """The reward term of a function: MODULE:FUNCTION or FILE.py:FUNCTION."""
    from ...agents.rollouts import RewardTerm

    place, name = split_name(named)
    if not place or not name.isidentifier():
        raise UsageError(f"--term takes MODULE:FUNCTION or FILE.py:FUNCTION, not {named!r}")
    look_in(Path.cwd())
    function = part_named(named, f"--term {named}")
    try:
        takes = [*inspect.signature(function).parameters]
    except TypeError as error:
        raise UsageError(f"--term {named}: {error}") from error
    if len(takes) not in (1, 2):
        raise UsageError(f"--term {named}: the function takes an episode, or an episode and the environment")
    if takes == ["env"]:  # as those that the setting `terms` of an environment names
        return RewardTerm(name, _named(lambda episode, env: function(env), named), live=True)
    return RewardTerm(name, _named(function, named), live=len(takes) == 2)


def _named(function: Callable[..., float | None], name: str) -> Callable[..., float | None]:
    """The function; what it raises is said with its name and the turn."""

    def score(episode: Episode, *env: Any) -> float | None:
        try:
            return function(episode, *env)
        except Exception as error:
            place = f"{episode.task.env}, seed {episode.task.seed}, turn {len(episode.turns)}"
            raise UsageError(f"--term {name}: {place}: {type(error).__name__}: {error}") from error

    return score


def _weights(weighted: list[str], run: Run, terms: list[RewardTerm]) -> dict[str, float]:
    try:
        weights = {name: float(value) for name, value in (pair.split("=", 1) for pair in weighted)}
    except ValueError:
        raise UsageError("--weight takes TERM=NUMBER, such as exact=1") from None
    if missing := weights.keys() - {term.name for term in terms}:
        known = {name for summary in run.trees.summaries() for name in summary.terms}
        if unknown := missing - known:
            raise UsageError(f"--weight: no term {sorted(unknown)[0]!r} in {run.path}; terms: {sorted(known)}")
    return weights


# another future


def _continue(
    run: Run, tree: RolloutTree, episode: tuple[int, int | None], turn: int, policy: str, n: int, out: Path | None
) -> int:
    from ...agents import derive_seed, run_to_end
    from ...agents.rollouts import Continuation, ReplayMismatch
    from ..schema import load_scenario

    number, rollout = episode
    if rollout is None:
        if len(tree.leaves) > 1:
            raise UsageError(f"which of the {len(tree.leaves)} rollouts of tree {number}? Such as {number}.0")
        rollout = 0
    if turn >= len(tree.paths[rollout]):
        raise UsageError(f"{number}.{rollout} ends with turn {len(tree.paths[rollout])}: --from takes an earlier one")
    if not (run.path / "scenario.yaml").exists():
        raise UsageError(f"{run.path} has no scenario.yaml, which tells how episodes are sampled")
    scenario = load_scenario(run.path / "scenario.yaml")
    once = policy in ("oracle", "recorded")
    how = Continuation(tree, rollout, turn, 1 if once else n, recorded_end=policy == "recorded")
    seed = derive_seed(scenario.seed, "continuation", number, rollout, turn)
    with ExitStack() as stack:
        new_run = _new_run(out or Path(stack.enter_context(tempfile.TemporaryDirectory())), run)
        growing = _grow(run, policy, scenario, tree.task, how, seed, new_run)
        try:
            [grown] = run_to_end(growing)
        except ReplayMismatch as error:
            say(str(error))
            return 1
        except (ValueError, ConnectionError) as error:
            raise UsageError(str(error)) from error
        place = f"{number}.{rollout}"
        new_run.trees.append(
            grown, stage="continued", step=0, source=str(run.path), episode=place, turn=turn, policy=policy
        )
    _show_turns(grown, 0, turn)
    _show_continuation(tree, rollout, turn, grown, policy, scenario.environment.success)
    if out:
        say(f"saved in {out}; treegym replay show {out} 0.0 shows the first one whole")
    else:
        say("not saved: --out FOLDER keeps them all")
    return 0


async def _grow(
    run: Run, policy: str, scenario: Scenario, task: Task, how: Continuation, seed: int, new_run: Run
) -> list[RolloutTree]:
    from ...agents import grow_trees
    from ..policies import open_policy

    own = run.path / "model"
    opened = open_policy(
        "oracle" if policy == "recorded" else policy,
        scenario,
        tokenizer=str(own) if own.is_dir() else None,  # of who plays in words, as those of the record are tokens
    )
    try:
        new_run.save_tokenizer(opened.renderer.tokenizer)
        return await grow_trees(
            [task], how, opened.policy, opened.renderer, opened.sampling, seed=seed, cassette=new_run.cassette
        )
    finally:
        await opened.close()


def _show_continuation(
    tree: RolloutTree, rollout: int, turn: int, grown: RolloutTree, policy: str, success: str
) -> None:
    from ...agents.evaluation import succeeded
    from ...agents.evaluation.statistics import bootstrap, wilson

    table = Table("", "return", success, "turns", "end")

    def add(name: str, of: RolloutTree, which: int) -> None:
        end = of.nodes[of.leaves[which]]
        why = "answered" if end.terminated else str(end.info.get("cause", "not ended"))
        won = "yes" if succeeded(of, success)[which] else "no"
        table.add_row(name, f"{of.returns[which]:.2f}", won, str(len(of.paths[which])), escape(why))

    add("recorded", tree, rollout)
    for which in range(len(grown.leaves)):
        add(f"{escape(policy)} {which}", grown, which)
    console.print(table)
    wins = succeeded(grown, success)
    mean, share = bootstrap(grown.returns), wilson(sum(wins), len(wins))
    if len(wins) > 1:
        say(
            f"{len(wins)} from turn {turn} on: return {mean.mean:.2f} (95%: {mean.low:.2f} … {mean.high:.2f}), "
            f"{success} {share.mean:.0%} (95%: {share.low:.0%} … {share.high:.0%})"
        )
    kept = zip(tree.paths[rollout][:turn], grown.paths[0], strict=False)
    tokens = (
        (of.nodes[i].action.token_ids, of.nodes[i].observation)
        for pair in kept
        for of, i in zip((tree, grown), pair, strict=True)
    )
    same = grown.prompt == tree.prompt and all(one == next(tokens) for one in tokens)
    say("the turns before are the recorded tokens" if same else "the turns before were put into another model's tokens")
