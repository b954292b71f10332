"""Parts as a scenario writes them: a class by name, or a name with fields, parts within parts.

A name is that of one of treegym's classes, or `module:Name`, or `path/to/file.py:Name`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .. import agents, trainers
from ..agents import memory, rollouts, store
from ..envs.wrappers import find_wrapper
from ..tools.named import PartNotFound, split_name, written
from ..trainers import advantages, losses
from .errors import ScenarioError, say, suggest
from .modules import part_named

ROLLOUTS: dict[str, type] = {
    kind.__name__: kind
    for kind in (rollouts.Budgeted, rollouts.Chains, rollouts.EntropyBranching, rollouts.TreeExpansion)
}
ADVANTAGES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        advantages.AnchorStates,
        advantages.BackedUp,
        advantages.BestOnly,
        advantages.GroupRelative,
        advantages.GroupedGAE,
        advantages.HistoryAnchors,
        advantages.PrefixGroups,
        advantages.SharedMean,
        advantages.Sum,
        advantages.SummedLeaves,
        advantages.TokenReturns,
        advantages.Whitened,
    )
}
LOSSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        losses.CispoLoss,
        losses.ClippedLoss,
        losses.GeometricLoss,
        losses.MaskedRatios,
        losses.ReinforceLoss,
        losses.SapoLoss,
        losses.TruncatedImportance,
        losses.WithEntropy,
        losses.WithKL,
    )
}
SOURCES: dict[str, type] = {kind.__name__: kind for kind in (trainers.Curriculum, trainers.Mixture, trainers.Uniform)}
STAGES: dict[str, type] = {
    kind.__name__: kind for kind in (trainers.Distillation, trainers.Evaluate, trainers.Improvement, trainers.Warmup)
}
COMPARISONS: dict[str, type] = {kind.__name__: kind for kind in (losses.Groups, losses.Siblings)}
REFLECTORS: dict[str, type] = {kind.__name__: kind for kind in (memory.AskModel, memory.Contrast)}
TRACKERS: dict[str, type] = {kind.__name__: kind for kind in (store.Trackio, store.Wandb)}
SUM_LOSSES: dict[str, type] = {kind.__name__: kind for kind in (losses.DpoLoss, losses.GvpoLoss)}
Credit = trainers.AdvantageEstimator | losses.Comparisons  # what stands at algorithm.advantage
Loss = trainers.PolicyLoss | losses.SumLoss  # what stands at algorithm.loss
_METHODS: dict[Any, tuple[str, ...]] = {  # that make something a part of the kind
    agents.RolloutStrategy: ("grow",),
    trainers.AdvantageEstimator: ("__call__",),
    losses.Comparisons: ("compare", "makes"),
    trainers.PolicyLoss: ("__call__", "aggregation", "needs", "couples", "keeps_zeros"),
    losses.SumLoss: ("of_sums", "needs", "couples"),
    memory.Reflector: ("reflect",),
    trainers.TaskSource: ("draw", "report"),
    trainers.Stage: ("name", "run"),
    store.Tracker: ("open", "episodes"),
}
_KINDS: dict[Any, Mapping[str, type]] = {
    agents.RolloutStrategy: ROLLOUTS,
    trainers.AdvantageEstimator: ADVANTAGES,
    trainers.PolicyLoss: LOSSES,
    Credit: ADVANTAGES | COMPARISONS,
    Loss: LOSSES | SUM_LOSSES,
    memory.Reflector: REFLECTORS,
    trainers.TaskSource: SOURCES,
    trainers.Stage: STAGES,
    store.Tracker: TRACKERS,
}


def build_part(kind: Any, written: Any, place: str) -> Any:
    """A part of a kind, one of those in _KINDS, from what stands at `place`.

    `GroupRelative`, or `{GroupRelative: {within: origin}}`; of `Sum` a list of weights and parts,
    `{Sum: [[1.0, GroupRelative], [0.5, AnchorStates]]}`. A class that a module has is made with the fields; a function
    there is an AdvantageEstimator itself, its fields keyword arguments, or returns a part of another kind.
    ScenarioError for what there is not.
    """
    name, fields = _named(written, place)
    found = _KINDS[kind].get(name)
    if found is None and split_name(name)[0]:
        return _of_module(kind, name, fields, place)
    if found is None:
        raise ScenarioError(f"{place}: no {_alternatives(kind)[0].__name__} {name!r}{suggest(name, _KINDS[kind])}")
    place = f"{place}.{name}"
    if found is advantages.Sum:
        return advantages.Sum(*_weighted(kind, fields, place))
    return _make(found, fields, place)


def _of_module(kind: Any, name: str, fields: Any, place: str) -> Any:
    """The part that `module:Name` names, made with its fields."""
    found = part_named(name, place)
    if not callable(found):
        raise ScenarioError(f"{place}: {name} is a {type(found).__name__}; name a class or a function")
    if kind in (trainers.AdvantageEstimator, Credit) and not isinstance(found, type):
        made = _estimator(found, name, fields, place)
    else:
        made = _make(found, fields, f"{place}.{name}")
    kinds = _alternatives(kind)
    meant = next((each for each in kinds if hasattr(made, _METHODS[each][0])), kinds[0])
    if lacking := [method for method in _METHODS[meant] if not hasattr(made, method)]:
        raise ScenarioError(f"{place}: {name} makes no {meant.__name__}: it has no {lacking[0]}")
    return made


def _estimator(function: Any, name: str, fields: Any, place: str) -> Any:
    """A function of trees as an AdvantageEstimator, its fields bound."""
    parameters = [*fields_of(function).items()]
    if not parameters:
        raise ScenarioError(f"{place}: {name} takes nothing; an AdvantageEstimator is called with the trees of a step")
    checked = _checked(dict(parameters[1:]), fields, f"{place}.{name}")
    try:
        inspect.signature(function).bind([], **checked)
    except TypeError as error:
        example = ", ".join(f"{parameter}: …" for parameter, _ in parameters[1:])
        raise ScenarioError(f"{place}: {name}: {error}; write {{{name!r}: {{{example}}}}}") from error
    return functools.partial(function, **checked)


def check_wrappers(spelled: Sequence[Any], field: str) -> None:
    """ScenarioError for what is no wrapper in this field of a scenario, or takes other arguments."""
    for number, part in enumerate(spelled):
        place = f"{field}.{number}"
        try:
            name, arguments = written(part)
            make = find_wrapper(name)
        except (ValueError, PartNotFound) as error:
            raise ScenarioError(f"{place}: {error}") from error
        known = dict([*fields_of(make).items()][1:])  # the first takes the environment
        try:
            inspect.signature(make).bind(None, **_checked(known, arguments, f"{place}.{name}"))
        except TypeError as error:
            raise ScenarioError(f"{place}.{name}: {error}") from error


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The kinds that a part may be of."""
    return get_args(kind) or (kind,)


def made_with(written: Any, place: str, **given: Any) -> Any:
    """What `module:Name`, alone or with its fields, makes; of the things given it takes those that its parameters name.

    Each is given as a function that makes it, so that nothing is made that is not wanted. ScenarioError.
    """
    name, fields = _named(written, place)
    make = part_named(name, place)
    if not callable(make):
        raise ScenarioError(f"{place}: {name} is a {type(make).__name__}; name a class or a function")
    parameters = fields_of(make)
    wanted = {parameter: given[parameter]() for parameter in given if parameter in parameters}
    known = {parameter: hint for parameter, hint in parameters.items() if parameter not in given}
    checked = _checked(known, fields, f"{place}.{name}")
    try:
        return make(**wanted, **checked)
    except (TypeError, ValueError, ImportError, OSError) as error:
        why = str(error).partition("__init__() ")[2] or error
        hint = f"; it is given {', '.join(given)}, and its fields: {{{name!r}: {{field: value}}}}"
        raise ScenarioError(f"{place}: {why}{hint if isinstance(error, TypeError) else ''}") from error


def _named(written: Any, place: str) -> tuple[str, Any]:
    """The name of a part, and its fields."""
    named = {written: {}} if isinstance(written, str) else written
    if not isinstance(named, Mapping) or len(named) != 1:
        raise ScenarioError(f"{place}: write a name, or one name with its fields, not {written!r}")
    [(name, fields)] = named.items()
    return str(name), {} if fields is None else fields


def validate(hint: Any, value: Any, place: str) -> Any:
    """The value as its type hint wants it. ScenarioError where it cannot be."""
    if hint in _KINDS:
        return build_part(hint, value, place)
    if is_dataclass(hint):
        return _make(hint, value, place)
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ScenarioError(f"{place}: {say(error.errors()[0])}") from error


def fields_of(make: Any) -> dict[str, Any]:
    """The parameters of a class or function that can be written down, and their type hints."""
    hints: dict[str, Any] = {}
    with contextlib.suppress(NameError):  # of what is imported for type checkers alone
        hints = get_type_hints(make.__init__ if isinstance(make, type) and not is_dataclass(make) else make)  # type: ignore[misc]
    parameters = inspect.signature(make).parameters.values()
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return {each.name: hints.get(each.name, Any) for each in parameters if each.kind in kinds}


def _make(kind: Any, written: Any, place: str) -> Any:
    """What a class or function makes of its fields."""
    checked = _checked(fields_of(kind), written, place)
    try:
        return kind(**checked)
    except (TypeError, ValueError) as error:  # a field that is needed, or values that do not go together
        raise ScenarioError(f"{place}: {str(error).partition('__init__() ')[2] or error}") from error


def _checked(known: Mapping[str, Any], written: Any, place: str) -> dict[str, Any]:
    """The fields as their type hints want them."""
    if not isinstance(written, Mapping):
        raise ScenarioError(f"{place}: write its fields, {{name: value}}, not {written!r}")
    for name in written:
        if name not in known:
            raise ScenarioError(f"{place}.{name}: no such field{suggest(str(name), known)}")
    return {name: validate(known[name], value, f"{place}.{name}") for name, value in written.items()}


def _weighted(kind: Any, fields: Any, place: str) -> list[tuple[float, Any]]:
    if not isinstance(fields, list) or not all(isinstance(part, list) and len(part) == 2 for part in fields):
        raise ScenarioError(f"{place}: write a list of weights and parts, [[1.0, GroupRelative], …], not {fields!r}")
    return [(validate(float, weight, place), build_part(kind, part, place)) for weight, part in fields]
