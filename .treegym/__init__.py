"""treegym: multi-turn text environments with tools, and trainers that learn from trees of rollouts.

Five rooms, each importing only those before it: tools, envs, agents, trainers, scenarios.
"""

import os

# Threads of torch that wait for work shall yield: spinning, they take the cores from whatever else runs, and where
# there are fewer cores than threads from each other. Read by OpenMP when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
