"""Compute a user's own metrics.

A metric is a Python function given by path, or a metric module of the package `evaluate`.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.evaluation.metrics.predictions import Ratio
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.job import CustomMetric


def compute_custom_metrics(
    metrics: Mapping[str, CustomMetric],
    predictions: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str],
) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Compute the custom metrics of a job.

    This runs code of the user, in this process. Commands on runs of other people ask for
    `--trust` before they get here.

    Args:
        metrics: Metric name -> its block in the job file.
        predictions: Answers of the model.
        references: What they are compared with.
        prompts: Prompts, for functions that have a parameter `prompt`.

    Returns:
        Metrics per row, and metrics that have one value for all rows.

    Raises:
        UserError: A user's function raised an exception, or did not return a finite number.
            The message names the row.
    """
    by_row: dict[str, Ratio] = {}
    overall: dict[str, float] = {}
    for name, metric in metrics.items():
        path, _, function = metric.function.partition(":")
        if function:
            values = _compute_per_row(
                name, _load_function(name, path, function), predictions, references, prompts
            )
            by_row[name] = (values, np.ones(len(predictions)))
        else:
            overall[name] = _compute_overall(name, path, predictions, references)
    return by_row, overall


def _load_function(name: str, path: str, function: str) -> Callable[..., Any]:
    """Load a function from a Python file of the user.

    The file is executed anew in each call. It gets a module name of its own, so it cannot
    replace a module that is loaded already.

    Raises:
        UserError: The file cannot be run, or has no such function.
    """
    spec = importlib.util.spec_from_file_location(f"lorafleet_metric_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # the path ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        loaded: Callable[..., Any] = getattr(module, function)
    except Exception as error:  # whatever the user's file raises
        raise UserError(
            f"evaluate.custom_metrics.{name}: {path}: {type(error).__name__}: {error}"
        ) from error
    return loaded


def _compute_per_row(
    name: str,
    function: Callable[..., Any],
    predictions: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str],
) -> np.ndarray:
    """Call a metric function on each row and return its values."""
    wants_prompt = "prompt" in inspect.signature(function).parameters
    values = np.zeros(len(predictions))
    for row, (prediction, reference, prompt) in enumerate(
        zip(predictions, references, prompts, strict=True)
    ):
        options = {"prompt": prompt} if wants_prompt else {}
        try:
            value = function(prediction, reference, **options)
        except Exception as error:  # whatever the user's function raises
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"evaluate.custom_metrics.{name} raised an error at held-out row {row}: {reason}"
            ) from error
        # One NaN would make the mean NaN, and the user would not learn which row it came from.
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise UserError(
                f"evaluate.custom_metrics.{name} returned {value!r} for row {row}, but must return "
                "a finite number"
            )
        values[row] = float(value)
    return values


def _compute_overall(
    name: str, path: str, predictions: Sequence[str], references: Sequence[str]
) -> float:
    """Compute a metric of the package `evaluate` on all rows.

    Args:
        name: Name of the metric in the job file.
        path: Path of the metric module. Nothing is downloaded.
        predictions: Answers of the model.
        references: What they are compared with.

    Returns:
        The number that is called `name`, or the only number that the module returned.

    Raises:
        UserError: The module raised an exception, or returned several numbers of other
            names.
    """
    import evaluate

    try:
        output = evaluate.load(path).compute(
            predictions=list(predictions), references=list(references)
        )
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"evaluate.custom_metrics.{name}: {path}: {type(error).__name__}: {error}"
        ) from error
    numbers = {
        key: value
        for key, value in (output or {}).items()
        if isinstance(value, int | float | np.number)
    }
    if name in numbers or len(numbers) == 1:
        return float(numbers.get(name, next(iter(numbers.values()))))
    raise UserError(
        f"evaluate.custom_metrics.{name}: {path} returned {sorted(numbers) or 'no number'}; give "
        "the metric the name of one of them"
    )
