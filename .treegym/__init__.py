"""treegym: multi-turn text environments with tools, and trainers that learn from trees of rollouts.

Five rooms, each importing only those before it: tools, envs, agents, trainers, scenarios.
"""

__version__ = "0.1.0"
