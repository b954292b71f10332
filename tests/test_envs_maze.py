"""Maze: every cell can be reached, the oracle's way is the shortest, states come back."""

from __future__ import annotations

import pytest

from treegym.envs import MazeEnv, check_env
from treegym.envs.maze import STEPS


def start(seed: int, **settings: float) -> MazeEnv:
    env = MazeEnv(**settings)  # type: ignore[arg-type]
    env.reset(seed=seed)
    return env


def test_the_smallest_maze_keeps_the_promises_of_every_environment() -> None:
    check_env(lambda: MazeEnv(size=2, loops=1.0))


def distances(env: MazeEnv) -> dict[tuple[int, int], int]:
    """Steps from every cell to the exit, by relaxing until nothing changes."""
    far = dict.fromkeys(env.ways, 10**6) | {env.exit: 0}
    for _ in env.ways:
        for (x, y), ways in env.ways.items():
            nearest = min((far[x + dx, y + dy] for way in ways for dx, dy in [STEPS[way]]), default=10**6)
            far[x, y] = min(far[x, y], nearest + 1)
    return far


@pytest.mark.parametrize("loops", [0.0, 0.3])
def test_every_cell_is_joined_to_the_exit_and_the_oracle_walks_the_shortest_way(loops: float) -> None:
    for seed in range(30):
        env = start(seed, loops=loops)
        far = distances(env)
        assert max(far.values()) < len(env.ways)
        ways = sum(map(len, env.ways.values())) // 2
        assert ways == len(env.ways) - 1 if loops == 0 else ways >= len(env.ways) - 1
        for left in range(far[env.cell], 0, -1):
            assert far[env.cell] == left
            env.step(env.oracle() or "")
        _, reward, terminated, _, _ = env.step(env.oracle() or "")
        assert terminated and reward == 1.0


def test_walls_hold_and_a_walk_there_and_back_leads_to_the_same_state() -> None:
    env = start(0, loops=0.0)
    key, here = env.state_key(), env.cell
    open_way = env.ways[here][0]
    shut = next(way for way in STEPS if way not in env.ways[here])
    *_, info = env.step(env.write_call("go", direction=shut))
    assert info["failed_calls"] == 1 and env.state_key() == key
    env.step(env.write_call("go", direction=open_way))
    assert env.state_key() != key
    back = next(way for way, (dx, dy) in STEPS.items() if (env.cell[0] + dx, env.cell[1] + dy) == here)
    env.step(env.write_call("go", direction=back))
    assert env.state_key() == key


def test_one_is_out_at_the_exit_only() -> None:
    assert start(0).step("<answer>out</answer>")[1] == 0.0
    with pytest.raises(ValueError, match="size 11: expected 2 to 10"):
        MazeEnv(size=11)
