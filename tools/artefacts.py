"""Directories built once, kept on disk under a key, and checked against their checksums when opened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
_lock = threading.Lock()


def cache_root() -> Path:
    """The environment variable TREEGYM_CACHE, or the user's cache folder."""
    if root := os.environ.get("TREEGYM_CACHE"):
        return Path(root)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("treegym"))


def cached_directory(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory that `build` filled, from the cache if it is there and whole.

    Processes that build at once each write a directory of their own; the first to finish is kept.
    """
    path = cache_root() / kind / key
    with _lock:
        if is_whole(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=path.parent))
        try:
            build(draft)
            (draft / MANIFEST).write_text(json.dumps(checksums(draft)))
            _put(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path


def is_whole(path: Path) -> bool:
    """Whether every file is there, unchanged since it was written."""
    try:
        return bool(json.loads((path / MANIFEST).read_text()) == checksums(path))
    except (OSError, ValueError):
        return False


def checksums(path: Path) -> dict[str, str]:
    """The SHA-256 of every file under the folder, by its path there."""
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST and file.suffix != ".lock"
    )
    return {file.relative_to(path).as_posix(): _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(draft: Path, path: Path) -> None:
    """Renames the draft into place; a damaged directory there is set aside, a whole one is kept."""
    try:
        draft.rename(path)
    except OSError:
        if is_whole(path):
            return
        damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=path.parent))
        path.rename(damaged / path.name)
        shutil.rmtree(damaged)
        draft.rename(path)
