"""treegym commands, in this process or in forks of another that interrupts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from treegym.scenarios.commands.cli import main


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)"""
    before, sys.argv = sys.argv, ["treegym", *arguments]
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    return (int(end.value.code or 0), *capsys.readouterr())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command refuses."""
    status, _, said = command(capsys, *arguments)
    assert status == 2 and said.startswith("treegym: ") and said.count("\n") == 1, said
    return said.removeprefix("treegym: ").strip()


def run_all(folder: Path, jobs: Sequence[tuple[list[str], Any]], hash_seed: int) -> list[int]:
    """Exit statuses of (arguments, how interrupt.py interrupts it or None), one after the other."""
    script = Path(__file__).with_name("interrupt.py")
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(jobs), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(status) for status in json.loads(done.stdout)]
