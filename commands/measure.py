"""`lorafleet measure`: measure a model's speed in a fresh process.

`measure_in_subprocess` starts it; its request and result are JSON. Requests: `pace`
(seconds per training row), `inference`, `artefact` (an exported model) and `answers`
(an exported model's answers to prompts).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer


def measure() -> None:
    """Read a request from standard input, and print the measurement as one line of JSON."""
    from lorafleet.jobs.schema.job import JobSpec

    request = json.loads(sys.stdin.read())
    points = request.get("points", [])
    if request["what"] == "artefact":
        from lorafleet.deployment.measure import measure_artefact

        amount = (request["rows"], request["new_tokens"], request["batch_rows"], request["threads"])
        typer.echo(json.dumps(measure_artefact(Path(request["folder"]), *amount, points)))
        return
    if request["what"] == "answers":
        from lorafleet.deployment.prompted_check import answer_prompts

        typer.echo(
            json.dumps(
                answer_prompts(Path(request["folder"]), request["prompts"], request["new_tokens"])
            )
        )
        return
    from lorafleet.training import measure as measured

    job, tokens = JobSpec.from_record(request["job"]), Path(request["tokens"])
    if request["what"] == "pace":
        pace = measured.measure_pace(job, tokens, request["gpus"], request["threads"])
        typer.echo(json.dumps(pace))
        return
    measurement = measured.measure_inference(
        job,
        tokens,
        Path(request["weights"]) if request["weights"] else None,
        request["split"],
        request["gpus"],
        request["threads"],
        request["rows"],
        request["new_tokens"],
        points,
    )
    typer.echo(json.dumps(measurement))
