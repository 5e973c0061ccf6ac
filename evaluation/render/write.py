"""Write the report of a run in every form."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lorafleet.evaluation.report.build import build_report
from lorafleet.jobs import files
from lorafleet.jobs.errors import AssetError, DataError
from lorafleet.jobs.extras import has_module
from lorafleet.jobs.runs.report import Report
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.text import make_json_printable


def write_report(run: Run, *, with_tokenizer: bool = False) -> Report:
    """Build the report and write it in all its forms, with a card beside the weights.

    The files are below `report/`; README.md and manifest.json are in the folder of the
    recommended weights. Existing ones are replaced. Drivers call this at the end of a run
    and when it stops.

    Args:
        run: The run.
        with_tokenizer: Also save the tokenizer and the generation settings beside the
            recommended weights. This needs transformers, the model and the data on this
            machine, as the process that trained has them.
    """
    from lorafleet.evaluation.render.model_card import find_recommended_weights, write_card

    report = build_report(run)
    if not has_module("scipy"):
        return report  # a client-only installation: the forms that the run wrote stay
    write_report_files(report, run.path / "report")
    weights = find_recommended_weights(run, report)
    prompt = None
    if with_tokenizer and weights is not None:
        from lorafleet.evaluation.render.inference_files import save_inference_files
        from lorafleet.evaluation.report.model_of_run import load_trial_job

        with contextlib.suppress(
            AssetError, DataError
        ):  # without model and data, the card gets no loading code
            prompt = save_inference_files(load_trial_job(Trial(weights.parent)), weights)
    write_card(run, report, prompt)
    return report


def write_report_files(report: Report, folder: Path) -> None:
    """Write a report as JSON, CSV, Markdown and HTML.

    Files: report.json, report.csv, report.md, report.html, and for a comparison or
    benchmark arms.csv and batches.csv.

    Args:
        report: The report.
        folder: Folder of the files. It is created if it does not exist.
    """
    from lorafleet.evaluation.render.forms import (
        render_arms_csv,
        render_batches_csv,
        render_html,
        render_markdown,
        render_table_csv,
    )

    files.write_text(folder / "report.json", render_report_json(report) + "\n")
    files.write_text(folder / "report.csv", render_table_csv(report))
    if report.arms is not None:
        files.write_text(folder / "arms.csv", render_arms_csv(report))
    if any(arm.batches for arm in report.arms or []):
        files.write_text(folder / "batches.csv", render_batches_csv(report))
    files.write_text(folder / "report.md", render_markdown(report))
    files.write_text(folder / "report.html", render_html(report))


def render_report_json(report: Report) -> str:
    """Return a report as JSON.

    NaN and infinite numbers become null, which every reader knows. Control characters in
    texts are escaped: terminals would obey them when the file is printed.
    """
    return make_json_printable(
        report.model_dump_json(indent=2)
    )  # pydantic writes NaN and infinity as null
