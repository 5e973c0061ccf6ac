"""`lorafleet schema`: the JSON Schema of a job file, for editors."""

from __future__ import annotations

from commands.common import print_json


def schema() -> None:
    """Print the JSON Schema of a job file."""
    from jobs.load import json_schema

    print_json(json_schema())
