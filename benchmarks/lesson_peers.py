"""What benchmarks/lessons.py does with another library's memory, inside that library's own environment.

    PEER/bin/python benchmarks/lesson_peers.py ace-framework|reasoning-bank operations|write|kept|recall FOLDER ...

Prints JSON. Imports nothing of treegym. Embeddings are made here, without a model.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUERIES = 20
DIMENSIONS = 256


class Ace:
    """A Skillbook in a JSON file, loaded and saved around each change, as its own documentation does."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "skills.json"
        found = importlib.util.find_spec("ace")
        assert found is not None
        package = types.ModuleType("ace")  # its __init__ imports a dozen services, of which a skillbook needs none
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["ace"] = package
        from ace.skillbook import Skillbook
        from ace.updates import UpdateBatch

        self.book, self.batch = Skillbook, UpdateBatch

    def change(self, kind: str, id: str | None, text: str) -> None:
        book = self.book.load_from_file(str(self.path)) if self.path.exists() else self.book()
        row = {"type": {"DELETE": "REMOVE"}.get(kind, kind), "section": "rules", "skill_id": id, "content": text}
        book.apply_update(self.batch.from_json({"operations": [row]}))
        book.save_to_file(str(self.path))

    def reply(self, text: str) -> None:
        self.batch.from_json(json.loads(text))

    def texts(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        return {skill.id: skill.content for skill in self.book.load_from_file(str(self.path)).skills()}

    def recall(self, texts: list[str]) -> None:
        return None  # the whole book goes into the prompt


class Reasoning:
    """A ReasoningBank over its SQLite store, or in memory where this Python loads no extensions of SQLite.

    Lessons are added by hand (`add_manual`), because what it draws from episodes it asks a model about.
    """

    def __init__(self, folder: Path) -> None:
        from reasoning_bank import InMemoryStore, MemoryItem, ReasoningBank
        from reasoning_bank._json import parse_json_strict

        warnings.simplefilter("ignore")  # utcnow is deprecated
        self.item, self.parse = MemoryItem, parse_json_strict
        try:
            from reasoning_bank import SQLiteVecStore

            store = SQLiteVecStore(folder / "bank.db", dim=DIMENSIONS)
        except (AttributeError, ImportError):
            store = InMemoryStore()
        self.in_memory = isinstance(store, InMemoryStore)
        self.bank = ReasoningBank(llm=no_model, store=store, embedder=Numbers())

    def change(self, kind: str, id: str | None, text: str) -> None:
        if kind == "ADD":
            asyncio.run(self.bank.add_manual("a rule", "", text))
        elif kind == "DELETE":
            asyncio.run(self.bank.delete(str(id)))
        else:
            item = self.bank.store.get(str(id)) or self.item(
                id=str(id), title="", description="", content="", source="manual", task_signature=""
            )
            self.bank.store.update(item.model_copy(update={"content": text, "embedding": Numbers().embed([text])[0]}))

    def reply(self, text: str) -> None:
        self.parse(text)

    def texts(self) -> dict[str, str]:
        return {item.id: item.content for item in self.bank.store.list_all()}

    def recall(self, texts: list[str]) -> list[float]:
        for text in texts:
            self.change("ADD", None, text)
        times = []
        for text in texts[:: len(texts) // QUERIES]:
            start = time.thread_time()
            asyncio.run(self.bank.retrieve(text))
            times.append(time.thread_time() - start)
        return times


async def no_model(prompt: str, *, system: str | None = None) -> str:
    return "not JSON"


class Numbers:
    """Vectors that depend on the text alone."""

    dim = DIMENSIONS

    def embed(self, texts: list[str]) -> list[list[float]]:
        return [_vector(text) for text in texts]


def _vector(text: str) -> list[float]:
    dice = random.Random(text)
    return [dice.uniform(-1, 1) for _ in range(DIMENSIONS)]


SIDES: dict[str, Callable[[Path], Any]] = {"ace-framework": Ace, "reasoning-bank": Reasoning}


def operations(side: Any, rows: list[list[Any]]) -> list[str]:
    """What each operation did, as the texts that are left tell it. Ids are given by the order of additions."""
    said = []
    ids: list[str] = []
    for kind, number, text in rows:
        before = side.texts()
        id = ids[number] if number is not None and number < len(ids) else None if kind == "ADD" else "99"
        try:
            side.reply(text) if kind == "REPLY" else side.change(kind, id, text)
        except Exception as error:
            said.append(f"raises {type(error).__name__}")
            continue
        after = side.texts()
        ids += [new for new in after if new not in before]
        said.append(difference(before, after))
    return said


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    if before == after:
        return "nothing, silently"
    if len(before) == len(after):
        return "changed, the former text is gone"
    return "added" if len(after) > len(before) else "removed, the text is gone"


def main() -> None:
    name, job, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    side = SIDES[name](folder)
    if job == "operations":
        print(json.dumps(operations(side, json.loads(sys.stdin.read()))))
    elif job == "write":
        lost = 0
        for number in range(int(sys.argv[5])):
            try:
                side.change("ADD", None, f"Rule {sys.argv[4]} {number}")
            except Exception:
                lost += 1
        print(lost)
    elif job == "kept":
        print("- (in memory)" if getattr(side, "in_memory", False) else len(set(side.texts().values())))
    else:
        print(json.dumps(side.recall(json.loads(sys.stdin.read()))))


if __name__ == "__main__":
    main()
