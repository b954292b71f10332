"""The program that a sandbox starts: makes one package of the guest_*.py beside it, and runs the role it is given."""

import importlib
import os
import sys
import types

if __name__ == "__main__":
    package = types.ModuleType("inside")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules[package.__name__] = package
    importlib.import_module("inside.guest_keeper").main()
