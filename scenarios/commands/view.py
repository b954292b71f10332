"""treegym view: runs and their trees in a browser, served from this machine or written into one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import UsageError, say
from .conditions import Cause, Env, Returns, Rollouts, Stage, Steps, Success, Terms, Text, conditions, where

if TYPE_CHECKING:  # torch takes seconds to import
    from ..viewer.shelf import Shelf


def view_command(
    run: Annotated[Path, typer.Argument(help="A run's directory, or a folder of runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free port.")] = 7171,
    host: Annotated[
        str, typer.Option(help="The address to listen at. Whoever reaches it can read the runs.")
    ] = "127.0.0.1",
    export: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write chosen trees into one file instead of serving.")
    ] = None,
    tree: Annotated[list[int] | None, typer.Option(help="With --export: this tree; repeatable.")] = None,
    stage: Stage = None,
    steps: Steps = None,
    env: Env = None,
    returns: Returns = None,
    term: Terms = None,
    rollouts: Rollouts = None,
    success: Success = None,
    cause: Cause = None,
    text: Text = None,
    limit: Annotated[int, typer.Option(min=1, help="With --export: at most so many trees a run, the first.")] = 100,
) -> None:
    """Look at runs in a browser: curves, trees, episodes, and two of them side by side.

    Serves a page at this machine's loopback until Ctrl-C; a run that is still being written can be watched. With
    --export, chosen trees and all curves go into one HTML file that needs no server. The options --stage to --text
    choose the trees of an export; the page has fields for them.

    Example: treegym view runs/quickstart-0 --export failures.html --stage trained --success none
    """
    from ...agents import Run
    from ..viewer.shelf import Shelf
    from ..viewer.site import serve

    if not run.is_dir():
        raise UsageError(f"no folder {run}; treegym runs lists the runs in runs/")
    shelf = Shelf(run, lambda path: Run(path).trees)
    if not shelf.volumes():
        raise UsageError(f"no runs in {run}")
    given = conditions(stage, steps, env, returns, term, rollouts, success, cause, text)
    if export:
        _export(shelf, export, given, tree, limit)
        return
    if tree or given:
        raise UsageError("--tree and the conditions on trees go with --export; the page has fields for them")
    try:
        server = serve(shelf, host, port)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {error}; --port 0 takes a free one") from error
    with server:
        say(f"{len(shelf.volumes())} runs at {server.url}; Ctrl-C ends")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


def _export(shelf: Shelf, file: Path, given: dict[str, str], trees: list[int] | None, limit: int) -> None:
    from ...agents.store.folder import write_text
    from ..viewer.site import exported

    picked = {}
    for name, volume in shelf.volumes().items():
        passing = volume.numbers(where(given, volume.success_term))
        for number in trees or ():
            if number not in passing:
                raise UsageError(f"{name}: no tree {number} meets the conditions")
        numbers = trees or passing
        if len(numbers) > limit:
            say(f"{name}: the first {limit} of {len(numbers)} trees; --limit takes more")
        picked[name] = numbers[:limit]
    write_text(file, exported(shelf, picked))
    say(f"{sum(map(len, picked.values()))} trees of {len(picked)} runs in {file}")
