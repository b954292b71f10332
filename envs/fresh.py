"""Episodes in fresh interpreters with other hash seeds: what they say must not depend on the order of a set.

Each interpreter unpickles the function that makes the environment, which cloudpickle writes by value where it is not in
a module that can be imported. Environments that are registered here are registered there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.vector.utils import CloudpickleWrapper

from .base import TextEnv

HASH_SEEDS = ("1", "2")  # two, since a set of two texts has the same order under every other seed
JOB = "job.pickle"
INSIDE = "TREEGYM_FRESH"  # set in a fresh interpreter: a module that calls check_env at its import starts no more
Told = list[dict[str, Any]]  # JSON, of reset and of every turn
Play = Callable[[Callable[[], TextEnv], dict[str, Any], Sequence[int]], list[Told]]


class NotMade(Exception):
    """Why a fresh interpreter cannot make the environment."""


def told_elsewhere(
    play: Play, new: Callable[[], TextEnv], options: Mapping[str, Any], seeds: Sequence[int]
) -> list[list[Told]]:
    """What `play` gives, [interpreter][seed]; nothing in an interpreter that is a fresh one itself.

    NotMade; AssertionError where an episode raises there.
    """
    if INSIDE in os.environ:
        return []
    with tempfile.TemporaryDirectory() as folder:
        try:
            job = _dumps((new, dict(options), list(seeds)))
        except Exception as error:  # whatever the parts of the user's function raise when they are pickled
            raise NotMade(f"it cannot be pickled: {type(error).__name__}: {error}") from error
        Path(folder, JOB).write_bytes(pickle.dumps((play, dict(_specs()), job)))
        with ThreadPoolExecutor(len(HASH_SEEDS)) as pool:
            return list(pool.map(lambda hash_seed: _run(folder, hash_seed), HASH_SEEDS))


def _dumps(value: Any) -> bytes:
    return pickle.dumps(CloudpickleWrapper(value))


def _specs() -> Iterator[tuple[str, bytes]]:
    for id, spec in gymnasium.registry.items():
        try:
            yield id, _dumps(spec)
        except Exception:  # whatever its parts raise when they are pickled
            continue


def _run(folder: str, hash_seed: str) -> list[Told]:
    answer = Path(folder, f"{hash_seed}.json")
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import main; main()", str(Path(folder, JOB)), str(answer)],
        env={**os.environ, INSIDE: "1", "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # an environment may print
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise AssertionError(
            f"in a fresh interpreter with PYTHONHASHSEED={hash_seed} it raises:\n{done.stderr.strip()}"
        )
    found = json.loads(answer.read_text())
    if "fault" in found:
        raise NotMade(found["fault"])
    episodes: list[Told] = found["episodes"]
    return episodes


def main() -> None:
    """Of the fresh interpreter: job and answer are the files that the command line names."""
    job, answer = map(Path, sys.argv[1:])
    play, specs, made = pickle.loads(job.read_bytes())
    try:
        for id in specs.keys() - gymnasium.registry.keys():
            with contextlib.suppress(Exception):  # an environment with this one cannot be made here, which is then said
                gymnasium.registry[id] = pickle.loads(specs[id]).fn
        new, options, seeds = pickle.loads(made).fn
        new().close()
    except Exception as error:
        answer.write_text(json.dumps({"fault": f"{type(error).__name__}: {error}"}))
        return
    answer.write_text(json.dumps({"episodes": play(new, options, seeds)}))


def as_json(info: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a store could hold."""
    return dict(_storable(info.items()))


def _storable(entries: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, value in entries:
        try:
            yield name, json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
