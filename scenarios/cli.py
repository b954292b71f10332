"""The treegym command."""

from __future__ import annotations

import json
import os
import resource
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Train language models in multi-turn text environments with tools.", no_args_is_help=True, add_completion=False
)
models_app = typer.Typer(help="The models that treegym knows by name.", invoke_without_command=True)
app.add_typer(models_app, name="models")
console = Console()

Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a field of the scenario; repeatable.")
]
RunsFolder = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs.")]


@app.command()
def train(
    scenario: Annotated[Path, typer.Argument(help="A scenario file, or the name of a bundled one: quickstart.")],
    change: Changes = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory. Default: runs/NAME-TIME.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out, or with the scenario's latest.")] = False,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Train the model of a scenario: evaluate, warm up, improve, evaluate again.

    A killed run goes on with --resume exactly as it would have without the kill.

    Example: treegym train quickstart --set improvement.steps=5 --set seed=1
    """
    from .schema import dump_scenario, find, load_scenario

    name = find(scenario).stem
    if resume:
        folder = out or _latest(runs, name)
        chosen = load_scenario(folder / "scenario.yaml", change or ())
    else:
        chosen = load_scenario(scenario, change or ())
        folder = out or runs / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        if (folder / "scenario.yaml").exists():
            raise typer.BadParameter(f"{folder} holds a run already: --resume goes on with it, another --out begins anew")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenario.yaml").write_text(dump_scenario(chosen), encoding="utf-8")
    _train(chosen, folder)


def _train(scenario: Any, folder: Path) -> None:
    from ..trainers import Run, Stopped, Trainer
    from .build import prepare
    from .watch import ProgressBars, gain, results_table, summary

    start = time.monotonic()
    model, renderer = prepare(scenario)
    run = Run(folder)
    with ProgressBars() as bars:
        trainer = Trainer(
            scenario.plan(), model, renderer, run, bars, dtype=scenario.model.torch_dtype, max_rows=scenario.model.max_rows
        )
        try:
            results = trainer.train()
        except (Stopped, KeyboardInterrupt) as stopped:
            bars.__exit__(None, None, None)
            console.print(f"{stopped or 'stopped'}; go on with: treegym train {folder / 'scenario.yaml'} --out {folder} --resume")
            raise typer.Exit(130) from None
    trainer.save_model(folder / "model")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    run.summarize(summary(results, seconds=time.monotonic() - start, peak_memory_gib=peak))
    run.finish()
    console.print(results_table(results))
    if (change := gain(results)) is not None:
        console.print(f"gain over the warmed-up policy: {change.mean:+.1%} (95%: {change.low:+.1%} … {change.high:+.1%}, paired by task)")
    console.print(f"{time.monotonic() - start:.0f} s, peak memory {peak:.1f} GiB; saved in {folder}")


@app.command()
def evaluate(
    scenario: Annotated[Path, typer.Argument(help="A scenario file or name: says the environment and the held-out tasks.")],
    model: Annotated[str | None, typer.Option(help="A run's model directory, or a model name. Default: the scenario's.")] = None,
    change: Changes = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Measure a model on the scenario's held-out tasks."""
    from .build import evaluate_model
    from .schema import load_scenario
    from .watch import ProgressBars, results_table, summary

    chosen = load_scenario(scenario, [*(change or ()), *([f"model.name={model}"] if model else ())])
    with ProgressBars() as bars:
        result = evaluate_model(chosen, bars)
    console.print(results_table({"trained": result}))
    if json_out:
        json_out.write_text(json.dumps(summary({"trained": result}, success=result.success), indent=1) + "\n")


@app.command()
def envs(
    env: Annotated[str | None, typer.Argument(help="An id, such as treegym/FactSearch-v0.")] = None,
    seed: Annotated[int, typer.Option(help="Which episode.")] = 0,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="A reset option.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--setting", metavar="KEY=VALUE", help="A constructor setting.")] = None,
) -> None:
    """List the environments, or let the oracle of one play an episode, as an agent would see it."""
    import yaml

    from ..envs import Task, registered

    if env is None:
        for name in registered():
            console.print(name)
        console.print("[dim]treegym envs ID plays an episode[/dim]")
        return
    if env not in registered():
        raise typer.BadParameter(f"no environment {env!r}; there are: {', '.join(registered())}")
    pairs = [[(key, yaml.safe_load(value)) for key, _, value in (x.partition("=") for x in xs or ())] for xs in (option, setting)]
    _play(Task(env, seed, dict(pairs[0]), dict(pairs[1])))


def _play(task: Any) -> None:
    env = task.make()
    observation, info = env.reset(seed=task.seed, options=dict(task.options))
    done, rewards = False, 0.0
    while True:
        for message in info["messages"]:
            console.print(f"[bold cyan]{message.role}[/]", highlight=False)
            console.print(message.text, markup=False, highlight=False)
        if done:
            break
        action = env.oracle()
        if action is None:
            console.print("[dim]the oracle knows no further action[/dim]")
            break
        console.print("[bold green]assistant (oracle)[/]")
        console.print(action, markup=False, highlight=False)
        observation, reward, terminated, truncated, info = env.step(action)
        rewards += reward
        done = terminated or truncated
    console.print(f"[bold]reward {rewards:.2f}[/] {info['reward_terms']}", highlight=False)


@models_app.callback()
def models(context: typer.Context) -> None:
    """List the models: size, licence, and whether they are here already."""
    if context.invoked_subcommand is not None:
        return
    from ..agents.models import list_models

    table = Table("model", "parameters", "on disk", "licence", "where")
    for card in list_models():
        where = str(card.folder) if card.cached else "made on the spot" if not card.hub else "not fetched"
        table.add_row(card.name, f"{card.parameters / 1e6:.1f}M", f"{card.size / 1e6:.0f} MB" if card.size else "–", card.licence, where)
    console.print(table)
    console.print("[dim]any local directory or hub name of a causal language model works as well[/dim]")


@models_app.command()
def fetch(name: Annotated[str, typer.Argument(help="A model's name: smollm2.")]) -> None:
    """Fetch a model once, check it, and keep it in the cache."""
    from ..agents.models import fetch as fetch_model

    console.print(str(fetch_model(name)))


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs")) -> None:
    """List the runs with what came of them."""
    from ..trainers import Run

    table = Table("run", "state", "untouched", "warmed up", "trained", "gain (95%)")
    for path in sorted(path.parent for path in folder.glob("*/scenario.yaml")):
        summary = Run(path).summary()
        stages = summary["stages"] if summary else {}
        cells = [f"{stages[s]['success']['mean']:.1%}" if s in stages else "–" for s in ("untrained", "warmed up", "trained")]
        gain = summary and summary["gain"]
        change = f"{gain['mean']:+.1%} ({gain['low']:+.1%} … {gain['high']:+.1%})" if gain else "–"
        table.add_row(path.name, "finished" if summary else "unfinished", *cells, change)
    console.print(table if table.row_count else f"no runs in {folder}")


def _latest(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"{name}-*/scenario.yaml"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise typer.BadParameter(f"nothing to resume: {folder} holds no run of {name}")
    return found[-1].parent


def main() -> None:
    """The command; errors that the user can mend are one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .schema import ScenarioError

    try:
        app()
    except (ScenarioError, ConnectionError) as error:
        Console(stderr=True).print(f"treegym: {error}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
