"""Checkpoints: how a training run survives being killed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...agents import Run
from ...agents.store import StoreError
from ...agents.store.folder import write_json, write_text
from ...agents.store.store import sync


@dataclass(slots=True)
class Progress:
    """Where a run stands: everything besides weights and optimiser that the next step depends on."""

    stage: int = 0  # number of the stage to go on with
    step: int = 0  # steps done in it
    weights_version: int = 0  # steps done in all stages
    results: dict[str, Any] = field(default_factory=dict)  # evaluations so far, by stage name
    best: float = -1.0  # highest success on all held-out tasks so far
    states: dict[str, Any] = field(default_factory=dict)  # JSON that stages keep from step to step, by stage name


class DamagedCheckpoint(StoreError):
    """A checkpoint is not what was written, or not this model's; nothing of it was loaded."""


SUMS = "SHA256SUMS"  # of a checkpoint's files, as sha256sum reads it


class Checkpoints:
    """The checkpoints of a run, of which at every moment one is whole."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = run.path / "checkpoints"

    def save(
        self, progress: Progress, tensors: Mapping[str, torch.Tensor], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Writes a checkpoint beside the last one, then removes that: at every moment one of them is whole. `files`
        are more of its files, by name."""
        number = max(self._numbers(), default=-1) + 1
        new = self._folder / f"{number:06d}.part"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for i, shard in enumerate(_shards(tensors)):
            file = new / f"{i:04d}.safetensors"
            save_file(shard, file)
            sync(file)
        for name, content in (files or {}).items():
            (new / name).write_bytes(content)
            sync(new / name)
        state = {**asdict(progress), **self._run.sizes(), "tensors": sorted(tensors)}
        write_json(new / "progress.json", state)
        sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(new.iterdir())]
        write_text(new / SUMS, "".join(sums))
        new.rename(new.with_suffix(""))
        for old in self._numbers()[:-1]:
            shutil.rmtree(self._folder / f"{old:06d}")

    def restore(self) -> tuple[Progress, dict[str, torch.Tensor]] | None:
        """The last whole checkpoint; metrics and trees written after it are forgotten. None: there is none.

        DamagedCheckpoint where it is not what was written; then nothing is forgotten.
        """
        self._run.claim()
        if not self._numbers():
            self._run.forget(0, 0)
            return None
        folder = self._folder / f"{self._numbers()[-1]:06d}"
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
        self._run.forget(*sizes)
        return progress, tensors

    def read(self, name: str) -> bytes:
        """A file of the last whole checkpoint; empty where it has none of this name."""
        file = self._folder / f"{self._numbers()[-1]:06d}" / name
        return file.read_bytes() if file.exists() else b""

    def progress(self) -> Progress:
        """Where the last whole checkpoint stands, without reading its tensors."""
        if not self._numbers():
            return Progress()
        state = json.loads((self._folder / f"{self._numbers()[-1]:06d}" / "progress.json").read_text())
        return Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})

    def finish(self) -> None:
        """Removes the checkpoints: the trained model and the summary stay."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _numbers(self) -> list[int]:
        """Whole checkpoints, oldest first."""
        folders = self._folder.glob("*") if self._folder.exists() else ()
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


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
    """Parts of about 128 MB: safetensors copies all tensors of a file before it writes them."""
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        shard[name] = tensor.detach().contiguous()
        if sum(part.nbytes for part in shard.values()) >= size:
            yield shard
            shard = {}
    yield shard
