"""Shelf: the runs of a folder, told as JSON to the viewer's page a little at a time."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ...agents import EpisodeStore, Node, RolloutTree
from ...agents.evaluation import succeeded
from ...agents.store import Record, StoreError, TreeSummary, Where, read_lines
from ...agents.store.folder import count_failures, tokenizer_file
from ..folders import content_of, who
from .lessons import has_lessons

T = TypeVar("T")

DEPTH = 4  # folders below the shelf's in which runs are looked for
PATIENCE = 0.2  # seconds of reading for one request
SEARCHES = 4  # texts whose search in a run can be continued
MAX_ROWS = 1000  # of a listing in one answer
EXACT = 1 << 53  # JavaScript's numbers round integers from here on


class Reading(Generic[T]):
    """One value for each tree of a growing store. A large store is read over several requests, each for a moment.

    `read(start)` gives the values of the trees from the number `start` on.
    """

    def __init__(self, store: EpisodeStore, read: Callable[[int], Iterator[T]]) -> None:
        self.known: list[T] = []  # the values that were read so far, by number of the tree
        self._store, self._read = store, read
        self._rest: Iterator[T] | None = None
        self._size = 0  # of the store, in bytes, when `_rest` began
        self._lock = threading.Lock()

    def read_on(self, seconds: float = PATIENCE) -> bool:
        """Reads on for about so many seconds. -> whether `known` now covers the store as it was at the beginning"""
        with self._lock:
            until = time.monotonic() + seconds
            if self._rest is None:
                size = self._store.size
                if size == self._size:
                    return True
                self._rest, self._size = self._begin(), size
            try:
                for value in self._rest:
                    self.known.append(value)
                    if time.monotonic() > until:
                        return False
            except BaseException:
                self._size = -1  # so that the next request reads again and raises the same error
                self._rest = None
                raise
            self._rest = None
            return True

    def _begin(self) -> Iterator[T]:
        """The values after the known ones. If the last known value has changed, all values are read again."""
        if self.known:
            rest = self._read(len(self.known) - 1)
            if next(rest, None) == self.known[-1]:
                return rest
            self.known = []
        return self._read(0)


ORDERS = (
    "number",
    "step",
    "rollouts",
    "nodes",
    "mean_return",
    "best_return",
    "success",
    "sampled_tokens",
    "tool_calls",
)


class Volume:
    """One run, as the page shows it."""

    def __init__(self, name: str, path: Path, store: EpisodeStore) -> None:
        self.name, self.path, self.store = name, path, store
        self._summaries = Reading(store, lambda start: store.summaries(start=start))
        self._searches: dict[str, Reading[bool]] = {}  # the latest searches, by text
        self._read: dict[int, Record] = {}  # the trees of the latest requests, by number
        self._lock = threading.Lock()

    def card(self) -> dict[str, Any]:
        """The facts that the list of runs shows."""
        scenario, (summary, fault) = self._scenario, self._summary()
        algorithm, model = _section(scenario, "algorithm"), _section(scenario, "model")
        stages = _section(summary, "stages")
        return {
            "name": self.name,
            "env": _section(scenario, "environment").get("id"),
            "algorithm": None if (self.path / "evaluation.json").exists() else algorithm.get("name"),
            "model": who(self.path) + " lora" * (model.get("weights") == "lora"),
            "seed": scenario.get("seed"),
            "finished": summary is not None,
            "failures": self._failures(),
            "stages": {stage: _section(stages, stage).get("success") for stage in stages},
            "gain": (summary or {}).get("gain"),
            "fault": fault,
            "lessons": has_lessons(self.path),
            "bytes": self.store.size,
        }

    def curves(self) -> dict[str, Any]:
        """The facts of `card`, and the run's metrics, results and scenario."""
        return {
            **self.card(),
            "metrics": list(read_lines(self.path / "metrics.jsonl")),
            "results": _section(self._summary()[0], "stages"),
            "scenario": dict(_flat(self._scenario)),
        }

    def listing(
        self, where: Where, order: str = "", offset: int = 0, limit: int = MAX_ROWS, at: int | None = None
    ) -> dict[str, Any]:
        """Rows `offset` to `offset + limit` of the trees that `where` means, among the trees read so far.

        `place` is the position of the tree with the number `at` in the whole list, -1 if it is not there. ValueError if
        `order` is not one of ORDERS, with a minus for descending order.
        """
        complete, matching = self._matching(where)
        known = self._summaries.known
        key = order.removeprefix("-")
        if key and key not in ORDERS:
            raise ValueError(f"order: one of {', '.join(ORDERS)}, with a minus for the largest first; got {order!r}")
        if key:
            matching.sort(key=lambda tree: self._rank(tree, key), reverse=order.startswith("-"))
        return {
            "known": len(known),
            "complete": complete,
            "matching": len(matching),
            "offset": offset,
            "place": next((place for place, tree in enumerate(matching) if tree.number == at), -1),
            "rows": [self._row(tree) for tree in matching[offset : offset + limit]],
            "stages": sorted({str(tree.labels.get("stage", "")) for tree in known}),
            "envs": sorted({tree.env for tree in known}),
            "causes": sorted({cause for tree in known for cause in tree.causes}),
            "lessons": has_lessons(self.path),
        }

    def numbers(self, where: Where) -> list[int]:
        """The numbers of all trees that `where` means. Reads the whole run first."""
        complete = False
        while not complete:
            complete, matching = self._matching(where)
        return [tree.number for tree in matching]

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of the trees with these numbers. Reads the whole run first."""
        while not self._summaries.read_on():
            pass
        return [self._row(self._summaries.known[number]) for number in numbers]

    def tree(self, number: int) -> dict[str, Any]:
        """A tree, with the text of each of its tokens. IndexError if there is none with this number."""
        with self._lock:
            if number not in self._read:
                latest = dict(islice(reversed(self._read.items()), 3))
                self._read = {**latest, number: self.store.record(number)}
            record = self._read[number]
        tree = record.tree
        return {
            "run": self.name,
            "number": number,
            "labels": record.labels,
            "advantages": [[_mean(turn) for turn in rollout] for rollout in record.advantages or ()] or None,
            "token_advantages": _of_tokens(record),
            "values": record.values,  # [node][token]
            "lessons": record.lessons,
            "has_lessons": has_lessons(self.path),
            "task": asdict(tree.task),
            "messages": [asdict(message) for message in tree.messages],
            "prompt": len(tree.prompt),
            "nodes": [self._node(node) for node in tree.nodes],
            "leaves": tree.leaves,
            "origins": tree.origins,
            "returns": tree.returns,
            "success": self.success_term,
            "succeeded": succeeded(tree, self.success_term) if self._knows(tree) else None,
            "state_key": tree.state_key,
            "info": tree.info,
            "cost": asdict(tree.cost),
        }

    def rollouts_through(self, number: int, nodes: Sequence[int]) -> list[int] | None:
        """The rollouts of a tree that go through any of the nodes; None where the tree cannot be read."""
        try:
            paths = self.store.record(number).tree.paths
        except (LookupError, StoreError):
            return None
        return [rollout for rollout, path in enumerate(paths) if {*path} & {*nodes}]

    def _matching(self, where: Where) -> tuple[bool, list[TreeSummary]]:
        """-> (whether the whole run is read, the trees that `where` means among those read so far)"""
        complete = self._summaries.read_on()
        matching = [tree for tree in self._summaries.known if where.passes(tree)]
        if where.text is not None:
            search = self._search(where.text)
            complete &= search.read_on()
            matching = [tree for tree in matching if tree.number < len(search.known) and search.known[tree.number]]
        return complete, matching

    def _row(self, tree: TreeSummary) -> dict[str, Any]:
        return {
            **{field.name: getattr(tree, field.name) for field in fields(tree) if field.name != "labels"},
            "stage": tree.labels.get("stage"),
            "step": tree.labels.get("step"),
            "success": tree.success(self.success_term),
        }

    def _rank(self, tree: TreeSummary, key: str) -> float:
        if key == "step":
            return _step(tree)
        value = tree.success(self.success_term) if key == "success" else getattr(tree, key)
        return -math.inf if value is None else float(value)

    def _node(self, node: Node) -> dict[str, Any]:
        action = node.action
        return {
            "parent": node.parent,
            "text": action.text,
            "tokens": len(action.token_ids),
            "pieces": self._pieces(action.token_ids, action.text),
            "logprobs": [round(x, 4) for x in action.logprobs],
            "entropies": [round(x, 4) for x in action.entropies],
            "stop": action.stop_reason,
            "weights": action.weights_version,
            "last_weights": action.last_weights_version,
            "observation": len(node.observation),
            "messages": [asdict(message) for message in node.messages],
            "reward": node.reward,
            "terms": node.reward_terms,
            "calls": [asdict(call) for call in node.calls],
            "speaker": node.speaker,
            "terminated": node.terminated,
            "truncated": node.truncated,
            "key": node.state_key,
            "info": node.info,
        }

    def _knows(self, tree: RolloutTree) -> bool:
        return any(self.success_term in node.reward_terms for node in tree.nodes)

    def _search(self, text: str) -> Reading[bool]:
        """For each tree, whether it holds a text. The last searches are kept, each for the page that asked it."""

        def read(start: int) -> Iterator[bool]:
            return (Where(text=text).text_occurs(record.tree) for record in self.store.records(start))

        with self._lock:
            search = self._searches.pop(text, None) or Reading(self.store, read)
            self._searches[text] = search
            if len(self._searches) > SEARCHES:
                del self._searches[next(iter(self._searches))]
        return search

    def _pieces(self, tokens: Sequence[int], text: str) -> list[str] | None:
        file = tokenizer_file(self.path)
        return pieces(_tokenizer(file, file.stat().st_mtime_ns), tokens, text) if tokens and file.is_file() else None

    def _summary(self) -> tuple[dict[str, Any] | None, str]:
        """-> (the summary, None without a readable one; why the file cannot be read, empty if it can)"""
        file = self.path / "summary.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            return None, f"{file.name} cannot be read: {error}"
        if content is None or isinstance(content, dict):
            return content, ""
        return None, f"{file.name} holds no summary"

    def _failures(self) -> int:
        """How many rollouts failed. 0 if the files with that number cannot be read."""
        try:
            return count_failures(self.path)
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    @property
    def success_term(self) -> str:
        return success_term(self.path)

    @property
    def _scenario(self) -> dict[str, Any]:
        return content_of(self.path / "scenario.yaml")


class Shelf:
    """The runs in a folder and its subfolders, by name; or the one run whose folder it is."""

    def __init__(self, root: Path, open_store: Callable[[Path], EpisodeStore]) -> None:
        self.root = root
        self._open_store = open_store
        self._volumes: dict[str, Volume] = {}
        self._lock = threading.Lock()

    def volumes(self) -> dict[str, Volume]:
        """The runs that are there now, by name."""
        with self._lock:
            paths = {self._name(path): path for path in run_folders(self.root)}
            self._volumes = {
                name: self._volumes.get(name) or Volume(name, path, self._open_store(path))
                for name, path in sorted(paths.items())
            }
            return self._volumes

    def volume(self, name: str) -> Volume:
        """The run with a name. LookupError if there is none."""
        volume = self._volumes.get(name) or self.volumes().get(name)
        if volume is None:
            raise LookupError(f"no run {name!r} in {self.root}")
        return volume

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path != self.root else path.resolve().name


def success_term(run: Path) -> str:
    """The reward term that is 1 where a rollout succeeded, as the scenario in a run's folder names it."""
    return str(_section(content_of(run / "scenario.yaml"), "environment").get("success", "exact"))


def _mean(advantage: float | Sequence[float]) -> float:
    """The mean advantage of a turn, which has one number, or one for each of its tokens."""
    if isinstance(advantage, float | int):
        return advantage
    return sum(advantage) / len(advantage) if advantage else 0.0


def _of_tokens(record: Record) -> list[list[Sequence[float] | None]] | None:
    """[rollout][turn]: the advantages of the turn's tokens, or None if the turn has one for all of them.

    The result is None if every turn has one for all of its tokens.
    """
    rows = [
        [None if isinstance(turn, float | int) else turn for turn in rollout] for rollout in record.advantages or ()
    ]
    return rows if any(turn is not None for row in rows for turn in row) else None


def run_folders(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The folders that hold a scenario, metrics or trees, at most `depth` levels below `root`. Runs hold no runs."""
    if any(any(root.glob(pattern)) for pattern in ("scenario.yaml", "metrics.jsonl*", "trees.jsonl*")):
        yield root
    elif depth and root.is_dir():
        for folder in root.iterdir():
            if folder.is_dir() and not folder.is_symlink():
                yield from run_folders(folder, depth - 1)


def pieces(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[str] | None:
    """The text of each token. Joined they are `text`, perhaps without that of a last end-of-turn token.

    None if they do not join to it.
    """
    stream = DecodeStream(skip_special_tokens=False)
    try:
        parts = [stream.step(tokenizer, token) or "" for token in tokens]  # "": later tokens complete the character
    except Exception as error:  # OverflowError or a plain Exception: the tokenizer does not know a token
        if not isinstance(error, OverflowError) and type(error) is not Exception:
            raise
        return None
    if "".join(parts) == text or "".join(parts[:-1]) == text:
        return parts
    return None


@lru_cache(4)
def _tokenizer(file: Path, written: int) -> Tokenizer:
    return Tokenizer.from_file(str(file))


def to_json(content: Any) -> str:
    """JSON that JavaScript reads exactly. Integers from EXACT on become texts, NaN and infinities become null."""
    return json.dumps(_exact(content), separators=(",", ":"))


def _exact(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= EXACT:
        return str(value)
    return value


def _step(tree: TreeSummary) -> float:
    step = tree.labels.get("step")
    return step if isinstance(step, int | float) else -math.inf


def _section(content: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    found = (content or {}).get(name)
    return found if isinstance(found, dict) else {}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)
