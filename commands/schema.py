"""`lorafleet schema`: the JSON Schema of a job file, for editors."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, print_json


def schema(runs: AnyRuns = DEFAULT_RUNS) -> None:
    """Print the JSON Schema of a job file."""
    from lorafleet.jobs.loading.job_file import json_schema

    print_json(json_schema())
