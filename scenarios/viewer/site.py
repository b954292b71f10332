"""The viewer's site: the answer at each path, the server, and the page with its data in one file."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ...agents.store import StoreError, Where
from .lessons import has_lessons, lesson_page, lessons_export, lessons_listing
from .shelf import MAX_ROWS, Shelf, Volume, to_json

PAGE = Path(__file__).parent / "page"
LISTING = ("run", "order", "offset", "limit", "at")  # parameters of /api/trees; all others are conditions on trees
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = "default-src 'none'; {0}; img-src data:; base-uri 'none'; form-action 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY.format("script-src 'self'; style-src 'self'; connect-src 'self'")
    + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def exported(shelf: Shelf, picked: Mapping[str, Sequence[int]]) -> str:
    """One HTML file that holds the page and the data of the picked trees, by run.

    Its Content Security Policy admits the page's own scripts and styles only, by their hashes.
    """
    volumes = {name: volume for name, volume in shelf.volumes().items() if name in picked}
    data = {
        "title": shelf.root.resolve().name,
        "runs": [volume.card() for volume in volumes.values()],
        "curves": {name: volume.curves() for name, volume in volumes.items()},
        "rows": {name: volume.rows(picked[name]) for name, volume in volumes.items()},
        "trees": {name: {n: volume.tree(n) for n in picked[name]} for name, volume in volumes.items()},
        "lessons": {
            name: _lessons(volume, picked[name]) for name, volume in volumes.items() if has_lessons(volume.path)
        },
    }
    text = to_json(data).replace("<", "\\u003c")  # a "<" in the data could end its element
    hashes: dict[str, list[str]] = {"script": [], "style": []}

    def inlined(match: re.Match[str]) -> str:
        kind = "script" if match["script"] else "style"
        content = (PAGE / (match["script"] or match["style"])).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
        return f"<{kind}>{content}</{kind}>"

    page = (PAGE / "index.html").read_text(encoding="utf-8")
    scripts = r'<script src="(?P<script>[\w.]+)"></script>|<link rel="stylesheet" href="(?P<style>[\w.]+)">'
    page = re.sub(scripts, inlined, page)
    sources = "; ".join(f"{kind}-src {' '.join(hashes[kind])}" for kind in hashes)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(sources)}">'
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{policy}', 1)
    return page.replace("<script>", f'<script type="application/json" id="data">{text}</script>\n<script>', 1)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """The answer to a request."""

    status: HTTPStatus
    kind: str  # media type
    body: bytes


class Site:
    """Answers each path: the page's own files, which are read once, and /api/ with what a shelf knows.

    No path is looked up in the file system.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._files = {f"/{file.name}": file.read_bytes() for file in PAGE.iterdir() if file.suffix in KINDS}
        self._files["/"] = self._files["/index.html"]

    def answer(self, target: str) -> HttpResponse:
        try:
            path, values = urlsplit(target).path, dict(parse_qsl(urlsplit(target).query))
            if path in self._files:
                return HttpResponse(HTTPStatus.OK, KINDS[Path(path).suffix or ".html"], self._files[path])
            return _json(HTTPStatus.OK, self._ask(path, values))
        except LookupError as error:
            return _json(HTTPStatus.NOT_FOUND, {"error": str(error.args[0])})
        except ValueError as error:
            return _json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except (OSError, StoreError) as error:  # a run that is damaged, or was removed
            return _json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})

    def _ask(self, path: str, values: dict[str, str]) -> Any:
        if path == "/api/runs":
            cards = [volume.card() for volume in self._shelf.volumes().values()]
            return {"title": self._shelf.root.resolve().name, "runs": cards}
        if path not in ("/api/curves", "/api/trees", "/api/tree", "/api/lessons", "/api/lesson"):
            raise LookupError(f"nothing at {path}")
        volume = self._shelf.volume(values.get("run", ""))
        if path == "/api/curves":
            return volume.curves()
        if path == "/api/tree":
            return volume.tree(_count("tree", values, 0))
        if path == "/api/lessons":
            return lessons_listing(volume.path, values.get("state", ""), values.get("words", ""))
        if path == "/api/lesson":
            return lesson_page(volume.path, _count("lesson", values, 0), volume.rollouts_through)
        limit = min(_count("limit", values, MAX_ROWS), MAX_ROWS)
        at = _count("at", values, 0) if "at" in values else None
        conditions = {name: text for name, text in values.items() if name not in LISTING}
        where = Where.parse(conditions, volume.success_term)
        return volume.listing(where, values.get("order", ""), _count("offset", values, 0), limit, at)


def _lessons(volume: Volume, picked: Sequence[int]) -> dict[str, Any]:
    """The lessons of a run for an exported file that holds the picked trees, or why they cannot be read."""

    def through(tree: int, nodes: Sequence[int]) -> list[int] | None:
        return volume.rollouts_through(tree, nodes) if tree in picked else None

    try:
        return {"pages": lessons_export(volume.path, through)}
    except (OSError, StoreError) as error:
        return {"error": str(error)}


def _count(name: str, values: dict[str, str], default: int) -> int:
    text = values.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(f"{name}: a number from 0, got {text!r}")
    return int(text)


def _json(status: HTTPStatus, content: Any) -> HttpResponse:
    return HttpResponse(status, "application/json", to_json(content).encode())


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests whose Host is a name of this server."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds; a connection that is silent for longer is closed
    server_version, sys_version = "treegym", ""

    def __init__(self, site: Site, names: frozenset[str], *arguments: Any) -> None:
        self._site, self._names = site, names
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self._trusted(self.headers.get("Host", "")):
            answer = self._site.answer(self.path)
        else:  # DNS rebinding: another site's name resolves to this address, so its page could read the answers
            answer = _json(HTTPStatus.FORBIDDEN, {"error": "this server answers to its address and to localhost only"})
        self.send_response(answer.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{answer.kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def _trusted(self, host: str) -> bool:
        """Whether Host is an address, localhost, or the name given to --host: names that no other site can use."""
        name = re.sub(r":\d*$", "", host).strip("[]")
        if name.lower() in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Prints nothing: requests are not what the user watches the terminal for."""


class ViewServer(ThreadingHTTPServer):
    """Serves a site at one address."""

    daemon_threads = True  # open pages keep their connections, which must not keep the process alive

    def __init__(self, site: Site, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = AF_INET6
        names = frozenset({"localhost", host.lower()})
        super().__init__((host, port), partial(Handler, site, names))
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser that leaves a page closes its connections
            super().handle_error(request, client_address)


def serve(shelf: Shelf, host: str = "127.0.0.1", port: int = 0) -> ViewServer:
    """A server that has its address; `serve_forever` runs it. OSError if the address is taken."""
    return ViewServer(Site(shelf), host, port)
