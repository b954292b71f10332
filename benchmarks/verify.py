"""A thousand recorded trees over all environments, played again and compared; into docs/results/verify.md.

python benchmarks/verify.py    # some ten minutes on a quiet core

The trees are those of tests/wander.py: experts' turns, nonsense and broken calls, branching anywhere. In one of ten
trees one word of one recorded observation is then changed; the replay has to find it and to name rollout, turn and
field. (tests/test_replay.py changes the environments instead.)
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from treegym.agents import ChatRenderer, RolloutTree, Sampling, grow_trees
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import ScriptedPolicy
from treegym.agents.rollouts import verify
from treegym.envs import Message

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from wander import ENVS, Wander, tasks  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "verify.md"
TREES = {"treegym/Code-v0": 60, "treegym/PythonMath-v0": 140}  # which run Python
OTHERS = 200
PLANTED = 10  # one tree of so many
AT_ONCE = 20


@dataclass
class Count:
    """Of an environment."""

    trees: int = 0
    rollouts: int = 0
    turns: int = 0
    equal: int = 0  # trees
    planted: int = 0
    found: int = 0
    first: list[str] = field(default_factory=list)  # divergences of trees in which nothing was changed


def main() -> None:
    renderer = ChatRenderer(build_nano()[1])
    counts = {env: measure(env, TREES.get(env, OTHERS), renderer) for env in ENVS}
    rows = [row("environment", "trees", "rollouts", "turns", "as recorded", "words changed", "found and named")]
    rows.append("|---" * 7 + "|")
    for env, count in counts.items():
        rows.append(row(env, count.trees, count.rollouts, count.turns, count.equal, count.planted, count.found))
    columns = ("trees", "rollouts", "turns", "equal", "planted", "found")
    rows.append(row("all", *(sum(getattr(count, name) for count in counts.values()) for name in columns)))
    said = [line for count in counts.values() for line in count.first]
    text = [
        "# Recorded trees, verified",
        "",
        "Made by `python benchmarks/verify.py`, in strict mode.",
        "",
        *rows,
        *said,
    ]
    RESULTS.write_text("\n".join(text) + "\n")
    print("\n".join(rows + said))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def measure(env: str, trees: int, renderer: ChatRenderer) -> Count:
    count, dice = Count(), random.Random(env)
    for first in range(0, trees, AT_ONCE):
        for tree in grow(env, min(AT_ONCE, trees - first), first, renderer):
            found = verify(tree)
            count.trees += 1
            count.rollouts += len(tree.leaves)
            count.turns += len(tree.nodes)
            count.equal += not found
            count.first += [f"{env}, seed {tree.task.seed}, {found[0]}"] if found else []
            if count.trees % PLANTED == 0:
                number = dice.choice([i for i, node in enumerate(tree.nodes) if node.messages[0].text])
                divergence = next(iter(verify(changed(tree, number))), None)
                count.planted += 1
                rollout = next(rollout for rollout, path in enumerate(tree.paths) if number in path)
                named = divergence and (divergence.rollout, divergence.turn, divergence.difference.field)
                count.found += named == (rollout, len(tree.path(number)), "messages[0]")
        print(env, count, flush=True)
    return count


def grow(env: str, number: int, first: int, renderer: ChatRenderer) -> list[RolloutTree]:
    """Trees as they come out of a store."""
    policy, sampling = ScriptedPolicy(renderer, lambda text, seed: ""), Sampling(max_context=1 << 20)
    trees = asyncio.run(grow_trees(tasks(env, number, first), Wander(4), policy, renderer, sampling))
    return [RolloutTree.from_json(json.loads(json.dumps(tree.to_json()))) for tree in trees]


def changed(tree: RolloutTree, number: int) -> RolloutTree:
    """The tree with another word in an observation, as if the environment had said it."""
    node = tree.nodes[number]
    words = node.messages[0].text.split(" ")
    words[len(words) // 2] += "x"
    messages = (Message(node.messages[0].role, " ".join(words)), *node.messages[1:])
    return replace(tree, nodes=(*tree.nodes[:number], replace(node, messages=messages), *tree.nodes[number + 1 :]))


if __name__ == "__main__":
    main()
