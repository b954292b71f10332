"""Files and a shell in a sandbox: what agents do to them, what forks share, what is refused."""

from __future__ import annotations

import contextlib
import difflib
import random
from collections.abc import Iterator

import pytest

from treegym.envs import ToolEnv, check_env
from treegym.tools import Limits, SandboxUnavailable, ToolError, Toolkit, Workspace, open_sandbox

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
    with pytest.raises(ToolError, match="read_file: first_line: "):
        space.read_file(path="long", first_line=0)


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
