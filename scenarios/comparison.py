"""Comparisons of evaluations, and of the held-out stages of training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..agents import Evaluation, Run
from ..agents.evaluation import Comparison, Curves, Flip, Interval, PairedResult, compare, read_evaluation
from ..agents.evaluation.compare import judged
from ..agents.evaluation.run import STAGE
from .folders import who
from .terminal import UsageError, console, say

SHOWN = 10  # flips in each direction


def read_side(name: str, term: str | None) -> tuple[Evaluation, str]:
    """The evaluation that `FOLDER` or `FOLDER@STAGE` names, and the reward term that tells success in it.

    Without a stage it is an evaluation's, or the run's last held-out stage. UsageError.
    """
    folder, stage = Path(name), ""
    if not folder.is_dir():
        path, _, stage = name.rpartition("@")
        folder = Path(path)
    if not name or not (folder / "scenario.yaml").exists():
        raise UsageError(f"{name}: no evaluation and no run; write FOLDER or FOLDER@STAGE")
    stage = stage or (STAGE if (folder / "evaluation.json").exists() else "trained")
    success = term or _success(folder / "scenario.yaml")
    run = Run(folder)
    evaluation = read_evaluation(run, success, stage=stage)
    if not evaluation.tasks:
        stages = sorted({str(labels.get("stage")) for labels, _ in run.trees})
        raise UsageError(f"{name}: no trees of the stage {stage!r}; stages: {', '.join(stages) or 'none'}")
    if not any(success in rollout.terms for rollout in evaluation.rollouts):
        terms = sorted({term for rollout in evaluation.rollouts for term in rollout.terms})
        raise UsageError(f"{name}: no episode has the reward term {success!r}; terms: {', '.join(terms)}")
    return evaluation, success


def _success(file: Path) -> str:
    """The reward term that a scenario calls success. The scenario may be of another version. UsageError."""
    try:
        scenario = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return str(scenario.get("environment", {}).get("success", "exact"))
    except (AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: not a scenario: {str(error).splitlines()[0]}; --success names the term") from error


def compare_named(
    a: str, b: str, *, success: str | None = None, shared: bool = False, curve: bool = False
) -> Comparison:
    """The comparison of what two names stand for, by default in A's reward term. UsageError."""
    one, term = read_side(a, success)
    other, _ = read_side(b, term)
    try:
        return compare(one, other, names=(a, b), shared=shared, curve=curve)
    except ValueError as error:
        raise UsageError(str(error)) from error


def show_comparison(comparison: Comparison) -> None:
    result = comparison.result
    for letter, name in (("A", comparison.a), ("B", comparison.b)):
        player = who(Path(name) if Path(name).is_dir() else Path(name.rpartition("@")[0]))
        say(f"{letter}: {name}" + f" ({player})" * bool(player))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("", "tasks", "A", "B", "B - A", "95% interval", "p", "B is"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row("all", *_cells(result, result.p))
    for (name, group), p in zip(comparison.groups.items(), comparison.adjusted, strict=True):
        table.add_row(f"  difficulty {name}", *_cells(group, p), style="dim")
    console.print(table)
    also = ", those of difficulties adjusted by Holm's method" if comparison.groups else ""
    say(f"p: {result.test}{also}; tries a task: {result.samples[0]} and {result.samples[1]}")
    say(verdict_line(result))
    _show_flips(comparison.flips)
    if comparison.curves:
        _show_curves(comparison.curves)


def verdict_line(result: PairedResult) -> str:
    change = f"{result.difference.mean:+.1%} ({result.difference.low:+.1%} … {result.difference.high:+.1%})"
    noise = f"chance alone stays below {result.noise:.1%}"
    if min(result.samples) > 1:
        noise = f"chance in the tries alone makes {result.noise:.1%} at most"
    if result.verdict != "within noise":
        return f"B is {result.verdict}: B - A is {change}; {noise}"
    seen = f"a difference of {result.detectable:.1%} would be found in 8 of 10 such comparisons"
    if min(result.samples) > 1 and abs(result.difference.mean) > result.noise:
        noise += ", so what is within noise is the choice of tasks"
    return f"within noise: B - A is {change}; {noise}; {seen}"


def _cells(result: PairedResult, p: float) -> Sequence[str]:
    low, high = result.difference.low, result.difference.high
    means = f"{result.a.mean:.1%}", f"{result.b.mean:.1%}", f"{result.difference.mean:+.1%}"
    verdict = judged(result.difference.mean, p).removeprefix("within ")
    return str(result.tasks), *means, f"{low:+.1%} … {high:+.1%}", f"{p:.3f}" if p >= 0.001 else "< 0.001", verdict


def _show_flips(found: Sequence[Flip]) -> None:
    for verb, part in (
        ("gained", [flip for flip in found if flip.change > 0]),
        ("lost", [flip for flip in reversed(found) if flip.change < 0]),
    ):
        if part:
            say(f"tasks {verb}: {len(part)} (episodes of A and of B as TREE.ROLLOUT)")
        for flip in part[:SHOWN]:
            level = "" if flip.difficulty is None else f"  difficulty {flip.difficulty}"
            say(f"  {flip.episodes[0]} → {flip.episodes[1]}  {_share(flip.a)} → {_share(flip.b)}{level}")
        if len(part) > SHOWN:
            say(f"  and {len(part) - SHOWN} more")


def _share(tries: tuple[int, int]) -> str:
    return f"{tries[0]}/{tries[1]}"


def _show_curves(found: Curves) -> None:
    table = Table("pass@k", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("A", "95% interval", "B", "95% interval", "B - A", "95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for k, a, b, difference in zip(found.ks, found.a, found.b, found.difference, strict=True):
        table.add_row(str(k), *_percents(a), *_percents(b), *_percents(difference, "+"))
    console.print(table)
    say(found.verdict)
    say("the curves do not cross" if found.crossing is None else f"the curves cross before {found.crossing} tries")
    for name, trees in (("A", found.only_a), ("B", found.only_b)):
        more = " …" if len(trees) > SHOWN else ""
        listed = f" (trees {', '.join(trees[:SHOWN])}{more})" if trees else ""
        say(f"solved by {name} alone: {len(trees)} tasks{listed}")


def _percents(interval: Interval, sign: str = "") -> tuple[str, str]:
    mean, low, high = (f"{value:{sign}.1%}" for value in interval)
    return mean, f"{low} … {high}"
