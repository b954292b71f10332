"""train() in a notebook: in a cell of a real kernel, whose event loop is running."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

from treegym.agents import Run, run_to_end

SCENARIO = """
environment: {id: "steps:tests/Steps-v0"}
model: {name: nano, dtype: float32}
algorithm: {parameters: {n: 2}}
sampling: {max_tokens: 4}
warmup: {demonstrations: 16, batch_size: 4}
improvement: {steps: 2, tasks_per_step: 2}
heldout: {tasks: 2}
threads: 1
"""
MODULE = """
import gymnasium
from treegym.envs import LookupEnv
gymnasium.register("tests/Steps-v0", LookupEnv)
"""


class Notebook:
    """A kernel in a folder, and what its cells print or raise."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager, self._client = manager, client

    def begin(self, cell: str) -> str:
        return str(self._client.execute(cell))

    def outputs(self, cell: str, timeout: float = 250) -> Iterator[str]:
        """Texts as they come, errors as NAME: MESSAGE, until the cell has ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                message = self._client.get_iopub_msg(timeout=1)
            except Empty:
                continue
            content = message["content"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            if content.get("execution_state") == "idle":
                return
            yield content.get("text") or content.get("data", {}).get("text/plain", "")
            if "ename" in content:
                yield f"{content['ename']}: {content['evalue']}"
        raise AssertionError(f"the cell has not ended in {timeout} s")

    def run(self, cell: str) -> str:
        return "\n".join(self.outputs(self.begin(cell)))


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    pytest.importorskip("ipykernel", reason="a notebook's kernel is not installed: pip install 'treegym[test]'")
    client_module = pytest.importorskip("jupyter_client")
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    (tmp_path / "steps.py").write_text(MODULE)
    manager = client_module.KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.timeout(600)  # a kernel imports torch once more
def test_a_notebook_trains_and_a_stopped_run_goes_on(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("from treegym.scenarios import load_scenario, train\nscenario = load_scenario('tiny.yaml')")
    cell = notebook.begin("train(scenario, 'run')")
    said: list[str] = []
    for text in notebook.outputs(cell):
        said.append(text)
        if "warming up 1/4" in text:
            notebook.manager.interrupt_kernel()
    assert said[-1].startswith("Stopped: saved after step"), said
    assert (tmp_path / "run" / "checkpoints").is_dir() and Run(tmp_path / "run").summary() is None
    assert "saved in run" in notebook.run("results = train(scenario, 'run', resume=True)")
    assert "['demonstrations', 'trained', 'untrained', 'warmed up']" in notebook.run("sorted(results)")


def test_an_interrupt_cancels_and_waits() -> None:
    ended: list[str] = []

    async def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)  # of which the main thread hears
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append("cleaned up")

    async def cell() -> None:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_to_end(interrupted())
        finally:
            signal.signal(signal.SIGINT, before)

    asyncio.run(cell())
    assert ended == ["cleaned up"]


def test_a_coroutine_runs_in_scripts_and_in_notebooks() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def cell() -> int:
        return run_to_end(double(3))

    assert run_to_end(double(2)) == 4 and asyncio.run(cell()) == 6
