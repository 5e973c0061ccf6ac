"""Translate a W&B sweep file to the search block of a job. Pure.

Every difference is reported by key: what is lost, what is assumed, and what lorafleet
does otherwise. A sweep names no model and no data; `commands/import_config.py` adds
them. Format: docs.wandb.ai, sweep configuration.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError

from lorafleet.jobs.loading.importers import Translation
from lorafleet.jobs.loading.job_file import resolve_field_name
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.aliases import (
    DISTRIBUTION_ALIASES,
    EXPONENT_DISTRIBUTIONS,
    VALUE_ALIASES,
)
from lorafleet.jobs.schema.metrics import strip_metric_prefix
from lorafleet.jobs.schema.search import Distribution
from lorafleet.jobs.trials.hyperband import HYPERBAND_KEYS, convert_to_asha

_METHODS = {"random": "random", "grid": "grid", "bayes": "tpe"}
_UNSUPPORTED_REASONS = {
    "program": "not needed, because lorafleet itself trains the trials",
    "command": "not needed, because lorafleet itself trains the trials",
    "strict": "has no counterpart",
    "controller": "has no counterpart",
    "description": "has no counterpart",
}
_METRICS = {"acc": "accuracy"}
_DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)


def translate_sweep(config: dict[str, Any], name: str) -> Translation:
    """Return a job with the sweep as its search. The caller sets the model and the data.

    Args:
        config: The content of the sweep file. Values of any type are accepted; those that
            cannot be interpreted are reported in `lost`.
        name: Name of the job.
    """
    translation = Translation()
    translation.set_field("name", name)
    method = config.get("method", "random")
    method = method if isinstance(method, str) else repr(method)
    if method in _METHODS:
        translation.set_field("search.method", _METHODS[method])
    else:
        translation.lost.append(f"method: {method!r} is not one of {', '.join(_METHODS)}")
    if method == "bayes":
        translation.otherwise.append(
            "method: bayes is a Gaussian process in W&B, and Optuna's TPE in lorafleet"
        )
    _translate_metric(config.get("metric"), translation)
    _translate_run_cap(config.get("run_cap"), method, translation)
    for key in ("project", "entity"):
        if config.get(key):
            translation.set_field(f"tracking.{key}", str(config[key]))
    parameters = config.get("parameters")
    for key, definition in parameters.items() if isinstance(parameters, dict) else ():
        try:
            _translate_parameter(str(key), definition, translation)
        except (
            TypeError,
            ValueError,
        ):  # the value has the wrong type, such as a list instead of a string
            translation.lost.append(f"parameters.{key}: {definition!r} cannot be interpreted")
    try:
        _translate_early_terminate(config.get("early_terminate"), translation)
    except (TypeError, ValueError, OverflowError):
        _disable_early_stopping(
            f"early_terminate: {config['early_terminate']!r} cannot be interpreted", translation
        )
    handled_keys = (
        "method",
        "metric",
        "run_cap",
        "project",
        "entity",
        "parameters",
        "early_terminate",
        "name",
    )
    for key, value in config.items():
        if key not in handled_keys and value is not None:
            translation.lost.append(f"{key}: {_UNSUPPORTED_REASONS.get(key, 'has no counterpart')}")
    return translation


def _translate_metric(metric: Any, translation: Translation) -> None:
    """Translate the metric: its name, or a block with name and goal."""
    metric = {"name": metric} if isinstance(metric, str) else metric
    if metric is not None and not (isinstance(metric, dict) and metric.get("name")):
        translation.lost.append("metric: it has no name; the task's default metric is used")
    if isinstance(metric, dict) and metric.get("name"):
        translation.set_field(
            "search.metric", {key: metric[key] for key in ("name", "goal") if key in metric}
        )
        metric_name = strip_metric_prefix(str(metric["name"]))
        fields.set_value(
            translation.tree, "search.metric.name", _METRICS.get(metric_name, metric_name)
        )


def _translate_run_cap(run_cap: Any, method: str, translation: Translation) -> None:
    """Translate the largest number of runs."""
    if run_cap is not None and method == "grid":
        translation.otherwise.append("run_cap: lorafleet tries all combinations of a grid")
    elif run_cap is not None:
        try:
            translation.set_field("search.num_samples", _parse_whole_number(run_cap))
        except (TypeError, ValueError):
            translation.lost.append(f"run_cap: {run_cap!r} is not a whole number")
    elif method != "grid":
        translation.otherwise.append(
            f"run_cap: without it, a {method} sweep of W&B never ends; in lorafleet "
            "search.num_samples limits it"
        )


def _translate_parameter(key: str, definition: Any, translation: Translation) -> None:
    """Translate one parameter: a fixed value becomes a field, others a searched parameter.

    Args:
        key: Name in the sweep file.
        definition: Its definition.
        translation: Receives the result.

    Raises:
        TypeError: If a value of the definition has the wrong type. The caller reports it.
        ValueError: As TypeError.
    """
    path = _resolve_field(key)
    where = f"parameters.{key}"
    if path not in fields.get_leaf_fields():
        translation.lost.append(f"{where}: this is not a field of the job file")
        return
    if not isinstance(definition, dict) or "parameters" in definition:
        translation.lost.append(
            f"{where}: {definition!r} is not a parameter definition that lorafleet supports"
        )
        return
    parameters = fields.get_value(translation.tree, "search.parameters") or {}
    # Two names of a sweep may mean one field, such as `lr` and `learning_rate`.
    if path in parameters or (
        "value" in definition and fields.get_value(translation.tree, path) is not None
    ):
        translation.lost.append(f"{where}: {path} is set twice")
        return
    if "value" in definition:
        translation.set_field(path, definition["value"])
        return
    distribution = _translate_range(path, where, definition, translation)
    if distribution is None:
        return
    kind, ends = distribution
    if "probabilities" in definition:
        translation.lost.append(
            f"{where}.probabilities: in lorafleet all values are equally likely"
        )
    if kind not in _DISTRIBUTIONS:
        translation.lost.append(
            f"{where}: distribution {kind} is not one of {', '.join(_DISTRIBUTIONS)}"
        )
        return
    parameter: dict[str, Any] = {"distribution": kind} | ends
    if "values" in definition:
        parameter = {"values": _filter_values(path, where, definition["values"], translation)}
        if not parameter["values"]:
            return
    if "q" in definition:
        parameter["q"] = definition["q"]
    translation.tree.setdefault("search", {}).setdefault("parameters", {})[path] = parameter


def _translate_range(
    path: str, where: str, definition: dict[str, Any], translation: Translation
) -> tuple[Any, dict[str, Any]] | None:
    """Return a parameter's distribution and its ends; None if they cannot be translated."""
    kind = definition.get("distribution", "categorical" if "values" in definition else None)
    kind = DISTRIBUTION_ALIASES.get(str(kind), kind)
    ends: dict[str, Any] = {name: definition[name] for name in ("min", "max") if name in definition}
    if kind in EXPONENT_DISTRIBUTIONS:
        try:
            ends = {
                # W&B's log_uniform draws exp(x) with x between min and max; lorafleet's takes the
                # values themselves.
                name: _convert_end(path, name, math.exp(float(end)))
                for name, end in ends.items()
            }
        except (OverflowError, ValueError):
            translation.lost.append(
                f"{where}: min and max of {kind} cannot be used as exponents of e"
            )
            return None
        translation.assumed.append(
            f"{where}: min and max of {kind} are exponents of e in W&B, and values in lorafleet"
        )
        kind = EXPONENT_DISTRIBUTIONS[str(kind)]
    if kind is None and len(ends) == 2:
        # As in W&B, which chooses int_uniform for integers without a distribution.
        is_whole = all(isinstance(end, int) for end in ends.values())
        kind = "int_uniform" if is_whole else "uniform"
    return kind, ends


def _filter_values(path: str, where: str, values: Any, translation: Translation) -> list[Any]:
    """Return the values that the field accepts, and report the others.

    One wrong value must not cost the whole parameter.

    Args:
        path: Dotted field.
        where: Key of the parameter, for messages.
        values: The values of the sweep file.
        translation: Receives what is lost.
    """
    field = fields.get_leaf_fields()[path]
    checked: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[Any] = TypeAdapter(checked)
    accepted = []
    for value in values if isinstance(values, list) else [values]:
        converted = VALUE_ALIASES.get((path, value), value) if isinstance(value, str) else value
        try:
            adapter.validate_python(converted)
        except ValidationError:
            translation.lost.append(f"{where}: {value!r} is not a valid value of {path}")
            continue
        accepted.append(converted)
    return accepted


def _resolve_field(key: str) -> str:
    """Return the field for a parameter name of a sweep.

    The name may be a field here, a name of another tool, or the last part of exactly one
    field: a sweep uses the names of the user's script, often with a prefix. The result may
    be no field; the caller checks it.
    """
    path = resolve_field_name(key)
    if path in fields.get_leaf_fields():
        return path
    leaf = key.rpartition(".")[2]
    matches = [
        candidate for candidate in fields.get_leaf_fields() if candidate.endswith(f".{leaf}")
    ]
    return matches[0] if len(matches) == 1 else resolve_field_name(leaf)


def _translate_early_terminate(setting: Any, translation: Translation) -> None:
    """Translate Hyperband to ASHA.

    The first bracket becomes the first rung, and eta the ratio between rungs. If anything
    cannot be interpreted, no trial is stopped early: stopping at other points than the user
    meant would be worse than not stopping.

    Args:
        setting: Value of `early_terminate`; None if the sweep has none.
        translation: Receives the result.
    """
    # W&B never stops a trial without this key, and lorafleet's own default does.
    if setting is None or setting is False or setting == "none":
        translation.set_field("search.scheduler.type", "none")
        return
    if setting == "hyperband":
        setting = {"type": setting}
    if not isinstance(setting, dict) or setting.get("type") != "hyperband":
        _disable_early_stopping(f"early_terminate: {setting!r} is not hyperband", translation)
        return
    translation.set_field("search.scheduler", {"type": "asha"} | convert_to_asha(setting))
    translation.otherwise.append(
        "early_terminate: an iteration is a logged line in W&B, and an epoch in lorafleet "
        "(search.scheduler.time_attr)"
    )
    if "strict" in setting:
        translation.lost.append(
            "early_terminate.strict: ASHA always stops all but the best 1/eta at each rung"
        )
    for key in set(setting) - {"type", "strict", *HYPERBAND_KEYS}:
        translation.lost.append(f"early_terminate.{key}: has no counterpart")


def _disable_early_stopping(reason: str, translation: Translation) -> None:
    translation.set_field("search.scheduler", {"type": "none"})
    translation.lost.append(f"{reason}; no trial is stopped early")


def _parse_whole_number(value: Any) -> int:
    """Return a whole number, which may be written as text. Raise ValueError or TypeError."""
    number = float(value)
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(value)
    return int(number)


def _convert_end(path: str, name: str, value: float) -> float | int:
    """Return an end of a range; for integer fields, rounded to an integer inside the range."""
    if not fields.is_integer(path):
        return value
    return max(1, math.ceil(value)) if name == "min" else math.floor(value)
