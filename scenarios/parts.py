"""Parts of an algorithm as a scenario writes them: a class by name, or a name with fields, parts within parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .. import agents, trainers
from .errors import ScenarioError, say, suggest

ROLLOUTS: dict[str, type] = {
    kind.__name__: kind for kind in (agents.Budgeted, agents.Chains, agents.EntropyBranching, agents.TreeExpansion)
}
ADVANTAGES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        trainers.AnchorStates,
        trainers.BackedUp,
        trainers.BestOnly,
        trainers.GroupRelative,
        trainers.GroupedGAE,
        trainers.HistoryAnchors,
        trainers.PrefixGroups,
        trainers.SharedMean,
        trainers.Sum,
        trainers.SummedLeaves,
        trainers.TokenReturns,
        trainers.Whitened,
    )
}
LOSSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        trainers.CispoLoss,
        trainers.ClippedLoss,
        trainers.GeometricLoss,
        trainers.ReinforceLoss,
        trainers.SapoLoss,
        trainers.TruncatedImportance,
        trainers.WithEntropy,
        trainers.WithKL,
    )
}
_KINDS: dict[Any, Mapping[str, type]] = {
    agents.RolloutStrategy: ROLLOUTS,
    trainers.AdvantageEstimator: ADVANTAGES,
    trainers.PolicyLoss: LOSSES,
}


def build_part(kind: Any, written: Any, place: str) -> Any:
    """A part of a kind (RolloutStrategy, AdvantageEstimator, PolicyLoss) from what stands at `place`.

    `GroupRelative`, or `{GroupRelative: {within: origin}}`; of `Sum` a list of weights and parts,
    `{Sum: [[1.0, GroupRelative], [0.5, AnchorStates]]}`. ScenarioError for what there is not.
    """
    named = {written: {}} if isinstance(written, str) else written
    if not isinstance(named, Mapping) or len(named) != 1:
        raise ScenarioError(f"{place}: write a name, or one name with its fields, not {written!r}")
    [(name, fields)] = named.items()
    found = _KINDS[kind].get(name)
    if found is None:
        raise ScenarioError(f"{place}: no {kind.__name__} {name!r}{suggest(str(name), _KINDS[kind])}")
    place = f"{place}.{name}"
    if found is trainers.Sum:
        return trainers.Sum(*_weighted(kind, fields, place))
    return _make(found, {} if fields is None else fields, place)


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


def _make(kind: Any, written: Mapping[str, Any], place: str) -> Any:
    """A dataclass from its fields."""
    if not isinstance(written, Mapping):
        raise ScenarioError(f"{place}: write its fields, {{name: value}}, not {written!r}")
    known, hints = {field.name for field in dataclasses.fields(kind)}, get_type_hints(kind)
    for name in written:
        if name not in known:
            raise ScenarioError(f"{place}.{name}: no such field{suggest(str(name), known)}")
    try:
        return kind(**{name: validate(hints[name], value, f"{place}.{name}") for name, value in written.items()})
    except (TypeError, ValueError) as error:  # a field that is needed, or values that do not go together
        raise ScenarioError(f"{place}: {str(error).partition('__init__() ')[2] or error}") from error


def _weighted(kind: Any, fields: Any, place: str) -> list[tuple[float, Any]]:
    if not isinstance(fields, list) or not all(isinstance(part, list) and len(part) == 2 for part in fields):
        raise ScenarioError(f"{place}: write a list of weights and parts, [[1.0, GroupRelative], …], not {fields!r}")
    return [(validate(float, weight, place), build_part(kind, part, place)) for weight, part in fields]
