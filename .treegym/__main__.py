"""`python -m treegym`: the same as the `treegym` command."""

from .scenarios.cli import main

main()
