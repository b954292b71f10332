"""`python -m treegym`: the same as the `treegym` command."""

from .scenarios.cli import app

app(prog_name="treegym")
