"""Format numbers, durations and parameters for reports."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lorafleet.jobs.text import format_decimal, make_printable

if TYPE_CHECKING:
    from lorafleet.jobs.runs.report import Report

MISSING = "-"


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with few digits; a dash if it is missing.

    Very large and very small numbers are written in scientific form, since rounding would
    make a small one 0.

    Args:
        value: The number.
        digits: Most digits after the point.
    """
    if value is None:
        return MISSING
    if value and (abs(value) >= 1e5 or abs(value) < 10**-digits):
        return f"{value:.2e}"
    return format_decimal(value, digits)


def escape_markdown(text: str) -> str:
    """Escape a text so that every Markdown reader shows it literally, on one line.

    Names and texts come from data files, models and other people's runs. Unescaped, they
    could bring links, images or HTML into a report or card. HTML characters, and characters
    that turn bare addresses into links, are written as entities: not every reader knows a
    backslash before them.
    """
    for mark in ("\\", "`", "*", "_", "~", "|", "["):
        text = text.replace(mark, f"\\{mark}")
    text = _ACTIVE_CHARACTERS.sub(lambda match: f"&#{ord(match[0])};", text)
    return " ".join(make_printable(text).split())


def format_duration(seconds: float | None) -> str:
    """Format seconds as `42.0 s`, `3 min 05 s` or `2 h 10 min`; a dash if they are missing."""
    if seconds is None:
        return MISSING
    minutes, remainder = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {remainder:02d} s" if minutes else f"{seconds:.1f} s"


def format_p_value(p_value: float | None) -> str:
    """Format a p-value with three digits; a dash if it is missing.

    Smaller ones are written as `<0.001`: more digits would claim more than the draws can
    show.
    """
    if p_value is None:
        return MISSING
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def describe_p_value(p_value: float) -> str:
    """Return a p-value as text: `p = 0.012` or `p < 0.001`."""
    text = format_p_value(p_value)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def format_params(params: dict[str, Any]) -> str:
    """Return searched values as text: `lora_r=8, learning_rate=0.00126`."""
    return ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in params.items())


def format_short_params(params: dict[str, Any]) -> str:
    """Return searched values as text, with numbers of three digits."""
    return format_params(
        {
            path: f"{value:.3g}" if isinstance(value, float) else value
            for path, value in params.items()
        }
    )


_ACTIVE_CHARACTERS = re.compile(
    r"[&<>]|:(?=//)|(?<=mailto):|(?<=xmpp):|(?<=\S)@(?=\S)|(?<=www)\.", re.IGNORECASE
)


BENCHMARK = "benchmark"
"""State of a benchmark's report. Its tables also show loading time and size on disk."""


def list_shown_metrics(report: Report) -> list[str]:
    """Return the metrics that a terminal shows beside the first deciding metric.

    These are the other deciding metrics, the requested metrics and perplexity.
    """
    return [
        name
        for name in report.metrics
        if name in report.also or (name != report.metric and name not in _DEFAULT_METRICS)
    ]


_DEFAULT_METRICS = ("accuracy", "f1", "precision", "recall", "loss")
"""Metrics that are computed without a request and that are closely related."""
