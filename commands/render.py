"""`lorafleet render`: print every resolved value of a job file and its origin."""

from __future__ import annotations

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    AnyRuns,
    Format,
    Job,
    Output,
    Overrides,
    print_json,
    print_text,
)


def render(
    job: Job,
    overrides: Overrides = None,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Print each field's value and its origin: file, override, default, alias or link."""
    from lorafleet.jobs.loading.job_file import load_job
    from lorafleet.jobs.trials.defaults import resolve_learning_rate

    loaded = load_job(job, tuple(overrides or ()))
    resolved = loaded.get_resolved_values()
    rate = resolve_learning_rate(loaded.job)
    if loaded.job.train.learning_rate is None:
        resolved["train.learning_rate"] = {"value": rate.value, "origin": f"default ({rate.rule})"}
    if output is Format.JSON:
        print_json({"file": str(job), "fields": resolved, "notes": list(loaded.notes)})
        return
    width = max(len(path) for path in resolved)
    for path, field in resolved.items():
        print_text(f"{path:<{width}}  {_format_value(field['value'])}  # {field['origin']}")


def _format_value(value: object) -> str:
    import json

    return json.dumps(value)
