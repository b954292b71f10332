"""treegym new: a package with an environment of one's own, its scenario and its test, to begin with."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import UsageError, say


def new_command(
    name: Annotated[str, typer.Argument(help="The package's name, such as my_env.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write. Default: one of the package's name.")] = None,
) -> None:
    """Write a small package: an environment, a scenario that trains on it, and its test.

    Once it is installed, every command knows the environment by its id.

    Example: treegym new my_env && pip install -e ./my_env && treegym envs my_env/MyEnv-v0
    """
    package = name.replace("-", "_")
    if not package.isidentifier() or keyword.iskeyword(package) or package.lower() != package or package == "treegym":
        raise UsageError(f"{name!r} cannot name a package: write small letters, digits and _, such as my_env")
    folder = out or Path(package)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already: --out names another folder")
    title = "".join(part.capitalize() for part in package.split("_") if part)
    title = title if title.endswith("Env") else f"{title}Env"
    for place, text in FILES.items():
        file = folder / place.replace("PACKAGE", package)
        file.parent.mkdir(parents=True, exist_ok=True)
        for mark, word in {"PACKAGE": package, "TITLE": title, "DISTRIBUTION": package.replace("_", "-")}.items():
            text = text.replace(mark, word)
        file.write_text(text, encoding="utf-8")
    id = f"{package}/{title}-v0"
    say(f"{folder} has {', '.join(place.replace('PACKAGE', package) for place in FILES)}")
    say(f"next: pip install -e {folder}, then treegym envs {id} and treegym train {folder / 'train.yaml'}")


FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "DISTRIBUTION"
version = "0.1.0"
description = "An environment for treegym"
requires-python = ">=3.11"
dependencies = ["treegym"]

[project.optional-dependencies]
test = ["pytest"]

# by which every treegym command, and Gymnasium once treegym is imported, knows the environment
[project.entry-points."treegym.environments"]
"PACKAGE/TITLE-v0" = "PACKAGE.env:TITLE"

[tool.setuptools]
packages = ["PACKAGE"]
""",
    "README.md": """\
# DISTRIBUTION

`PACKAGE/TITLE-v0`: find the box with the key. The environment is in `PACKAGE/env.py`.

```
pip install -e '.[test]'
pytest                               # the environment keeps what it promises
treegym envs PACKAGE/TITLE-v0        # the expert plays an episode
treegym play PACKAGE/TITLE-v0        # you do
treegym train train.yaml             # a tiny model learns it in a minute
```
""",
    "PACKAGE/__init__.py": '''\
"""An environment for treegym."""

from .env import TITLE

__all__ = ["TITLE"]
''',
    "PACKAGE/env.py": '''\
"""TITLE: find the box with the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treegym.envs import ToolEnv
from treegym.tools import ToolError, tool

BOXES, THINGS = 6, ("coin", "ring", "shell", "stone", "feather", "key")


class TITLE(ToolEnv):
    """One of six boxes holds the key. Each of the other things lies beside a box that is always the same."""

    instructions = "Open boxes until you know where the key is, then answer with the number of its box."
    max_turns = 5

    def __init__(self, *, oracle_error: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.oracle_error = oracle_error  # the probability that the expert guesses

    def begin(self, options: Mapping[str, Any]) -> str:
        heldout = options.get("split") == "heldout"
        while True:
            things = [str(thing) for thing in self.np_random.permutation(THINGS)]
            if (things.index("coin") == (things.index("ring") + 1) % BOXES) == heldout:  # in no task to train on
                break
        self.things, self.opened = tuple(things), ()
        self.guesses = self.np_random.random() < self.oracle_error
        return f"There are boxes 1 to {BOXES}. Where is the key?"

    @tool
    def open_box(self, number: int) -> str:
        """See what is in a box; two at most can be opened at once."""
        if not 1 <= number <= BOXES:
            raise ToolError(f"there is no box {number}; there are 1 to {BOXES}")
        self.opened += (number,)
        thing = self.things[number - 1]
        return thing if thing == "key" else f"{thing}; the key is in box {self.things.index('key') + 1}"

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(answer == str(self.things.index("key") + 1))}

    def details(self) -> dict[str, Any]:
        return {"hops": 1}  # how difficult the task is

    def oracle(self) -> str | None:
        if self.over:
            return None
        if not self.opened and not self.guesses:
            return self.write_call("open_box", number=1)
        return self.write_answer(str(self.things.index("key") + 1) if self.opened else "1")
''',
    "train.yaml": """\
# A tiny model learns to look before it answers.
environment: {id: PACKAGE/TITLE-v0}
model: {name: nano}
algorithm: {name: grpo, parameters: {n: 8}}
sampling: {max_tokens: 24, max_context: 512}
warmup:
  demonstrations: 600
  settings: {oracle_error: 0.5}
  optimization: {learning_rate: 3.0e-3, warmup_steps: 5}
improvement:
  steps: 12
  tasks_per_step: 8
  optimization: {learning_rate: 3.0e-4}
heldout: {tasks: 60}
seed: 0
""",
    "tests/test_env.py": '''\
"""The environment keeps what treegym asks of one, and its splits differ."""

from PACKAGE import TITLE
from treegym.envs import check_env


def test_it_keeps_the_contract() -> None:
    check_env(TITLE)


def test_held_out_tasks_are_never_trained_on() -> None:
    env = TITLE()

    def things(split: str) -> set[tuple[str, ...]]:
        return {env.reset(seed=seed, options={"split": split}) and env.things for seed in range(50)}

    assert not things("train") & things("heldout")


def test_the_key_is_the_answer() -> None:
    env = TITLE()
    env.reset(seed=1)
    right = env.things.index("key") + 1
    assert env.score(str(right)) == {"exact": 1.0} and env.score(str(right + 1)) == {"exact": 0.0}
''',
}
