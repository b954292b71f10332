"""Questions over a corpus: one question, a set with its pools, and the JSONL files that hold them."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...tools.protocol import encodable
from ...tools.search import Passage
from ..formats.lines import lines_of
from ..rewards import exact_match

T = TypeVar("T")
LONE = re.compile(r"\\u[dD][89a-fA-F]")  # what may write half of a surrogate pair
HELD_OUT = frozenset({"dev", "eval", "heldout", "test", "valid", "validation"})  # names of splits not for training


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answers, and the searches that lead to them."""

    id: str
    question: str
    answers: tuple[str, ...]  # any of them is right; the first is the oracle's
    supporting: tuple[str, ...]  # ids of the passages that together answer it, in the order of the hops
    queries: tuple[str, ...]  # one a hop; each finds the supporting passage of its place
    hops: int
    split: str = "train"
    path: str = ""  # its kind: the relations it follows, or the row's type
    new_path: bool = False  # whether questions for training never follow this path
    wrong_query: str = ""  # a search for another fact about the entity of the last hop …
    wrong_answer: str = ""  # … and what it finds
    guess: str = ""  # a plausible answer that is wrong


class QuestionSet(Sequence[Question]):
    """Questions in a fixed order, drawn from by split, hops and novelty of path. Immutable."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = tuple(questions)
        self.by_id = {question.id: question for question in questions}
        self.pool = functools.cache(self._pool)

    def _pool(self, split: str, hops: frozenset[int], paths: str) -> tuple[Question, ...]:
        """The questions of a split with one of these hop counts (any if empty) on seen, new or any paths."""
        allowed = {"seen": {False}, "new": {True}, "any": {False, True}}.get(paths, set())
        return tuple(
            q for q in self._questions if q.split == split and q.new_path in allowed and (not hops or q.hops in hops)
        )

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: Any) -> Any:
        return self._questions[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> QuestionSet:
        return self


def write_questions(questions: Sequence[Question], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(question)) + "\n" for question in questions)


def read_passages(*paths: Path) -> list[Passage]:
    """Passages from JSONL rows {"id", "title", "text"}; a file may be .gz or .xz. No two have the same id."""
    return _read(paths, lambda row: Passage(_text(row, "id"), _text(row, "title"), _text(row, "text")))


def read_questions(path: Path, titles: dict[str, str] | None = None) -> list[Question]:
    """Questions from JSONL rows {"id", "question", "answers", "supporting"[, "hops", "split", "type", …]}, of which no
    two have the same id.

    `titles` are the corpus's, by passage id; a question searches for its supporting titles unless it has queries.
    Without `titles` those of the row are taken, and where the row has none the question searches for its own words.
    """
    return _read([path], lambda row: _question(row, titles))


class _BadField(Exception):
    """Says which field of a row is wrong, and how."""


class _Row(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_Row)


def _read(paths: Sequence[Path], make: Callable[[dict[str, Any]], R]) -> list[R]:
    rows: list[R] = []
    places: dict[str, str] = {}  # by id
    for path in paths:
        for number, line in lines_of(path):
            if line.strip():
                row, place = _make(path, number, line, make), f"{path}, line {number}"
                if row.id in places:
                    raise ValueError(f"{place}: the id {row.id!r} is also that of {places[row.id]}; ids must differ")
                places[row.id] = place
                rows.append(row)
    return rows


def _make(path: Path, number: int, line: str, make: Callable[[dict[str, Any]], T]) -> T:
    try:
        row = json.loads(line)
        if LONE.search(line):
            row = json.loads(encodable(json.dumps(row, ensure_ascii=False)))
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        return make(row)
    except (_BadField, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def _question(row: dict[str, Any], titles: dict[str, str] | None) -> Question:
    supporting = tuple(_passage_id(item, titles) for item in _list(row, "supporting"))
    answers = tuple(str(answer) for answer in _list(row, "answers"))
    if not answers:
        raise _BadField("field 'answers': at least one is needed")
    queries = row.get("queries") or [_title(row, item, titles) for item in row["supporting"]]
    if not isinstance(queries, list) or len(queries) != len(supporting):
        raise _BadField(f"field 'queries': expected one for each supporting passage, got {queries!r}")
    hops = row.get("hops", len(supporting))
    if type(hops) is not int:
        raise _BadField(f"field 'hops': expected a number, got {hops!r}")
    return Question(
        id=_text(row, "id"),
        question=_text(row, "question"),
        answers=answers,
        supporting=supporting,
        queries=tuple(map(str, queries)),
        hops=hops,
        split=_split(row),
        path=str(row.get("path") or row.get("type") or row.get("kind") or ""),
        new_path=bool(row.get("new_path", False)),
        wrong_query=str(row.get("wrong_query", "")),
        wrong_answer=str(row.get("wrong_answer", "")),
        guess=str(row.get("guess") or _guess(answers, queries)),
    )


def _guess(answers: tuple[str, ...], seen: Sequence[str]) -> str:
    """A wrong answer: no for yes, yes for no, otherwise the first of the titles that is no answer."""
    opposite = {"yes": "no", "no": "yes"}.get(answers[0].lower(), "")
    return opposite or next((title for title in seen if not exact_match(title, answers)), "unknown")


def _passage_id(item: Any, titles: dict[str, str] | None) -> str:
    id = item.get("pid", item.get("id")) if isinstance(item, dict) else item
    if not isinstance(id, str) or (titles is not None and id not in titles):
        raise _BadField(f"field 'supporting': {item!r} is not the id of a passage")
    return id


def _title(row: dict[str, Any], item: Any, titles: dict[str, str] | None) -> str:
    if titles is not None:
        return titles[_passage_id(item, titles)]
    return str((item.get("title") if isinstance(item, dict) else None) or row.get("question"))


def _split(row: dict[str, Any]) -> str:
    """train or heldout, as the row says; by a hash of its id (one in five held out) where it says neither."""
    split = str(row.get("split") or "").lower()
    if split == "train" or split in HELD_OUT:
        return "train" if split == "train" else "heldout"
    return "heldout" if hashlib.sha256(row["id"].encode()).digest()[0] % 5 == 0 else "train"


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (value or name == "title"):
        raise _BadField(f"field {name!r}: expected a text, got {value!r}")
    return value


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise _BadField(f"field {name!r}: expected a list, got {value!r}")
    return value
