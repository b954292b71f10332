"""The commands that measure: eval, compare and play."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..tasks import ENV, Settings
from ..terminal import UsageError, console, say

if TYPE_CHECKING:
    from ...agents.evaluation import Budget


class Splits(StrEnum):
    """Which tasks."""

    heldout = "heldout"
    train = "train"
    both = "both"


def eval_command(
    scenario: Annotated[
        Path | None, typer.Argument(help="A scenario's file or name, or a run's directory: says the held-out tasks.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            "--model",
            help="The directory of a run or a model, a name, oracle, random, human, scripted:FILE.py, or a server: "
            "http://HOST:PORT/v1#MODEL (vLLM), chat+http://… (text only), tools+http://… (its own tool calls); or one "
            "of yours: FILE.py:Name, with fields '{FILE.py:Name: {field: value}}'. "
            "Default: the run's or the scenario's model.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Tries a task.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="How many tasks, the first ones.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sampling temperature; 0 takes the likeliest tokens.")
    ] = None,
    split: Annotated[Splits | None, typer.Option(help="Which tasks. Default: heldout.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; the tasks stay the same. Default: 0.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Episodes at a time.")] = None,
    lessons: Annotated[
        str | None,
        typer.Option(
            help="Whose lessons the policy is told: a run's directory, a store, or JSON lines; none: nobody's. "
            "Default: its own, where the policy is a run that has some."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A model's directory or name whose tokenizer a server's model has.")
    ] = None,
    max_tokens_total: Annotated[
        int | None,
        typer.Option(min=1, help="Stop where the next task is likely to take more tokens than this, sent and sampled."),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(min=0.0, help="Stop where the next task is likely to take more than this; needs the prices."),
    ] = None,
    max_failures: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE%", help="Stop where more samples than this failed: servers gone and such. Default: 10%."
        ),
    ] = None,
    price_sent: Annotated[float | None, typer.Option(min=0.0, help="Price of a million tokens that are sent.")] = None,
    price_sampled: Annotated[
        float | None, typer.Option(min=0.0, help="Price of a million tokens that are sampled.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a field of the scenario; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to save. Default: evaluations/NAME-TIME.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on with the evaluation in --out, failed samples first; only the budget can be new, and "
            "--max-failures."
        ),
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the summary here too.")] = None,
) -> None:
    """Measure a policy on the scenario's held-out tasks.

    A killed evaluation goes on with --resume and ends in the same numbers.

    Example: treegym eval quickstart --policy runs/first --samples 8 --tasks 100
    """
    from ...agents import Stopped
    from ...agents.evaluation import Budget
    from ...agents.rollouts import TooManyFailures
    from ...agents.store.folder import trees_file, write_text
    from ..evaluation import Setting, evaluate_scenario, own_lessons, own_policy, read_setting, show_evaluation
    from ..schema import load_scenario, title
    from ..watch import ProgressBars

    limits: dict[str, Any] = {
        "tokens": max_tokens_total,
        "cost": max_cost,
        "sent_price": price_sent,
        "sampled_price": price_sampled,
        "max_failures": max_failures,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    if resume:
        if out is None and scenario and (scenario / "evaluation.json").exists():
            scenario, out = None, scenario
        if out is None or not (out / "evaluation.json").exists():
            raise UsageError(f"nothing to resume: {out or 'without --out there'} holds no evaluation")
        fixed = (
            scenario, policy, samples, tasks, temperature, split, seed, concurrency, lessons, tokenizer, change or None,
        )  # fmt: skip
        if any(value is not None for value in fixed):
            raise UsageError("--resume takes the scenario, policy and tasks from --out; only the budget can be new")
        setting, chosen, folder = read_setting(out), load_scenario(out / "scenario.yaml"), out
        setting = replace(setting, budget=_budget(setting.budget, given))
    else:
        if scenario is None:
            raise UsageError("which scenario? A file, or the name of a bundled one, such as quickstart")
        folder = out or Path("evaluations") / f"{title(scenario)}-{datetime.now():%Y%m%d-%H%M%S}"
        if (folder / "scenario.yaml").exists() or trees_file(folder).exists():
            raise UsageError(f"{folder} holds an evaluation or a run already: --resume, or another --out")
        fields = {
            "heldout.rollouts": samples,
            "heldout.tasks": tasks,
            "heldout.temperature": temperature,
            "model.max_rows": concurrency,
        }
        chosen = load_scenario(
            scenario, [*(change or ()), *(f"{key}={value}" for key, value in fields.items() if value is not None)]
        )
        if not chosen.heldout.tasks:
            raise UsageError("heldout.tasks is 0: there is nothing to measure")
        if policy is None and (scenario / "scenario.yaml").exists():
            policy, tokenizer = own_policy(scenario, tokenizer)
        setting = Setting(
            policy, tokenizer, (split or Splits.heldout).value, seed or 0, _budget(Budget(), given),
            own_lessons(policy) if lessons is None else None if lessons == "none" else lessons,
        )  # fmt: skip
    try:
        with ProgressBars(shown=setting.policy != "human") as bars:
            result = evaluate_scenario(chosen, setting, folder, bars)
    except (Stopped, KeyboardInterrupt) as stopped:
        say(f"{str(stopped) or 'stopped'}; go on with: treegym eval --resume --out {folder}")
        raise typer.Exit(130) from None
    except TooManyFailures as error:
        raise UsageError(f"{error}; go on with: treegym eval --resume --out {folder}") from error
    except ConnectionError as error:
        if not (folder / "evaluation.json").exists():
            raise
        raise ConnectionError(f"{error}; go on with: treegym eval --resume --out {folder}") from error
    show_evaluation(result, folder)
    if json_out:
        write_text(json_out, (folder / "summary.json").read_text(encoding="utf-8"))


def _budget(before: Budget, limits: Mapping[str, Any]) -> Budget:
    """The budget with some limits of its own. UsageError."""
    try:
        budget = replace(before, **limits)
    except ValueError as error:
        raise UsageError(f"--max-failures: {error}") from error
    if budget.cost is not None and not (budget.sent_price or budget.sampled_price):
        raise UsageError("--max-cost needs a price: --price-sent, --price-sampled")
    return budget


def compare_command(
    a: Annotated[str, typer.Argument(help="An evaluation or a run, FOLDER or FOLDER@STAGE.")],
    b: Annotated[str, typer.Argument(help="What is compared with it.")],
    curve: Annotated[bool, typer.Option("--curve", help="Compare pass@k at every k; needs several tries.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Compare the tasks of both where they differ.")] = False,
    success: Annotated[str | None, typer.Option(help="The reward term that is 1 at success. Default: A's.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the curves of --curve here, as SVG.")] = None,
) -> None:
    """Say whether B is better than A on the same tasks, worse, or within noise.

    Tries are paired by task and seed. Stages of a training run are compared by name.

    Example: treegym compare "runs/first@warmed up" runs/first@trained
    """
    from ...agents.store.folder import write_json
    from ..charts import save_chart
    from ..comparison import compare_named, show_comparison

    if plot and not curve:
        raise UsageError("--plot draws the curves of --curve")
    result = compare_named(a, b, success=success, shared=shared, curve=curve)
    show_comparison(result)
    if json_out:
        write_json(json_out, result.to_json())
    if plot and result.curves:
        ks = [str(k) for k in result.curves.ks]
        lines = {
            f"A: {a}": list(zip(ks, result.curves.a, strict=True)),
            f"B: {b}": list(zip(ks, result.curves.b, strict=True)),
        }
        save_chart(plot, "pass@k", "k, tries", lines)


def play_command(
    env: Annotated[str, typer.Argument(help=ENV)],
    seed: Annotated[int, typer.Option(help="Which episode.")] = 0,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="A reset option.")] = None,
    setting: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Where the episode is recorded. Default: plays/NAME.")] = None,
    tokenizer: Annotated[str, typer.Option(help="A model's directory or name; its tokens are recorded.")] = "nano",
) -> None:
    """Play an episode yourself: you see what an agent sees, and the episode is recorded like any other.

    Example: treegym play treegym/Maze-v0 --seed 3
    """
    from ...agents import ChatRenderer, Run
    from ...agents.models.registry import load_tokenizer
    from ...agents.store.folder import write_text
    from ...trainers import TaskSet
    from ..build import refusing
    from ..modules import folders_of
    from ..person import play, show
    from ..schema import Scenario, dump_scenario
    from ..tasks import begin, named_task, values

    task = named_task(env, seed, values("--option", option), values("--setting", setting))
    tried, info = begin(task)
    tried.close()
    texts = [message.text for message in info["messages"]] if "messages" in info else []
    with refusing(f"--tokenizer {tokenizer}"):
        renderer = ChatRenderer(load_tokenizer(tokenizer, texts=texts))
    tree = play(task, renderer)
    if not tree.nodes:
        say("nothing was played, nothing is recorded")
        return
    last = tree.nodes[tree.leaves[0]]
    if last.terminated or last.truncated:
        show(last.messages)
        terms = {name: tree.term(name)[0] for node in tree.nodes for name in node.reward_terms}
        say(f"reward {tree.returns[0]:.2f} {terms}")
    else:
        console.print("[dim]the episode has not ended[/dim]")
    folder = out or Path("plays") / task.env.rpartition("/")[2]
    run = Run(folder)
    number = len(run.trees)
    if not (folder / "scenario.yaml").exists():
        write_text(
            folder / "scenario.yaml",
            dump_scenario(Scenario(TaskSet(task.env, task.settings, task.wrappers), look_in=folders_of(asdict(task)))),
        )
    run.save_tokenizer(renderer.tokenizer)
    run.trees.append(tree, stage="play", step=number)
    say(f"recorded as {number}.0 in {folder}")
