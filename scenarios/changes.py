"""What may change in the scenario of a run that goes on, and where that is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from ..agents import Run
from ..agents.store import append_line
from ..trainers.learner import Checkpoints, Progress
from .errors import ScenarioError
from .schema import Scenario

# Fields that a run can take on later: what it did so far is what it would have done.
FREE = (
    "checkpoint_every",
    "environment_threads",
    "improvement.evaluate_every",
    "improvement.optimization.max_tokens",
    "improvement.steps",
    "keep.best",
    "keep.every",
    "max_failures",
    "model.max_rows",
    "on_failure",
    "serving.address",
    "serving.folder",
    "serving.patience",
    "serving.pause",
    "serving.start",
    "serving.sync",
    "serving.urls",
    "threads",
    "trackers",
    "warmup.optimization.max_tokens",
)


@dataclass(frozen=True, slots=True)
class Change:
    """A field that differs between the scenario of a run and that with which it is to go on."""

    field: str  # dotted
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field} is {self.before!r} in the run, not {self.after!r}"


def kept(recorded: Scenario, wanted: Scenario) -> Scenario:
    """`wanted` with what a run settles by itself: device and dtype where they are auto, the action format where none is
    named, the secret of its seeds, and the folder of modules."""
    dtype = recorded.model.dtype if wanted.model.dtype == "auto" else wanted.model.dtype
    device = recorded.model.device if wanted.model.device == "auto" else wanted.model.device
    before = recorded.environment
    form = {name: value for name, value in before.settings.items() if name == "format"}
    environment = replace(wanted.environment, settings={**form, **wanted.environment.settings}, secret=before.secret)
    model = replace(wanted.model, device=device, dtype=dtype)
    return replace(wanted, environment=environment, model=model, look_in=recorded.look_in)


def changes(recorded: Scenario, wanted: Scenario) -> list[Change]:
    """All fields that differ, but for what a run settles by itself."""
    sides = (TypeAdapter(Scenario).dump_python(side, mode="json") for side in (recorded, kept(recorded, wanted)))
    before, after = (dict(_fields(side)) for side in sides)
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [Change(name, before.get(name), after.get(name)) for name in differing]


def refuse(found: Iterable[Change]) -> None:
    """ScenarioError if there are any."""
    if listed := "; ".join(map(str, found)):
        raise ScenarioError(f"{listed}. A run that goes on can change only {', '.join(FREE)}, each by --set")


def changed(run: Run, recorded: Scenario, wanted: Scenario) -> list[Change]:
    """What differs. ScenarioError where the run, as far as it has come, cannot take that on."""
    found = changes(recorded, wanted)
    refuse(change for change in found if change.field not in FREE)
    if any(change.field == "improvement.steps" for change in found):
        _check_steps(recorded, wanted, Checkpoints(run).progress())
    return found


def _check_steps(recorded: Scenario, wanted: Scenario, progress: Progress) -> None:
    steps, improving = wanted.improvement.steps, _stages(recorded).index(recorded.improvement.name)
    if recorded.improvement.reward_weights:
        raise ScenarioError("improvement.steps: the reward weights of the steps so far depend on it")
    if progress.stage > improving or (progress.stage == improving and progress.step > steps):
        done = progress.step if progress.stage == improving else recorded.improvement.steps
        raise ScenarioError(f"improvement.steps: the run has done {done} already, got {steps}")


def record(run: Run, scenario: Scenario, found: Iterable[Change]) -> None:
    """Appends the changes, and from where on they hold, to changes.jsonl."""
    for change in found:
        progress = Checkpoints(run).progress()
        row = {"stage": _stages(scenario)[progress.stage], "step": progress.step, "field": change.field}
        append_line(run.path / "changes.jsonl", {**row, "from": change.before, "to": change.after})


def _stages(scenario: Scenario) -> list[str]:
    return [stage.name for stage in scenario.plan().stages]


def _fields(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
