"""The report's table as words, the same in every form it is drawn in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lorafleet.jobs.runs.report import Metrics, Report, Row
from lorafleet.jobs.text import counted, printable, unsigned_zero

Cell = Callable[[Row], str]
BENCHMARK = "benchmark"
"""The state of a report that is a benchmark's: what loading takes and what lies on disk matter there."""
MISSING = "-"


def number(value: float | None, digits: int = 3) -> str:
    """A number cut to what can be read, or a dash."""
    if value is None:
        return MISSING
    if value and (abs(value) >= 1e5 or abs(value) < 10**-digits):
        return f"{value:.2e}"
    return unsigned_zero(value, digits)


_READ_AS_MORE = re.compile(r"[&<>]|:(?=//)|(?<=mailto):|(?<=xmpp):|(?<=\S)@(?=\S)|(?<=www)\.", re.IGNORECASE)


def plain(text: str) -> str:
    """A text that every reader of Markdown shows as it is, on one line: no HTML, no link, no picture, no format.

    HTML's marks and those that make links of bare addresses are written as entities, for not every reader knows a
    backslash before them.
    """
    for mark in ("\\", "`", "*", "_", "~", "|", "["):
        text = text.replace(mark, f"\\{mark}")
    text = _READ_AS_MORE.sub(lambda found: f"&#{ord(found[0])};", text)
    return " ".join(printable(text).split())


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def parameter_columns(report: Report) -> list[str]:
    """The searched fields, in the order in which trials have them."""
    return list(dict.fromkeys(path for row in report.trials for path in row.params))


def columns(report: Report) -> list[tuple[str, Cell]]:
    """The table's columns: heading, and how a row fills it."""
    found: list[tuple[str, Cell]] = [("trial", lambda row: row.trial_id)]
    if report.arms is not None:
        found.append(("arm", lambda row: row.arm or MISSING))
    for path in parameter_columns(report):
        found.append((path.rpartition(".")[2], _parameter(path)))
    found += [("state", _state), ("rung", _rung(report))]
    found += [(f"validation {name}", _validation(name)) for name in (report.metric, *report.also)]
    for name in report.metrics if report.arms is None else ():
        found.append((f"{report.held_out} {name}", _held_out(name, wide=name == report.metric)))
    found += [
        ("train time", lambda row: duration(row.train_seconds)),
        ("samples/s", lambda row: number(row.samples_per_second, 1)),
        ("tokens/s", lambda row: number(row.tokens_per_second, 0)),
        ("one evaluation", lambda row: duration(row.eval_runtime)),
        ("evaluated rows/s", lambda row: number(row.eval_samples_per_second, 1)),
        *([("s an answer", lambda row: number(row.seconds_per_answer, 2))] if _answered(report) else []),
        ("peak GiB", lambda row: number(row.peak_memory_gib, 2)),
        (
            "trained parameters",
            lambda row: MISSING if row.trainable_parameters is None else f"{row.trainable_parameters:,}",
        ),
    ]
    if any(row.gpu_hours for row in report.trials):
        found.append(("GPU-hours", lambda row: number(row.gpu_hours, 3)))
    return found


def _answered(report: Report) -> bool:
    return any(row.seconds_per_answer is not None for row in report.trials)


def terminal_columns(report: Report) -> list[tuple[str, Cell]]:
    """The columns that fit a terminal: the choice's metric on both splits, and what a configuration costs."""
    split = "validation again" if report.held_out == "validation" else "test"
    found: list[tuple[str, Cell]] = [("trial", lambda row: row.trial_id)]
    found += [(path.rpartition(".")[2], _parameter(path)) for path in parameter_columns(report)]
    found += [
        ("state", _state),
        ("rung", _rung(report)),
        *((f"val {name}", _validation(name, wide=False)) for name in (report.metric, *report.also)),
        (f"{split} {report.metric}", lambda row: _briefly(row.test_metrics or {}, row.test_intervals, report.metric)),
        *((f"{split} {name}", _held_out(name, wide=False)) for name in shown_metrics(report)),
        ("train time", lambda row: duration(row.train_seconds)),
        ("tokens/s", lambda row: number(row.tokens_per_second, 0)),
        ("peak GiB", lambda row: number(row.peak_memory_gib, 2)),
        ("parameters", lambda row: MISSING if row.trainable_parameters is None else f"{row.trainable_parameters:,}"),
    ]
    return found


_ALWAYS = ("accuracy", "f1", "precision", "recall", "loss")
"""Metrics that nobody has to ask for, and that follow each other."""


def shown_metrics(report: Report) -> list[str]:
    """Return the metrics that a terminal shows beside the first that decides: the others that decide, those that were
    asked for, and perplexity."""
    return [name for name in report.metrics if name in report.also or (name != report.metric and name not in _ALWAYS)]


def _briefly(metrics: Metrics, intervals: dict[str, tuple[float, float]], name: str) -> str:
    """A metric with its 95 % interval in little room: `0.757 [0.71, 0.80]`."""
    value, ends = number(metrics.get(name)), intervals.get(name)
    return f"{value} [{number(ends[0], 2)}, {number(ends[1], 2)}]" if ends and value != MISSING else value


def _parameter(path: str) -> Cell:
    def cell(row: Row) -> str:
        value = row.params.get(path)
        if value is None:
            return MISSING
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return cell


def _rung(report: Report) -> Cell:
    """`2/3`: reached the second of three, as the live view counts."""
    return lambda row: MISSING if row.rung is None else f"{row.rung + 1}/{max(len(report.rungs), row.rung + 1)}"


def _state(row: Row) -> str:
    return f"failed: {row.failure.failure_class}" if row.failure else row.state


def _validation(name: str, *, wide: bool = True) -> Cell:
    render = with_interval if wide else _briefly
    return lambda row: render(row.metrics, row.intervals, name)


def _held_out(name: str, *, wide: bool) -> Cell:
    if wide:
        return lambda row: with_interval(row.test_metrics or {}, row.test_intervals, name)
    return lambda row: number((row.test_metrics or {}).get(name))


def with_interval(metrics: Metrics, intervals: dict[str, tuple[float, float]], name: str) -> str:
    """A metric with its 95 % interval, where it has one."""
    value = number(metrics.get(name))
    ends = intervals.get(name)
    return f"{value} [{number(ends[0])}, {number(ends[1])}]" if ends and value != MISSING else value


def notes(report: Report) -> list[str]:
    """What a reader must know beside the table."""
    found = [
        f"{row.trial_id} failed ({row.failure.failure_class}): {row.failure.sentence}"
        for row in report.trials
        if row.failure
    ]
    found += report.warnings
    formats = list(dict.fromkeys(row.number_formats for row in report.trials if row.number_formats))
    found += [f"Trained with {'; or with '.join(formats)}."] if formats else []
    if report.arms is not None:
        from lorafleet.evaluation.render.arm_table import arm_notes

        return found + arm_notes(report)
    if report.held_out == "test" and any(row.test_metrics for row in report.trials):
        found.append(
            "The search and the choice looked at the validation rows; the test rows were run once, after the choice."
        )
    found.append(
        "Square brackets hold 95 % intervals over rows (not over seeds). Baselines have none, nor do metrics with too "
        "few rows."
    )
    return found


def folds_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of a cross-validation: a row a configuration."""
    if not report.folds:
        return [], []
    paths = list(report.folds[0].params)
    headings = [*(path.rpartition(".")[2] for path in paths), f"mean {report.metric}", "deviation", "folds"]
    rows = []
    for one in report.folds:
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in one.params.values()]
        rows.append([*values, number(one.mean), number(one.deviation), " ".join(number(score) for score in one.scores)])
    return headings, rows


def ratings_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of what people think: a row a model, a column a criterion; the last row has the agreement."""
    if report.ratings is None:
        return [], []
    judged = report.ratings.judgements
    criteria = list(dict.fromkeys(one.criterion for one in judged))
    found = {(one.arm, one.criterion): one for one in judged}

    def cell(arm: str, criterion: str) -> str:
        one = found.get((arm, criterion))
        if one is None:
            return MISSING
        ends = f" [{one.interval[0]:.2f}, {one.interval[1]:.2f}]" if one.interval else ""
        return f"{one.mean:.2f}{ends} ({one.rows})"

    rows = [[arm, *(cell(arm, name) for name in criteria)] for arm in dict.fromkeys(one.arm for one in judged)]
    alphas = {one.criterion: one.alpha for one in judged}
    agreed = [number(alphas[name], 2) for name in criteria]
    raters = len(report.ratings.raters)
    if raters > 1:
        rows.append([f"agreement of {raters} raters (Krippendorff's alpha)", *agreed])
    return ["rated 0 to 5, blind", *criteria], rows


def headline(report: Report) -> str:
    """One line on what ran."""
    counts = report.rows_count
    rows = ", ".join(f"{counts[name]:,} {name}" for name in ("train", "validation", "test") if counts.get(name))
    of = f" ({rows} rows)" if rows else ""
    took = f", {duration(report.wall_seconds)}" if report.wall_seconds else ""
    arms = f"{counted(len(report.arms), 'arm')}, " if report.arms is not None else ""
    if report.arms is not None and report.state == BENCHMARK:
        return f"{report.model} on {report.data}, {counted(len(report.arms), 'variant')} measured side by side"
    return f"{report.model} on {report.data}{of}, {arms}{counted(len(report.trials), 'trial')}{took}, {report.state}"


def class_cells(values: Mapping[str, float]) -> list[str]:
    """Return precision, recall, F1 and number of rows of a class. Without rows the first three are unknown."""
    rows = int(values["support"])
    scores = [number(values[name]) if rows else MISSING for name in ("precision", "recall", "f1")]
    return [*scores, str(rows)]


def format_p_value(p_value: float | None) -> str:
    """Format a p-value with three digits."""
    if p_value is None:
        return MISSING
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def describe_p_value(p_value: float) -> str:
    """Return a p-value as text: `p = 0.012` or `p < 0.001`."""
    text = format_p_value(p_value)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def describe(params: dict[str, Any]) -> str:
    """Return searched values as text: `lora_r=8, learning_rate=0.00126`."""
    return ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in params.items())


def short(params: dict[str, Any]) -> str:
    """Return `describe` with numbers of three digits."""
    return describe({path: f"{value:.3g}" if isinstance(value, float) else value for path, value in params.items()})
