"""Files and a shell in a sandbox: what agents do to them, what forks share, what is refused."""

from __future__ import annotations

import contextlib
import difflib
import io
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from treegym.envs import ToolEnv, check_env
from treegym.tools import ToolError, Toolkit
from treegym.tools.sandbox import Limits, SandboxUnavailable, Workspace, open_sandbox
from treegym.tools.sandbox import guest_files as files

pytestmark = pytest.mark.filterwarnings("ignore:the sandbox 'local'")


@pytest.fixture(params=["bubblewrap", "local"])
def space(request: pytest.FixtureRequest) -> Iterator[Workspace]:
    try:
        open_sandbox(request.param)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with contextlib.closing(Workspace({"src/a.py": "x = 1\n"}, sandbox=request.param)) as workspace:
        workspace.reset(0)
        yield workspace


def text(result: object) -> str:
    return result.text  # type: ignore[attr-defined,no-any-return]


def test_an_episode_begins_with_its_files_and_those_alone(space: Workspace) -> None:
    assert text(space.list_files()) == "src/a.py 6\n"
    space.write_file(path="b/c.txt", text="hä\n")
    assert text(space.list_files()) == "b/c.txt 4\nsrc/a.py 6\n"
    assert text(space.read_file(path="b/c.txt")) == "hä\n"
    space.reset(0)
    assert text(space.list_files()) == "src/a.py 6\n"


def test_files_shell_and_python_are_one_place(space: Workspace) -> None:
    space.python(code="import os; y = 5; open('made', 'w').write('by python')")
    assert text(space.shell(command="cat made; echo; echo by shell > made; ls src")) == "by python\na.py\n"
    assert text(space.python(code="y, open('made').read()")) == "(5, 'by shell\\n')\n"
    assert text(space.python(code="sorted(n for n in globals() if not n.startswith('_'))")) == "['os', 'y']\n"


def test_lines_of_a_long_file_come_as_asked(space: Workspace) -> None:
    space.write_file(path="long", text="".join(f"{i}\n" for i in range(1, 1001)))
    assert text(space.read_file(path="long", first_line=10, lines=2)) == "10\n11\n\n[lines 10 to 11 of 1000]\n"
    assert text(space.read_file(path="long")).endswith("200\n\n[lines 1 to 200 of 1000]\n")
    assert text(space.read_file(path="long", first_line=1001)) == "[no line 1001: the file has 1000 lines]\n"
    assert text(space.read_file(path="long", first_line=1000)) == "1000\n\n[lines 1000 to 1000 of 1000]\n"
    with pytest.raises(ToolError, match="read_file: first_line: "):
        space.read_file(path="long", first_line=0)


def test_lines_are_those_between_line_feeds(space: Workspace) -> None:
    space.write_file(path="f", text="a\r\nb\rc\x0cd\r\n")
    assert text(space.read_file(path="f")) == "a\nb\\rc\\x0cd\n"
    assert text(space.read_file(path="f", first_line=3)) == "[no line 3: the file has 2 lines]\n"
    space.write_file(path="f", text="")
    assert text(space.read_file(path="f")) == "[the file is empty]\n"


def test_all_files_can_be_listed() -> None:
    with contextlib.closing(Workspace(sandbox=open_sandbox().name)) as space:
        space.reset(0)
        result = space.list_files(folder="/")
        assert not result.failed and "[200 of " in text(result)  # type: ignore[union-attr]


def test_a_folder_that_is_closed_is_named(space: Workspace) -> None:
    space.shell(command="mkdir -p a/shut && touch a/f && chmod 0 a/shut")
    if text(space.shell(command="ls a/shut")) == "(nothing printed)":
        pytest.skip("no folder is closed to this user")
    assert text(space.list_files(folder="a")) == "a/f 0\n[a/shut: Permission denied]\n"
    assert space.list_files(folder="a/shut").failed  # type: ignore[union-attr]


def test_a_file_that_may_not_be_so_large_is_refused_and_the_old_one_stays(space: Workspace) -> None:
    result = space.write_file(path="src/a.py", text="x" * (40 << 20))
    assert result.failed and text(result) == "41943040 characters; a file has at most 33554432 bytes"  # type: ignore[union-attr]
    result = space.write_file(path="src/a.py", text="ä" * (20 << 20))
    assert result.failed and "File too large" in text(result)  # type: ignore[union-attr]
    assert text(space.read_file(path="src/a.py")) == "x = 1\n"


def test_a_full_disk_leaves_the_old_file_and_what_is_said() -> None:
    with contextlib.closing(Workspace(sandbox="bubblewrap" if shutil.which("bwrap") else "local")) as space:
        if space.session.sandbox == "local":
            pytest.skip("no bwrap here: the disk of local is not bounded")
        space.reset(0)
        space.write_file(path="a", text="old")
        space.python(code="import itertools\nfor i in itertools.count(): open(f'f{i}', 'wb').write(bytes(8 << 20))")
        for result in (
            space.write_file(path="a", text="new" * 5000),
            space.patch_file(path="a", changes="@@\n-old\n+" + "new" * 5000),
            space.write_file(path="b", text="new" * 5000),
        ):
            assert "No space left on device" in text(result) and result.failed  # type: ignore[union-attr]
        assert text(space.read_file(path="a")) == "old"
        assert " a 3" not in text(space.list_files()) and "b" not in text(space.list_files()).split()


def test_the_shell_is_bash_where_there_is_one(space: Workspace) -> None:
    assert "bash" in space.shell.description
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    assert text(space.shell(command="a=(1 2); [[ ${a[1]} == 2 ]] && echo {1..3} <(:)")).startswith("1 2 3 /dev/fd/")


@pytest.mark.parametrize("seed", range(8))
def test_a_patch_makes_of_the_old_file_the_new_one(space: Workspace, seed: int) -> None:
    rng = random.Random(seed)
    old = [f"{rng.randint(0, 3)} line" for _ in range(30)]
    new = list(old)
    for _ in range(4):
        at = rng.randrange(len(new))
        new[at : at + rng.randint(0, 2)] = [f"new {rng.random()}"] * rng.randint(0, 2)
    changes = "\n".join(difflib.unified_diff(old, new, "a", "b", lineterm=""))
    space.write_file(path="f", text="\n".join(old) + "\n")
    assert not space.patch_file(path="f", changes=changes).failed or old == new  # type: ignore[union-attr]
    assert text(space.python(code="print(open('f').read(), end='')")) == "\n".join(new) + "\n"


CHARACTERS = st.sampled_from("abcd")
LINES = st.lists(CHARACTERS.map(lambda character: character + "\n"), max_size=20)


@st.composite
def edited(draw: st.DrawFn, lines: list[str], most: int) -> list[str]:
    lines = list(lines)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(lines)))
        lines[at : at + draw(st.integers(0, 2))] = draw(st.lists(st.sampled_from(["a\n", "x\n", "y\n"]), max_size=3))
    return lines


def differences(old: str, new: str, context: int) -> str:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "f", "f", n=context)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


@pytest.mark.skipif(not shutil.which("patch"), reason="no GNU patch here: install the package patch")
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.data())
def test_what_gnu_patch_takes_is_patched_as_it_does(data: st.DataObject) -> None:
    old = data.draw(LINES)
    new, there = data.draw(edited(old, 4)), data.draw(edited(old, 2))
    if there == old and data.draw(st.booleans()):  # of a file that has changed, GNU patch may join the last lines
        texts = ["".join(lines).removesuffix("\n" * data.draw(st.integers(0, 1))) for lines in (old, new)]
        text_there = texts[0]
    else:
        texts, text_there = ["".join(old), "".join(new)], "".join(there)
    changes = differences(*texts, data.draw(st.integers(0, 3)))
    hypothesis.assume(changes)
    with tempfile.TemporaryDirectory() as folder:
        gnus, ours = Path(folder, "gnus"), Path(folder, "ours")
        for path in (gnus, ours):
            path.write_bytes(text_there.encode())
        command = ["patch", "--force", "--silent", "--no-backup-if-mismatch", "--reject-file=-", str(gnus)]
        done = subprocess.run(command, input=changes.encode(), capture_output=True, check=False)
        hypothesis.assume(done.returncode == 0)
        with contextlib.redirect_stdout(io.StringIO()):
            files.patch(str(ours), changes)
        assert ours.read_bytes() == gnus.read_bytes()


@pytest.mark.parametrize(
    ("old", "changes", "new"),
    [
        ("a\nb\nc\n", "@@ -2,0 +3 @@\n+new", "a\nb\nnew\nc\n"),
        ("a\nb\nc\n", "@@ -0,0 +1 @@\n+new", "new\na\nb\nc\n"),
        ("a\nb\nc\n", "@@ -2 +1,0 @@\n-b", "a\nc\n"),
        ("a\nb", "@@ -2,0 +3 @@\n+new\n\\ No newline at end of file\n", "a\nb\nnew"),
        ("a\nb", "@@ -2 +2 @@\n-b\n+new\n", "a\nnew"),
        ("a\nb\n", "@@ -2 +2 @@\n-b\n+new\n\\ No newline at end of file", "a\nnew"),
        ("a\r\nb\r\nc\r\n", "@@ -1,3 +1,4 @@\n a\n-b\n+new\n+line\n c\n", "a\r\nnew\r\nline\r\nc\r\n"),
        ("a\r\nb\r\n", "@@ -1,2 +1,2 @@\r\n a\r\n-b\r\n+new\r\n", "a\r\nnew\r\n"),
        ("a\nb\n", "@@ -1,2 +1,2 @@\r\n a\r\n-b\r\n+new\r\n", "a\nnew\n"),
        ("a\r\nb\r\n", "@@ -2,0 +3 @@\n+new\n", "a\r\nb\r\nnew\r\n"),
        ("a\nb\r\nc\n", "@@\n-b\n+new\n", "a\nnew\r\nc\n"),
        ("a\nb\nc\nd\n", "@@ -1,9 +1,9 @@\n a\n-b\n+new\n c\n", "a\nnew\nc\nd\n"),
        ("a\n\nb\n", "@@ -1,3 +1,3 @@\n a\n\n-b\n+new\n", "a\n\nnew\n"),
        ("a\x0c\u2028b\nc\n", "@@ -1,2 +1,2 @@\n a\x0c\u2028b\n-c\n+new\n", "a\x0c\u2028b\nnew\n"),
        ("a\nb\nc\nd\n", "@@ -4 +4 @@\n-d\n+new\n@@ -1 +1 @@\n-a\n+line\n", "line\nb\nc\nnew\n"),
        ("-- a\nb\n", "--- f\n+++ f\n@@ -1,2 +1,2 @@\n--- a\n+++ a\n b\n", "++ a\nb\n"),
        ("a\n", "@@ -1 +1 @@\n-a\n+new\n-- \n2.39\n", "new\n"),
    ],
)
def test_a_patch_goes_where_it_says_and_keeps_line_ends(space: Workspace, old: str, changes: str, new: str) -> None:
    space.write_file(path="f", text=old)
    result = space.patch_file(path="f", changes=changes)
    assert text(space.python(code="print(ascii(open('f', newline='').read()))")) == ascii(new) + "\n", result


def test_a_patch_makes_and_removes_files(space: Workspace) -> None:
    made = space.patch_file(path="new/f", changes="--- /dev/null\n+++ b/new/f\n@@ -0,0 +1,2 @@\n+a\n+b\n")
    assert text(made) == "changed new/f in 1 places\n" and text(space.read_file(path="new/f")) == "a\nb\n"
    space.patch_file(path="new/f", changes="--- a/new/f\n+++ /dev/null\n@@ -1,2 +0,0 @@\n-a\n-b\n")
    assert text(space.list_files()) == "src/a.py 6\n"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("--- a\n+++ a\n@@ -1 +1 @@\n-x = 1\n+x = 2\n--- b\n+++ b\n@@ -1 +1 @@\n-y\n+z\n", "changes of 2 files"),
        ("@@ -1 +1 @@\n-x = 1\nx = 2\n", "hunk 1: the line 'x = 2' begins with none of blank, - and +"),
        ("@@ -1 +1 @@\n x = 1\n", "hunk 1 changes nothing"),
        ("@@\n+y = 1\n", "hunk 1: src/a.py has no such lines"),
    ],
)
def test_a_patch_that_cannot_be_meant_is_refused(space: Workspace, changes: str, reason: str) -> None:
    result = space.patch_file(path="src/a.py", changes=changes)
    assert reason in text(result) and result.failed  # type: ignore[union-attr]
    assert text(space.read_file(path="src/a.py")) == "x = 1\n"


def test_a_patch_that_does_not_fit_changes_nothing_and_says_where(space: Workspace) -> None:
    result = space.patch_file(path="src/a.py", changes="@@\n-x = 1\n+x = 2\n@@\n-y = 1\n+y = 2")
    assert result.failed and "hunk 2" in result.text and "Traceback" not in result.text  # type: ignore[union-attr]
    assert text(space.read_file(path="src/a.py")) == "x = 1\n"
    assert "no hunk" in text(space.patch_file(path="src/a.py", changes="x = 2"))


def test_what_fails_is_told_without_our_own_code(space: Workspace) -> None:
    for result in (
        space.read_file(path="none"),
        space.list_files(folder="none"),
        space.write_file(path="src", text=""),
    ):
        assert result.failed and "Traceback" not in result.text  # type: ignore[union-attr]
    assert text(space.read_file(path="none")).startswith("FileNotFoundError: ")


def test_a_command_tells_its_status_and_leaves_nothing_running(space: Workspace) -> None:
    assert text(space.shell(command="echo out; echo err >&2; exit 3")) == "out\nerr\n[exit status 3]\n"
    space.shell(command="sleep 987 & (setsid sleep 987 &) ; sleep 0.1")
    assert "987" not in text(space.shell(command=SLEEPERS))


SLEEPERS = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o 'sleep 98[0-9]'"


def test_a_command_in_a_fork_leaves_nothing_running(space: Workspace) -> None:
    space.python(code="x = 1")
    with contextlib.closing(space.fork()) as twin:
        twin.shell(command="sleep 987 & (setsid sleep 987 &) ; sleep 0.1")
        assert "987" not in text(twin.shell(command=SLEEPERS))
        assert "987" not in text(space.shell(command=SLEEPERS))


def test_a_command_that_takes_too_long_ends_and_the_variables_stay() -> None:
    with contextlib.closing(Workspace(limits=Limits(seconds=1), sandbox=open_sandbox().name)) as space:
        space.reset(0)
        space.python(code="y = 5")
        result = space.shell(command="sleep 60")
        assert result.failed and "stopped after 0.8 seconds" in result.text  # type: ignore[union-attr]
        assert text(space.python(code="y")) == "5\n"


def test_forks_have_files_of_their_own(space: Workspace) -> None:
    space.write_file(path="f", text="before")
    with contextlib.closing(space.fork()) as twin:
        twin.shell(command="echo twin > f")
        space.shell(command="echo parent > g")
        assert text(space.read_file(path="f")) == "before"
        assert text(twin.read_file(path="f")) == "twin\n"
        assert text(twin.read_file(path="g")).startswith("FileNotFoundError")


def test_unknown_tools_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no tool 'delete'; tools: read_file"):
        Workspace(tools=["delete"])
    assert isinstance(Workspace(), Toolkit)


class Fixing(ToolEnv):
    """Change a file."""

    def __init__(self) -> None:
        super().__init__(tools=[Workspace({"a.py": "x = 1\n"})])

    def begin(self, options: object) -> str:
        return "Let x be 2."

    def score(self, answer: str) -> dict[str, float]:
        space = self.given_tools[0]
        assert isinstance(space, Workspace)
        return {"exact": float(text(space.read_file(path="a.py")) == "x = 2\n")}

    def oracle(self) -> str | None:
        if self.over:
            return None
        if self.transcript:
            return self.write_answer("done")
        return self.write_call("patch_file", path="a.py", changes="@@\n-x = 1\n+x = 2")


def test_an_environment_of_files_keeps_every_promise() -> None:
    check_env(Fixing, seeds=[0])
