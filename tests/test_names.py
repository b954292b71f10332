"""`import treegym` is light, offers the usual names, and makes the ids known."""

import subprocess
import sys
from types import SimpleNamespace

import gymnasium
import pytest

import treegym


def test_importing_treegym_makes_the_ids_known_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, treegym, gymnasium; known = 'treegym/Lookup-v0' in gymnasium.registry\n"
        "print(known, [name for name in ('torch', 'pydantic', 'treegym.envs') if name in sys.modules])\n"
        "print(gymnasium.make('treegym/Lookup-v0').reset(seed=0)[0][:5], 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True []\nEach  False\n"


def test_every_usual_name_is_that_of_its_room() -> None:
    for name, room in treegym._NAMES.items():
        module = sys.modules.get(f"treegym.{room}") or __import__(f"treegym.{room}", fromlist=[name])
        assert getattr(treegym, name) is getattr(module, name) and name in dir(treegym)
    assert set(treegym.__all__) == {*treegym._NAMES, *treegym._ROOMS}


def test_a_package_adds_ids_and_takes_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, str] = {}
    points = [SimpleNamespace(name=name, value="theirs:Env") for name in ("treegym/Lookup-v0", "theirs/Env-v0")]
    monkeypatch.setattr(treegym, "entry_points", lambda group: points)
    monkeypatch.setattr(gymnasium, "registry", {})
    monkeypatch.setattr(gymnasium, "register", lambda id, entry_point: made.update({id: entry_point}))
    assert treegym._register() == tuple(made) and made["theirs/Env-v0"] == "theirs:Env"
    assert made["treegym/Lookup-v0"] == "treegym.envs.lookup:LookupEnv"
