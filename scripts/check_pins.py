"""Check that every dependency has a lower and an upper bound that include the installed version."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def find_problem(line: str) -> str | None:
    """Return the problem of a dependency in pyproject.toml, or None if there is none."""
    requirement = Requirement(line)
    if requirement.name == "lorafleet":  # one of our own extras
        return None
    operators = {bound.operator for bound in requirement.specifier}
    if not operators & {">=", "==", "~="} or not operators & {"<", "==", "~="}:
        return f"{line} must have a lower and an upper bound"
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:  # belongs to an extra that is not installed
        return None
    return (
        None
        if requirement.specifier.contains(installed)
        else f"{line}, but {installed} is installed"
    )


def main() -> int:
    """Print every problem; return 1 if there is any, else 0."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    problems = [problem for line in dict.fromkeys(lines) if (problem := find_problem(line))]
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
