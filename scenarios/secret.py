"""What the seeds of tasks derive from, so that code that an agent runs cannot search for them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from filelock import FileLock
from gymnasium.envs.registration import load_env_creator, spec

from ..tools.artefacts import cache_root
from ..trainers import TaskSet
from .errors import ScenarioError


def with_secret(environment: TaskSet) -> TaskSet:
    """The environment with this installation's secret, where agents run code in it and the scenario gives none."""
    if environment.secret is not None or not _runs_code(environment.id):
        return environment
    return replace(environment, secret=installation_secret())


def with_secrets(written: Any) -> Any:
    """The same for every `environment: {id: …}` within a part as a scenario writes it."""
    if isinstance(written, list | tuple):
        return type(written)(with_secrets(part) for part in written)
    if not isinstance(written, Mapping):
        return written
    content = {name: with_secrets(part) for name, part in written.items()}
    environment = content.get("environment")
    if isinstance(environment, Mapping) and "id" in environment:
        secret = with_secret(TaskSet(str(environment["id"]), secret=environment.get("secret"))).secret
        content["environment"] = {**environment, **({"secret": secret} if secret else {})}
    return content


def installation_secret() -> str:
    """128 random bits, drawn once and kept in the cache folder."""
    file = cache_root() / "secret"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                draft = file.with_suffix(".draft")
                draft.touch(mode=0o600)
                draft.write_text(secrets.token_hex(16))
                draft.replace(file)
            return file.read_text()
    except OSError as error:
        raise ScenarioError(f"environment.secret: {file} cannot be kept ({error}); give one in the scenario") from error


def _runs_code(id: str) -> bool:
    entry = spec(id.rpartition(":")[2]).entry_point
    made = load_env_creator(entry) if isinstance(entry, str) else entry
    return bool(getattr(made, "runs_code", False))
