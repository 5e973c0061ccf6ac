"""Measuring in a process that has done nothing else: what a model needs is then its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from lorafleet.cluster.local import driver_command

_SECONDS = 3600.0


def measured_apart(request: dict[str, Any], folder: str | Path, threads: int) -> dict[str, Any]:
    """What `lorafleet measure` finds, on this node. Raises RuntimeError with what it said when it failed."""
    try:
        done = _run(request, folder, threads)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took more than {_SECONDS / 60:.0f} minutes") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(request: dict[str, Any], folder: str | Path, threads: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*driver_command(), "measure"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
