"""What a workspace's tools do inside its sandbox. Sent there as text, so it imports the standard library alone."""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

MAX_ENTRIES = 200  # that a listing shows
MAX_COUNTED = 20_000  # and that it looks at
MAX_FUZZ = 2  # lines of context at each end of a hunk that need not be there


def given(text: str) -> "list[Any]":
    """The arguments of a call, which come as JSON: a Python literal would take long to compile."""
    return list(json.loads(base64.b64decode(text).decode("utf-8", "surrogatepass")))


def read(path: str, first_line: int, lines: int) -> None:
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        shown = list(itertools.islice(file, first_line - 1, first_line - 1 + lines))
        last = first_line + len(shown) - 1
        total = last + sum(1 for _ in file) if shown else _count(path)
    for line in shown:
        sys.stdout.write(line[:-2] + "\n" if line.endswith("\r\n") else line)
    if not shown:
        print(f"[no line {first_line}: the file has {total} lines]" if total else "[the file is empty]")
    elif last < total or first_line > 1:
        print(f"\n[lines {first_line} to {last} of {total}]")


def _count(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    _put(path, text.encode())
    print(f"wrote {len(text)} characters to {path}")


def _put(path: str, data: bytes) -> None:
    """Writes a file whole. Where that fails, as on a full disk, the file is as it was before."""
    old = None
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        old = file.read()
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError:
        if old is not None:
            with open(path, "wb") as file:
                file.write(old)
        elif os.path.exists(path):
            os.remove(path)
        raise


def list_(folder: str) -> None:
    entries: list[str] = []
    closed: list[OSError] = []

    def note(error: OSError) -> None:
        if error.filename == folder:
            raise error
        closed.append(error)

    for place, folders, names in os.walk(folder, onerror=note):
        hidden = {".tmp", ".git", "proc"} if os.path.abspath(place) == "/" else {".tmp", ".git"}
        folders[:] = sorted(set(folders) - hidden)
        entries += [os.path.normpath(os.path.join(place, name)) for name in sorted(names)]
        if len(entries) > MAX_COUNTED:
            break
    if len(entries) > MAX_ENTRIES:  # first, since what is printed last may be cut
        print(f"[{MAX_ENTRIES} of {len(entries)} files{' or more' * (len(entries) > MAX_COUNTED)}]")
    elif not entries:
        print("(no files)")
    for path in entries[:MAX_ENTRIES]:
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            print(path, os.lstat(path).st_size)
    for error in closed[:MAX_ENTRIES]:
        print(f"[{error.filename}: {error.strerror}]")


class Hunk(NamedTuple):
    """A hunk's lines with their signs and line ends, and the number of the line they begin at, where it is told."""

    line: "int | None"
    body: "list[tuple[str, str]]"

    @property
    def old(self) -> "list[str]":
        return [text for sign, text in self.body if sign != "+"]

    def context(self) -> "tuple[int, int]":
        """How many lines stay before the first change and after the last one."""
        signs = "".join(sign for sign, _ in self.body)
        return len(signs) - len(signs.lstrip()), len(signs) - len(signs.rstrip())


class Place(NamedTuple):
    """Where a hunk fits: the index of its first old line, and how many lines at its top and bottom need not match."""

    at: int
    top: int = 0
    bottom: int = 0
    loose: bool = False  # GNU patch would not take it


def patch(path: str, changes: str) -> None:
    """Applies a unified diff's hunks, all or none, where GNU patch applies them.

    Beyond that, a hunk may have no line number, wrong counts, or other line ends than the file.
    """
    hunks, empties = _hunks(changes)
    lines = _lines(path, new=not any(hunk.old for hunk in hunks))
    taken: list[tuple[int, int]] = []  # (start, end) of the lines that each hunk changes
    parts, notes, offset = [], [], 0
    for number, hunk in enumerate(hunks, 1):
        place = _place(lines, hunk, offset, taken)
        if place is None:
            shown = "".join(hunk.old[:3])
            raise ValueError(f"hunk {number}: {path} has no such lines: {shown!r}; nothing was changed")
        before, after = hunk.context()
        taken.append((place.at + before, place.at + len(hunk.old) - after))
        parts.append(_new_lines(lines, hunk, place))
        if hunk.line is not None:
            offset = place.at + 1 - hunk.line
        if place.top or place.bottom:
            notes.append(f"hunk {number} fits at line {place.at + 1} only without the outermost lines of its context")
    for (start, end), _, part in sorted(zip(taken, itertools.count(), parts), reverse=True):
        lines[start:end] = part
    for index, line in enumerate(lines[:-1]):
        if not line.endswith("\n"):  # it was the last
            lines[index] = line + _line_end(lines, index)
    _put(path, "".join(lines).encode("utf-8", "surrogateescape"))
    if empties and not lines:
        os.remove(path)
    print(f"changed {path} in {len(hunks)} places", *notes, sep="\n")


def _lines(path: str, new: bool) -> "list[str]":
    """A file's lines with their ends; no lines where a new file is to be made."""
    try:
        with open(path, "rb") as file:
            return _split(file.read().decode("utf-8", "surrogateescape"))
    except FileNotFoundError:
        if not new:
            raise
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        return []


def _split(text: str) -> "list[str]":
    """The lines, split only at line feeds: str.splitlines would split at other characters too."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _bare(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _hunks(changes: str) -> "tuple[list[Hunk], bool]":
    """The hunks of a diff of one file, and whether they leave no file."""
    lines = [line.removesuffix("\n") for line in _split(changes)]
    if all(line.endswith("\r") for line in lines):
        lines = [line[:-1] for line in lines]
    heads = [index for index, line in enumerate(lines) if line.startswith("@@")]
    if not heads:
        raise ValueError("no hunk: a change begins with a line @@, then lines that begin with a blank, - or +")
    hunks, outside = [], lines[: heads[0]]
    for number, (head, end) in enumerate(itertools.pairwise([*heads, len(lines)]), 1):
        line, counts = _numbers(lines[head])
        start = head + 1
        stop = start + _length(lines[start:end], counts)
        body = _body(lines[start:stop], number)
        if line is not None and all(sign == "+" for sign, _ in body):
            line += 1  # the head names the line before
        hunks.append(Hunk(line, body))
        outside += lines[stop:end]
    names = [line for line in outside if line.startswith("+++ ")]
    if len(names) > 1:
        raise ValueError(f"changes of {len(names)} files; this tool changes one at a time")
    return hunks, any(name.startswith("+++ /dev/null") for name in names)


def _numbers(head: str) -> "tuple[int | None, tuple[int, int] | None]":
    """The line that a hunk's head names, and how many old and new lines it counts; None for what it leaves out."""
    if whole := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", head):
        first, old, new = whole.groups(default="1")
        return int(first), (int(old), int(new))
    part = re.match(r"@@ -(\d+)", head)
    return int(part[1]) if part else None, None


def _length(lines: "list[str]", counts: "tuple[int, int] | None") -> int:
    """How many lines belong to a hunk: as many as its head counts or, if that is wrong, all before another file."""
    old = new = 0
    for index, line in enumerate([*lines, "@@"]):
        if (old, new) == counts and not line.startswith("\\"):
            rest = lines[index : _next_file(lines, index)]
            if not any(line.strip(" -") and line[0] in " +-" for line in rest):
                return index
            break
        old += not line.startswith(("+", "\\"))
        new += not line.startswith(("-", "\\"))
    end = _next_file(lines, 0)
    while end and not lines[end - 1]:
        end -= 1
    return end


def _next_file(lines: "list[str]", start: int) -> int:
    """The index of the first line from there on that begins the changes of another file."""
    for index in range(start, len(lines)):
        names = [line[:4] for line in lines[index : index + 2]] == ["--- ", "+++ "]
        if names or lines[index].startswith(("diff --git ", "Index: ")):
            return index
    return len(lines)


def _body(lines: "list[str]", number: int) -> "list[tuple[str, str]]":
    body: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("\\"):  # No newline at end of file
            body[-1:] = [(sign, text.removesuffix("\n")) for sign, text in body[-1:]]
        elif line.startswith((" ", "+", "-")):
            body.append((line[0], line[1:] + "\n"))
        elif not line or line.startswith("\t"):  # an editor took the blank
            body.append((" ", line + "\n"))
        else:
            raise ValueError(f"hunk {number}: the line {line!r} begins with none of blank, - and +")
    if all(sign == " " for sign, _ in body):
        raise ValueError(f"hunk {number} changes nothing: no line of it begins with - or +")
    return body


def _place(lines: "list[str]", hunk: Hunk, offset: int, taken: "list[tuple[int, int]]") -> "Place | None":
    """Where the hunk fits nearest to the line that it names, moved as the hunk before was, with the least fuzz."""
    old, here = ([line.replace("\r\n", "\n") for line in each] for each in (hunk.old, lines))
    free = taken[-1][1] if taken else 0
    guess = free if hunk.line is None else hunk.line - 1 + offset
    if not old:
        return None if hunk.line is None and lines else Place(min(max(guess, free), len(lines)))

    def nearest(starts: "Iterable[int]", top: int = 0, bottom: int = 0) -> "int | None":
        end = len(old) - bottom
        fitting = (at for at in starts if here[at + top : at + end] == old[top:end])
        return min(fitting, key=lambda at: (abs(at - guess), at < guess), default=None)

    sides = hunk.context()
    for fuzz in range(min(MAX_FUZZ, max(sides)) + 1):
        if hunk.line is None:
            break
        top, bottom = (fuzz + side - max(sides) for side in sides)
        starts = range(free, len(lines) - len(old) + max(bottom, 0) + 1)
        if top < 0 and hunk.line <= 1:  # less context before than after: the file begins there
            starts = range(free, 1)
        if bottom < 0:  # or ends
            starts = starts[-1:]
        top, bottom = max(top, 0), max(bottom, 0)
        if (at := nearest(starts, top, bottom)) is not None:
            return Place(at, top, bottom)
    here[-1:] = [_bare(line) + "\n" for line in here[-1:]]  # the hunk may not know that the file's last line is open
    old = [_bare(line) + "\n" for line in old]
    apart = (at for at in range(len(lines)) if all(at >= end or at + len(old) <= start for start, end in taken))
    at = nearest(apart)
    return None if at is None else Place(at, loose=True)


def _new_lines(lines: "list[str]", hunk: Hunk, place: Place) -> "list[str]":
    """The new lines from the first change to the last one, with the line ends that the file has there."""
    before, after = hunk.context()
    index, new = place.at + before, list[str]()
    has_crlf = any(text.endswith("\r\n") for _, text in hunk.body)
    for sign, text in hunk.body[before : len(hunk.body) - after]:
        if sign == "+":
            new.append(text if has_crlf or not text.endswith("\n") else text[:-1] + _line_end(lines, index))
            continue
        if sign == " ":
            new.append(lines[index])
        index += 1
    if place.loose and new and index == len(lines) and not lines[-1].endswith("\n"):
        new[-1] = _bare(new[-1])
    return new


def _line_end(lines: "list[str]", index: int) -> str:
    """The end of the line before the index, or of the first line."""
    return "\r\n" if lines and lines[max(index - 1, 0)].endswith("\r\n") else "\n"


def shell(command: str, seconds: float) -> None:
    """Runs the command to its end, in bash where there is one. What it leaves running is ended with it."""
    before = _children()
    process = subprocess.Popen(
        [shutil.which("bash") or "/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=1, stderr=1
    )
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
    """The child processes of this one. Orphans are among them: the interpreter becomes their parent."""
    pids = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            pids.add(int(name))
    return pids
