"""Lesson: what rollouts have taught, with the evidence that it was drawn from; and what makes one unfit to be kept."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

from ...envs.notes import Note, why_not_a_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter

State = Literal["proposed", "active", "retired", "replaced"]
STATES: tuple[State, ...] = get_args(State)
IN_FORCE: tuple[State, ...] = ("proposed", "active")  # lessons in these states are told to agents
MAX_TAGS = 6  # a task with six tags has 64 sets of them, by each of which lessons are looked up
MAX_NAME = 200  # characters of an environment, a tag, an author
MAX_RUN = 4096  # characters of a run's folder
MAX_REASON = 400  # characters
MAX_NUMBER = (1 << 53) - 1  # JSON readers of other languages keep integers up to here
_STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}  # for pydantic, which is slow to import
# words, numbers and signs; what ends a sentence or divides it is left out
_WORDS = re.compile(r"\w+(?:[.,]\w+)*|[^\w\s.,;:!?]|[.,;:!?](?![\s.,;:!?]|$)")
_FILLERS = frozenset({"the", "please"})


class LessonRefused(ValueError):
    """A lesson, or a change of one, is not taken. The text says why in one line."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a lesson was drawn from: rollouts of one tree that did so, and others that did not."""

    __pydantic_config__ = _STRICT

    run: str  # its folder or name
    tree: int  # the number of the tree in the run's store
    nodes: tuple[int, ...]
    returns: tuple[float, float]  # the mean return of those who did so, and of the others
    counts: tuple[int, int]  # how many rollouts there are on the two sides
    stage: str = "improvement"  # of the run; a store refuses every other
    split: str = "train"  # of the task; a store refuses every other, such as "heldout"
    in_force: tuple[int, ...] = ()  # ids of the lessons that were told there


@dataclass(frozen=True, slots=True)
class Effect:
    """What trials have measured: how much more an episode returns with the lesson than without it."""

    __pydantic_config__ = _STRICT

    mean: float
    low: float  # ends of the interval
    high: float
    pairs: int  # of episodes that were compared


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an agent is to be told in tasks of one environment that have all of the tags."""

    __pydantic_config__ = _STRICT

    text: str
    env: str  # id of the environment
    when: str = ""  # a phrase: the lesson is told where the environment has said it; empty: in the prompt
    tags: tuple[str, ...] = ()
    author: str = ""  # what or who wrote the text
    evidence: tuple[Evidence, ...] = ()
    effect: Effect | None = None  # None: not measured
    state: State = "proposed"
    replaced_by: int | None = None  # id of the lesson that says it better; only in the state "replaced"
    id: int = 0  # in its store, from 1; 0: in no store

    def note(self) -> Note:
        """What the agent is told. ValueError where the text or the phrase does not fit a line."""
        return Note(self.text, self.when, str(self.id) if self.id else "")


def to_json(lesson: Lesson) -> str:
    """The lesson as a JSON object on one line, without the fields that have their defaults."""
    told = {name: value for name, value in asdict(lesson).items() if value or name in ("text", "env")}
    return json.dumps(told, ensure_ascii=False, separators=(",", ":"))


def from_json(line: str | bytes) -> Lesson:
    """Reads what `to_json` wrote. LessonRefused names the field that is missing, unknown or of another type."""
    from pydantic import ValidationError

    try:
        return _shape().validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise LessonRefused(f"{where or 'the line'}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    except (ValueError, RecursionError) as error:
        raise LessonRefused(f"the line cannot be read: {error!s:.80}") from None


@functools.cache
def _shape() -> TypeAdapter[Lesson]:
    from pydantic import TypeAdapter

    return TypeAdapter(Lesson)


def checked(lesson: Lesson) -> Lesson:
    """The lesson with its tags sorted, each once. LessonRefused where it is not fit to be kept or told."""
    try:
        line = to_json(lesson).encode()
    except (TypeError, ValueError, RecursionError) as error:  # a field holds what is no text, or half a surrogate pair
        raise LessonRefused(f"the lesson holds what JSON cannot: {error!s:.80}") from None
    lesson = from_json(line)
    for fault in _faults(lesson):
        raise LessonRefused(fault)
    return replace(lesson, tags=tuple(sorted(set(lesson.tags))))


def _faults(lesson: Lesson) -> Iterator[str]:
    try:
        lesson.note()
    except ValueError as error:
        yield str(error)
    if lesson.when and not lesson.when.strip():
        yield "a note's when is blank: write a phrase, or nothing"
    if not lesson.env.strip() or not all(map(str.strip, lesson.tags)):
        yield "the environment or a tag is empty"
    if len(set(lesson.tags)) > MAX_TAGS:
        yield f"a lesson has at most {MAX_TAGS} tags, got {len(set(lesson.tags))}"
    names = [("env", lesson.env, MAX_NAME), ("author", lesson.author, MAX_NAME)]
    names += [("tag", tag, MAX_NAME) for tag in lesson.tags]
    names += [("run", piece.run, MAX_RUN) for piece in lesson.evidence]
    yield from (f"{name} {fault}" for name, text, most in names if (fault := why_not_a_line(text, most)))
    if (lesson.state == "replaced") != (lesson.replaced_by is not None):
        yield f"a lesson that is {lesson.state} has replaced_by {lesson.replaced_by}; 'replaced' alone takes a number"
    yield from (fault for piece in lesson.evidence for fault in _evidence_faults(piece))
    if (effect := lesson.effect) is not None and not effect.low <= effect.mean <= effect.high:
        yield f"the effect {effect.mean} lies outside its interval, {effect.low} to {effect.high}"
    numbers = (lesson.id, lesson.replaced_by or 0, effect.pairs if effect else 0)
    yield from _number_faults(*numbers)


def _evidence_faults(piece: Evidence) -> Iterator[str]:
    if piece.stage != "improvement":
        yield f"evidence is of the stage 'improvement', not {piece.stage!r:.80}"
    if piece.split != "train":
        yield f"evidence is of tasks to train on, not of the split {piece.split!r:.80}"
    yield from _number_faults(piece.tree, *piece.nodes, *piece.counts, *piece.in_force)


def _number_faults(*numbers: int) -> Iterator[str]:
    """A fault for each number that no count, place or id can be."""
    yield from (f"{n!r:.20} is no number from 0 to {MAX_NUMBER}" for n in numbers if not is_number(n))


def is_number(value: object) -> TypeGuard[int]:
    """Whether a value can be an id, a place or a count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def checked_reason(reason: str, *, needed: bool = True) -> str:
    """The reason of a change. LessonRefused where it is no line, too long, or missing though it is needed."""
    if not isinstance(reason, str):
        raise LessonRefused(f"a reason is a text, got {reason!r:.80}")
    if fault := why_not_a_line(reason, MAX_REASON):
        raise LessonRefused(f"the reason {fault}")
    if needed and not reason.strip():
        raise LessonRefused("the reason is missing: nothing changes without one on record")
    return reason


def likeness(lesson: Lesson) -> str:
    """A digest that near duplicates share: lessons of equal environment, tags and phrase, and of nearly equal words.

    Texts have nearly equal words if these are the same in the same order, apart from the case of the first letter,
    spacing, the punctuation that ends or divides sentences, the words "the" and "please", and an "always" that comes
    first. Order, case, quotes and signs count, because "left, not right" and "right, not left" have the same words.
    """
    key = (lesson.env, lesson.tags, lesson.when, near_words(lesson.text))
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def near_words(text: str) -> list[str]:
    """The words by which near duplicates are told, in order."""
    text = text.strip()
    words = [word for word in _WORDS.findall(text[:1].lower() + text[1:]) if word not in _FILLERS]
    return words[1:] if words[:1] == ["always"] else words


def tags_of(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The tags of a task that count, by the info of its reset: the first six, sorted."""
    return tuple(sorted(list(dict.fromkeys(map(str, info.get("tags", ()))))[:MAX_TAGS]))
