"""What runs inside a sandbox: a zygote, a keeper for each episode, and interpreters. The standard library alone.

    zygote        imports the usual libraries once and forks a keeper when an episode begins; no agent's code runs in it
    keeper        first process of the episode's namespaces: mounts its files, starts, kills and moves interpreters; no
                  agent's code runs in it either
    interpreter   runs the agent's code, one call after the other, and forks when the episode branches

Each talks to the host over a socket of its own, in messages of a length and a JSON text. An interpreter can forge its
own answers and nobody else's. In a container there is one interpreter, without a zygote and a keeper.

This file makes a package of the guest files beside it, in which they import each other as they do on the host.
"""

import importlib
import os
import sys
import types

if __name__ == "__main__":
    package = types.ModuleType("inside")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules[package.__name__] = package
    importlib.import_module("inside.guest_keeper").main()
