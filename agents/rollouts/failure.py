"""Failures of the world: what ends one rollout and is counted, while its siblings go on.

Such failures are a server that is gone or does not answer, a sandbox that stopped, a machine that is out of space.
Errors of code, an environment's or ours, are no failures: they propagate.
"""

from __future__ import annotations

import errno
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ...envs import Task
from ...tools import EpisodeLost, ServerUnavailable
from ...tools.browser import BrowserUnavailable
from ...tools.sandbox import SandboxError, SandboxUnavailable


class FailureCause(StrEnum):
    """Why a rollout failed."""

    CONNECTION = "connection failed"
    TIMEOUT = "timed out"
    OVERRUN = "server overrun"  # 429, in every attempt
    SERVER = "server error"  # 5xx, in every attempt
    REFUSED = "request refused"  # 4xx
    MALFORMED = "malformed answer"
    TOOLS = "tool server lost"
    SANDBOX = "sandbox failed"
    RESOURCES = "out of resources"  # disk, memory, descriptors, processes
    CRASHED = "crashed"  # a process or a page that the environment talks to is gone
    ERROR = "error in the environment's code"


@dataclass(frozen=True, slots=True)
class Failure:
    """A rollout, or a whole tree, that did not come to its end."""

    task: Task
    rollout: int | None  # None: the whole tree, such as where the environment could not be reset
    turn: int  # counted from 1; 0: the reset
    cause: FailureCause
    error: str
    raised: BaseException = field(repr=False, compare=False)

    @property
    def place(self) -> str:
        return f"{self.task.env}, seed {self.task.seed}, turn {self.turn}"


class TooManyFailures(Exception):
    """More failed than is allowed; what was played before is kept."""


_KINDS: tuple[tuple[type[BaseException], FailureCause | None], ...] = (
    (SandboxUnavailable, None),  # it is not installed, which another try would not mend
    (BrowserUnavailable, None),
    (EpisodeLost, FailureCause.CRASHED),
    (SandboxError, FailureCause.SANDBOX),
    (ServerUnavailable, FailureCause.TOOLS),
    (TimeoutError, FailureCause.TIMEOUT),
    (subprocess.TimeoutExpired, FailureCause.TIMEOUT),
    (BrokenExecutor, FailureCause.CRASHED),
    (EOFError, FailureCause.CRASHED),
    (subprocess.CalledProcessError, FailureCause.CRASHED),
    (ConnectionError, FailureCause.CONNECTION),
    (MemoryError, FailureCause.RESOURCES),
)
_ERRNO = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EIO),
        FailureCause.RESOURCES,
    ),
    **dict.fromkeys((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN), FailureCause.CONNECTION),
}
_CLIENTS = {  # base classes of HTTP clients' errors, by name: which of them is installed does not matter
    "httpx.TimeoutException": FailureCause.TIMEOUT,
    "httpx2.TimeoutException": FailureCause.TIMEOUT,
    "httpx.TransportError": FailureCause.CONNECTION,
    "httpx2.TransportError": FailureCause.CONNECTION,
    "requests.Timeout": FailureCause.TIMEOUT,
    "requests.ConnectionError": FailureCause.CONNECTION,
    "aiohttp.ClientConnectionError": FailureCause.CONNECTION,
    "socket.gaierror": FailureCause.CONNECTION,
}


def failure_cause(error: BaseException) -> FailureCause | None:
    """None for an error of code. An error that was raised from another one has that one's cause.

    An environment's own exceptions can be subclasses of ConnectionError or TimeoutError, or have a `cause`.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(cause := getattr(link, "cause", None), FailureCause):
            return cause
        for kind, known in _KINDS:
            if isinstance(link, kind):
                return known
        if isinstance(link, OSError) and link.errno in _ERRNO:
            return _ERRNO[link.errno]
        for kind in type(link).__mro__:
            if named := _CLIENTS.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}"):
                return named
        link = link.__cause__
    return None


# what servers say where a conversation is too long for the model

_CODES = re.compile(r"context_length_exceeded|exceed_context_size|context_window|max_tokens_exceeded")
_WORDS = re.compile(
    r"""context[ _-](length|window|size|limit)                          # OpenAI, vLLM, SGLang, llama.cpp, LM Studio
    | max(imum)?\ (model|prompt|input|sequence|allowed)\ (input\ )?length   # xAI, vLLM, SGLang
    | maximum\ number\ of\ (input\ )?tokens                             # Gemini
    | (prompt|inputs?|request|messages?|conversation)\ (is|are)\ too\ (long|large)  # Anthropic, Fireworks, Bedrock
    | too\ many\ (input\ )?tokens                                       # Cohere
    | tokens?\b.{0,40}\b(exceeds?|must\ be\ <=|must\ be\ less|longer\ than)   # TGI, OpenAI
    | must\ have\ less\ than\ \d+\ tokens                               # TGI
    | max_seq_len|max_model_len|n_ctx                                  # vLLM, llama.cpp
    | reduce\ the\ length\ of                                           # Groq, OpenAI
    | max_tokens\ must\ be\ at\ least\ 1,\ got\ -                       # vLLM: what is left of the context
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LIMITS_OF_RATE = (401, 403, 404, 429)  # statuses whose texts may speak of tokens too


def context_exceeded(status: int, body: str) -> bool:
    """Whether a server's refusal says that the conversation, with the reply, would be too long for the model."""
    if status in _LIMITS_OF_RATE:
        return False
    return any(_CODES.search(text) or _WORDS.search(text) for text in _told(body))


def _told(body: str) -> Iterator[str]:
    """Codes, types and messages of an error; not what it repeats of the request."""
    try:
        row = json.loads(body)
    except (ValueError, RecursionError):
        yield body[:1000]
        return
    yield from _texts(row, ("error", "detail"), ("code", "type", "error_type", "message", "msg"))


def _texts(part: Any, inner: tuple[str, ...], names: tuple[str, ...]) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from _texts(item, inner, names)
    elif isinstance(part, dict):
        yield from (part[name] for name in names if isinstance(part.get(name), str))
        for name in inner:
            yield from _texts(part.get(name), inner, names)
