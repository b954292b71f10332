"""Sandboxes: what interpreters keep and copy, and that hostile programs are held, as root and as another user."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from treegym.tools.sandbox import PythonTool, open_sandbox
from treegym.tools.sandbox import guest_keeper as inside
from treegym.tools.sandbox.cgroup import Cgroup
from treegym.tools.sandbox.interface import (
    ForkRefused,
    Interpreter,
    Limits,
    Sandbox,
    SandboxError,
    SandboxUnavailable,
)
from treegym.tools.sandbox.link import INSIDE, PARTS, Link
from treegym.tools.sandbox.seccomp import Compare, filter_rules
from treegym.tools.sandbox.zygote import Episode, KeeperLink

sys.path.insert(0, str(Path(__file__).parent))
from attacks import ATTACKS, GREED, KEEPING, LEAVING, LINGERING, MACHINERY

pytestmark = pytest.mark.filterwarnings("ignore:the sandbox 'local'")
LIMITS = Limits(seconds=3, cpu=3, memory=400 << 20, total_memory=512 << 20, disk=64 << 20, file_size=32 << 20)


def opened(name: str) -> Sandbox:
    try:
        return open_sandbox(name)
    except SandboxUnavailable as error:
        if os.environ.get("TREEGYM_NEEDS") == name:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["local", "bubblewrap", "docker"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return opened(request.param)


@pytest.fixture(scope="module", params=["local", "bubblewrap"])
def forking(request: pytest.FixtureRequest) -> Sandbox:
    return opened(request.param)


@pytest.fixture
def branch(forking: Sandbox) -> Iterator[Interpreter]:
    with contextlib.closing(forking.start(LIMITS, 0)) as interpreter:
        yield interpreter


@pytest.fixture
def interpreter(sandbox: Sandbox) -> Iterator[Interpreter]:
    with contextlib.closing(sandbox.start(LIMITS, 0)) as interpreter:
        yield interpreter


def text(interpreter: Interpreter, code: str) -> str:
    return interpreter.run(code).text


def test_variables_stay_and_the_last_value_is_shown(interpreter: Interpreter) -> None:
    assert interpreter.run("x = 6").text == ""
    assert text(interpreter, "print('a')\nx * 7") == "a\n42\n"


def test_an_error_shows_the_agents_own_frames_and_lines(interpreter: Interpreter) -> None:
    outcome = interpreter.run("def f():\n    return 1 / 0\nf()")
    assert outcome.failed
    assert outcome.text.startswith('Traceback (most recent call last):\n  File "<call 1>", line 3, in <module>')
    assert "return 1 / 0" in outcome.text and "guest_" not in outcome.text


@pytest.mark.parametrize("part", PARTS)
def test_what_runs_inside_imports_the_standard_library_and_parts_before_it(part: str) -> None:
    for node in ast.walk(ast.parse((INSIDE / part).read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).partition(".")[0] in sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" in PARTS[: PARTS.index(part)]


def test_code_is_compiled_as_python_compiles_it(branch: Interpreter) -> None:
    assert text(branch, "def f(x: int): pass\nf.__annotations__") == "{'x': <class 'int'>}\n"
    assert (
        text(branch, "from __future__ import annotations\ndef f(x: int): pass\nf.__annotations__") == "{'x': 'int'}\n"
    )


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1\n2", "2\n"),
        ("\n\n'a'\n\n", "'a'\n"),
        ("x = 1; x", "1\n"),
        ("(1 +\n2)", "3\n"),
        ("max(\n1, 2\n)", "2\n"),
        ("x = '''\n5\n'''\nx", "'\\n5\\n'\n"),
        ("'''\n5'''", "'\\n5'\n"),
        ("x = 3 \\\n- 1", ""),
        ("3 \\\n- 1", "2\n"),
        ("# why \\\n7", "7\n"),
        ("7\n# why", "7\n"),
        ("if True:\n    x = 8\nx", "8\n"),
        ("if True:\n    9", ""),
        ("x = 1\rx", "1\n"),
        ("x = 1\r\nx", "1\n"),
        ("*(1, 2), 3", "(1, 2, 3)\n"),
        ("f = lambda: 4\nf()", "4\n"),
        ("x = 5", ""),
        ("None", ""),
        ("", ""),
    ],
)
def test_the_last_expression_is_shown_however_it_is_written(branch: Interpreter, code: str, shown: str) -> None:
    outcome = branch.run(code)
    assert (outcome.text, outcome.failed) == (shown, False)


@pytest.mark.parametrize(
    ("code", "line"),
    [("\n\n1 / 0", 3), ("x = 1\n\n1 / 0", 3), ("x = 1\n\n(1 /\n0)", 3), ("x = 1; 1 / 0", 1), ("x = 1\r1 / 0", 2)],
)
def test_tracebacks_count_lines_from_the_beginning(branch: Interpreter, code: str, line: int) -> None:
    assert f'File "<call 1>", line {line}, in <module>' in text(branch, code)


@pytest.mark.parametrize(
    "code", ["x = = 1", "x = 1\nx +", "try:\n    x\nx", "@f\nx", "if x:\nx", "return 1\n1", "x \\\n"]
)
def test_an_error_of_syntax_is_told_without_our_own_code(branch: Interpreter, code: str) -> None:
    outcome = branch.run(code)
    assert outcome.failed and 'File "<call 1>"' in outcome.text
    assert "Error: " in outcome.text and "ast.py" not in outcome.text and "Traceback" not in outcome.text


@pytest.mark.parametrize("shown", ["\\x07", "\\U000e0001", "\\u00e4", "A", "\\ud800"])
def test_what_comes_back_is_as_long_as_its_limit(sandbox: Sandbox, shown: str) -> None:
    tool = PythonTool(sandbox.name, dataclasses.replace(LIMITS, output=1000))
    for code in (f"print('{shown}' * 20000)", f"raise ValueError('{shown}' * 20000)", f"print('{shown}' * 999)\n1 / 0"):
        result = tool(code=code)
        assert 400 < len(result.text) <= 1000 and "gone" not in result.text, result
        assert ("[cut: " in result.text) == code.startswith("print")
    assert "[cut: " in result.text and result.text.endswith("ZeroDivisionError: division by zero\n")
    tool.close()


def test_nothing_of_a_call_is_printed_by_the_next(interpreter: Interpreter) -> None:
    outcome = interpreter.run("print('A' * (40 << 20))")
    assert outcome.failed and outcome.text.endswith("OSError: [Errno 27] File too large\n")
    assert text(interpreter, "print('next')") == "next\n"
    interpreter.run("import os; print('A'); os.truncate('/proc/self/fd/1', 32 << 20)")
    assert text(interpreter, "import gc; gc.collect(); print('next')") == "next\n"


@pytest.mark.parametrize("name", ["bubblewrap", "docker"])
def test_a_call_can_print_where_the_disk_is_full(name: str) -> None:
    with contextlib.closing(opened(name).start(LIMITS, 0)) as interpreter:
        interpreter.run("i = 0\nwhile True:\n    f = open(f'f{i}', 'wb', 0); f.write(bytes(8 << 20)); i += 1")
        assert "No space left" in text(interpreter, "while True: f.write(b'x')")
        assert text(interpreter, "print('said')") == "said\n"
        outcome = interpreter.run("print('A' * 400000)")
        assert outcome.failed and outcome.text.endswith("OSError: [Errno 28] No space left on device\n"), outcome
        assert text(interpreter, "import os; os.remove('f0'); print('said')") == "said\n"


def test_forks_have_variables_files_and_positions_of_their_own(branch: Interpreter) -> None:
    branch.run("import numpy as np; x = np.arange(3); open('a', 'w').write('hello'); f = open('a', 'rb', 0); f.read(1)")
    branch.run("g = (i for i in range(9)); next(g)")
    with contextlib.closing(branch.fork()) as twin:
        assert text(twin, "x[0] = 9; open('a', 'w').write('other'); open('b', 'w').close(); next(g), f.read(1)")
        assert text(twin, "x, f.read(), next(g)") == "(array([9, 1, 2]), b'her', 2)\n"
        assert text(branch, "import os; x, f.read(), next(g), os.path.exists('b')") == (
            "(array([0, 1, 2]), b'ello', 1, False)\n"
        )


def test_an_interpreter_forks_before_its_first_call(forking: Sandbox) -> None:
    for _ in range(20):
        with contextlib.closing(forking.start(LIMITS, 0)) as branch, contextlib.closing(branch.fork()) as twin:
            drawn = [text(each, "import random; random.random()") for each in (branch, twin)]
            assert drawn[0] == drawn[1]


def test_forks_draw_the_same_numbers_as_their_parent(branch: Interpreter) -> None:
    branch.run("import random, numpy; random.random(), numpy.random.random()")
    with contextlib.closing(branch.fork()) as twin:
        drawn = [text(each, "random.random(), numpy.random.random()") for each in (branch, twin)]
    assert drawn[0] == drawn[1]


def test_forks_of_forks_and_siblings_differ(branch: Interpreter) -> None:
    branch.run("path = []")
    with contextlib.ExitStack() as stack:
        leaves = [branch]
        for depth in range(3):
            for leaf in list(leaves):
                leaves.append(stack.enter_context(contextlib.closing(leaf.fork())))
                leaves[-1].run(f"path.append({depth})")
        found = [text(leaf, "path") for leaf in leaves]
        assert len(set(found)) == 8


def test_a_fork_outlives_its_parent(forking: Sandbox) -> None:
    parent = forking.start(LIMITS, 0)
    parent.run("x = 1")
    twin = parent.fork()
    parent.close()
    with contextlib.closing(twin):
        assert text(twin, "x") == "1\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(2,), name='ticker').start()", "ticker"),
        ("import socket; a, b = socket.socketpair()", "socket"),
        ("import os; r, w = os.pipe()", "pipe"),
        ("import os; f = os.open('.', os.O_RDONLY)", "file descriptor"),
        ("import os; os.mkdir('sub'); f = os.open('sub', os.O_RDONLY)", "sub"),
        ("import os; f = open('a', 'w'); os.remove('a')", "a .deleted."),
        ("import os; ours, theirs = os.openpty()", "/dev/pt"),
        ("import mmap; m = mmap.mmap(-1, 4096)", "memory is shared"),
        ("import mmap, os; open('a', 'wb').write(bytes(9)); m = mmap.mmap(os.open('a', os.O_RDONLY), 9, prot=1)", "/a"),
        ("import subprocess; p = subprocess.Popen(['sleep', '9'])", "a process"),
        ("import subprocess; p = subprocess.Popen(['true']); import time; time.sleep(0.1)", "a process"),
        ("import os; os.system('sleep 9 &')", "a process"),
        ("import signal; signal.signal(14, signal.SIG_IGN); signal.alarm(60)", "a timer"),
        ("import ctypes; ctypes.CDLL(None).timer_create(1, None, ctypes.byref(ctypes.c_void_p()))", "a timer"),
        ("import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [10]); os.kill(os.getpid(), 10)", "a signal"),
    ],
)
def test_what_cannot_be_copied_is_refused_by_name(branch: Interpreter, code: str, reason: str) -> None:
    branch.run(code)
    with pytest.raises(ForkRefused, match=reason):
        branch.fork()
    assert text(branch, "1") == "1\n"


def test_a_fork_waits_for_nobody_who_holds_a_file(forking: Sandbox) -> None:
    hold = """
import fcntl, os, signal
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(os.open('held', os.O_RDWR | os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_WRLCK)
"""
    with contextlib.closing(forking.start(LIMITS, 0)) as branch:
        if "PermissionError" in text(branch, hold):  # where there are walls, no lease can be had
            assert forking.isolates
            branch.fork().close()
        else:
            with pytest.raises(ForkRefused, match="a program holds a lease on held"):
                branch.fork()
        assert text(branch, "1 + 1") == "2\n"


def test_a_fork_waits_for_no_pipe(branch: Interpreter) -> None:
    branch.run("import os; os.mkdir('sub'); os.mkfifo('sub/pipe')")
    with pytest.raises(ForkRefused, match="pipe is neither a file, a folder nor a link"):
        branch.fork()


def test_a_copy_of_files_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    (source / "file").write_bytes(b"x")
    monkeypatch.setattr(inside, "COPYING", -1.0)
    fd = os.open(target, os.O_RDONLY)
    with pytest.raises(inside.Uncopyable, match="seconds to copy"):
        inside.copy_folder(str(source), fd)
    os.close(fd)


def test_an_interpreter_that_does_not_fork_is_not_waited_for(branch: Interpreter) -> None:
    branch.run("import sys, time; sys.modules['inside.guest_interpreter'].Interpreter.fork = lambda *_: time.sleep(60)")
    with pytest.raises(ForkRefused, match="timed out"):
        branch.fork()


def test_forks_read_on_in_files_of_the_system_by_themselves(branch: Interpreter) -> None:
    branch.run("import ast; f = open(ast.__file__, 'rb', 0); null = open('/dev/null', 'w'); f.read(9)")
    with contextlib.closing(branch.fork()) as twin:
        assert text(twin, "f.seek(0); f.tell()") == "0\n"
        assert text(branch, "f.tell()") == "9\n"


def test_forks_that_end_leave_nothing_to_wait_for(branch: Interpreter) -> None:
    branch.run("import os; x = 1")
    for _ in range(LIMITS.processes + 6):
        branch.fork().close()
    assert "ChildProcessError" in text(branch, "os.wait()")
    assert text(branch, "x") == "1\n"


def test_forks_have_threads_signals_and_processes_as_their_parent_has(branch: Interpreter) -> None:
    """A copy is made beside what Python does in a child, which nothing here may need."""
    code = """
import os, queue, signal, subprocess, sys, threading
said = queue.Queue()
def work():
    import colorsys  # under the import lock
    said.put(threading.current_thread() is threading.main_thread())
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join(5)
rang = []
signal.signal(signal.SIGALRM, lambda *_: rang.append(threading.current_thread() is threading.main_thread()))
signal.setitimer(signal.ITIMER_REAL, 0.01)
while not rang: pass
child = os.fork()
if not child: os._exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
said.qsize(), said.get(), threading.active_count(), rang, status, subprocess.run([sys.executable, '-c', '']).returncode
"""
    with contextlib.closing(branch.fork()) as first, contextlib.closing(first.fork()) as second:
        for each in (branch, first, second):
            assert text(each, code) == "(3, False, 1, [True], 7, 0)\n"


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        ("ours.fork_beside, os.setpgid = lambda: True, lambda *_: None", "no fork of its parent"),  # the parent itself
        ("ours.fork_beside = lambda: not os.fork()", "no fork of its parent"),  # a child of the parent
        ("ours.Interpreter.fork = lambda _, meeting, work: os.close(meeting)", "no fork came"),
    ],
)
def test_only_a_fork_is_taken_for_one(branch: Interpreter, forged: str, reason: str) -> None:
    branch.run("open('a', 'w').write('1')")
    assert not branch.run(f"import os, sys\nours = sys.modules['inside.guest_interpreter']\n{forged}").failed
    with pytest.raises(ForkRefused, match=reason):
        branch.fork()
    branch.run("1")  # which is where it is lost that pretended
    assert text(branch, "open('a').read()") == "'1'\n"


def test_where_there_are_too_many_processes_the_interpreter_stays(forking: Sandbox) -> None:
    limits = dataclasses.replace(LIMITS, processes=8)
    with contextlib.ExitStack() as stack:
        branch = stack.enter_context(contextlib.closing(forking.start(limits, 0)))
        branch.run("x = 1")
        if forking.name == "local" and not os.geteuid():
            pytest.skip("the processes of root are not counted")
        with pytest.raises(ForkRefused, match="no process more"):
            for _ in range(9):
                stack.enter_context(contextlib.closing(branch.fork()))
        assert text(branch, "x") == "1\n"


def test_what_a_fork_leaves_behind_is_not_its_parents(branch: Interpreter) -> None:
    """Neither the processes of a fork that died, nor its own forks."""
    branch.run("import os, time")
    with contextlib.closing(branch.fork()) as twin, contextlib.closing(twin.fork()) as own:
        assert twin.run("if os.fork() == 0: time.sleep(30)\nos._exit(0)").lost
        assert "ChildProcessError" in text(branch, "os.wait()")
        assert text(own, "1 + 1") == "2\n"
        branch.fork().close()


def test_a_signal_to_a_forks_group_is_not_its_parents(branch: Interpreter) -> None:
    branch.run("import os, signal; x = 1")
    with contextlib.closing(branch.fork()) as twin:
        assert twin.run("os.killpg(0, signal.SIGKILL)").lost
    assert text(branch, "x") == "1\n"


def test_an_interpreter_that_died_leaves_no_process(walls: Sandbox, host: Host) -> None:
    with contextlib.closing(walls.start(LIMITS, 0)) as interpreter:
        end = "time.sleep(0.5); os._exit(0)"
        assert interpreter.run(f"{GREED['a daemon']}\nimport time; {end}".format(**host.facts())).lost
        assert any(not running(host.daemon) or time.sleep(0.1) for _ in range(20))


def test_a_deadline_takes_the_variables_and_keeps_the_files(interpreter: Interpreter) -> None:
    interpreter.run("x = 1; open('kept', 'w').write('y')")
    start = time.monotonic()
    outcome = interpreter.run("while True: pass")
    assert "after 3 seconds" in outcome.lost and time.monotonic() - start < 8
    assert "NameError" in text(interpreter, "x")
    assert text(interpreter, "open('kept').read()") == "'y'\n"


@pytest.mark.parametrize("instead", ["pass", "open('.tmp', 'w').close()"])
def test_an_interpreter_without_its_folder_for_temporary_files_can_be_lost(
    interpreter: Interpreter, instead: str
) -> None:
    interpreter.run(f"import os, shutil; shutil.rmtree('.tmp'); {instead}; open('kept', 'w').write('y')")
    assert interpreter.run("import os; os._exit(0)").lost
    assert text(interpreter, "import os; open('kept').read(), os.path.exists('.tmp')") == "('y', True)\n"


def test_a_deadline_in_a_fork_leaves_its_parent_alone(branch: Interpreter) -> None:
    branch.run("x = 1")
    with contextlib.closing(branch.fork()) as twin:
        assert twin.run("import time; time.sleep(60)").lost
        assert text(branch, "x") == "1\n"
        assert "NameError" in text(twin, "x")


@pytest.mark.parametrize(
    "set_up",
    [
        "",
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
        "import threading; threading.Thread(target=spin).start(); time.sleep(60)",
    ],
)
def test_cpu_time_is_bounded_whatever_the_interpreter_sets(sandbox: Sandbox, set_up: str) -> None:
    spin = "import time\ndef spin():\n    while time.process_time() < 40: pass\n"
    with contextlib.closing(sandbox.start(dataclasses.replace(LIMITS, seconds=60, cpu=0.5), 0)) as interpreter:
        assert "after 0.5 seconds of CPU time" in interpreter.run(f"{spin}{set_up}\nspin()").lost
        for seconds in (0.3, 0.6):  # each call has the whole of it
            assert not interpreter.run(f"import time\nwhile time.process_time() < {seconds}: pass").lost


def test_the_same_seed_draws_the_same_numbers(sandbox: Sandbox) -> None:
    drawn = []
    for seed in (1, 1, 2):
        with contextlib.closing(sandbox.start(LIMITS, seed)) as interpreter:
            drawn.append(text(interpreter, "import random, numpy; random.random(), numpy.random.random()"))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_fork_of_the_host_makes_interpreters_of_its_own(forking: Sandbox, branch: Interpreter) -> None:
    """As gymnasium's AsyncVectorEnv does, whose workers are forks."""
    branch.run("x = 1")
    read, write = os.pipe()
    if not (pid := os.fork()):
        with contextlib.suppress(BaseException), contextlib.closing(forking.start(LIMITS, 0)) as interpreter:
            os.write(write, text(interpreter, "'x' in globals()").encode())
            forking.close()
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read() == b"False\n"
    os.waitpid(pid, 0)
    assert text(branch, "x") == "1\n"


def test_a_fork_of_the_host_ends_nothing_of_its_parents(sandbox: Sandbox, interpreter: Interpreter) -> None:
    """As the workers of multiprocessing do, which collect what they inherited."""
    interpreter.run("x = 1")
    if not (pid := os.fork()):
        with contextlib.suppress(BaseException):
            interpreter.close()
            sandbox.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert text(interpreter, "x") == "1\n"


def test_a_tool_forks_only_when_it_must_and_comes_back_from_a_pickle(sandbox: Sandbox) -> None:
    import pickle

    tool = PythonTool(sandbox.name, LIMITS)
    tool(code="x = [1]")
    twin = tool.fork()
    assert twin(code="x.append(2); x").text == "[1, 2]\n"
    assert tool(code="x").text == "[1]\n"
    again = pickle.loads(pickle.dumps(twin))
    assert again(code="x").text == "[1, 2]\n"
    for each in (tool, twin, again):
        each.close()


def test_a_tool_in_a_fork_of_the_host_runs_the_calls_again(forking: Sandbox) -> None:
    tool = PythonTool(forking.name, LIMITS)
    tool(code="x = 1")
    read, write = os.pipe()
    if not (pid := os.fork()):
        with contextlib.suppress(BaseException):
            os.write(write, tool(code="x += 1; x").text.encode())
            tool.close()
            forking.close()
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read() == b"2\n"
    os.waitpid(pid, 0)
    assert tool(code="x").text == "1\n"
    tool.close()


def test_a_tool_whose_interpreter_cannot_fork_runs_the_calls_again(sandbox: Sandbox) -> None:
    tool = PythonTool(sandbox.name, LIMITS)
    tool(code="import os; r, w = os.pipe(); x = 1")
    twin = tool.fork()
    assert twin(code="x += 1; x").text == "2\n"
    assert tool(code="x").text == "1\n"
    tool.close()
    twin.close()


def test_a_sandbox_that_was_killed_is_an_observation_and_then_a_new_one() -> None:
    sandbox = opened("bubblewrap")
    tool = PythonTool(sandbox.name, LIMITS)
    tool(code="x = 1")
    sandbox._zygote.close()  # type: ignore[attr-defined]
    time.sleep(0.5)  # the kernel ends what was below it
    texts = [tool(code="1 + 1").text for _ in range(3)]
    assert "gone" in texts[0] and texts[-1] == "2\n"
    tool.close()


def test_a_killed_host_leaves_no_files(tmp_path: Path) -> None:
    host = """
import os, signal, warnings
from treegym.tools.sandbox import Limits, open_sandbox
warnings.simplefilter("ignore")
interpreter = open_sandbox("local").start(Limits(), 0)
print(interpreter.run("open('left', 'w').write('x')").text, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", host], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.startswith("1"), done.stderr
    end = time.monotonic() + 20
    while list(tmp_path.iterdir()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())


def test_an_episode_outlives_the_thread_that_started_its_sandbox() -> None:
    opened("bubblewrap")._zygote.close()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        interpreter = pool.submit(opened("bubblewrap").start, LIMITS, 0).result()
        pool.submit(interpreter.run, "x = 1").result()
    assert text(interpreter, "x") == "1\n"
    interpreter.close()


def test_a_fork_of_a_branch_in_another_folder_keeps_its_open_files(branch: Interpreter) -> None:
    branch.run("import os; os.mkdir('sub'); f = open('log', 'wb', 0); f.write(b'ab'); os.chdir('sub')")
    with contextlib.closing(branch.fork()) as twin:
        twin.run("f.write(b'twin')")
        branch.run("f.write(b'parent')")
        assert text(twin, "os.path.basename(os.getcwd()), open('../log').read()") == "('sub', 'abtwin')\n"
        assert text(branch, "open('../log').read()") == "'abparent'\n"


def test_a_keeper_that_answers_late_is_waited_for_at_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treegym.tools.sandbox.zygote.GRACE", 0.05)
    ours, theirs = socket.socketpair()
    with contextlib.closing(KeeperLink(ours)) as link, contextlib.closing(Link(ours=theirs)) as keeper:
        episode = Episode(link, LIMITS, None, None, lambda: None)
        with pytest.raises(SandboxError, match="does not answer"):
            episode.ask(do="something")
        keeper.send(error=None)
        keeper.send(error="it has no such branch")
        with pytest.raises(SandboxError, match="no such branch"):
            episode.ask(do="something else")
        assert episode.owed == 0


def test_a_keeper_that_hangs_is_ended_with_all_that_is_below_it(
    forking: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treegym.tools.sandbox.zygote.GRACE", 0.2)
    mark = f"tg-h-{os.getpid()}"
    branch = forking.start(LIMITS, 0)
    branch.run(LINGERING["a session of its own"].format(mark=mark).replace("time.sleep(60)", "time.sleep(0.3)"))
    assert alive(mark)
    signal.pidfd_send_signal(branch._episode.keeper, signal.SIGSTOP)  # type: ignore[attr-defined]
    branch.close()
    assert ended(mark)


def test_a_keeper_that_code_kills_leaves_nothing_behind() -> None:
    """Which it can where there are no walls."""
    mark = f"tg-o-{os.getpid()}"
    with contextlib.closing(opened("local").start(dataclasses.replace(LIMITS, seconds=1), 0)) as branch:
        code = LINGERING["a session of its own"].format(mark=mark)
        branch.run(f"import os; keeper = os.getppid()\n{code.replace('60)', '0.3)')}; os.kill(keeper, 9)")
        assert alive(mark)
    assert ended(mark)


# Attacks


class Host:
    """What the attacks aim at: listeners, a secret, a process; all of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.reached: list[str] = []
        self.marker = f"treegym-marker-{os.getpid()}"
        self.daemon = f"treegym-daemon-{os.getpid()}"
        self.secret = folder / "secret"
        self.secret.write_text("a secret")
        folder.chmod(0o755)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.tcp6 = contextlib.ExitStack()
        with contextlib.suppress(OSError):  # no IPv6 here
            address = ("::1", self.tcp.getsockname()[1])
            self.tcp6.enter_context(socket.create_server(address, family=socket.AF_INET6))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.path = folder / "socket"
        self.unix, self.hidden = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.path))
        self.path.chmod(0o777)
        self.hidden.bind("\0" + self.marker)
        for listener in (self.unix, self.hidden):
            listener.listen()
        self.process = subprocess.Popen([self.marker, "600"], env={"MARKER": self.marker}, executable="/bin/sleep")

    def facts(self) -> dict[str, Any]:
        return {
            "secret": str(self.secret),
            "port": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "path": str(self.path),
            "abstract": self.marker,
            "pid": self.process.pid,
            "marker": self.marker,
            "daemon": self.daemon,
        }

    def close(self) -> None:
        for listener in (self.tcp, self.tcp6, self.udp, self.unix, self.hidden):
            listener.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    os.environ["TREEGYM_MARKER"] = (host := Host(tmp_path_factory.mktemp("host"))).marker
    yield host
    host.close()
    del os.environ["TREEGYM_MARKER"]


@pytest.fixture(scope="module", params=["bubblewrap", "docker"])
def walls(request: pytest.FixtureRequest) -> Sandbox:
    return opened(request.param)


@pytest.mark.parametrize("attack", ATTACKS)
def test_walls_hold(walls: Sandbox, host: Host, attack: str) -> None:
    with contextlib.closing(walls.start(LIMITS, 0)) as interpreter:
        outcome = interpreter.run(ATTACKS[attack].format(**host.facts()))
        assert outcome.text and "ESCAPED" not in outcome.text, outcome
        assert not outcome.failed, f"the attack did not run to its end: {outcome}"
        assert text(interpreter, "1 + 1") == "2\n"


@pytest.mark.parametrize("attack", GREED)
def test_limits_hold(walls: Sandbox, host: Host, attack: str) -> None:
    with contextlib.closing(walls.start(LIMITS, 0)) as interpreter:
        interpreter.run("1")  # a container takes seconds to begin
        start = time.monotonic()
        outcome = interpreter.run(GREED[attack].format(**host.facts()))
        assert "ESCAPED" not in outcome.text and len(outcome.text) <= LIMITS.output * 10, outcome
        assert "SyntaxError" not in outcome.text and "NameError" not in outcome.text, outcome
        assert time.monotonic() - start < LIMITS.seconds + 5
    assert not running(host.daemon)


@pytest.mark.parametrize("attack", MACHINERY)
def test_calls_are_answered_in_turn(walls: Sandbox, attack: str) -> None:
    with contextlib.closing(walls.start(LIMITS, 0)) as interpreter:
        outcome = interpreter.run(MACHINERY[attack].replace("{{", "{").replace("}}", "}"))
        assert not any(x in outcome.text for x in "\x1b\x07\x9b\x00\u202e\u2066"), outcome
        answers = [interpreter.run(f"{i} + 1") for i in range(3)]
        assert all(answer.text in (f"{i + 1}\n",) for i, answer in enumerate(answers) if not answer.failed), answers
        if answers[-1].lost:  # an alarm goes off when it likes; the next interpreter has none
            answers.append(interpreter.run("3 + 1"))
        assert not answers[-1].failed or attack in POISONED, answers


@pytest.mark.parametrize("attack", LINGERING)
def test_what_is_started_ends(sandbox: Sandbox, attack: str) -> None:
    mark = f"tg-{os.getpid()}"
    with contextlib.ExitStack() as opened:
        interpreter = opened.enter_context(contextlib.closing(sandbox.start(dataclasses.replace(LIMITS, seconds=1), 0)))
        if sandbox.name != "docker":  # which does not fork
            twin = opened.enter_context(contextlib.closing(interpreter.fork()))
            twin.run("x = 1")
        outcome = interpreter.run(LINGERING[attack].format(mark=mark))
        assert outcome.lost, outcome
        sizes = [text(interpreter, "import os, time; time.sleep(0.2); os.path.getsize('beat')") for _ in range(2)]
        assert int(sizes[0]) == int(sizes[1]), "ESCAPED: it writes after its deadline"
        assert ended(mark)
        if sandbox.name != "docker":
            assert text(twin, "x") == "1\n"


@pytest.mark.parametrize("attack", KEEPING)
def test_what_is_kept_over_a_fork_is_found(attack: str) -> None:
    with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as parent:
        done = parent.run(f"import os, sys\nours = sys.modules['inside.guest_interpreter']\n{KEEPING[attack]}")
        assert not done.failed, done
        with pytest.raises(ForkRefused):
            parent.fork()


def test_a_fork_that_leaves_its_mounts_has_no_file_of_its_parent_s() -> None:
    for _ in range(8):  # it may leave before or after it got files of its own
        with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as parent:
            assert not parent.run(LEAVING).failed
            with contextlib.suppress(ForkRefused), contextlib.closing(parent.fork()) as twin:
                twin.run("open('whose', 'w').write('its own')")
            assert text(parent, "open('whose').read()") == '"the parent\'s"\n'


def test_nobody_answers_in_the_place_of_a_branch_that_was_killed() -> None:
    parent = opened("bubblewrap").start(LIMITS, 0)
    with contextlib.closing(parent), contextlib.closing(parent.fork()) as twin:
        parent.run(f"import os; os.kill({int(text(twin, 'import os; os.getpid()'))}, 9)")
        assert twin.run("print('still here')").lost
        assert text(twin, "print('again')") == "again\n"


POISONED = {"no compiler"}  # the agent broke its own Python, and is told so


def test_memory_is_bounded_in_total_where_that_is_said(walls: Sandbox) -> None:
    if not walls.bounds_total_memory:
        pytest.skip("no cgroup can be made here: memory is bounded for each process, and their number")
    with contextlib.closing(walls.start(LIMITS, 0)) as interpreter:
        outcome = interpreter.run(
            "import os, time\npids = []\nfor _ in range(6):\n    pids.append(os.fork())\n    if pids[-1] == 0:\n"
            "        x = bytearray(os.urandom(1 << 20)) * 180\n        time.sleep(1)\n        os._exit(0)\n"
            "killed = sum(os.waitpid(pid, 0)[1] == 9 for pid in pids)\nprint(killed)"
        )
        assert outcome.lost or int(outcome.text) >= 3, outcome
        assert text(interpreter, "1 + 1") == "2\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes cgroups")
def test_a_cgroup_of_version_2_is_written_as_the_kernel_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cgroup, "ROOT", tmp_path)
    assert not Cgroup.works()  # neither version's files are there
    (tmp_path / "cgroup.controllers").write_text("memory pids")
    cgroup = Cgroup(1 << 20, 24)
    (folder,) = tmp_path.glob("treegym-*")
    wrote = {file.name: file.read_text() for file in folder.iterdir()}
    assert wrote == {"memory.max": "1048576", "pids.max": "24"}
    (folder / "cgroup.procs").touch()
    (fd,) = cgroup.open()
    assert os.readlink(f"/proc/self/fd/{fd}") == str(folder / "cgroup.procs")
    os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="these tests run as an ordinary user already")
def test_walls_hold_for_an_ordinary_user_too(tmp_path: Path) -> None:
    opened("bubblewrap")
    here = Path(__file__)
    command = [
        *("bwrap", "--dev-bind", "/", "/", "--tmpfs", "/tmp"),
        *seen_by_all(here.parent.parent, Path(sys.prefix), Path(sys.base_prefix), tmp_path),
        *(
            "--chdir",
            str(here.parent.parent),
            "--",
            "setpriv",
            "--reuid",
            "64322",
            "--regid",
            "64322",
            "--clear-groups",
        ),
        *(sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", str(here)),
        *("-k", "(bubblewrap and (hold or answered or outlives or reach or ends)) or kept or place"),
    ]
    env = {**os.environ, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "SKIPPED" not in done.stdout, done.stdout
    print(done.stdout)


def seen_by_all(*paths: Path) -> Iterator[str]:
    """bwrap's arguments for a view in which the folders above these are open to every user."""
    closed = {parent for path in paths for parent in path.parents if not parent.stat().st_mode & 1}
    for parent in sorted(closed):
        yield from ("--perms", "0755", "--tmpfs", str(parent))
    for path in paths:
        for parent in [*path.parents][-2::-1]:
            yield from ("--perms", "0755", "--dir", str(parent))
        yield from ("--ro-bind", str(path), str(path))


def test_no_process_outlives_its_episode(walls: Sandbox, host: Host) -> None:
    interpreter = walls.start(LIMITS, 0)
    with contextlib.ExitStack() as stack:
        if walls.name != "docker":  # which does not fork
            twin = stack.enter_context(contextlib.closing(interpreter.fork()))
            twin.run(GREED["a daemon"].format(**host.facts()))
        interpreter.run(GREED["a daemon"].format(**host.facts()))
        assert any(running(host.daemon) or time.sleep(0.1) for _ in range(50))
        interpreter.close()
    assert not running(host.daemon)


def test_a_branch_cannot_reach_its_siblings() -> None:
    with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as parent:
        parent.run("secret = 'of the parent'; open('file', 'w').write('parent')")
        with contextlib.closing(parent.fork()) as twin:
            outcome = twin.run(
                "import os\nfor p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid():\n"
                "        for what in ('mem', 'root/episode/file', 'cwd/file'):\n"
                "            try: open(f'/proc/{p}/{what}', 'r+b'); print('ESCAPED', p, what)\n"
                "            except OSError: print('held')"
            )
            assert "held" in outcome.text and "ESCAPED" not in outcome.text and not outcome.failed, outcome
            twin.run("open('file', 'w').write('twin')")
            assert text(parent, "open('file').read()") == "'parent'\n"


def test_an_interpreter_cannot_open_its_memory_to_other_branches() -> None:
    with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as branch:
        assert text(branch, "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)") == "-1\n"


def test_a_branch_cannot_reach_an_interpreter_that_just_starts() -> None:
    """Which is started anew after each call that ended it."""
    code = """
import os, time
end, found = time.time() + 1.5, set()
while time.time() < end:
    for pid in set(range(2, 60)) - {os.getpid()}:
        try: os.close(os.open(f'/proc/{pid}/mem', os.O_RDWR)); found.add(pid)
        except OSError: pass
"""
    parent = opened("bubblewrap").start(LIMITS, 0)
    with contextlib.closing(parent), contextlib.closing(parent.fork()) as twin, ThreadPoolExecutor(1) as pool:
        looking = pool.submit(twin.run, code)
        while not looking.done():
            parent.run("import os; os._exit(0)")
        assert not looking.result().lost and text(twin, "found") == "set()\n"


def test_a_fork_has_no_way_to_its_parents_files() -> None:
    with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as parent:
        parent.run("open('file', 'w').write('parent')")
        with contextlib.closing(parent.fork()) as twin:
            parent.run("open('secret', 'w').write('x')")
            for attack in ("unmounting its files", "moving its files", "what lies aside", "opening what is closed"):
                outcome = twin.run(ATTACKS[attack].replace("{{", "{").replace("}}", "}"))
                assert outcome.text and "ESCAPED" not in outcome.text, outcome
            assert text(twin, "import os; sorted(os.listdir('/episode'))") == "['.tmp', 'file']\n"
            mounted = "[line.split()[4] for line in open('/proc/self/mountinfo')]"
            assert text(twin, f"[m for m in {mounted} if m in ('/episode', '/mnt/aside')]") == "['/episode']\n"


def test_a_fork_that_keeps_its_parents_mounts_is_refused_and_takes_no_files_along() -> None:
    with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as parent:
        parent.run("open('file', 'w').write('parent')")
        assert not parent.run("import sys; sys.modules['inside.guest_interpreter'].libc.unshare = lambda *_: 0").failed
        with pytest.raises(ForkRefused, match="no mount namespace of its own"):
            parent.fork()
        assert text(parent, "open('file').read()") == "'parent'\n"


def test_an_episode_cannot_reach_the_terminals_of_another() -> None:
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(contextlib.closing(opened("bubblewrap").start(LIMITS, 0))) for _ in range(2))
        made = one.run("import os; ours, theirs = os.openpty(); os.ttyname(theirs)")
        assert made.text == "'/dev/pts/0'\n", made
        assert "FileNotFoundError" in text(other, "import os; os.open('/dev/pts/0', os.O_RDWR | os.O_NOCTTY)")


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\nasync def f(): await asyncio.sleep(0.01); return 'done'\nprint(asyncio.run(f()))",
        "import asyncio\nasync def f():\n    echo = await asyncio.create_subprocess_exec('echo', 'done', stdout=-1)\n"
        "    return (await echo.communicate())[0].decode().strip()\nprint(asyncio.run(f()))",
        "import multiprocessing as mp\nmp.get_context('fork').Process(target=print, args=['done']).start()\n"
        "[each.join() for each in mp.active_children()]; None",
        "import multiprocessing as mp\nours, theirs = mp.Pipe(); theirs.send('done'); print(ours.recv())",
        "import subprocess\nprint(subprocess.run(['echo', 'done'], capture_output=True, text=True).stdout.strip())",
        "import os\nours, theirs = os.openpty(); os.write(theirs, b'done\\n'); os.read(ours, 9)\nprint('done')",
    ],
)
def test_the_filter_lets_ordinary_programs_run(code: str) -> None:
    with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as interpreter:
        assert text(interpreter, code) == "done\n"


def alive(mark: str) -> bool:
    """Whether a process or a thread goes by this name."""
    for path in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, fields = path.read_text(errors="replace").partition("(")[2].rpartition(")")
            if name == mark and fields.split()[0] not in "ZX":
                return True
    return False


def ended(mark: str) -> bool:
    """Whether they are no more, after the moment that the kernel takes."""
    return any(not alive(mark) or time.sleep(0.1) for _ in range(50))


HIGH = 1 << 32
CONDITIONAL = [rule for rule in filter_rules(fork=True) if rule[2]]


@pytest.mark.parametrize(("call", "error", "compare"), CONDITIONAL)
def test_the_filter_compares_what_the_kernel_reads(call: str, error: int, compare: Compare) -> None:
    """What stands above the 32 bits of an argument makes no other call of it."""
    sandbox = opened("bubblewrap")
    number = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(call.encode())
    arguments = [0] * 5
    arguments[compare.argument] = HIGH | (compare.second if compare.operator == "SCMP_CMP_MASKED_EQ" else compare.first)
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
result = libc.syscall(*map(ctypes.c_long, {[number, *arguments]}))
if result == 0 and {call!r} == 'clone': os._exit(0)
result, ctypes.get_errno()
"""
    with contextlib.closing(sandbox.start(LIMITS, 0)) as interpreter:
        assert text(interpreter, code) == f"(-1, {error})\n"


LOCKED = ["/usr/bin/env", "/usr", os.__file__, "/", "/etc/ld.so.cache"]
LOCK = """
import fcntl, os
for path in {paths}:
    file = os.open(path, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.path.isfile(path): fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
print('locked')
"""


def test_locks_reach_neither_the_host_nor_other_episodes(walls: Sandbox) -> None:
    code = LOCK.format(paths=[path for path in LOCKED if walls.name == "bubblewrap" or path != "/etc/ld.so.cache"])
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            interpreter = stack.enter_context(contextlib.closing(walls.start(LIMITS, 0)))
            assert text(interpreter, code) == "locked\n"
        for path in LOCKED:
            file = os.open(path, os.O_RDONLY)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_locks_in_an_episode_hold(branch: Interpreter) -> None:
    code = "import fcntl, os\nfile = open('own', 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
    code += "fcntl.flock(os.open('own', os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert "BlockingIOError" in text(branch, code)
    assert text(branch, "import sqlite3; db = sqlite3.connect('db'); db.execute('create table t(x)'); 1") == "1\n"


@pytest.mark.parametrize("attack", ["queued signals", "timers"])
def test_what_one_episode_takes_another_still_has(attack: str) -> None:
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(contextlib.closing(opened("bubblewrap").start(LIMITS, 0))) for _ in range(2))
        taken = [each.run(GREED[attack]).text for each in (one, other)]
        assert taken[0] == taken[1] and taken[0].startswith("held 2"), taken


def test_terminals_and_namespaces_of_an_episode_are_few() -> None:
    with contextlib.closing(opened("bubblewrap").start(LIMITS, 0)) as interpreter:
        made = "import os\ntry:\n    for n in range(60): os.openpty()\nexcept OSError: print(n)"
        assert text(interpreter, made) == "16\n"
        assert text(
            interpreter, "sum(int(open(f'/proc/sys/user/{n}').read()) for n in os.listdir('/proc/sys/user'))"
        ) == (f"{4 * LIMITS.processes}\n")


def running(name: str) -> bool:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().split(b"\0")[0].decode(errors="replace"))
    return name in found
