"""Salvage and migration: a store is written anew, and takes the place of the old one when it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

from .records import Record
from .store import CUT_OFF, EpisodeStore, Loss, sync

Seen = Callable[[int], None]  # hears how many trees were written since the last time


def salvage(store: EpisodeStore, seen: Seen = lambda trees: None) -> tuple[list[Loss], Path | None]:
    """Puts what can be read of a store in its place. What was lost, and where the damaged file lies now.

    Trees behind a loss move up to lower numbers. Where nothing is lost the file stays; where only the last record is
    cut off, that is removed and there is no other file.
    """
    with store.exclusively():
        losses = [found for found in store.survey() if isinstance(found, Loss)]
        if all(loss.why == CUT_OFF for loss in losses):
            if losses:
                store.truncate(losses[0].offset)
            return losses, None
        part = _write_beside(store.path, (found for found in store.survey() if isinstance(found, Record)), seen)
        names = (store.path.with_name(f"{store.path.name}.damaged{number or ''}") for number in count())
        damaged = next(path for path in names if not path.exists())
        os.link(store.path, damaged)
        _take_place(part, store.path)
    return losses, damaged


def migrate(old: EpisodeStore, new: Path, seen: Seen = lambda trees: None) -> None:
    """Writes a store's trees to another file in the present schema, reads them back and, if they are the same, removes
    the old one."""
    with old.exclusively():
        part = _write_beside(new, old.records(), seen)
        for before, after in zip(old.records(), EpisodeStore(part).records(), strict=True):
            if replace(before, shares=False) != replace(after, shares=False):
                raise AssertionError(f"{old.path}: tree {before.number} would not be the same in {new}")
        _take_place(part, new)
        for path in (old.path, old.index_path):
            path.unlink(missing_ok=True)


def _write_beside(path: Path, records: Iterable[Record], seen: Seen) -> Path:
    """A new store with the records, in a file beside the path."""
    part = EpisodeStore(path.with_name(f"part-{path.name}"))
    for leftover in (part.path, part.index_path):
        leftover.unlink(missing_ok=True)
    part.path.touch()
    for record in records:
        part.append(record.tree, record.advantages, record.values, record.lessons, **record.labels)
        seen(1)
    part.close()
    sync(part.path)  # before another file gives way to it
    return part.path


def _take_place(part: Path, path: Path) -> None:
    """Moves a store and its index to a path. A crash in between leaves an index that is found to be another file's."""
    EpisodeStore(path).index_path.unlink(missing_ok=True)
    part.replace(path)
    if (index := EpisodeStore(part).index_path).exists():
        index.replace(EpisodeStore(path).index_path)
