"""How a measured process talks: a line of JSON each way for every measurement, so that processes can take turns."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Channel:
    """Standard input and output for measurements alone; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = json.loads(sys.argv[1])
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._begun = 0.0

    def ask(self) -> dict[str, Any]:
        """Waits for the next request. SystemExit when there is none."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        request: dict[str, Any] = json.loads(line)
        self._begun = time.process_time()
        return request

    def answer(self, **values: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB, of this process so far
        result = {**values, "cpu": time.process_time() - self._begun, "peak": peak}  # cpu: seconds of all threads
        print(json.dumps(result), file=self._out, flush=True)


def serve(prepare: Callable[..., Callable[..., dict[str, float]]]) -> None:
    """`prepare(**settings)` gives what is measured; it is called with every request."""
    channel = Channel()
    measure = prepare(**channel.settings)
    channel.answer()  # ready
    while True:
        channel.answer(**measure(**channel.ask()))
