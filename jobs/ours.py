"""Our packages have plain names (`training`, `jobs`): what is imported under them must be ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jobs.errors import UserError

PACKAGES = ("jobs", "slurm", "evaluation", "cluster", "training", "tuning", "commands")


def foreign_packages() -> dict[str, str]:
    """Packages that Python would import from somewhere else, and where."""
    home = Path(__file__).parent.parent
    found = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).parent if spec and spec.origin else None
        if origin != home / name:
            found[name] = str(origin)
    return found


def check_packages() -> None:
    """Raise UserError when a folder on the path hides one of our packages."""
    for name, place in foreign_packages().items():
        raise UserError(
            f"the Python package {name!r} is taken from {place}, not from lorafleet: take that folder's parent out of "
            "PYTHONPATH, or uninstall the package that brought it"
        )
