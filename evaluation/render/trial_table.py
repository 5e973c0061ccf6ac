"""Format the tables and texts of a report.

All output formats share these functions. A column is a heading and a function that
formats the cell of a row. Terminal, Markdown and HTML show the same cells, so a number
never differs between them; CSV has full precision and its own writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorafleet.evaluation.report.format import (
    BENCHMARK,
    MISSING,
    format_duration,
    format_number,
    list_shown_metrics,
)
from lorafleet.jobs.runs.report import Metrics, Report, Row
from lorafleet.jobs.text import format_count

Cell = Callable[[Row], str]


def list_searched_fields(report: Report) -> list[str]:
    """Return the searched fields, in the order in which trials have them."""
    return list(dict.fromkeys(path for row in report.trials for path in row.params))


def build_columns(report: Report) -> list[tuple[str, Cell]]:
    """Return the columns of the full trial table, for Markdown, HTML and W&B.

    Returns:
        (heading, function that formats a row's cell) of each column. Columns that no trial
            could fill are left out.
    """
    table_columns: list[tuple[str, Cell]] = [("trial", lambda row: row.trial_id)]
    if report.arms is not None:
        table_columns.append(("arm", lambda row: row.arm or MISSING))
    for path in list_searched_fields(report):
        table_columns.append((path.rpartition(".")[2], _make_parameter_cell(path)))
    table_columns += [("state", _format_state), ("rung", _make_rung_cell(report))]
    table_columns += [
        (f"validation {name}", _make_validation_cell(name))
        for name in (report.metric, *report.also)
    ]
    for name in report.metrics if report.arms is None else ():
        table_columns.append(
            (f"{report.held_out} {name}", _make_held_out_cell(name, wide=name == report.metric))
        )
    table_columns += [
        ("train time", lambda row: format_duration(row.train_seconds)),
        ("samples/s", lambda row: format_number(row.samples_per_second, 1)),
        ("tokens/s", lambda row: format_number(row.tokens_per_second, 0)),
        ("one evaluation", lambda row: format_duration(row.eval_runtime)),
        ("evaluated rows/s", lambda row: format_number(row.eval_samples_per_second, 1)),
        *(
            [("s per answer", lambda row: format_number(row.seconds_per_answer, 2))]
            if _has_answer_times(report)
            else []
        ),
        ("peak GiB", lambda row: format_number(row.peak_memory_gib, 2)),
        (
            "trained parameters",
            lambda row: (
                MISSING if row.trainable_parameters is None else f"{row.trainable_parameters:,}"
            ),
        ),
    ]
    if any(row.gpu_hours for row in report.trials):
        table_columns.append(("GPU-hours", lambda row: format_number(row.gpu_hours, 3)))
    return table_columns


def _has_answer_times(report: Report) -> bool:
    """Return True if any trial has a time per answer."""
    return any(row.seconds_per_answer is not None for row in report.trials)


def build_terminal_columns(report: Report) -> list[tuple[str, Cell]]:
    """Return the columns that fit a terminal, the most important first to last.

    These are the deciding metrics on both splits, and what a configuration costs. The
    renderer may still drop some of them in a narrow terminal.
    """
    split = "validation again" if report.held_out == "validation" else "test"
    table_columns: list[tuple[str, Cell]] = [("trial", lambda row: row.trial_id)]
    table_columns += [
        (path.rpartition(".")[2], _make_parameter_cell(path))
        for path in list_searched_fields(report)
    ]
    table_columns += [
        ("state", _format_state),
        ("rung", _make_rung_cell(report)),
        *(
            (f"val {name}", _make_validation_cell(name, wide=False))
            for name in (report.metric, *report.also)
        ),
        (
            f"{split} {report.metric}",
            lambda row: _format_briefly(row.test_metrics or {}, row.test_intervals, report.metric),
        ),
        *(
            (f"{split} {name}", _make_held_out_cell(name, wide=False))
            for name in list_shown_metrics(report)
        ),
        ("train time", lambda row: format_duration(row.train_seconds)),
        ("tokens/s", lambda row: format_number(row.tokens_per_second, 0)),
        ("peak GiB", lambda row: format_number(row.peak_memory_gib, 2)),
        (
            "parameters",
            lambda row: (
                MISSING if row.trainable_parameters is None else f"{row.trainable_parameters:,}"
            ),
        ),
    ]
    return table_columns


def _format_briefly(metrics: Metrics, intervals: dict[str, tuple[float, float]], name: str) -> str:
    """Format a metric with a short 95 % interval: `0.757 [0.71, 0.80]`."""
    value, ends = format_number(metrics.get(name)), intervals.get(name)
    return (
        f"{value} [{format_number(ends[0], 2)}, {format_number(ends[1], 2)}]"
        if ends and value != MISSING
        else value
    )


def _make_parameter_cell(path: str) -> Cell:
    """Return a function that formats a searched value; floats with three significant digits."""

    def format_cell(row: Row) -> str:
        value = row.params.get(path)
        if value is None:
            return MISSING
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return format_cell


def _make_rung_cell(report: Report) -> Cell:
    """Return a function that formats the rung of a trial.

    `2/3` means that it reached the second of three rungs, as in the live view.
    """
    return lambda row: (
        MISSING if row.rung is None else f"{row.rung + 1}/{max(len(report.rungs), row.rung + 1)}"
    )


def _format_state(row: Row) -> str:
    return f"failed: {row.failure.failure_class}" if row.failure else row.state


def _make_validation_cell(name: str, *, wide: bool = True) -> Cell:
    render = format_with_interval if wide else _format_briefly
    return lambda row: render(row.metrics, row.intervals, name)


def _make_held_out_cell(name: str, *, wide: bool) -> Cell:
    if wide:
        return lambda row: format_with_interval(row.test_metrics or {}, row.test_intervals, name)
    return lambda row: format_number((row.test_metrics or {}).get(name))


def format_with_interval(
    metrics: Metrics, intervals: dict[str, tuple[float, float]], name: str
) -> str:
    """Format a metric with its 95 % interval, if it has one."""
    value = format_number(metrics.get(name))
    ends = intervals.get(name)
    return (
        f"{value} [{format_number(ends[0])}, {format_number(ends[1])}]"
        if ends and value != MISSING
        else value
    )


def list_notes(report: Report) -> list[str]:
    """Return the notes that a reader of the table needs.

    They are failures, warnings, number formats, and what the intervals cover. Each is a
    sentence or two.
    """
    all_notes = [
        f"{row.trial_id} failed ({row.failure.failure_class}): {row.failure.sentence}"
        for row in report.trials
        if row.failure
    ]
    all_notes += report.warnings
    formats = list(dict.fromkeys(row.number_formats for row in report.trials if row.number_formats))
    all_notes += [f"Trained with {'; or with '.join(formats)}."] if formats else []
    if report.arms is not None:
        from lorafleet.evaluation.render.arm_table import list_arm_notes

        return all_notes + list_arm_notes(report)
    if report.held_out == "test" and any(row.test_metrics for row in report.trials):
        all_notes.append(
            "The search and the selection used the validation rows only. Each model was evaluated "
            "on the test rows once, which decided nothing."
        )
    all_notes.append(
        "Square brackets are 95 % intervals over rows (not over seeds). Baselines, and metrics "
        "with too few rows, have no interval."
    )
    return all_notes


def build_folds_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of a cross-validation, one row per configuration.

    Both are empty without folds.
    """
    if not report.folds:
        return [], []
    paths = list(report.folds[0].params)
    headings = [
        *(path.rpartition(".")[2] for path in paths),
        f"mean {report.metric}",
        "deviation",
        "folds",
    ]
    rows = []
    for configuration in report.folds:
        values = [
            f"{value:.3g}" if isinstance(value, float) else str(value)
            for value in configuration.params.values()
        ]
        rows.append(
            [
                *values,
                format_number(configuration.mean),
                format_number(configuration.deviation),
                " ".join(format_number(score) for score in configuration.scores),
            ]
        )
    return headings, rows


def build_ratings_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of the ratings: one row per model, one column per criterion.

    With several raters, the last row has their agreement.
    """
    if report.ratings is None:
        return [], []
    judgements = report.ratings.judgements
    criteria = list(dict.fromkeys(judgement.criterion for judgement in judgements))
    judgements_by_key = {
        (judgement.arm, judgement.criterion): judgement for judgement in judgements
    }

    def format_cell(arm: str, criterion: str) -> str:
        judgement = judgements_by_key.get((arm, criterion))
        if judgement is None:
            return MISSING
        ends = (
            f" [{judgement.interval[0]:.2f}, {judgement.interval[1]:.2f}]"
            if judgement.interval
            else ""
        )
        return f"{judgement.mean:.2f}{ends} ({judgement.rows})"

    rows = [
        [arm, *(format_cell(arm, name) for name in criteria)]
        for arm in dict.fromkeys(judgement.arm for judgement in judgements)
    ]
    alphas = {judgement.criterion: judgement.alpha for judgement in judgements}
    agreements = [format_number(alphas[name], 2) for name in criteria]
    raters = len(report.ratings.raters)
    if raters > 1:
        rows.append([f"agreement of {raters} raters (Krippendorff's alpha)", *agreements])
    return ["rated 0 to 5, blind", *criteria], rows


def build_headline(report: Report) -> str:
    """Return one line about what ran: model, data, rows, arms, trials, duration and state."""
    counts = report.rows_count
    rows = ", ".join(
        f"{counts[name]:,} {name}" for name in ("train", "validation", "test") if counts.get(name)
    )
    rows_text = f" ({rows} rows)" if rows else ""
    duration_text = f", {format_duration(report.wall_seconds)}" if report.wall_seconds else ""
    arms = f"{format_count(len(report.arms), 'arm')}, " if report.arms is not None else ""
    if report.arms is not None and report.state == BENCHMARK:
        return (
            f"{report.model} on {report.data}, {format_count(len(report.arms), 'variant')} "
            "compared side by side"
        )
    return (
        f"{report.model} on {report.data}{rows_text}, "
        f"{arms}{format_count(len(report.trials), 'trial')}{duration_text}, {report.state}"
    )


def format_class_cells(values: Mapping[str, float]) -> list[str]:
    """Return precision, recall, F1 and number of rows of a class.

    Without rows the first three are unknown, not 0.

    Args:
        values: Precision, recall, f1 and support of the class.
    """
    rows = int(values["support"])
    scores = [
        format_number(values[name]) if rows else MISSING for name in ("precision", "recall", "f1")
    ]
    return [*scores, str(rows)]
