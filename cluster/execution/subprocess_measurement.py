"""Measure a model in an isolated subprocess, so that its memory and time are its own.

A process that has trained or loaded another model before would report that model's peak
memory.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.command import get_driver_command

_TIMEOUT_SECONDS = 3600.0


def measure_in_subprocess(
    request: dict[str, Any], folder: str | Path, threads: int
) -> dict[str, Any]:
    """Run `lorafleet measure` on this node and return its result.

    Args:
        request: What to measure; see `commands/measure.py`.
        folder: Working directory of the command.
        threads: OpenMP threads.

    Raises:
        RuntimeError: The command failed (with its last line of output) or took more than an
            hour.
    """
    try:
        process = _run_measure(request, folder, threads)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"the measurement took more than {_TIMEOUT_SECONDS / 60:.0f} minutes"
        ) from error
    if process.returncode:
        raise RuntimeError(
            (
                process.stderr.strip().splitlines()
                or [(f"the measurement ended with exit code {process.returncode}")]
            )[-1]
        )
    # Libraries may print before the result.
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def _run_measure(
    request: dict[str, Any], folder: str | Path, threads: int
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*get_driver_command(), "measure"],
        input=json.dumps(request | {"threads": threads}),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
        cwd=folder,
        # OpenMP reads its number of threads once, when torch is imported.
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
