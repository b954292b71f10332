"""Server: requests to a model's server over HTTP, made again while it is away, for as long as patience lasts."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

from ..policy import ContextLengthExceeded
from ..rollouts.failure import FailureCause, context_exceeded

TIMEOUT = 120.0  # seconds of a request
PATIENCE = 180.0  # seconds that a request is made again for; a server that is started anew takes one to three minutes
FIRST_WAIT = 0.5  # seconds, at most, before the second attempt; each further wait may be twice as long
LONGEST_WAIT = 60.0  # seconds that a server may ask for, and that a wait may become
KEPT_ALIVE = 4.0  # seconds that an idle connection is kept: less than the 5 after which vLLM closes it


class ServerError(ConnectionError):
    """A server that does not answer as it must, in one line."""

    def __init__(self, fault: str, cause: FailureCause = FailureCause.MALFORMED, status: int | None = None) -> None:
        super().__init__(fault)
        self.cause, self.status = cause, status  # status: of a reply over HTTP that refuses the request


class Passing(Exception):
    """A fault that may have passed when the request is made again."""

    def __init__(self, fault: str, cause: FailureCause, wait: float = 0.0) -> None:
        super().__init__(fault)
        self.cause, self.wait = cause, wait  # wait: seconds that the server asks for


def _never(reply: Mapping[str, Any]) -> bool:
    return False


class Server:
    """Requests to a server, so many at a time.

    A request is made again, after a random wait or the one that Retry-After asks for, where the connection fails, no
    answer comes in time or one is cut, the server is at fault (5xx) or overrun (429), until `patience` seconds have
    passed. A server belongs to the event loop it is first asked in; close it there.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        at_once: int = 32,
        timeout: float = TIMEOUT,
        patience: float | None = None,  # PATIENCE
        alive: Callable[[], bool] = lambda: True,  # patience ends where the server's process has
        kept_alive: float = KEPT_ALIVE,
    ) -> None:
        try:
            import httpx2
        except ImportError:
            raise ImportError("asking a server needs httpx2: pip install 'treegym[search]'") from None
        self.url, self.timeout, self._key = url.rstrip("/"), timeout, key
        self.patience = PATIENCE if patience is None else patience
        self._alive = alive
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        kept = at_once if kept_alive else 0
        limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=kept, keepalive_expiry=kept_alive)
        self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, headers=headers)
        self._slots = asyncio.Semaphore(at_once)
        self._random = random.Random()

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        patience: float | None = None,
        again: Callable[[Mapping[str, Any]], bool] = _never,
        read: Callable[[str, str], dict[str, Any]] | None = None,  # _object
    ) -> dict[str, Any]:
        """The JSON object that answers a POST of `body`, or a GET without one. ServerError, also where this is closed.

        A reply for which `again` holds does not count, and is asked for again. `timeout` and `patience`, seconds, may
        differ from the server's. ContextLengthExceeded where the server says that the conversation is too long for its
        model.
        """
        patience = self.patience if patience is None else patience
        begun = time.monotonic()
        for attempt in range(1, 1 << 30):
            try:
                async with self._slots:
                    text = await self._once(f"{self.url}/{path}", body, headers, timeout or self.timeout)
                reply = (read or _object)(text, f"{self.url}/{path}")
                if again(reply):
                    raise Passing(f"{self.url}/{path} aborted the request", FailureCause.SERVER)
                return reply
            except Passing as passing:
                longest = min(FIRST_WAIT * 2.0 ** min(attempt - 1, 30), LONGEST_WAIT)
                wait = passing.wait + self._random.uniform(0, longest)
                if time.monotonic() + wait - begun > patience or not self._alive():
                    raise ServerError(f"{passing}; {attempt} attempts", passing.cause) from None
                await asyncio.sleep(wait)
        raise AssertionError("patience ends before")

    async def tell(self, path: str, body: Mapping[str, Any], **more: Any) -> None:
        """As `ask`, where it does not matter what is answered, only that the request is done."""
        await self.ask(path, body, read=lambda text, url: {}, **more)

    async def _once(
        self, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None, timeout: float
    ) -> str:
        import httpx2

        more: dict[str, Any] = {"headers": dict(headers or {}), "timeout": timeout}
        if self._client.is_closed:
            raise ServerError(f"{url}: its connections were closed", FailureCause.CONNECTION)
        try:
            reply = await (self._client.get(url, **more) if body is None else self._client.post(url, json=body, **more))
        except httpx2.TimeoutException:
            raise Passing(f"{url} has not answered within {timeout:g} s", FailureCause.TIMEOUT) from None
        except httpx2.TransportError as error:
            fault = f"{url} cannot be reached ({error or type(error).__name__})"
            raise Passing(fault, FailureCause.CONNECTION) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ServerError(f"{url}: {error}", FailureCause.REFUSED) from None
        status = reply.status_code
        if status == 200:
            return str(reply.text)
        fault = f"{url} answered {status}: {_reason(reply.text)}"
        if context_exceeded(status, reply.text):
            raise ContextLengthExceeded(fault)
        if status < 500 and status != 429:
            raise ServerError(fault, FailureCause.REFUSED, status)
        cause = FailureCause.OVERRUN if status == 429 else FailureCause.SERVER
        raise Passing(fault, cause, _seconds(reply.headers.get("Retry-After", "")))

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[Self]:
        """The same server, with a connection of its own for each request.

        After an error of its code (500) uvicorn closes the connection: a request that is made once must not meet that.
        """
        settings: dict[str, Any] = {"key": self._key, "timeout": self.timeout, "patience": self.patience}
        other = type(self)(self.url, **settings, alive=self._alive, kept_alive=0.0)
        try:
            yield other
        finally:
            await other.close()

    async def close(self) -> None:
        await self._client.aclose()


def _seconds(text: str) -> float:
    """The seconds of a Retry-After header; 0 where it names a date instead."""
    return min(float(text), LONGEST_WAIT) if text.isdecimal() else 0.0


def _object(text: str, url: str) -> dict[str, Any]:
    """The JSON object that a text is. A text that is no JSON may be one that was cut."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        fault = f"{url} answered with something else than a JSON object: {text[:80]!r}"
        raise Passing(fault, FailureCause.MALFORMED) from None
    if not isinstance(value, dict):
        raise ServerError(f"{url} answered with something else than a JSON object: {text[:80]!r}")
    return value


def _reason(text: str) -> str:
    """What a refusal says of its cause, on one line."""
    try:
        row = json.loads(text)
        text = str(row["error"]["message"] if isinstance(row["error"], dict) else row["error"])
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:300]
