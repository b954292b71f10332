"""What a workspace's tools do, inside its sandbox: sent there as text, so the standard library alone."""

import itertools
import os
import re
import signal
import subprocess
import sys

MAX_ENTRIES = 200


def read(path: str, first_line: int, lines: int) -> None:
    with open(path, encoding="utf-8", errors="replace") as file:
        shown = list(itertools.islice(file, first_line - 1, first_line - 1 + lines))
        rest = sum(1 for _ in file)
    sys.stdout.writelines(shown)
    if rest or first_line > 1:
        last = first_line + len(shown) - 1
        print(f"\n[lines {first_line} to {last} of {last + rest}]")


def write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    print(f"wrote {len(text)} characters to {path}")


def list_(folder: str) -> None:
    entries = []
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(set(folders) - {".tmp", ".git"})
        entries += [os.path.normpath(os.path.join(place, name)) for name in sorted(names)]
    for path in entries[:MAX_ENTRIES]:
        print(path, os.lstat(path).st_size)
    if len(entries) > MAX_ENTRIES:
        print(f"[{MAX_ENTRIES} of {len(entries)} files]")
    elif not entries:
        print("(no files)")


def _refuse(error: OSError) -> None:
    raise error


def patch(path: str, changes: str) -> None:
    """Applies a unified diff's hunks, all or none: each where its old lines stand, nearest to the line it names."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = file.read().split("\n")
    hunks = _hunks(changes)
    for number, (line, old, new) in enumerate(hunks, 1):
        places = [i for i in range(len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
        if not places:
            raise ValueError(f"hunk {number}: {path} has no such lines: {chr(10).join(old[:3])!r}; nothing was changed")
        at = min(places, key=lambda i: abs(i + 1 - line))
        lines[at : at + len(old)] = new
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write("\n".join(lines))
    print(f"changed {path} in {len(hunks)} places")


def _hunks(changes: str) -> "list[tuple[int, list[str], list[str]]]":
    """Of each hunk: its first line's number, the lines there, and those to be there."""
    found: list[tuple[int, list[str], list[str]]] = []
    for line in changes.splitlines():
        if head := re.match(r"@@(?: -(\d+))?", line):
            found.append((int(head[1] or 0), [], []))
        elif found and not line.startswith("\\"):
            if line[:1] != "+":
                found[-1][1].append(line[1:])
            if line[:1] != "-":
                found[-1][2].append(line[1:])
    if not any(old or new for _, old, new in found):
        raise ValueError("no hunk: a change begins with a line @@, then lines that begin with a blank, - or +")
    return found


def shell(command: str, seconds: float) -> None:
    """Runs it to its end; what it leaves running is ended with it."""
    before = _children()
    process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=1, stderr=1)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    while left := _children() - before:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if status is None:
        raise TimeoutError(f"stopped after {seconds:g} seconds")
    if status:
        print(f"[exit status {status}]")


def _children() -> "set[int]":
    """Processes below this one, orphans among them: they come to the interpreter."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            found.add(int(name))
    return found
