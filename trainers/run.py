"""Run: the directory of one training run, and how it survives being killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..agents import EpisodeStore, StoreError, append_line, read_lines
from ..agents.store import finite, sync
from ..tools import Cassette

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Progress:
    """Where a run stands: everything besides weights and optimiser that the next step depends on."""

    stage: int = 0  # number of the stage to go on with
    step: int = 0  # steps done in it
    weights_version: int = 0  # steps done in all stages
    results: dict[str, Any] = field(default_factory=dict)  # evaluations so far, by stage name
    best: float = -1.0  # highest success on all held-out tasks so far
    states: dict[str, Any] = field(default_factory=dict)  # of parts that have one, JSON, by the name of their stage


class DamagedCheckpoint(StoreError):
    """A checkpoint is not what was written, or not this model's; nothing was loaded of it."""


SUMS = "SHA256SUMS"  # of a checkpoint's files, as sha256sum reads it


class Run:
    """A directory of scenario.yaml, metrics.jsonl, trees.jsonl.zst, tokenizer.json, checkpoints/, model/, summary.json.

    A run that began with trees.jsonl, of schema 1, goes on with it. Where an environment reads from outside,
    cassette.jsonl holds what it was answered. Where TensorBoard is installed, tensorboard/ shows the numbers of
    metrics.jsonl; `close` completes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.trees = EpisodeStore(trees_file(path))
        self.cassette = Cassette(path / "cassette.jsonl")
        self._metrics = path / "metrics.jsonl"
        self._checkpoints = path / "checkpoints"
        self._board: Board | None = None

    @property
    def started(self) -> bool:
        return (self.path / "summary.json").exists() or self._metrics.exists()

    def claim(self) -> None:
        """Nobody else writes to the run until `close`. StoreLocked where somebody does: nothing was changed then."""
        self.trees.lock()

    def log(self, **row: Any) -> None:
        self._board = self._board or Board(self.path / "tensorboard", self.metrics())
        append_line(self._metrics, row)
        self._board.add(row)

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self._metrics))

    def save_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """What the token ids in its trees are read with, one by one."""
        own = getattr(tokenizer, "backend_tokenizer", None)
        if own is not None:  # one that is written in Python has no such file
            write_text(self.path / "tokenizer.json", own.to_str())

    def summarize(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def save(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a checkpoint beside the last one, then removes that: at every moment one of them is whole."""
        number = max(self._numbers(), default=-1) + 1
        new = self._checkpoints / f"{number:06d}.part"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for i, shard in enumerate(_shards(tensors)):
            file = new / f"{i:04d}.safetensors"
            save_file(shard, file)
            sync(file)
        for written in (self._metrics, self.trees.path, self.cassette.path):
            if written.exists():
                sync(written)  # up to the sizes that the checkpoint notes
        state = {
            **asdict(progress),
            "metrics_size": self._metrics.stat().st_size if self._metrics.exists() else 0,
            "trees_size": self.trees.size,
            "tensors": sorted(tensors),
        }
        write_json(new / "progress.json", state)
        sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(new.iterdir())]
        write_text(new / SUMS, "".join(sums))
        new.rename(new.with_suffix(""))
        for old in self._numbers()[:-1]:
            shutil.rmtree(self._checkpoints / f"{old:06d}")

    def restore(self) -> tuple[Progress, dict[str, torch.Tensor]] | None:
        """The last whole checkpoint; metrics and trees written after it are forgotten. None: there is none.

        DamagedCheckpoint where it is not what was written; then nothing is forgotten.
        """
        self.claim()
        if not self._numbers():
            self._forget(0, 0)
            return None
        folder = self._checkpoints / f"{self._numbers()[-1]:06d}"
        try:
            _check_sums(folder)
            state = json.loads((folder / "progress.json").read_text())
            shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
            tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
            if missing := sorted(set(state.pop("tensors", tensors)) - tensors.keys()):
                raise ValueError(f"tensors are missing: {', '.join(missing[:3])}")
            sizes = state.pop("metrics_size"), state.pop("trees_size")
            progress = Progress(**state)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise DamagedCheckpoint(
                f"{folder} is damaged: {error}; the run cannot go on from it, its trees and metrics are whole"
            ) from error
        self._forget(*sizes)
        return progress, tensors

    def progress(self) -> Progress:
        """Where the last whole checkpoint stands, without reading its tensors."""
        if not self._numbers():
            return Progress()
        state = json.loads((self._checkpoints / f"{self._numbers()[-1]:06d}" / "progress.json").read_text())
        return Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})

    def finish(self) -> None:
        """Removes the checkpoints: the trained model and the summary stay."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Writes out what TensorBoard has yet to show and lets others write trees; a later `log` opens it anew."""
        self.trees.close()
        if self._board is not None:
            self._board.close()
        self._board = None

    def _forget(self, metrics_size: int, trees_size: int) -> None:
        if self._metrics.exists():
            os.truncate(self._metrics, metrics_size)
        self.trees.truncate(trees_size)

    def _numbers(self) -> list[int]:
        """Whole checkpoints, oldest first."""
        folders = self._checkpoints.glob("*") if self._checkpoints.exists() else ()
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def trees_file(folder: Path) -> Path:
    """Where a run's trees are: trees.jsonl.zst, or trees.jsonl if there is only that."""
    plain, packed = folder / "trees.jsonl", folder / "trees.jsonl.zst"
    return plain if plain.exists() and not packed.exists() else packed


def tokenizer_file(folder: Path) -> Path:
    """Where a run's tokenizer is: tokenizer.json, or its model's if there is only that."""
    own, models = folder / "tokenizer.json", folder / "model" / "tokenizer.json"
    return models if models.exists() and not own.exists() else own


class Board:
    """The numbers of metric rows as TensorBoard scalars, named stage/metric; does nothing where it is not installed.

    The folder is written anew from the rows so far: they are what a resumed run goes on from.
    """

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer: Any = None
            return
        self._writer = SummaryWriter(str(folder))
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        numbers = {**row}
        for group in ("seconds", "cost"):
            numbers |= {f"{group}/{name}": value for name, value in row.get(group, {}).items()}
        for name, value in numbers.items():
            if name not in ("stage", "step") and isinstance(value, int | float):
                self._writer.add_scalar(f"{row['stage']}/{name}".replace(" ", "-"), value, row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_sums(folder: Path) -> None:
    """ValueError where a file of the checkpoint is not what was written. Older checkpoints have no sums."""
    if not (folder / SUMS).exists():
        return
    for line in (folder / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).exists():
            raise ValueError(f"{name} is missing")
        if _sha256(folder / name) != digest:
            raise ValueError(f"{name} has another checksum than when it was written")


def _shards(tensors: Mapping[str, torch.Tensor], size: int = 1 << 27) -> Iterator[dict[str, torch.Tensor]]:
    """Parts of about 128 MB, for safetensors copies a file's tensors before it writes them."""
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        shard[name] = tensor.detach().contiguous()
        if sum(part.nbytes for part in shard.values()) >= size:
            yield shard
            shard = {}
    yield shard


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a file; numbers that JSON lacks are null."""
    write_text(path, json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, or leaves it as it was. What is no file, such as /dev/stdout, is written to."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
