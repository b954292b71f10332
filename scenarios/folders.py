"""Folders that are as they were where nothing came of a command."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LESSONS = "lessons.sqlite"  # the file of a run that has its lessons
PLAYED = ("trees.jsonl", "trees.jsonl.zst", "metrics.jsonl", "cassette.jsonl", "checkpoints/*")  # what is worth keeping


def who(folder: Path) -> str:
    """Who plays in the evaluation in a folder, or which model the run there trains; empty where nothing says it."""
    policy = content_of(folder / "evaluation.json").get("policy")
    model = content_of(folder / "scenario.yaml").get("model")
    return short_name(str(policy or (model if isinstance(model, dict) else {}).get("name") or ""))


def short_name(model: str) -> str:
    """The last part of a model's path; for a model in a run's folder that of the run. Other policies are whole."""
    path = Path(model)
    return model if "://" in model else path.parent.name if path.name == "model" else path.name


def content_of(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, unchecked, so that runs of other versions can be shown; empty if it holds
    none."""
    return _content(file, file.stat().st_mtime_ns) if file.is_file() else {}


@functools.lru_cache(1024)
def _content(file: Path, written: int) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def begun(folder: Path) -> Iterator[None]:
    """After an error before anything was played, the folder is as it was before; a new folder is removed.

    A ConnectionError leaves it: what was set up can go on when the server is back.
    """
    before = set(folder.iterdir()) if folder.is_dir() else set()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except ConnectionError:
        raise
    except BaseException:
        from ..agents.store.folder import remove  # most commands come to their end without it

        if not any(path.stat().st_size for pattern in PLAYED for path in folder.glob(pattern)):
            for path in set(folder.iterdir()) - before if folder.is_dir() else ():
                remove(path)
            for path in missing:
                with contextlib.suppress(OSError):  # another run began in it
                    path.rmdir()
        raise
