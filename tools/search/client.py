"""Search over HTTP, in the protocol of Search-R1's retrieval server; `treegym serve-search` speaks it."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ..protocol import encodable
from .index import Hit, Passage, SearchError

TIMEOUT = 30.0  # seconds
ATTEMPTS = 4
WINDOW = 0.002  # seconds
FIRST_WAIT = 0.1  # seconds, at most, before the second attempt; each further wait may be twice as long
MAX_BATCH = 64  # queries in a request
UNDER_WAY = 4  # shared requests at a time: the busier the server, the more queries gather for the next
MAX_SHARED_CHARS = 2000  # a longer query goes alone: a server that refuses it refuses nobody else


@dataclass(eq=False)
class _Batch:
    """Queries that go out as one request. Whoever puts the first one in sends it, the others wait."""

    queries: list[str] = field(default_factory=list)
    full: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    hits: list[list[Hit]] = field(default_factory=list)  # of each query, once done without an error
    error: str = ""


class RemoteSearch:
    """A server's index; share it between environments and threads. It pickles as its address and settings.

    Queries that threads ask within `window` seconds of the first, or while four requests are under way, go out as one
    request. A request is attempted again, after a random wait, where the connection fails or the server is at fault
    (5xx) or overrun (429); not where the answer takes longer than `timeout` seconds.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT, attempts: int = ATTEMPTS, window: float = WINDOW) -> None:
        try:
            import httpx2
        except ImportError:
            raise ImportError("searching on a server needs httpx2: pip install 'treegym[search]'") from None
        try:
            address = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"no address of a search server: {url!r} ({error})") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"no address of a search server: {url!r}; such as http://127.0.0.1:8000/retrieve")
        self.url, self.timeout, self.attempts, self.window = url, timeout, attempts, window
        self.outside = url
        self._client = httpx2.Client(timeout=timeout)
        self._random = random.Random()
        self._lock = threading.Condition()
        self._gathering: dict[int, _Batch] = {}  # by k
        self._slots = threading.Semaphore(UNDER_WAY)
        self._requests = 0  # under way
        self._closed = threading.Event()

    def search(self, query: str, k: int) -> list[Hit]:
        """The server's best k passages. SearchError where it does not answer."""
        if k < 1:
            return []
        if len(query) > MAX_SHARED_CHARS:
            return self._ask([query], k)[0]
        batch, place = self._join(query, k)
        if place == 0:
            self._lead(batch, k)
        batch.done.wait()
        if batch.error:
            raise SearchError(batch.error)
        return batch.hits[place]

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """What `search` gives for each query, in requests of 64."""
        if k < 1:
            return [[] for _ in queries]
        starts = range(0, len(queries), MAX_BATCH)
        return [hits for start in starts for hits in self._ask(list(queries[start : start + MAX_BATCH]), k)]

    def close(self) -> None:
        """From now on searches fail, also those not sent yet. Returns when the requests under way are answered."""
        with self._lock:
            self._closed.set()
            for batch in self._gathering.values():
                batch.full.set()
            self._lock.wait_for(lambda: not self._requests)
        self._client.close()

    def _join(self, query: str, k: int) -> tuple[_Batch, int]:
        """The batch that the query is in now, and its place there."""
        with self._lock:
            self._check_open()
            batch = self._gathering.setdefault(k, _Batch())
            batch.queries.append(query)
            if len(batch.queries) == MAX_BATCH:
                del self._gathering[k]
                batch.full.set()
            return batch, len(batch.queries) - 1

    def _lead(self, batch: _Batch, k: int) -> None:
        """Waits for company, sends the batch and wakes the others, whatever happens."""
        batch.error = "the search was interrupted"  # unless it comes to an end below
        try:
            batch.full.wait(self.window)
            with self._slots:
                self._part(batch, k)
                batch.hits = self._ask(batch.queries, k)
            batch.error = ""
        except SearchError as error:
            batch.error = str(error)
        finally:
            self._part(batch, k)
            batch.done.set()

    def _part(self, batch: _Batch, k: int) -> None:
        """Nobody joins the batch any more."""
        with self._lock:
            if self._gathering.get(k) is batch:
                del self._gathering[k]

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise SearchError(f"the connection to {self.url} was closed")

    def _ask(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Sends one request, again where an attempt fails."""
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        with self._lock:
            self._check_open()
            self._requests += 1
        try:
            return _read(self._post(body), len(queries), k, self.url)
        finally:
            with self._lock:
                self._requests -= 1
                self._lock.notify_all()

    def _post(self, body: bytes) -> bytes:
        import httpx2

        fault = ""
        for attempt in range(self.attempts):
            if attempt and self._closed.wait(self._random.uniform(0, FIRST_WAIT * 2 ** (attempt - 1))):
                break
            try:
                reply = self._client.post(self.url, content=body, headers={"Content-Type": "application/json"})
            except (httpx2.NetworkError, httpx2.ConnectTimeout, httpx2.RemoteProtocolError) as error:
                fault = f"{self.url} cannot be reached ({error})"
                continue
            except httpx2.TimeoutException:
                raise SearchError(f"{self.url} has not answered within {self.timeout:g} s") from None
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise SearchError(f"{self.url}: {error}") from None
            if reply.status_code == 200:
                return reply.content
            fault = f"{self.url} answered {reply.status_code}: {_detail(reply.text)}"
            if reply.status_code < 500 and reply.status_code != 429:
                break
        raise SearchError(fault)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_remote, (self.url, self.timeout, self.attempts, self.window)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _detail(text: str) -> str:
    """The reason that the reply to a refused request gives."""
    try:
        return str(json.loads(text)["detail"])[:200]
    except (ValueError, LookupError, TypeError):
        return text[:200]


def _read(reply: bytes, count: int, k: int, url: str) -> list[list[Hit]]:
    """The hits of each of `count` queries."""
    try:
        answer = json.loads(reply)
        lists = answer["result"] if isinstance(answer, dict) else answer
        if len(lists) != count:
            raise ValueError(f"{len(lists)} results for {count} queries")
        return [[_hit(item, rank) for rank, item in enumerate(found[:k], 1)] for found in lists]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SearchError(f"{url} answered in another shape: {type(error).__name__}: {error}") from None


def _hit(item: Any, rank: int) -> Hit:
    """A hit from {"document": document, "score"} or from the document alone: {"id", "contents"}, or the contents as a
    text. Contents are a title, in quotes or not, and a text. Search-R1's online servers give neither ids nor scores:
    then the id is a digest of the contents, and the score 1 / rank.
    """
    document = item.get("document", item) if isinstance(item, dict) else item
    fields = {"contents": document} if isinstance(document, str) else document
    title, text = _parts(fields)
    digest = hashlib.blake2b(json.dumps([title, text]).encode(), digest_size=8).hexdigest()
    score = item.get("score") if isinstance(item, dict) else None
    id = fields.get("id")
    return Hit(Passage(digest if id is None else str(id), title, text), 1 / rank if score is None else float(score))


def _parts(document: Mapping[str, Any]) -> tuple[str, str]:
    """Title and text of a document; KeyError where it has none."""
    contents = document.get("contents", document.get("content"))
    if contents is None:
        return str(document.get("title") or ""), encodable(document["text"])
    contents = encodable(contents)
    quoted = contents.startswith('"') and '"\n' in contents
    title, _, text = contents[1:].partition('"\n') if quoted else contents.partition("\n")
    return title, text


_open_lock = threading.Lock()


def open_remote(url: str, timeout: float = TIMEOUT, attempts: int = ATTEMPTS, window: float = WINDOW) -> RemoteSearch:
    """The client of that server; one per process, so that all who search there share requests."""
    with _open_lock:
        return _open(os.getpid(), url, timeout, attempts, window)  # a forked process has connections of its own


@functools.cache
def _open(process: int, *settings: Any) -> RemoteSearch:
    client = RemoteSearch(*settings)
    atexit.register(client.close)
    return client
