"""The treegym command."""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ScenarioError
from ..tasks import ENV, Settings, begin, named_task, values
from ..terminal import AsJson, UsageError, console, say, told
from .lessons import lessons_app
from .measure import compare_command, eval_command, play_command
from .new import new_command
from .replay import replay_app
from .runs import runs_app
from .serve import serve_command
from .view import view_command

app = typer.Typer(
    help="Train language models in multi-turn text environments with tools.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from ... import __version__

        say(f"treegym {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which it is.")
    ] = False,
) -> None:
    """Train language models in multi-turn text environments with tools."""


models_app = typer.Typer(help="The models that treegym knows by name.", invoke_without_command=True)
app.add_typer(models_app, name="models")

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a field of the scenario; repeatable."),
]
RunsFolder = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs.")]


@app.command()
def train(
    scenario: Annotated[
        Path | None,
        typer.Argument(help="A scenario file, the name of a bundled one, such as quickstart, or a run's directory."),
    ] = None,
    change: Changes = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory. Default: runs/NAME-TIME.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out, or with the scenario's latest.")] = False,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Train the model of a scenario: evaluate, warm up, improve, evaluate again.

    A killed run goes on with --resume exactly as it would have without the kill.

    Example: treegym train quickstart --set improvement.steps=5 --set seed=1
    """
    from ...agents.rollouts import EpisodeError, TooManyFailures
    from ...agents.store.folder import trees_file
    from ...trainers import Stopped
    from ..build import train as run
    from ..schema import load_scenario, title

    if resume:
        folder = out or _resumable(scenario, runs)
        if not (folder / "scenario.yaml").exists():
            raise UsageError(f"nothing to resume: {folder} holds no run")
        if (folder / "summary.json").exists():
            say(f"the run in {folder} is finished")
            return
        chosen = _resumed(folder, scenario, change or [])
    elif scenario is None:
        raise UsageError("which scenario? A file, or the name of a bundled one, such as quickstart")
    else:
        chosen = load_scenario(scenario, change or ())
        folder = out or runs / f"{title(scenario)}-{datetime.now():%Y%m%d-%H%M%S}"
        if (folder / "scenario.yaml").exists():
            raise UsageError(f"{folder} holds a run already: --resume goes on with it, another --out begins anew")
        if trees_file(folder).exists():
            raise UsageError(f"{folder} holds trees already: --out names a new run")
    hint = f"go on with: treegym train --resume --out {folder}"
    try:
        run(chosen, folder, resume=resume)
    except (Stopped, KeyboardInterrupt) as stopped:
        begun = (folder / "scenario.yaml").exists()
        say(f"{str(stopped) or 'stopped'}; {hint}" if begun else "stopped before anything was played")
        raise typer.Exit(130) from None
    except TooManyFailures as error:
        raise ScenarioError(f"{error}; when that is mended, {hint}") from error
    except EpisodeError as error:
        raise ScenarioError(f"{error.in_full()}\nto leave such tasks out, {hint} --set on_failure=skip") from error
    except OSError as error:
        if not (folder / "checkpoints").exists():
            raise
        raise OSError(f"{told(error)}; {hint}") from error


def _resumable(scenario: Path | None, runs: Path) -> Path:
    """The run that is meant: the one in this directory, or the latest one of the scenario."""
    from ..schema import title

    if scenario and (scenario / "scenario.yaml").exists():
        return scenario
    return _latest(runs, f"{title(scenario)}-*" if scenario else "*")


def _resumed(folder: Path, named: Path | None, change: list[str]) -> Any:
    """The scenario with which the run goes on. ScenarioError where the named one differs in more than `--set` says."""
    from ..changes import changes, refuse
    from ..schema import load_scenario

    chosen = load_scenario(named or folder, change)
    names = tuple(f"{text.partition('=')[0].strip()}." for text in change)
    refuse(found for found in changes(load_scenario(folder), chosen) if not f"{found.field}.".startswith(names))
    return chosen


app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.add_typer(replay_app, name="replay")
app.command("view")(view_command)
app.command("play")(play_command)
app.command("serve")(serve_command)
app.add_typer(runs_app, name="runs")
app.add_typer(lessons_app, name="lessons")
app.command("new")(new_command)


@app.command("scenarios")
def scenarios_command(as_json: AsJson = False) -> None:
    """List the bundled scenarios: what each is about, its environment, model and algorithm.

    Example: treegym scenarios --json
    """
    from ..schema import BUNDLED, load_scenario

    names = ("name", "environment", "model", "algorithm", "about")
    for file in sorted(BUNDLED.glob("*.yaml")):
        scenario = load_scenario(file)
        parts = (scenario.environment.id, scenario.model.name, scenario.algorithm.name)
        about = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        if as_json:
            say(json.dumps(dict(zip(names, (file.stem, *parts, about), strict=True)), ensure_ascii=False))
        else:
            console.print(f"[bold]{file.stem}[/]  {', '.join(parts)}\n    {about}", highlight=False)


@app.command()
def envs(
    env: Annotated[str | None, typer.Argument(help=f"{ENV} Default: all are listed.")] = None,
    seed: Annotated[int, typer.Option(help="Which episode.")] = 0,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="A reset option.")] = None,
    setting: Settings = None,
    as_json: AsJson = False,
) -> None:
    """List the environments, or let the oracle of one play an episode, as an agent would see it.

    Example: treegym envs treegym/Maze-v0 --seed 3 --setting size=4
    """
    from ...envs import registered

    if env is None:
        for name in registered():
            say(json.dumps({"id": name}) if as_json else name)
        if not as_json and console.is_terminal:
            console.print("[dim]treegym envs ID plays an episode[/dim]")
        return
    _play(named_task(env, seed, values("--option", option), values("--setting", setting)))


def _play(task: Any) -> None:
    from ...envs.rewards import RewardTerms, added

    env, info = begin(task)
    done, rewards = False, 0.0
    terms: RewardTerms = {}
    while True:
        for message in info["messages"]:
            console.print(f"[bold cyan]{message.role}[/]", highlight=False)
            say(message.text)
        if done:
            break
        action = env.oracle()
        if action is None:
            console.print("[dim]the oracle knows no further action[/dim]")
            break
        console.print("[bold green]assistant (oracle)[/]")
        say(action)
        _, reward, terminated, truncated, info = env.step(action)
        rewards += float(reward)
        terms = added(terms, info["reward_terms"])
        done = terminated or truncated
    say(f"reward {rewards:.2f} {terms}")


@app.command("serve-tools")
def serve_tools_command(
    env: Annotated[str, typer.Argument(help=ENV)],
    seed: Annotated[int, typer.Option(help="Which episode.")] = 0,
    setting: Settings = None,
    http: Annotated[
        int | None,
        typer.Option("--http", metavar="PORT", min=0, max=65535, help="Serve over HTTP at this port; 0: any free one."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at with --http. Whoever reaches it can call the tools.")
    ] = "127.0.0.1",
) -> None:
    """Serve the tools of an environment over MCP, in one episode of it.

    Without --http the protocol goes over standard input and output, for a client that starts this command. With it,
    clients connect to http://HOST:PORT/mcp and share the episode; their calls run one at a time. The task is in the
    server's instructions.

    Example: treegym serve-tools treegym/FactSearch-v0 --seed 3 --setting top_k=5
    """
    from ...envs import ToolEnv
    from ...tools import serve_tools

    with contextlib.redirect_stdout(sys.stderr):  # which is not for the protocol
        opened, info = begin(named_task(env, seed, {}, values("--setting", setting)))
    with contextlib.closing(opened):
        made = opened.unwrapped
        if not (isinstance(made, ToolEnv) and made.tools):
            raise UsageError(f"{env} has no tools")
        task = "\n".join(message.text for message in info["messages"] if message.role == "user")
        try:
            serve_tools(made.tools, instructions=task, port=http, host=host)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models: size, licence, and whether they are here already."""
    if context.invoked_subcommand is not None:
        return
    from ...agents.models.registry import list_models

    for card in list_models() if as_json else ():
        row = {"name": card.name, "parameters": card.parameters, "bytes": card.size, "licence": card.licence}
        say(json.dumps({**row, "folder": str(card.folder) if card.cached else None}))
    if as_json:
        return
    table = Table("model", "parameters", "on disk", "licence", "where")
    for card in list_models():
        where = str(card.folder) if card.cached else "made on the spot" if not card.hub else "not fetched"
        table.add_row(
            card.name,
            f"{card.parameters / 1e6:.1f}M",
            f"{card.size / 1e6:.0f} MB" if card.size else "-",
            card.licence,
            where,
        )
    console.print(table)
    console.print("[dim]any local directory or hub name of a causal language model works as well[/dim]")


@models_app.command()
def fetch(name: Annotated[str, typer.Argument(help="A model's name: smollm2.")]) -> None:
    """Fetch a model once, check it, and keep it in the cache."""
    from ...agents.models.registry import fetch as fetch_model

    try:
        say(str(fetch_model(name)))
    except ValueError as error:
        raise UsageError(str(error)) from error


@app.command("serve-search")
def serve_search_command(
    corpus: Annotated[list[Path], typer.Argument(help="JSONL files of id, title and text; .gz and .xz too.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    dense: Annotated[bool, typer.Option("--dense", help="Search by meaning, not by words.")] = False,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Search by words and by meaning, fused.")] = False,
    encoder: Annotated[
        Path | None, typer.Option(help="A Hugging Face encoder's folder, instead of static embeddings.")
    ] = None,
) -> None:
    """Serve a corpus to searches over HTTP, in the protocol of Search-R1's retrieval server, until Ctrl-C.

    Example: treegym serve-search corpus.jsonl.gz --hybrid
    """
    if dense and hybrid:
        raise UsageError("--dense or --hybrid, not both")
    if encoder and not (dense or hybrid):
        raise UsageError("--encoder goes with --dense or --hybrid")
    try:
        from ...tools.search.server import bind, serve_search

        listener = bind(host, port)
    except ImportError as error:
        raise UsageError(f"a search server needs {error.name}: pip install 'treegym[search]'") from error
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {error}") from error
    name = f"[{host}]" if ":" in host else host
    try:
        with listener:
            retriever, count = _retriever(corpus, dense, hybrid, encoder)
            say(f"{count} passages at http://{name}:{listener.getsockname()[1]}/retrieve; Ctrl-C ends")
            serve_search(retriever, listener)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        say("stopped")


def _retriever(corpus: list[Path], dense: bool, hybrid: bool, encoder: Path | None) -> tuple[Any, int]:
    """What searches the files, and how many passages they hold."""
    from ...envs.factsearch.questions import read_passages
    from ...tools.search import DenseIndex, Fused, SearchIndex, StaticEncoder, TransformerEncoder

    passages = read_passages(*corpus)
    if not passages:
        raise UsageError(f"{', '.join(map(str, corpus))}: no passages")
    if not (dense or hybrid):
        return SearchIndex.build(passages), len(passages)
    by_meaning = DenseIndex.build(passages, TransformerEncoder(str(encoder)) if encoder else StaticEncoder())
    return Fused((SearchIndex.build(passages), by_meaning)) if hybrid else by_meaning, len(passages)


def _latest(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(f"{pattern}/scenario.yaml"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UsageError(f"nothing to resume: there is no {folder / pattern}")
    return found[-1].parent


def main() -> None:
    """The command; errors that the user can mend are one line."""
    try:
        status = app(prog_name="treegym", standalone_mode=False)
    except UsageError as error:
        _refuse(getattr(error, "format_message", error.__str__)())
    except OSError as error:
        _refuse(told(error))
    except Exception as error:
        from safetensors import SafetensorError

        from ...agents.rollouts import EpisodeError
        from ...agents.store import StoreError

        if not isinstance(error, ScenarioError | StoreError | SafetensorError | EpisodeError):
            raise
        _refuse(error.in_full() if isinstance(error, EpisodeError) else str(error))
    raise SystemExit(status)


def _refuse(reason: str) -> NoReturn:
    if reason:  # else help was shown
        Console(stderr=True).print(f"treegym: {reason}", highlight=False, markup=False, emoji=False, soft_wrap=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
