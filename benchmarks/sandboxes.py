"""What interpreters in sandboxes cost: a call, an episode, a fork, files, many at once; into docs/results/sandboxes.md.

    python benchmarks/sandboxes.py
    .ci/with-docker python benchmarks/sandboxes.py     # containers too

The sides of a comparison take turns. Other suites' Python tools are timed where they are installed beside this one:
    python -m venv .venv-suites && .venv-suites/bin/pip install smolagents langchain-experimental
"""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles

from treegym.tools.sandbox import Interpreter, Limits, Sandbox, SandboxError, open_sandbox
from treegym.tools.sandbox.backends import BACKENDS
from treegym.tools.sandbox.docker import PYTHON, Contained
from treegym.tools.sandbox.interface import ForkRefused

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "sandboxes.md"
SUITES = ROOT / ".venv-suites" / "bin" / "python"
ROUNDS = 200
LIVE = 200
HEAD = "| | median ms | p95 ms |\n|---|---|---|"
WORK = "import math\ntotal = sum(math.sqrt(i) for i in range(10))\nprint(total)"
ALONE = f"""
import time
def alone():
    start = time.perf_counter()
    exec(compile({WORK!r}, "alone", "exec"), {{"print": str}})
    return time.perf_counter() - start
"""
FORK = """
import os, time
def bare():
    ours, theirs = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        exec(compile("x", "bare", "exec"), {"x": 1})
        os.write(theirs, b"1")
        os._exit(0)
    os.read(ours, 1)
    took = time.perf_counter() - start
    os.waitpid(pid, 0)
    os.close(ours), os.close(theirs)
    return took
"""
THEIRS = """
import json, statistics, sys, time
if sys.argv[1] == "smolagents":
    from smolagents.local_python_executor import LocalPythonExecutor
    tool = LocalPythonExecutor([])
    tool.send_tools({})
    call = lambda: tool("6 * 7")
else:
    from langchain_experimental.utilities import PythonREPL
    tool = PythonREPL()
    call = lambda: tool.run("6 * 7", timeout=10)
times = []
for _ in range(40):
    start = time.perf_counter()
    call()
    times.append((time.perf_counter() - start) * 1e3)
print(json.dumps(times))
"""


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def row(name: str, times: list[float]) -> str:
    return f"| {name} | {median(times):.3f} | {quantiles(times, n=20)[-1]:.3f} |"


def calls(sandbox: Sandbox) -> Iterator[str]:
    """A warm call; what Python itself takes of it, to compile and run the same code; and a cold `python -c` of it, in
    Docker by `docker exec`."""
    cold_name, command = "`python -c`, no sandbox", [sys.executable]
    warm, own, cold = [], [], []
    with contextlib.closing(sandbox.start(Limits(), 0)) as interpreter:
        interpreter.run(ALONE)
        if isinstance(interpreter, Contained):
            cold_name, command = "`docker exec`", ["docker", "exec", interpreter.container_id, PYTHON]
        for i in range(ROUNDS):
            warm.append(timed(lambda: interpreter.run(WORK)))
            own.append(float(interpreter.run("alone()").text) * 1e3)
            if i % 10 == 0:
                cold.append(timed(lambda: subprocess.run([*command, "-c", WORK], check=True, capture_output=True)))
    yield from (HEAD, row("warm call", warm), row("of it Python itself", own), row(cold_name, cold), "")
    more, ratio = median(warm) - median(own), median(cold) / median(warm)
    yield f"A warm call takes {more:.3f} ms more than Python itself, and 1/{ratio:,.0f} of a cold one."


def episodes(sandbox: Sandbox) -> Iterator[str]:
    """A new episode up to its first answer, with others before and after it; forks of its interpreter, one after the
    other, and the first of them, which comes after a rest and finds the processor's caches cold; what `os.fork()` and
    an answer take the same interpreter, without files and namespaces of its own; the end."""
    begun, firsts, forks, bare, ended = [], [], [], [], []
    for _ in range(ROUNDS // 4):
        start = time.perf_counter()
        parent = sandbox.start(Limits(), 0)
        parent.run("x = 1")
        begun.append((time.perf_counter() - start) * 1e3)
        with contextlib.suppress(ForkRefused):
            firsts.append(fork(parent))
            forks += [fork(parent) for _ in range(4)]
            parent.run(FORK)
            bare.append(float(parent.run("bare()").text) * 1e3)
        ended.append(timed(parent.close))
        time.sleep(0.05)  # the next episode is made ahead meanwhile; without it the pace is that of `many`
    yield from (HEAD, row("new episode", begun))
    for name, times in (("fork", forks), ("first fork", firsts)):
        for what, each in zip((name, f"{name}, up to its own answer"), zip(*times, strict=True), strict=False):
            yield row(what, list(each))
    if bare:
        yield row("`os.fork()` up to an answer", bare)
    yield row("close", ended)


def fork(parent: Interpreter) -> tuple[float, float]:
    """Milliseconds until there is a copy, and until it has answered."""
    start = time.perf_counter()
    with contextlib.closing(parent.fork()) as twin:
        made = time.perf_counter() - start
        twin.run("x")
        return made * 1e3, (time.perf_counter() - start) * 1e3


def files(sandbox: Sandbox) -> Iterator[str]:
    """A fork that copies files."""
    yield HEAD
    for megabytes in (0, 1, 8, 32):
        times = []
        with contextlib.closing(sandbox.start(Limits(), 0)) as parent:
            parent.run(f"import os\nfor i in range({megabytes}): open(f'f{{i}}', 'wb').write(os.urandom(1 << 20))")
            for _ in range(20):
                with contextlib.suppress(ForkRefused):
                    start = time.perf_counter()
                    twin = parent.fork()
                    times.append((time.perf_counter() - start) * 1e3)
                    twin.close()
        yield row(f"fork, files of {megabytes} MB", times) if times else f"| {megabytes} MB | cannot fork | |"


def many(sandbox: Sandbox) -> Iterator[str]:
    """Interpreters alive together, memory as the machine has less of it; then a call to each."""
    before = free()
    with contextlib.ExitStack() as stack:
        start = time.perf_counter()
        living: list[Interpreter] = []
        for i in range(LIVE):
            living.append(stack.enter_context(contextlib.closing(sandbox.start(Limits(), i))))
            living[-1].run("x = list(range(1000))")
        took = time.perf_counter() - start
        memory = before - free()
        times = [timed(lambda each=each: each.run("sum(x)")) for each in living]  # type: ignore[misc]
    yield from (f"{LIVE} interpreters: {took:.1f} s to start, {memory:.2f} GB.", "", HEAD, row("call to each", times))


def free() -> float:
    """Memory that the machine has left, GB."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1e6


def others() -> Iterator[str]:
    """A warm call of other suites' tools, none of which isolates; the second with a time limit."""
    yield HEAD
    for name in ("smolagents", "langchain-experimental"):
        done = subprocess.run([SUITES, "-c", THEIRS, name], capture_output=True, text=True, check=False)
        yield row(name, json.loads(done.stdout)) if done.returncode == 0 else f"| {name} | not here | |"


def main() -> None:
    parts = ["# Sandboxes", "", "Made by `.ci/with-docker python benchmarks/sandboxes.py`."]
    for name in BACKENDS:
        try:
            sandbox = open_sandbox(name)
        except SandboxError as error:
            parts += ["", f"## {name}", "", f"Not here: {error}"]
            continue
        for part in (calls, episodes, files, many) if name != "docker" else (calls, episodes):
            print(name, part.__name__, file=sys.stderr, flush=True)
            parts += ["", f"## {name}: {part.__name__}", "", inspect.getdoc(part) or "", "", *part(sandbox)]
        sandbox.close()
    if SUITES.exists():
        parts += ["", "## other suites", "", inspect.getdoc(others) or "", "", *others()]
    RESULTS.write_text("\n".join(parts) + "\n")
    print("\n".join(parts))


if __name__ == "__main__":
    main()
