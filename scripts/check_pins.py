"""Check that every dependency has a lower and an upper bound, and that what is installed lies between them."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def wrong(line: str) -> str | None:
    """Say what is wrong with a dependency as pyproject.toml has it; None where it is right."""
    needed = Requirement(line)
    if needed.name == "lorafleet":  # an extra of our own
        return None
    signs = {bound.operator for bound in needed.specifier}
    if not signs & {">=", "==", "~="} or not signs & {"<", "==", "~="}:
        return f"{line} must have a lower and an upper bound"
    try:
        installed = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:  # of an extra that is not installed here
        return None
    return None if needed.specifier.contains(installed) else f"{line}, but {installed} is installed"


def main() -> int:
    """Print every finding; 1 where there is one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = [sentence for line in dict.fromkeys(lines) if (sentence := wrong(line))]
    sys.stdout.writelines(f"{sentence}\n" for sentence in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
