"""A web application that listens on the loopback, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from treegym.tools.search.server import bind


@contextmanager
def listening(app: Starlette) -> Iterator[str]:
    """The root URL at which it answers."""
    with bind("127.0.0.1", 0) as listener:
        listener.listen()  # who connects before the server runs waits
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
