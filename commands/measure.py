"""`lorafleet measure`: one model's inference in a fresh process. Started by a comparison, never by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer


def measure() -> None:
    """Read what to measure from standard input, and print what was measured as one line of JSON."""
    from jobs.spec import JobSpec

    request = json.loads(sys.stdin.read())
    from training.measure import measure as measured

    found = measured(
        JobSpec.model_validate_json(json.dumps(request["job"])),
        Path(request["tokens"]),
        Path(request["weights"]) if request["weights"] else None,
        request["split"],
        request["gpus"],
        request["rows"],
        request["new_tokens"],
    )
    typer.echo(json.dumps(found))
