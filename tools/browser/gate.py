"""Gate: the only way from a page to anything else, a proxy that answers for the site of a task and refuses the rest."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

HEAD = 2**16  # bytes of a request's head
BODY = 2**24  # bytes of a request's body
SECONDS = 30.0  # that another server may take to answer


@dataclass(frozen=True, slots=True)
class Request:
    """What a page asks of its site."""

    method: str
    path: str  # with the query
    headers: Mapping[str, str] = field(default_factory=dict)  # names in small letters
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a site answers."""

    body: bytes = b""
    kind: str = "text/html; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def bytes(self, method: str) -> bytes:
        told = {"Content-Type": self.kind, "Cache-Control": "no-store", **self.headers}
        lines = [f"HTTP/1.1 {self.status} {http.client.responses.get(self.status, 'Status')}"]
        lines += [f"{name}: {value}" for name, value in told.items()]
        lines += [f"Content-Length: {len(self.body)}", "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace") + (b"" if method == "HEAD" else self.body)


REFUSED = Reply(b"<p>This leads outside, which is closed.</p>", status=403)


class Site(Protocol):
    """What serves an origin. Its requests come one at a time, from a thread of its own."""

    @property
    def origin(self) -> str:
        """Such as http://shop.test: any host will do, for no name is looked up."""
        ...

    def answer(self, request: Request) -> Reply: ...


@dataclass(frozen=True)
class FolderSite:
    """The files of a folder."""

    folder: Path
    origin: str = "http://site.test"

    def answer(self, request: Request) -> Reply:
        path = (self.folder / unquote(urlsplit(request.path).path).lstrip("/")).resolve()
        if path.is_dir():
            path /= "index.html"
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            return Reply(b"<p>There is no such page.</p>", status=404)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return Reply(path.read_bytes(), f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)


@dataclass(frozen=True)
class OtherSite:
    """A server that runs already, on this machine or another."""

    origin: str  # http://host:port

    def answer(self, request: Request) -> Reply:
        connection = http.client.HTTPConnection(urlsplit(self.origin).netloc, timeout=SECONDS)
        hop = ("connection", "proxy-connection", "accept-encoding", "content-length")
        headers = {name: value for name, value in request.headers.items() if name not in hop}
        try:
            connection.request(request.method, request.path, request.body or None, headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            return Reply(f"<p>The server does not answer: {error}</p>".encode(), status=502)
        finally:
            connection.close()
        told = {name: value for name, value in answer.getheaders() if name.lower() in ("location", "set-cookie")}
        return Reply(body, answer.getheader("Content-Type") or "text/html", answer.status, told)


class Gate:
    """A proxy on this machine for one page. It answers for `site`; whatever else the page asks for is refused.

    Addresses of other hosts and of other ports of this machine, web sockets, and encrypted connections all come here,
    because Chromium is started so that it resolves no name and connects to nothing but its proxy.
    """

    def __init__(self) -> None:
        self.site: Site | None = None
        self._server: asyncio.Server | None = None
        self._turn = asyncio.Lock()

    async def open(self) -> str:
        """Starts to listen; the proxy's address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEAD)
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}"

    def close(self) -> None:
        if self._server:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost: tuple[type[BaseException], ...] = (
            ConnectionError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            ValueError,
        )
        lost += (asyncio.CancelledError,)  # at the end of the loop; asyncio's own callback would complain of it
        with contextlib.suppress(*lost), contextlib.closing(writer):
            while True:
                method, target, headers = _head(await reader.readuntil(b"\r\n\r\n"))
                size = int(headers.get("content-length", 0))
                if size > BODY:
                    return
                body = await reader.readexactly(size)
                reply = await self._answer(method, target, headers, body)
                writer.write(reply.bytes(method))
                await writer.drain()

    async def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Reply:
        site, parts = self.site, urlsplit(target)
        if method == "CONNECT" or site is None or f"{parts.scheme}://{parts.netloc}" != site.origin:
            return REFUSED
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        async with self._turn:
            return await asyncio.to_thread(site.answer, Request(method, path, headers, body))


def _head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers of a request. ValueError where it is none."""
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    pairs = (line.split(":", 1) for line in lines)
    return method, target, {name.strip().lower(): value.strip() for name, value in pairs}
