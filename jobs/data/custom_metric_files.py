"""Check a user's custom metrics by path before a run starts, without executing their code.

`validate` and `plan` run on login nodes and on other people's job files, so they must
not import the metric. Its code runs only in the evaluation of a run.
"""

from __future__ import annotations

import ast
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.schema.job import CustomMetric


def get_metric_file(metric: CustomMetric) -> str:
    """Return the file that a metric is defined in."""
    return metric.function.partition(":")[0]


def compute_metric_digest(metric: CustomMetric) -> str:
    """Return what identifies a metric: the SHA-256 of its file, and the function.

    Two runs with equal digests compute the same metric, unless the file imports others that
    changed.

    Raises:
        OSError: If the file cannot be read.
    """
    path, _, function = metric.function.partition(":")
    return f"{files.compute_file_digest(Path(path))}:{function}"


def find_metric_problem(name: str, metric: CustomMetric) -> str | None:
    """Return the problem with a metric's path; None if there is none.

    The file is parsed and not run. A function that an `import` or an assignment defines is
    therefore not seen.

    Args:
        name: Name of the metric in the job file.
        metric: The metric; its path is absolute already.
    """
    field = f"evaluate.custom_metrics.{name}.function"
    path, _, function = metric.function.partition(":")
    if not path.endswith(".py"):
        return (
            f"{field} is {metric.function}, but must be FILE.py:NAME (or FILE.py, a module for the "
            "`evaluate` package)"
        )
    try:
        tree = ast.parse(files.read_regular_text(Path(path)))
    except OSError as error:
        return f"{field} is {metric.function}, but {path} cannot be read: {error.strerror}"
    # `ast.parse` raises ValueError for zero bytes, and RecursionError or MemoryError for code that
    # is nested too deeply.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{field} is {metric.function}, but {path} is not valid Python: {error}"
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if function and function not in defined:
        available = f" (it defines {', '.join(defined[:8])})" if defined else ""
        return (
            f"{field} is {metric.function}, but {path} does not define a function "
            f"{function}{available}"
        )
    return None
