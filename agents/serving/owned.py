"""Owned: a vLLM server of this process, started when it is needed and anew when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from .client import Server
from .launch import PATIENCE, ServerOptions, VLLMServer


class Owned:
    """Starts a server, asks it through a client of its own, and ends it.

    `stop` it: a server that is not stopped ends with this process.
    """

    def __init__(
        self, options: ServerOptions, *, at_once: int = 32, patience: float | None = None, start: float = PATIENCE
    ) -> None:
        """`patience` is that of requests, `start` the seconds in which the server must be healthy."""
        self.options = options
        self._at_once, self._patience, self._start = at_once, patience, start
        self.running: VLLMServer | None = None
        self._client: Server | None = None

    async def start(self) -> Server:
        """A client of a server that has just been started; one that ran before is ended. ServerError."""
        await self.stop()
        self.running = running = VLLMServer(self.options)
        try:
            await asyncio.to_thread(running.wait, self._start)
        except BaseException:  # nobody waits for it any more
            await self.stop()
            raise
        settings: dict[str, Any] = {"key": self.options.key, "at_once": self._at_once, "patience": self._patience}
        self._client = Server(running.url, **settings, alive=lambda: running.alive)
        return self._client

    async def stop(self) -> None:
        if self._client:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                await self._client.close()
        if self.running:
            await asyncio.to_thread(self.running.stop)
        self._client = self.running = None
