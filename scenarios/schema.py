"""Scenario: the YAML description of a training run, checked; errors name file, line and field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import gymnasium
import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from ..agents import RolloutStrategy, Sampling
from ..agents.store.folder import trees_file
from ..envs import registered
from ..tools.named import look_in, split_name
from ..trainers import (
    ALGORITHMS,
    Algorithm,
    HeldOut,
    Improvement,
    Keep,
    OnFailure,
    Plan,
    Stage,
    TaskSet,
    TaskSource,
    Warmup,
)
from ..trainers.losses.terms import NEEDS
from .errors import ScenarioError, say, suggest
from .modules import as_folders, import_named, part_named
from .parts import Credit, Loss, build_part, check_wrappers, fields_of, validate
from .secret import with_secret, with_secrets

_STRICT = {"extra": "forbid"}
Folders = Annotated[tuple[str, ...], BeforeValidator(as_folders)]
BUNDLED = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Model:
    """Which model learns, and which of its weights move."""

    __pydantic_config__ = _STRICT
    name: str = "smollm2"  # as `treegym models` lists it, a local directory, or owner/name on the hub
    weights: Literal["full", "lora"] = "full"
    lora_rank: Annotated[int, Field(ge=1)] = 16
    lora_alpha: int = 32
    device: str = "auto"  # as torch names it, cuda:1 say; auto: CUDA where there is one, else the CPU
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation; master weights are float32
    kernels: Literal["auto", "torch", "c"] = "auto"  # on a CPU; auto: in C where there is a compiler
    max_rows: Annotated[int, Field(ge=1)] = 32  # contexts decoded at a time
    lockstep: bool = False  # a pass waits for all rollouts, slow tools too: repeatable where batches change bits
    policy: Any = None  # what samples from it, `module:Name` with fields; None: a TransformersPolicy in this process
    template: Mapping[str, Any] = field(default_factory=dict)  # to its chat template, such as {enable_thinking: false}


@dataclass(frozen=True, slots=True)
class ServingChoice:
    """Where a training run samples: in this process, or at vLLM servers, to which every step's weights are pushed."""

    __pydantic_config__ = _STRICT
    engine: Literal["process", "vllm"] = "process"
    urls: tuple[str, ...] = ()  # of servers that run, http://127.0.0.1:8000#MODEL say; none: one is started
    start: Mapping[str, Any] = field(default_factory=dict)  # more flags of `vllm serve`, such as {max-num-seqs: 64}
    sync: Literal["files", "lora", "nccl"] = "files"  # how weights get to a server
    folder: str = ""  # in which files and adapters are written, where servers find them too; "": this machine's own
    address: str = "127.0.0.1"  # of this machine, as the servers reach it for nccl
    pause: Literal["wait", "keep"] = "wait"  # what becomes of turns under way while weights change
    patience: Annotated[float, Field(gt=0)] = 180.0  # seconds that a server is asked again for while it is away

    def __post_init__(self) -> None:
        if self.engine == "process" and (self.urls or self.start):
            raise ValueError("urls and start are of servers: they go with engine: vllm")
        if self.urls and self.start:
            raise ValueError("servers at urls are started by whoever runs them: start goes without urls")


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """Lessons that are drawn from the rollouts of the improvement, and told to later ones."""

    __pydantic_config__ = _STRICT
    reflector: Any = "Contrast"  # what writes them down, a Reflector by name, with fields; null: nothing does
    store: str = ""  # lessons to begin with: a run's directory, its store, or what `treegym lessons export` wrote
    tokens: Annotated[int, Field(ge=0)] = 400  # of the lessons that a task is told, at most
    doubt: Annotated[float, Field(ge=0, le=1)] = 0.1  # the share of tasks that are told all lessons but one
    place: Literal["turn", "prompt"] = "turn"  # where they stand: behind what they speak of, or all in the prompt


@dataclass(frozen=True, slots=True)
class AlgorithmChoice:
    """An algorithm by name, or `module:Name` of a function that makes one, its parameters, and parts that replace its
    own, written as `build_part` reads them."""

    __pydantic_config__ = _STRICT
    name: str = "grpo"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rollout: Any = None
    advantage: Any = None
    loss: Any = None

    def build(self) -> Algorithm:
        """Raises ScenarioError for names, parameters and parts that there are not."""
        make = ALGORITHMS.get(self.name)
        if make is None and split_name(self.name)[0]:
            make = part_named(self.name, "algorithm.name")
        if make is None:
            raise ScenarioError(f"algorithm.name: no algorithm {self.name!r}{suggest(self.name, ALGORITHMS)}")
        known = fields_of(make)
        checked = {}
        for name, value in self.parameters.items():
            place = f"algorithm.parameters.{name}"
            if name not in known:
                raise ScenarioError(f"{place}: {self.name} has no such parameter{suggest(name, known)}")
            checked[name] = validate(known[name], value, place)
        try:
            algorithm = make(**checked)
        except (TypeError, ValueError) as error:
            raise ScenarioError(f"algorithm.parameters: {error}") from error
        if not isinstance(algorithm, Algorithm):
            raise ScenarioError(f"algorithm.name: {self.name} makes a {type(algorithm).__name__}, not an Algorithm")
        parts = {"rollout": RolloutStrategy, "advantage": Credit, "loss": Loss}
        given = {name: kind for name, kind in parts.items() if getattr(self, name) is not None}
        built = {name: build_part(kind, getattr(self, name), f"algorithm.{name}") for name, kind in given.items()}
        try:
            algorithm = replace(algorithm, **built)
        except ValueError as error:  # parts that do not go together
            raise ScenarioError(f"algorithm: {error}") from error
        if columns := sorted(algorithm.loss.needs - NEEDS):
            raise ScenarioError(
                f"algorithm.loss: {type(algorithm.loss).__name__} needs the column {columns[0]!r}; a scenario has "
                f"{', '.join(sorted(NEEDS))}, others go to a Learner that is made in Python"
            )
        return algorithm


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole training run."""

    __pydantic_config__ = _STRICT
    environment: TaskSet
    model: Model = Model()
    algorithm: AlgorithmChoice = AlgorithmChoice()
    sampling: Sampling = Sampling()
    warmup: Warmup = Warmup()
    improvement: Improvement = Improvement()
    heldout: HeldOut = HeldOut()
    serving: ServingChoice = ServingChoice()
    memory: MemoryChoice | None = None
    stages: tuple[Any, ...] = ()  # parts; by default evaluations around the warm-up and the improvement
    seed: int = 0
    checkpoint_every: Annotated[float, Field(gt=0)] = 120.0  # seconds
    keep: Keep = Keep()
    on_failure: OnFailure = "stop"
    max_failures: Annotated[float, Field(ge=0, le=1)] = 0.5
    environment_threads: Annotated[int, Field(ge=1)] = 32
    threads: Annotated[int, Field(ge=0)] = 0  # of the computation; 0: one for each core
    trackers: tuple[Any, ...] = ()  # parts, which show metrics and sample episodes elsewhere, too
    look_in: Folders = ()  # in which the modules that it names are looked for first, then its own and the current one

    def plan(self) -> Plan:
        """Raises ScenarioError for parts that there are not."""
        improvement = _sourced(self.improvement, "improvement")
        own: dict[Any, Stage] = {"Warmup": self.warmup, "Improvement": improvement}  # without fields: this scenario's
        stages = [
            own[written]
            if isinstance(written, str) and written in own
            else _sourced(build_part(Stage, written, f"stages.{i}"), f"stages.{i}")
            for i, written in enumerate(self.stages)
        ]
        try:
            return self._plan(improvement, stages)
        except ValueError as error:
            raise ScenarioError(f"stages: {error}") from error

    def _plan(self, improvement: Improvement, stages: Sequence[Stage]) -> Plan:
        return Plan(
            environment=self.environment,
            algorithm=self.algorithm.build(),
            sampling=self.sampling,
            warmup=self.warmup,
            improvement=improvement,
            stages=stages,
            heldout=self.heldout,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            keep=self.keep,
            on_failure=self.on_failure,
            max_failures=self.max_failures,
            environment_threads=self.environment_threads,
        )


def _sourced(stage: Any, place: str) -> Any:
    """The stage with its task source, if it has one, made of what stands there."""
    if not isinstance(stage, Improvement) or stage.source is None:
        return stage
    return replace(stage, source=build_part(TaskSource, stage.source, f"{place}.source"))


def load_scenario(path: str | Path, changes: Sequence[str] = ()) -> Scenario:
    """Reads a scenario and applies `key.path=value` changes. Raises ScenarioError, one line.

    `path` is a file, the name of a bundled scenario, or the directory of a run or an evaluation.
    """
    path = find(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ScenarioError(f"{path}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    lines: dict[tuple[str, ...], str] = {(): f"{path}:1: "}
    if tree is not None:
        _places(tree, (), f"{path}:", lines)
    if not isinstance(content, dict):
        raise ScenarioError(f"{path}:1: a scenario is a mapping of fields, not {_kind(content)}")
    for change in changes:
        keys = _apply(content, change)
        lines.update({keys[:i]: f"--set {change}: " for i in range(1, len(keys) + 1)})
    try:
        scenario = TypeAdapter(Scenario).validate_python(content)
        _find_environment(scenario.environment.id, _folders(path, scenario))
        check_wrappers(scenario.environment.wrappers, "environment.wrappers")
        for environment in environments_of(scenario.plan()):
            _find_environment(environment.id, _folders(path, scenario))
            check_wrappers(environment.wrappers, f"improvement.source.{environment.id}.wrappers")
    except ValidationError as error:
        raise ScenarioError(_locate(error.errors()[0], lines, path)) from error
    except ScenarioError as error:
        keys = tuple(str(error).partition(":")[0].split("."))
        raise ScenarioError(f"{_place(keys, lines, path)}{error}") from error
    if trees_file(path.parent).exists():  # that of a run, whose seeds are what they are
        return scenario
    improvement = replace(scenario.improvement, source=with_secrets(scenario.improvement.source))
    stages = with_secrets(scenario.stages)
    return replace(scenario, environment=with_secret(scenario.environment), improvement=improvement, stages=stages)


def dump_scenario(scenario: Scenario) -> str:
    """The scenario as YAML, with every default written out."""
    return yaml.safe_dump(TypeAdapter(Scenario).dump_python(scenario, mode="json"), sort_keys=False, allow_unicode=True)


def find(path: str | Path) -> Path:
    """The file, that of the run in this directory, or the bundled one of this name. Raises ScenarioError."""
    path = Path(path)
    bundled = {file.stem: file for file in BUNDLED.glob("*.yaml")}
    if path.is_file():
        return path
    if (path / "scenario.yaml").is_file():
        return path / "scenario.yaml"
    if path.stem in bundled and path.parent.name in ("", "scenarios"):
        return bundled[path.stem]
    meant = suggest(path.stem, bundled)
    if path.suffix or len(path.parts) > 1:
        raise ScenarioError(f"there is no file {path}, and no bundled scenario of that name{meant}")
    raise ScenarioError(f"no scenario {str(path)!r}{meant}")


def title(path: str | Path) -> str:
    """What runs of a scenario are called: the name of its file, or of the run whose it is."""
    file = find(path)
    return file.resolve().parent.name if file.name == "scenario.yaml" else file.stem


def _folders(path: Path, scenario: Scenario) -> list[Path]:
    """Where the scenario's modules are looked for."""
    beside = [] if path.parent == BUNDLED else [path.parent]  # ours are no modules of a user's
    return [*(path.parent / folder for folder in scenario.look_in), *beside]


def environments_of(plan: Plan) -> list[TaskSet]:
    """Those of the sources of the plan's improvements; without a source it is the plan's."""
    sources = [stage.source for stage in plan.stages if isinstance(stage, Improvement) and stage.source]
    return [environment for source in sources for environment in source.environments]


def _find_environment(name: str, folders: Sequence[Path]) -> None:
    """Raises ScenarioError if Gymnasium has no such environment; `module:id` imports the module that registers it.

    The folders stay on Python's path, for the other modules that the scenario names.
    """
    module, id = split_name(name)
    look_in(*folders, Path.cwd())
    try:
        found = import_named(module, *folders) if module else None
    except ScenarioError as error:
        raise ScenarioError(f"environment.id: {error}") from error
    try:
        gymnasium.spec(id)
    except gymnasium.error.Error as error:
        place = getattr(found, "__file__", None) or module
        hint = f" after importing {place}" if module else suggest(id, registered())
        raise ScenarioError(f"environment.id: no environment {id!r}{hint}") from error


def _apply(content: dict[str, Any], change: str) -> tuple[str, ...]:
    """Sets a nested value; its keys."""
    key, equals, text = change.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise ScenarioError(f"--set {change}: write key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ScenarioError(f"--set {change}: the value is not YAML") from error
    for name in keys[:-1]:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ScenarioError(f"--set {change}: {name} is {_kind(inner)}, it has no fields")
        content = inner
    content[keys[-1]] = value
    return keys


def _places(node: yaml.Node, keys: tuple[str, ...], prefix: str, lines: dict[tuple[str, ...], str]) -> None:
    """Notes on which line every field stands."""
    lines[keys] = f"{prefix}{node.start_mark.line + 1}: "
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*keys, str(key.value))
            if inner in lines:
                raise ScenarioError(f"{prefix}{key.start_mark.line + 1}: {'.'.join(inner)}: this field stands twice")
            _places(value, inner, prefix, lines)
            lines[inner] = f"{prefix}{key.start_mark.line + 1}: "
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _places(value, (*keys, str(number)), prefix, lines)


def _place(keys: tuple[str, ...], lines: Mapping[tuple[str, ...], str], path: Path) -> str:
    """Where the field, or the nearest of its parents that is written down, stands."""
    while keys and keys not in lines:
        keys = keys[:-1]
    return lines.get(keys, f"{path}: ")


def _locate(error: Any, lines: Mapping[tuple[str, ...], str], path: Path) -> str:
    keys = tuple(str(key) for key in error["loc"])
    suggestion = ""
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        suggestion = suggest(keys[-1], _fields(keys[:-1]))
    return f"{_place(keys, lines, path)}{'.'.join(keys)}: {say(error)}{suggestion}"


def _fields(keys: Sequence[str]) -> list[str]:
    """Names of the fields of the part of a scenario that these keys lead to."""
    kind: Any = Scenario
    for key in keys:
        hint = get_type_hints(kind).get(key, Scenario)
        kind = next((each for each in get_args(hint) if each is not type(None)), hint)  # of what may be null
    return list(get_type_hints(kind))


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "empty"}.get(type(value), f"a {type(value).__name__}")
