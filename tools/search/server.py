"""A retriever over HTTP, in the protocol of Search-R1's retrieval server.

POST /retrieve {"queries": [text, …], "topk": count, "return_scores": whether} is answered with {"result": [hits of the
first query, …]}; a hit is {"document": {"id", "contents"}, "score"}, or the document alone without scores. `contents`
are the title in quotes, a newline and the text. A refusal is {"detail": reason}.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .index import Hit, Passage, Retriever

TOP_K = 3  # where the request does not say
MAX_TOP_K = 100
MAX_QUERIES = 256
MAX_BYTES = 4 << 20  # of a request's body


class _Refused(Exception):
    """Says which field of a request is wrong, and how."""


@dataclass(frozen=True, slots=True)
class _Request:
    queries: list[str]
    top_k: int
    scores: bool


def search_app(retriever: Retriever) -> Starlette:
    """The server as an ASGI application."""

    async def retrieve(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                return _reply({"detail": f"the body is longer than {MAX_BYTES} bytes"}, 413)
        try:
            asked = _parse(body)
        except _Refused as error:
            return _reply({"detail": str(error)}, 400)
        return _reply({"result": await run_in_threadpool(_answer, retriever, asked)})

    return Starlette(routes=[Route("/retrieve", retrieve, methods=["POST"])])


def _reply(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


def serve_search(retriever: Retriever, listener: socket.socket) -> None:
    """Answers on a bound socket until Ctrl-C, which is raised again once the requests under way are answered."""
    app = search_app(retriever)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=10)
    uvicorn.Server(config).run([listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, any free port if 0; nobody can connect before it is served. OSError where taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)  # asyncio sends at once only where the protocol says TCP
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _parse(body: bytes) -> _Request:
    try:
        row = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"the body is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise _Refused("the body is not a JSON object")
    queries, top_k, scores = row.get("queries"), row.get("topk"), row.get("return_scores", False)
    if not isinstance(queries, list):
        raise _Refused(f"queries: expected a list of texts, got {_shown(queries)}")
    if len(queries) > MAX_QUERIES:
        raise _Refused(f"queries: at most {MAX_QUERIES}, got {len(queries)}")
    for place, query in enumerate(queries):
        if not isinstance(query, str):
            raise _Refused(f"queries[{place}]: expected a text, got {_shown(query)}")
    if top_k is not None and (type(top_k) is not int or not 0 <= top_k <= MAX_TOP_K):
        raise _Refused(f"topk: expected a number up to {MAX_TOP_K}, got {_shown(top_k)}")
    if not isinstance(scores, bool):
        raise _Refused(f"return_scores: expected true or false, got {_shown(scores)}")
    return _Request(queries, top_k or TOP_K, scores)


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]


def _answer(retriever: Retriever, asked: _Request) -> list[list[Any]]:
    lists = retriever.search_many(asked.queries, asked.top_k)
    return [[_scored(hit) if asked.scores else _document(hit.passage) for hit in hits] for hits in lists]


def _scored(hit: Hit) -> dict[str, Any]:
    return {"document": _document(hit.passage), "score": hit.score}


def _document(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'}
