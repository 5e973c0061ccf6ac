"""A user's own metrics by path: looked at before anything runs, without running a line of them."""

from __future__ import annotations

import ast
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.schema.job import CustomMetric


def file_of(metric: CustomMetric) -> str:
    """The file that a metric is in."""
    return metric.function.partition(":")[0]


def digest(metric: CustomMetric) -> str:
    """What a metric is, whatever its name: SHA-256 of its file, and the function in it."""
    path, _, function = metric.function.partition(":")
    return f"{files.sha256_file(Path(path))}:{function}"


def wrong(name: str, metric: CustomMetric) -> str | None:
    """What is wrong with a metric's path; None where it is right."""
    field = f"evaluate.custom_metrics.{name}.function"
    path, _, function = metric.function.partition(":")
    if not path.endswith(".py"):
        return f"{field} is {metric.function}, but must be FILE.py:NAME (or FILE.py, a module of the package evaluate)"
    try:
        tree = ast.parse(files.read_plain_text(Path(path)))
    except OSError as error:
        return f"{field} is {metric.function}, but {path} cannot be read: {error.strerror}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{field} is {metric.function}, but {path} is not Python: {error}"
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if function and function not in defined:
        known = f" (there are: {', '.join(defined[:8])})" if defined else ""
        return f"{field} is {metric.function}, but {path} defines no function {function}{known}"
    return None
