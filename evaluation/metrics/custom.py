"""A user's own metrics: a Python function by path, or a metric module of the package `evaluate`."""

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


def custom_metrics(
    metrics: Mapping[str, CustomMetric], predictions: Sequence[str], references: Sequence[str], prompts: Sequence[str]
) -> tuple[dict[str, Ratio], dict[str, float]]:
    """(metrics by row, metrics that only all rows together have).

    Raises UserError with the row where a user's function raises or returns no number.
    """
    by_row: dict[str, Ratio] = {}
    whole: dict[str, float] = {}
    for name, metric in metrics.items():
        path, _, function = metric.function.partition(":")
        if function:
            values = _each(name, _function(name, path, function), predictions, references, prompts)
            by_row[name] = (values, np.ones(len(predictions)))
        else:
            whole[name] = _together(name, path, predictions, references)
    return by_row, whole


def _function(name: str, path: str, function: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"lorafleet_metric_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found: Callable[..., Any] = getattr(module, function)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"evaluate.custom_metrics.{name}: {path}: {type(error).__name__}: {error}") from error
    return found


def _each(
    name: str,
    function: Callable[..., Any],
    predictions: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str],
) -> np.ndarray:
    wants_prompt = "prompt" in inspect.signature(function).parameters
    values = np.zeros(len(predictions))
    for row, (prediction, reference, prompt) in enumerate(zip(predictions, references, prompts, strict=True)):
        more = {"prompt": prompt} if wants_prompt else {}
        try:
            value = function(prediction, reference, **more)
        except Exception as error:  # whatever the user's function raises
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"evaluate.custom_metrics.{name} raised at held-out row {row}: {said}") from error
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise UserError(f"evaluate.custom_metrics.{name} returned {value!r} for row {row}, and not a number")
        values[row] = float(value)
    return values


def _together(name: str, path: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    import evaluate

    try:
        found = evaluate.load(path).compute(predictions=list(predictions), references=list(references))
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"evaluate.custom_metrics.{name}: {path}: {type(error).__name__}: {error}") from error
    numbers = {key: value for key, value in (found or {}).items() if isinstance(value, int | float | np.number)}
    if name in numbers or len(numbers) == 1:
        return float(numbers.get(name, next(iter(numbers.values()))))
    raise UserError(
        f"evaluate.custom_metrics.{name}: {path} returned {sorted(numbers) or 'no number'}; name the metric after one"
    )
