"""Messages between the host and the processes of a sandbox: a length and a JSON text, over a socket or pipes."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

HEADER = struct.Struct("!I")
GRACE = 5.0  # seconds that a sandbox's own processes have for an answer


class Channel:
    """Messages over a socket. The host may send a few file descriptors with a message, which then tells how many."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.unread = bytearray()
        self.fds: list[int] = []  # that came with messages which were not read yet

    def send(self, **message: Any) -> None:
        self.socket.sendall(packed(message))

    def receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next message and the descriptors that belong to it; None at the end."""
        while (text := take(self.unread)) is None:
            part, found = self._some()
            if not part:
                return None, []
            self.unread += part
            self.fds += found  # of several messages that are read at once, the first has them
        message = json.loads(text)
        count = message.pop("fds", 0)
        fds, self.fds = self.fds[:count], self.fds[count:]
        return message, fds

    def _some(self) -> tuple[bytes, list[int]]:
        return socket.recv_fds(self.socket, 1 << 16, 4)[:2]

    def close(self) -> None:
        self.socket.close()


def packed(message: dict[str, Any]) -> bytes:
    text = json.dumps(message).encode()
    return HEADER.pack(len(text)) + text


def take(unread: bytearray, limit: int = 1 << 32) -> bytes | None:
    """Takes the first message out of what was received; None while it is not whole.

    EOFError where it would be longer than `limit` bytes.
    """
    if len(unread) < HEADER.size:
        return None
    (length,) = HEADER.unpack_from(unread)
    if length > limit:
        raise EOFError(f"a message of {length} bytes")
    end = HEADER.size + length
    if len(unread) < end:
        return None
    message = bytes(unread[HEADER.size : end])
    del unread[:end]
    return message


class Pipes(Channel):
    """Messages over standard input and output, which the agent's code then can no longer use."""

    def __init__(self) -> None:
        self.ends = [os.dup(fd) for fd in (0, 1)]
        self.unread = bytearray()
        self.fds = []

    def send(self, **message: Any) -> None:
        data = packed(message)
        while data:
            data = data[os.write(self.ends[1], data) :]

    def _some(self) -> tuple[bytes, list[int]]:
        return os.read(self.ends[0], 1 << 16), []
