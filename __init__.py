"""lorafleet: find out which fine-tuning configuration of a base model to ship.

The names below are the Python interface (docs/python.md). They are imported when they are first
used, so that `import lorafleet` costs nothing. All other modules are private.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafleet.cluster.api import (
        SubmittedRun,
        find_run,
        load_job,
        plan,
        run_here,
        submit,
    )
    from lorafleet.jobs.errors import (
        AssetError,
        DataError,
        JobFileError,
        LorafleetError,
        MissingExtra,
        PlacementRefused,
        RunError,
        UserError,
    )
    from lorafleet.jobs.runs.report import Report

__all__ = [
    "AssetError",
    "DataError",
    "JobFileError",
    "LorafleetError",
    "MissingExtra",
    "PlacementRefused",
    "Report",
    "RunError",
    "SubmittedRun",
    "UserError",
    "__version__",
    "find_run",
    "load_job",
    "plan",
    "run_here",
    "submit",
]

_MODULES = {
    "lorafleet.cluster.api": (
        "SubmittedRun",
        "find_run",
        "load_job",
        "plan",
        "run_here",
        "submit",
    ),
    "lorafleet.jobs.errors": (
        "AssetError",
        "DataError",
        "JobFileError",
        "LorafleetError",
        "MissingExtra",
        "PlacementRefused",
        "RunError",
        "UserError",
    ),
    "lorafleet.jobs.runs.report": ("Report",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lorafleet")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'lorafleet' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
