"""`lorafleet schema`: the JSON Schema of a job file, for editors."""

from __future__ import annotations

from commands.common import DEFAULT_RUNS, AnyRuns, print_json


def schema(runs: AnyRuns = DEFAULT_RUNS) -> None:
    """Print the JSON Schema of a job file."""
    from jobs.load import json_schema

    print_json(json_schema())
