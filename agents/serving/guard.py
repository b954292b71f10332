"""The guard of a server: starts it as a session of its own, and ends every process of it when its owner stops or dies.

Run as a program, with the standard library alone: `guard.py OWNER LOG COMMAND...`. It writes the server's process id to
its standard output, and ends the server at the end of its standard input, when the process OWNER is no longer its
parent, or when the server's first process is gone: workers that survive that one would keep their memory.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 10.0  # seconds that a process has to end itself after SIGTERM
LOOK = 0.25  # seconds between two looks at what is left
PROCESSES = Path("/proc")


def members(session: int) -> list[int]:
    """The processes of a session, and of the process group of the same number, that have not ended."""
    found = []
    for stat in PROCESSES.glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, *groups = stat.read_text().rpartition(")")[2].split()[:4]
            if state not in "ZX" and str(session) in groups:
                found.append(int(stat.parent.name))
    return found


def end(session: int, patience: float = PATIENCE) -> None:
    """Ends every process of the session: SIGTERM first, SIGKILL for what is left after `patience` seconds."""
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, PATIENCE)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(session, number)
        deadline, told = time.monotonic() + seconds, set[int]()
        while left := members(session):
            if time.monotonic() > deadline:
                break
            for process in set(left) - told:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            told.update(left)
            time.sleep(LOOK)
        if not left and PROCESSES.is_dir():  # without it, as on a Mac, nobody knows what is left of the group
            return


def main(owner: int, log: str, command: list[str]) -> int:
    with open(log, "wb") as file:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(server.pid, flush=True)
    while server.poll() is None and os.getppid() == owner and not select.select([sys.stdin], [], [], LOOK)[0]:
        pass
    end(server.pid)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
