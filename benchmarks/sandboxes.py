"""What interpreters in sandboxes cost: a call, an episode, a fork, and many at once; into docs/results/sandboxes.md.

    python benchmarks/sandboxes.py

The sides of a comparison take turns. A call's cost is over the same code's own time inside.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

from treegym.tools.backends import BACKENDS, open_sandbox
from treegym.tools.sandbox import Limits, Sandbox, SandboxError

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "sandboxes.md"
ROUNDS = 200
LIVE = 200
HEAD = "| | median ms | p95 ms |\n|---|---|---|"


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def row(name: str, times: list[float]) -> str:
    return f"| {name} | {median(times):.3f} | {quantiles(times, n=20)[-1]:.3f} |"


def calls(sandbox: Sandbox) -> list[str]:
    """Warm calls beside cold ones."""
    warm, cold = [], []
    with contextlib.closing(sandbox.start(Limits(), 0)) as interpreter:
        interpreter.run("1")
        for i in range(ROUNDS):
            warm.append(timed(lambda: interpreter.run("6 * 7")))
            if i % 10 == 0:
                cold.append(timed(lambda: subprocess.run([sys.executable, "-c", "6 * 7"], check=True)))
    ratio = f"A warm call takes 1/{median(cold) / median(warm):,.0f} of a cold `python -c`."
    return [HEAD, row("warm call", warm), row("`python -c`, no sandbox", cold), "", ratio]


def episodes(sandbox: Sandbox) -> list[str]:
    """A new episode up to its first answer, and a fork up to its own."""
    begun, forked, ended = [], [], []
    for _ in range(ROUNDS // 4):
        found = []

        def begin(found: list[object] = found) -> None:
            found.append(sandbox.start(Limits(), 0))
            found[0].run("x = 1")  # type: ignore[attr-defined]

        begun.append(timed(begin))
        parent = found[0]
        forked.append(timed(lambda: found.append(parent.fork())))  # type: ignore[attr-defined]  # noqa: B023
        for each in reversed(found):
            ended.append(timed(each.close))  # type: ignore[attr-defined]
    return [HEAD, row("new episode", begun), row("fork", forked), row("close", ended)]


def many(sandbox: Sandbox) -> list[str]:
    """Interpreters alive together: memory by the kernel's proportional count, and a call to each."""
    before = used()
    with contextlib.ExitStack() as stack:
        start = time.perf_counter()
        living = [stack.enter_context(contextlib.closing(sandbox.start(Limits(), i))) for i in range(LIVE)]
        for interpreter in living:
            interpreter.run("x = list(range(1000))")
        took = time.perf_counter() - start
        memory = before - used()
        times = [timed(lambda: each.run("sum(x)")) for each in living]  # noqa: B023
    return [f"{LIVE} interpreters: {took:.1f} s to start, {memory / 1e3:.2f} GB; then a call to each:", "", HEAD,
            row("call", times)]  # fmt: skip


def used() -> float:
    """Memory that the machine has left, MB."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1e3


def main() -> None:
    parts = ["# Sandboxes", "", "Made by `python benchmarks/sandboxes.py`."]
    for name in BACKENDS:
        try:
            sandbox = open_sandbox(name)
        except SandboxError as error:
            parts += ["", f"## {name}", "", f"Not here: {error}"]
            continue
        for part in (calls, episodes, many):
            print(name, part.__name__, file=sys.stderr, flush=True)
            parts += ["", f"## {name}: {part.__name__}", "", part.__doc__ or "", "", *part(sandbox)]
        sandbox.close()
    RESULTS.write_text("\n".join(parts) + "\n")
    print("\n".join(parts))


if __name__ == "__main__":
    main()
