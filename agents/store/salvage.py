"""Salvage and migration: a store is written into a new file, which replaces the old one once it is complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

from .records import Record
from .store import CUT_OFF, EpisodeStore, Loss, sync

Progress = Callable[[int], None]  # is called with the number of trees that were written since the last call


def salvage(store: EpisodeStore, progress: Progress = lambda trees: None) -> tuple[list[Loss], Path | None]:
    """Replaces a store by the records of it that can be read. -> (what was lost, the file that was damaged)

    The trees after a loss get lower numbers. If nothing is lost the file stays as it is. If only the last record is cut
    off, it is removed from the file. In both cases there is no damaged file: None.
    """
    with store.exclusively():
        losses = [found for found in store.survey() if isinstance(found, Loss)]
        if all(loss.why == CUT_OFF for loss in losses):
            if losses:
                store.truncate(losses[0].offset)
            return losses, None
        part = _write_beside(store.path, (found for found in store.survey() if isinstance(found, Record)), progress)
        names = (store.path.with_name(f"{store.path.name}.damaged{number or ''}") for number in count())
        damaged = next(path for path in names if not path.exists())
        os.link(store.path, damaged)
        _take_place(part, store.path)
    return losses, damaged


def migrate(old: EpisodeStore, new: Path, progress: Progress = lambda trees: None) -> None:
    """Writes the trees of a store to the file `new` in the present schema and removes the old file.

    The new trees are read back and compared before that. AssertionError if one differs: then both files stay as they
    were.
    """
    with old.exclusively():
        part = _write_beside(new, old.records(), progress)
        for before, after in zip(old.records(), EpisodeStore(part).records(), strict=True):
            if replace(before, shares=False) != replace(after, shares=False):
                raise AssertionError(f"{old.path}: tree {before.number} would not be the same in {new}")
        _take_place(part, new)
        for path in (old.path, old.index_path):
            path.unlink(missing_ok=True)


def _write_beside(path: Path, records: Iterable[Record], progress: Progress) -> Path:
    """Writes the records to a new store in the folder of `path`. -> its file"""
    part = EpisodeStore(path.with_name(f"part-{path.name}"))
    for leftover in (part.path, part.index_path):
        leftover.unlink(missing_ok=True)
    part.path.touch()
    for record in records:
        part.append(record.tree, record.advantages, record.values, record.lessons, **record.labels)
        progress(1)
    part.close()
    sync(part.path)  # before it replaces another file
    return part.path


def _take_place(part: Path, path: Path) -> None:
    """Moves a store and its index to a path. A crash in between leaves a store without an index, which is rebuilt."""
    EpisodeStore(path).index_path.unlink(missing_ok=True)
    part.replace(path)
    if (index := EpisodeStore(part).index_path).exists():
        index.replace(EpisodeStore(path).index_path)
