"""The packages that code in a sandbox may import; whatever else is installed here stays out of it.

Above all treegym stays out: its generators and task data would tell an agent the answers.
"""

from __future__ import annotations

import functools
import os
import site
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .interface import SandboxError

USUAL = ("numpy", "math-verify")  # with what they need, where they are installed
MORE = "TREEGYM_PACKAGES"  # environment variable: names of further packages, separated by blanks


@functools.cache
def packages() -> dict[str, Path]:
    """What a sandbox's site-packages holds: name there -> file or folder on this machine."""
    chosen = list(map(canonicalize_name, os.environ.get(MORE, "").split()))
    ahead, seen, places = [*USUAL, *chosen], set[str](), dict[str, Path]()
    while ahead:
        name = canonicalize_name(ahead.pop())
        if name in seen:
            continue
        if name == "treegym":
            raise SandboxError(f"{MORE} leads to treegym, which would tell agents the answers to its tasks")
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            if name in chosen:
                raise SandboxError(f"{MORE} names {name!r}, which is not installed here") from None
            continue
        tops = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
        places |= {top: Path(str(package.locate_file(top))) for top in tops}
        needs = map(Requirement, package.requires or ())
        ahead += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return dict(sorted(places.items()))


def site_packages() -> str:
    """Where this Python looks for packages."""
    return next(folder for folder in site.getsitepackages() if os.path.isdir(folder))
