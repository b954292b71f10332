"""Run: the directory of one run, with its trees, metrics, tokenizer and summary."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...tools import Cassette
from ..notebook import conversation, frame, run_html
from .store import EpisodeStore, append_line, finite, read_lines, sync
from .trackers import Board, TensorBoard, Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..tree import RolloutTree


class Run:
    """A directory of scenario.yaml, metrics.jsonl, trees.jsonl.zst, tokenizer.json, model/, summary.json; while it is
    trained, also of checkpoints/, which belong to the trainer.

    A run that began with trees.jsonl, of schema 1, goes on with it. Where an environment reads from outside,
    cassette.jsonl holds what it was answered. Where TensorBoard is installed, tensorboard/ shows the numbers of
    metrics.jsonl; `trackers` show them elsewhere, with sample episodes; `close` completes them.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the run in a directory, which is made if it is missing."""
        self.path = path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.trees = EpisodeStore(trees_file(path))
        self.cassette = Cassette(path / "cassette.jsonl")
        self._metrics = path / "metrics.jsonl"
        self.trackers: Sequence[Tracker] = ()
        self._boards: list[tuple[Tracker, Board]] = []

    @property
    def started(self) -> bool:
        return (self.path / "summary.json").exists() or self._metrics.exists()

    def claim(self) -> None:
        """Keeps others from writing to the run until `close`. StoreLocked where one does; nothing has changed then."""
        self.trees.lock()

    def log(self, **row: Any) -> None:
        boards = self._opened()
        append_line(self._metrics, row)
        for _, board in boards:
            board.add(row)

    def show(self, stage: str, step: int, trees: Sequence[RolloutTree]) -> None:
        """Shows sample episodes on the trackers: of each tree the first."""
        for tracker, board in self._opened() if self.trackers else ():
            if shown := [tree for tree in trees if tree.leaves][: tracker.episodes]:
                board.show(stage, step, [_sample(tree) for tree in shown])

    def _opened(self) -> list[tuple[Tracker, Board]]:
        if not self._boards:
            trackers = (TensorBoard(), *self.trackers)
            self._boards = [(tracker, tracker.open(self.path, self.metrics())) for tracker in trackers]
        return self._boards

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self._metrics))

    def save_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keeps the tokenizer as tokenizer.json, by which the token ids in the run's trees can be read."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # a tokenizer that is written in Python has no such file
            write_text(self.path / "tokenizer.json", backend.to_str())

    def summarize(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def frame(self, kind: Literal["pandas", "polars"] = "pandas") -> Any:
        """The rollouts as a table of pandas or polars, a row for each; see `treegym.agents.notebook.frame`."""
        return frame(self, kind)

    def _repr_html_(self) -> str:
        return run_html(self)

    def sizes(self) -> dict[str, int]:
        """Bytes of metrics and trees, once they have been synced to the disk."""
        for written in (self._metrics, self.trees.path, self.cassette.path):
            if written.exists():
                sync(written)
        metrics = self._metrics.stat().st_size if self._metrics.exists() else 0
        return {"metrics_size": metrics, "trees_size": self.trees.size}

    def close(self) -> None:
        """Writes out what trackers have yet to show and lets others write trees; a later `log` opens them again."""
        self.trees.close()
        while self._boards:
            self._boards.pop()[1].close()

    def forget(self, metrics_size: int, trees_size: int) -> None:
        """Forgets the metrics and trees that were written after these sizes, in bytes."""
        if self._metrics.exists():
            os.truncate(self._metrics, metrics_size)
        self.trees.truncate(trees_size)


def _sample(tree: RolloutTree) -> tuple[str, float, int, str]:
    """A row of COLUMNS: the first rollout of a tree."""
    return str(tree.task.seed), tree.returns[0], len(tree.paths[0]), conversation(tree, 0)


def trees_file(folder: Path) -> Path:
    """Where a run's trees are: trees.jsonl.zst, or trees.jsonl if there is only that."""
    plain, packed = folder / "trees.jsonl", folder / "trees.jsonl.zst"
    return plain if plain.exists() and not packed.exists() else packed


def count_failures(folder: Path) -> int:
    """How many rollouts of a run, or samples of an evaluation, have failed so far."""
    state = folder / "progress.json"  # an evaluation's
    samples = json.loads(state.read_text()).get("failures", {}) if state.exists() else {}
    rows = read_lines(folder / "metrics.jsonl")
    failed: int = sum(row.get("failed_rollouts", 0) for row in rows)
    return failed + sum(map(len, samples.values()))


def tokenizer_file(folder: Path) -> Path:
    """Where a run's tokenizer is: tokenizer.json, or its model's if there is only that."""
    own, models = folder / "tokenizer.json", folder / "model" / "tokenizer.json"
    return models if models.exists() and not own.exists() else own


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a file; numbers that JSON lacks are null."""
    write_text(path, json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, or leaves it as it was. What is no file, such as /dev/stdout, is written to."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
        if part != path:
            sync(part)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder that replaces it in the end; an error leaves `path` as it was.

    What is neither file nor folder, such as /dev/stdout, is itself that place.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    part = path.with_name(f"{path.name}.part")
    remove(part)
    try:
        yield part
        if part.is_dir():
            _replace_folder(path, part)
        else:
            part.replace(path)
    except BaseException:
        remove(part)
        raise


def _replace_folder(path: Path, part: Path) -> None:
    """Renames `part` to `path`; the folder that was there steps aside first, because only an empty one is replaced."""
    former = path.with_name(f"{path.name}.former")
    remove(former)
    try:
        if path.exists():
            path.replace(former)
        part.replace(path)
    except BaseException:
        if former.exists() and not path.exists():
            former.replace(path)
        raise
    remove(former)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
