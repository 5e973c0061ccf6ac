"""A sweep file of W&B as the search block of a job. What is done otherwise is said, key by key. Pure."""

from __future__ import annotations

import math
from typing import Annotated, Any

from lorafleet.jobs.loading.aliases import DISTRIBUTION_ALIASES, EXPONENT_DISTRIBUTIONS, VALUE_ALIASES
from lorafleet.jobs.loading.importers import Translation
from lorafleet.jobs.loading.job_file import our_field
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.metrics import bare_name
from lorafleet.jobs.trials.hyperband import WORDS, as_asha
from pydantic import TypeAdapter, ValidationError

_METHODS = {"random": "random", "grid": "grid", "bayes": "tpe"}
_NOT_CARRIED = {
    "program": "trials are trained by lorafleet itself",
    "command": "trials are trained by lorafleet itself",
    "strict": "has no counterpart",
    "controller": "has no counterpart",
    "description": "has no counterpart",
}
_METRICS = {"acc": "accuracy"}
_DISTRIBUTIONS = ("uniform", "log_uniform_values", "int_uniform", "q_uniform", "q_log_uniform_values", "categorical")


def translate_sweep(config: dict[str, Any], name: str) -> Translation:
    """Return a job with the sweep as its search; its model and data are left to the caller."""
    made = Translation()
    made.put("name", name)
    method = config.get("method", "random")
    method = method if isinstance(method, str) else repr(method)
    if method in _METHODS:
        made.put("search.method", _METHODS[method])
    else:
        made.lost.append(f"method: {method!r} is none of {', '.join(_METHODS)}")
    if method == "bayes":
        made.otherwise.append("method: bayes is a Gaussian process there, and Optuna's TPE here")
    metric = config.get("metric")
    metric = {"name": metric} if isinstance(metric, str) else metric
    if metric is not None and not (isinstance(metric, dict) and metric.get("name")):
        made.lost.append("metric: it has no name; the task's own is used")
    if isinstance(metric, dict) and metric.get("name"):
        made.put("search.metric", {key: metric[key] for key in ("name", "goal") if key in metric})
        name_here = bare_name(str(metric["name"]))
        fields.put(made.tree, "search.metric.name", _METRICS.get(name_here, name_here))
    if config.get("run_cap") is not None and method == "grid":
        made.otherwise.append("run_cap: a grid tries all its combinations here")
    elif config.get("run_cap") is not None:
        try:
            made.put("search.num_samples", _whole(config["run_cap"]))
        except (TypeError, ValueError):
            made.lost.append(f"run_cap: {config['run_cap']!r} is no whole number")
    elif method != "grid":
        made.otherwise.append(f"run_cap: without one {method} has no end there; here search.num_samples does")
    for key in ("project", "entity"):
        if config.get(key):
            made.put(f"tracking.{key}", str(config[key]))
    parameters = config.get("parameters")
    for key, said in parameters.items() if isinstance(parameters, dict) else ():
        try:
            _parameter(str(key), said, made)
        except (TypeError, ValueError):  # a list where a word is, and the like
            made.lost.append(f"parameters.{key}: {said!r} is not understood")
    try:
        _early_terminate(config.get("early_terminate"), made)
    except (TypeError, ValueError, OverflowError):
        _without_early_terminate(f"early_terminate: {config['early_terminate']!r} is not understood", made)
    known = ("method", "metric", "run_cap", "project", "entity", "parameters", "early_terminate", "name")
    for key, value in config.items():
        if key not in known and value is not None:
            made.lost.append(f"{key}: {_NOT_CARRIED.get(key, 'has no counterpart')}")
    return made


def _parameter(key: str, said: Any, made: Translation) -> None:
    """Carry one parameter over: a fixed value as a field, the others as what the search tries."""
    path = _field(key)
    where = f"parameters.{key}"
    if path not in fields.leaves():
        made.lost.append(f"{where}: no field of a job is called so")
        return
    if not isinstance(said, dict) or "parameters" in said:
        made.lost.append(f"{where}: {said!r} is no parameter that is read here")
        return
    taken = fields.get(made.tree, "search.parameters") or {}
    if path in taken or ("value" in said and fields.get(made.tree, path) is not None):
        made.lost.append(f"{where}: {path} is named twice")
        return
    if "value" in said:
        made.put(path, said["value"])
        return
    kind = said.get("distribution", "categorical" if "values" in said else None)
    kind = DISTRIBUTION_ALIASES.get(str(kind), kind)
    ends = {name: said[name] for name in ("min", "max") if name in said}
    if kind in EXPONENT_DISTRIBUTIONS:
        try:
            ends = {name: _end(path, name, math.exp(float(end))) for name, end in ends.items()}
        except (OverflowError, ValueError):
            made.lost.append(f"{where}: {kind} has ends that are no exponents of e")
            return
        made.assumed.append(f"{where}: the ends of {kind} are exponents of e there, and values here")
        kind = EXPONENT_DISTRIBUTIONS[str(kind)]
    if "probabilities" in said:
        made.lost.append(f"{where}.probabilities: all values are as likely here")
    if kind is None and len(ends) == 2:
        whole = all(isinstance(end, int) for end in ends.values())
        kind = "int_uniform" if whole else "uniform"
    if kind not in _DISTRIBUTIONS:
        made.lost.append(f"{where}: distribution {kind} is none of {', '.join(_DISTRIBUTIONS)}")
        return
    parameter: dict[str, Any] = {"distribution": kind} | ends
    if "values" in said:
        parameter = {"values": _possible_values(path, where, said["values"], made)}
        if not parameter["values"]:
            return
    if "q" in said:
        parameter["q"] = said["q"]
    made.tree.setdefault("search", {}).setdefault("parameters", {})[path] = parameter


def _possible_values(path: str, where: str, values: Any, made: Translation) -> list[Any]:
    """Return those of a list that a field may be; the others are said."""
    field = fields.leaves()[path]
    checked: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[Any] = TypeAdapter(checked)
    kept = []
    for value in values if isinstance(values, list) else [values]:
        ours = VALUE_ALIASES.get((path, value), value) if isinstance(value, str) else value
        try:
            adapter.validate_python(ours)
        except ValidationError:
            made.lost.append(f"{where}: {path} may not be {value!r}")
            continue
        kept.append(ours)
    return kept


def _field(key: str) -> str:
    """Return the field that a name of a sweep means: ours, another tool's, or the one with the same last part."""
    path = our_field(key)
    if path in fields.leaves():
        return path
    leaf = key.rpartition(".")[2]
    same = [known for known in fields.leaves() if known.endswith(f".{leaf}")]
    return same[0] if len(same) == 1 else our_field(leaf)


def _early_terminate(said: Any, made: Translation) -> None:
    """Carry Hyperband over as ASHA: its first bracket is the first rung, and eta what the rungs are apart."""
    if said is None or said is False or said == "none":
        made.put("search.scheduler.type", "none")
        return
    if said == "hyperband":
        said = {"type": said}
    if not isinstance(said, dict) or said.get("type") != "hyperband":
        _without_early_terminate(f"early_terminate: {said!r} is not hyperband", made)
        return
    made.put("search.scheduler", {"type": "asha"} | as_asha(said))
    made.otherwise.append(
        "early_terminate: an iteration is a line that a run logs there, and an epoch here (search.scheduler.time_attr)"
    )
    if "strict" in said:
        made.lost.append("early_terminate.strict: ASHA stops all but the best 1/eta at each rung")
    for key in set(said) - {"type", "strict", *WORDS}:
        made.lost.append(f"early_terminate.{key}: has no counterpart")


def _without_early_terminate(why: str, made: Translation) -> None:
    made.put("search.scheduler", {"type": "none"})
    made.lost.append(f"{why}; no trial is stopped early")


def _whole(value: Any) -> int:
    """Return a whole number, which may be written as text. Raises ValueError or TypeError."""
    number = float(value)
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(value)
    return int(number)


def _end(path: str, name: str, value: float) -> float | int:
    """Return an end of a range, a whole one inside it where the field holds whole numbers."""
    if not fields.is_whole(path):
        return value
    return max(1, math.ceil(value)) if name == "min" else math.floor(value)
