"""What a search tries: assignments drawn here, seeded and pure, so that a plan shows exactly what will run."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from lorafleet.jobs.errors import Problem
from lorafleet.jobs.loading.aliases import foreign_hint
from lorafleet.jobs.schema import expressions as expression
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import FOLD, SEED, Parameter, Scalar, SearchSpec
from lorafleet.jobs.schema.validation_messages import sentences
from pydantic import ValidationError

Assignment = dict[str, Scalar]
"""Dotted field -> the value that one trial gives it."""

STARTUP_TRIALS = 10
"""Trials that TPE draws at random before it models anything (Optuna's default)."""
NOT_IDENTITY = {
    **dict.fromkeys(
        ("model.model_name_or_path", "model.max_length", "train.packing"),
        "a search may not vary: rows become tokens once for all trials",
    ),
    "model.revision": "a search may not vary: name each revision's folder in model.model_name_or_path",
    "train.init_adapter": "a search may not vary",
    **dict.fromkeys(
        ("train.num_train_epochs", "train.max_steps"), "is a trial's budget: use search.scheduler, or several jobs"
    ),
    **dict.fromkeys(
        (
            "train.eval_steps",
            "train.checkpoint_minutes",
            "train.per_device_eval_batch_size",
            "train.chunked_loss",
            "train.gradient_checkpointing",
        ),
        "does not change a trial",
    ),
}
"""Fields outside a trial's identity, and why a search may not vary them: all their trials would be one."""
_MAX_GRID = 100_000
_DRAWS_FOR_A_NEW_ONE = 200


def free_parameters(search: SearchSpec) -> dict[str, Parameter]:
    """The parameters that are chosen; the others follow from them by an expression."""
    return {path: parameter for path, parameter in search.parameters.items() if parameter.expression is None}


def assignments(job: JobSpec) -> Iterator[Assignment]:
    """The configurations of a grid (all of them, in order) or of a random search (without end, from its seed)."""
    if job.search is None:
        yield {}
    elif job.search.method == "grid":
        yield from _grid(job.search)
    else:
        generator = random.Random(job.search.seed)
        while True:
            yield {path: draw(parameter, generator) for path, parameter in free_parameters(job.search).items()}


def grid_size(search: SearchSpec) -> int:
    """Combinations of a grid."""
    return math.prod(len(parameter.values or ()) for parameter in free_parameters(search).values())


def _grid(search: SearchSpec) -> Iterator[Assignment]:
    free = free_parameters(search)
    for values in itertools.product(*(parameter.values or () for parameter in free.values())):
        yield dict(zip(free, values, strict=True))


def draw(parameter: Parameter, generator: random.Random) -> Scalar:
    """One value of a parameter. Numbers are rounded to six significant digits, so that they can be typed again."""
    if parameter.values is not None:
        return generator.choice(parameter.values)
    assert parameter.min is not None and parameter.max is not None  # Parameter's own rule
    low, high = parameter.min, parameter.max
    if parameter.distribution == "int_uniform":
        return generator.randint(int(low), int(high))
    if "log" in str(parameter.distribution):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return rounded(value, parameter)


def rounded(value: float, parameter: Parameter) -> Scalar:
    """A drawn number on the parameter's step `q`, and inside its ends after rounding."""
    if parameter.q is not None:
        value = round(value / parameter.q) * parameter.q
    value = float(f"{value:.6g}")
    assert parameter.min is not None and parameter.max is not None
    value = min(max(value, parameter.min), parameter.max)
    whole = all(isinstance(end, int) for end in (parameter.min, parameter.max, parameter.q or 0.5))
    return int(value) if whole else value


def known_assignments(job: JobSpec, name: Callable[[Assignment], str]) -> list[Assignment]:
    """The different configurations that a search is known to try: all (grid, random), or TPE's start-up trials.

    `name` gives a configuration's trial id; two that train alike have one id and are tried once.
    """
    if job.search is None:
        return [{}]
    wanted = job.search.num_samples
    if job.search.method == "grid":
        wanted = grid_size(job.search)
    elif job.search.method == "tpe":
        wanted = min(wanted, STARTUP_TRIALS)
    found: dict[str, Assignment] = {}
    for assignment in _until_nothing_new(assignments(job), found, name):
        found.setdefault(name(assignment), assignment)
        if len(found) >= wanted:
            break
    return [one for assignment in found.values() for one in _on_folds(job, assignment)]


def _on_folds(job: JobSpec, assignment: Assignment) -> list[Assignment]:
    """A configuration once for each fold; without folds, itself."""
    return [assignment | {FOLD: fold} for fold in range(job.evaluate.folds)] if job.evaluate.folds else [assignment]


def _until_nothing_new(
    source: Iterator[Assignment], found: dict[str, Assignment], name: Callable[[Assignment], str]
) -> Iterator[Assignment]:
    """The draws, until many in a row were all known: a small space is exhausted."""
    repeats = 0
    for assignment in source:
        repeats = repeats + 1 if name(assignment) in found else 0
        if repeats > _DRAWS_FOR_A_NEW_ONE:
            return
        yield assignment


_NEVER_ASSIGNED = ("model.trust_remote_code", "model.revision")
"""Fields that decide what code runs: a trial's own record does not."""


def trial(job: JobSpec, assignment: Assignment) -> JobSpec:
    """The job of one trial: the searched fields set, linked values worked out, and everything checked again.

    Raises pydantic's ValidationError or a ValueError when the assignment makes an impossible job.
    """
    raw = job.model_dump()
    searched = job.search.parameters if job.search else {}
    for path, value in assignment.items():
        own = path in searched or path == FOLD
        if not own and (path.partition(".")[0] in fields.NOT_SEARCHED or path in _NEVER_ASSIGNED):
            raise ValueError(f"{path} is no field that a trial can have of its own")
        fields.put(raw, path, _as_field(path, value))
    links = dict(job.linked)
    if job.search:
        links |= {path: p.expression for path, p in job.search.parameters.items() if p.expression is not None}
    for path in _in_order(links):
        fields.put(raw, path, _as_field(path, _linked_value(links[path], path, raw)))
    return JobSpec.model_validate(raw)


def _as_field(path: str, value: Scalar) -> Scalar:
    """A whole float where the field counts things: a drawn 16.0 is a rank of 16."""
    if isinstance(value, float) and value.is_integer() and fields.is_whole(path):
        return int(value)
    return value


def _linked_value(text: str, path: str, raw: dict[str, Any]) -> Scalar:
    tree = expression.parse(text)
    values = {}
    for name in expression.names(tree):
        value = fields.get(raw, fields.full_path(name, path))
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{path} is {text!r}, but {name} is {value!r} and not a number")
        values[name] = value
    try:
        return expression.evaluate(tree, values)
    except (ZeroDivisionError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is {text!r}, which cannot be worked out: {error}") from error


def _in_order(links: dict[str, str]) -> list[str]:
    """Linked fields, those that others read first. Raises ValueError on a circle."""
    reads = {
        path: {fields.full_path(name, path) for name in expression.names(expression.parse(text))} & set(links)
        for path, text in links.items()
    }
    ordered: list[str] = []
    while len(ordered) < len(links):
        ready = [path for path in links if path not in ordered and reads[path] <= set(ordered)]
        if not ready:
            raise ValueError(f"linked values go round in a circle: {', '.join(p for p in links if p not in ordered)}")
        ordered += ready
    return ordered


def search_problems(job: JobSpec) -> list[Problem]:
    """What is wrong with a job's search block and links that its types alone do not show."""
    problems = [problem for path, text in job.linked.items() for problem in _link_problems(path, text, f"{path}")]
    if job.search is None:
        return problems or _trial_problems(job, {}, "linked")
    for path, parameter in job.search.parameters.items():
        problems += _parameter_problems(job, path, parameter)
    if problems:
        return problems
    if job.search.method == "grid":
        problems += _grid_problems(job.search)
    ends = {path: _ends(parameter) for path, parameter in free_parameters(job.search).items()}
    first = {path: values[0] for path, values in ends.items()}
    if not first:
        problems += _trial_problems(job, {}, "search.parameters")
    for path, values in ends.items():
        for value in values:
            problems += _trial_problems(job, {**first, path: value}, f"search.parameters.{path}")
    return _once(problems)


def _parameter_problems(job: JobSpec, path: str, parameter: Parameter) -> list[Problem]:
    where = f"search.parameters.{path}"
    if path not in fields.leaves():
        meant = fields.suggest_path(path)
        if meant and (meant.split(".")[0] in fields.NOT_SEARCHED or meant in NOT_IDENTITY):
            meant = None  # that may not be searched either
        foreign = foreign_hint(path)
        hint = f"; {foreign}" if foreign else f"; did you mean {meant!r}?" if meant else ""
        return [Problem(where, f"search.parameters has {path!r}, which is not a field of a job{hint}")]
    if path.split(".")[0] in fields.NOT_SEARCHED:
        return [Problem(where, f"search.parameters has {path!r}, but a search may not vary {path.split('.')[0]}")]
    if path in NOT_IDENTITY:
        return [Problem(where, f"search.parameters has {path!r}, which {NOT_IDENTITY[path]}")]
    if path in job.linked:
        return [
            Problem(where, f"{path} is searched and is linked to {job.linked[path]!r} as well; drop one of the two")
        ]
    if parameter.expression is not None:
        return _link_problems(path, parameter.expression, where)
    whole = fields.leaves()[path].annotation in (int, int | None)
    if whole and parameter.distribution in ("uniform", "log_uniform_values"):
        hint = "int_uniform, q_log_uniform_values with q: 1, or values"
        return [Problem(where, f"{path} is a whole number, and {parameter.distribution} draws fractions: use {hint}")]
    return []


def _link_problems(path: str, text: str, where: str) -> list[Problem]:
    if path not in fields.leaves():
        return [Problem(where, f"linked has {path!r}, which is not a field of a job")]
    if path.split(".")[0] in fields.NOT_SEARCHED or path in NOT_IDENTITY:
        return [Problem(where, f"{path} is {text!r}, but must be a value: it may not follow from what a trial has")]
    problems = []
    try:
        used = expression.names(expression.parse(text))
    except ValueError as error:
        return [Problem(where, f"{path} is {text!r}, but {error}")]
    for name in sorted(used):
        if fields.full_path(name, path) not in fields.leaves():
            meant = fields.suggest_path(name)
            hint = f"; did you mean {meant!r}?" if meant else ""
            problems.append(Problem(where, f"{path} is {text!r}, but {name!r} is not a field{hint}"))
    return problems


def _grid_problems(search: SearchSpec) -> list[Problem]:
    problems = [
        Problem(
            f"search.parameters.{path}",
            f"search.method is grid, but {path} is a {parameter.distribution} range: give it values: [...]",
        )
        for path, parameter in free_parameters(search).items()
        if parameter.values is None
    ]
    if not problems and grid_size(search) > _MAX_GRID:
        problems.append(
            Problem("search.method", f"the grid has {grid_size(search):,} combinations, at most {_MAX_GRID:,} are run")
        )
    return problems


def _ends(parameter: Parameter) -> list[Scalar]:
    if parameter.values is not None:
        return list(parameter.values)
    assert parameter.min is not None and parameter.max is not None
    return [rounded(parameter.min, parameter), rounded(parameter.max, parameter)]


def _trial_problems(job: JobSpec, assignment: Assignment, where: str) -> list[Problem]:
    try:
        trial(job, assignment)
    except ValidationError as error:
        return [Problem(where, f"{where}: {problem.sentence}") for problem in sentences(error)]
    except ValueError as error:
        return [Problem(where, str(error))]
    return []


def after_search(job: JobSpec, best: Assignment) -> list[Assignment]:
    """What is trained of a search's best configuration: after folds, on the training rows as they are; and with the
    seeds after its own."""
    assert job.search is not None
    whole = [best] if job.evaluate.folds else []
    return whole + [best | {SEED: job.train.seed + number} for number in range(1, job.search.seeds)]


def without_fold(assignment: Assignment) -> Assignment:
    """The configuration of a trial, whatever its fold."""
    return {path: value for path, value in assignment.items() if path != FOLD}


def repeats(job: JobSpec, assignment: Assignment) -> bool:
    """Whether a configuration is an earlier one with another seed."""
    return job.search is not None and SEED in assignment and SEED not in job.search.parameters


def impossible(job: JobSpec, assignment: Assignment) -> str | None:
    """Why a configuration makes no job, in one sentence, or None."""
    problems = _trial_problems(job, assignment, "search.parameters")
    values = ", ".join(f"{path}={value}" for path, value in assignment.items())
    return f"the configuration {values} is impossible: {problems[0].sentence}" if problems else None


def _once(problems: list[Problem]) -> list[Problem]:
    return list({(problem.path, problem.sentence): problem for problem in problems}.values())
