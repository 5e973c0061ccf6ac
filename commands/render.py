"""`lorafleet render`: every resolved value, and where it came from."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, Format, Job, Output, Overrides, print_json, tell


def render(job: Job, overrides: Overrides = None, output: Output = Format.TEXT, runs: AnyRuns = DEFAULT_RUNS) -> None:
    """Print each field's value and its origin: file, override, default, alias or link."""
    from lorafleet.jobs.loading.job_file import load_job
    from lorafleet.jobs.trials.defaults import learning_rate

    loaded = load_job(job, tuple(overrides or ()))
    resolved = loaded.resolved()
    rate = learning_rate(loaded.job)
    if loaded.job.train.learning_rate is None:
        resolved["train.learning_rate"] = {"value": rate.value, "origin": f"default ({rate.rule})"}
    if output is Format.JSON:
        print_json({"file": str(job), "fields": resolved, "notes": list(loaded.notes)})
        return
    width = max(len(path) for path in resolved)
    for path, field in resolved.items():
        tell(f"{path:<{width}}  {_shown(field['value'])}  # {field['origin']}")


def _shown(value: object) -> str:
    import json

    return json.dumps(value)
