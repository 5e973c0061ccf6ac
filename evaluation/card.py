"""The model card beside the recommended adapter: base, data, configuration, metric, versions."""

from __future__ import annotations

import json

from evaluation.report_text import number, plain
from jobs import files
from jobs.report import Report, Row
from jobs.run import Run, Trial

_WHAT = {
    "lora": "LoRA adapter for {}",
    "qlora": "LoRA adapter for a quantised {} (QLoRA)",
    "prompt_tuning": "Learnt prompt for {}",
    "full": "{} with every weight fine-tuned",
}


def write_card(run: Run, report: Report) -> None:
    """Write README.md and manifest.json beside the recommended weights, if they are on disk."""
    chosen, named = report.recommendation.trial_id, report.recommendation.adapter
    weights = run.path / named if named else run.path
    if chosen is None or weights == run.path or not (weights.is_dir() and weights.is_relative_to(run.path)):
        return
    trial = Trial(weights.parent)
    row = _with_held_out(report, chosen)
    resolved = trial.params().get("resolved", {})
    manifest = {
        "run": run.id,
        "trial_id": chosen,
        "base_model": report.model,
        "model_revisions": report.facts.get("model_revisions", {}),
        "data": report.data,
        "data_sha256": report.facts.get("data_sha256", {}),
        "labels": report.facts.get("labels", []),
        "resolved": resolved,
        "validation": row.metrics,
        report.held_out: row.test_metrics,
        "recommendation": report.recommendation.sentence,
        "versions": report.versions,
    }
    files.write_json(trial.weights / "manifest.json", manifest)
    files.write_text(trial.weights / "README.md", _card(report, row, resolved))


def _with_held_out(report: Report, chosen: str) -> Row:
    """The row of what is shipped; of a comparison's arm, with the arm's metrics on the held-out rows."""
    row = report.row(chosen)
    arm = next((arm for arm in report.arms or [] if arm.arm == report.recommendation.arm), None)
    return row if arm is None else row.model_copy(update={"test_metrics": arm.metrics})


def _card(report: Report, row: Row, resolved: dict[str, object]) -> str:
    held_out = row.test_metrics or {}
    method = str(resolved.get("method", "lora"))
    lines = [
        "---",
        f"library_name: {'transformers' if method == 'full' else 'peft'}",
        f"base_model: {json.dumps(report.model)}",
        f"tags: [{method}, lorafleet]",
        "---",
        "",
        f"# {'Model' if method == 'full' else 'Adapter'} {row.trial_id}",
        "",
        f"{_WHAT[method].format(plain(report.model))}, trained for {report.task} on {plain(report.data)} "
        f"by run `{report.run}` ({row.step} optimiser steps, {row.samples:,} rows).",
        "",
        plain(report.recommendation.sentence),
        "",
        f"| metric | validation | {report.held_out} |",
        "|---|---|---|",
        *(f"| {name} | {number(row.metrics[name])} | {number(held_out.get(name))} |" for name in row.metrics),
        "",
        "## Data",
        *(f"- {split}: SHA-256 `{digest}`" for split, digest in report.facts.get("data_sha256", {}).items()),
    ]
    if report.facts.get("labels"):
        labels = ", ".join(
            f"{index} = {plain(json.dumps(label))}" for index, label in enumerate(report.facts["labels"])
        )
        lines.append(f"- labels: {labels}")
    configuration = json.dumps(resolved, indent=2).splitlines()
    lines += ["", "## Configuration", "", *(f"    {line}" for line in configuration), "", "## Versions", ""]
    lines += [f"- {name} {version}" for name, version in report.versions.items()]
    return "\n".join(lines) + "\n"
