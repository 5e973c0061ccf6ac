"""`lorafleet schema`: print the JSON Schema of a job file, for editors."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, print_json


def schema(runs: AnyRuns = DEFAULT_RUNS) -> None:
    """Print the JSON Schema of a job file."""
    from lorafleet.jobs.loading.job_file import build_json_schema

    print_json(build_json_schema())
