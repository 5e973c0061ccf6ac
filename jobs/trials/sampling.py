"""Choose the configurations that a search tries.

Sampling is seeded and pure, so a plan shows exactly what will run.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from lorafleet.jobs.errors import Problem
from lorafleet.jobs.schema import expressions as expression
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.aliases import get_foreign_hint
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import SEED, Parameter, SearchSpec
from lorafleet.jobs.schema.types import FOLD, Assignment, Scalar
from lorafleet.jobs.schema.validation_messages import list_problems

STARTUP_TRIALS = 10
"""Number of random trials that TPE runs before it models anything (Optuna's default)."""
UNSEARCHABLE_REASONS = {
    **dict.fromkeys(
        ("model.model_name_or_path", "model.revision", "model.max_length", "train.packing"),
        "cannot be searched, because all trials share one tokenization of the rows: compare its "
        "values as arms of a `compare` block (`set`)",
    ),
    "train.init_adapter": "cannot be searched",
    **dict.fromkeys(
        ("train.num_train_epochs", "train.max_steps"),
        "is the budget of a trial: use search.scheduler, or several jobs",
    ),
    **dict.fromkeys(
        (
            "train.eval_steps",
            "train.checkpoint_minutes",
            "train.per_device_eval_batch_size",
            "train.chunked_loss",
            "train.gradient_checkpointing",
        ),
        "does not change the result of a trial",
    ),
}
"""Fields that are not part of a trial's identity -> why a search may not vary them.

Trials that differ only in such a field would be the same trial.
"""
_MAX_GRID = 100_000
# A random search over a small space repeats itself. After this many repeats in a row, the space
# counts as exhausted.
_MAX_REPEATED_DRAWS = 200


def select_free_parameters(search: SearchSpec) -> dict[str, Parameter]:
    """Return the parameters that are sampled; an expression derives the others from them."""
    return {
        path: parameter
        for path, parameter in search.parameters.items()
        if parameter.expression is None
    }


def iterate_assignments(job: JobSpec) -> Iterator[Assignment]:
    """Iterate over the configurations of a search.

    A grid yields all of them in order. A random search is endless and starts from its seed,
    so callers must stop it; it may repeat configurations. A job without a search has one
    empty assignment.
    """
    if job.search is None:
        yield {}
    elif job.search.method == "grid":
        yield from _iterate_grid(job.search)
    else:
        generator = random.Random(job.search.seed)
        while True:
            yield {
                path: draw(parameter, generator)
                for path, parameter in select_free_parameters(job.search).items()
            }


def count_grid_combinations(search: SearchSpec) -> int:
    """Return the number of combinations of a grid."""
    return math.prod(
        len(parameter.values or ()) for parameter in select_free_parameters(search).values()
    )


def _iterate_grid(search: SearchSpec) -> Iterator[Assignment]:
    free = select_free_parameters(search)
    for values in itertools.product(*(parameter.values or () for parameter in free.values())):
        yield dict(zip(free, values, strict=True))


def draw(parameter: Parameter, generator: random.Random) -> Scalar:
    """Draw one value of a parameter.

    Numbers are rounded to six significant digits, so that they can be typed again. The
    calls on the generator are part of the result: an additional one would change all later
    draws of a seed.

    Args:
        parameter: A parameter without an expression.
        generator: Seeded source of randomness; it is advanced.
    """
    if parameter.values is not None:
        return generator.choice(parameter.values)
    assert (
        parameter.min is not None and parameter.max is not None
    )  # guaranteed by the validator of Parameter
    low, high = parameter.min, parameter.max
    if parameter.distribution == "int_uniform":
        return generator.randint(int(low), int(high))
    if "log" in str(parameter.distribution):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return round_value(value, parameter)


def round_value(value: float, parameter: Parameter) -> Scalar:
    """Round a drawn number to the parameter's step `q` and keep it inside the range.

    The result is an int only if both ends and the step are whole numbers. TPE's proposals
    are rounded here too, so that both methods draw from the same values.
    """
    if parameter.q is not None:
        value = round(value / parameter.q) * parameter.q
    value = float(f"{value:.6g}")
    assert parameter.min is not None and parameter.max is not None
    value = min(max(value, parameter.min), parameter.max)
    # Without a step, `uniform` draws fractions also between whole numbers: 0.5 stands for that
    # case.
    is_whole = all(
        isinstance(end, int) for end in (parameter.min, parameter.max, parameter.q or 0.5)
    )
    return int(value) if is_whole else value


def list_planned_assignments(
    job: JobSpec, trial_id: Callable[[Assignment], str]
) -> list[Assignment]:
    """Return the distinct configurations that a search will certainly try.

    These are all of them for grid and random search, and the start-up trials for TPE.

    Args:
        trial_id: Returns the trial id of a configuration. Two configurations that train alike
            have the same id and are tried once.
    """
    if job.search is None:
        return [{}]
    count = job.search.num_samples
    if job.search.method == "grid":
        count = count_grid_combinations(job.search)
    elif job.search.method == "tpe":
        count = min(count, STARTUP_TRIALS)
    by_id: dict[str, Assignment] = {}
    for assignment in _iterate_until_exhausted(iterate_assignments(job), by_id, trial_id):
        by_id.setdefault(trial_id(assignment), assignment)
        if len(by_id) >= count:
            break
    return [
        fold_assignment
        for assignment in by_id.values()
        for fold_assignment in _expand_folds(job, assignment)
    ]


def _expand_folds(job: JobSpec, assignment: Assignment) -> list[Assignment]:
    """Return a configuration once for each fold; without folds, only the configuration itself."""
    return (
        [assignment | {FOLD: fold} for fold in range(job.evaluate.folds)]
        if job.evaluate.folds
        else [assignment]
    )


def _iterate_until_exhausted(
    source: Iterator[Assignment],
    by_id: dict[str, Assignment],
    trial_id: Callable[[Assignment], str],
) -> Iterator[Assignment]:
    """Iterate over the draws until many in a row are repeats: a small space is then exhausted."""
    repeats = 0
    for assignment in source:
        repeats = repeats + 1 if trial_id(assignment) in by_id else 0
        if repeats > _MAX_REPEATED_DRAWS:
            return
        yield assignment


_CODE_FIELDS = ("model.trust_remote_code", "model.revision")
"""Fields that decide which code runs. The record of a trial must not set them."""


def build_trial_job(job: JobSpec, assignment: Assignment) -> JobSpec:
    """Return the job of one trial.

    The searched fields are set, linked values are computed, and the job is validated again.

    Raises:
        ValidationError: The assignment makes an invalid job (pydantic).
        ValueError: The assignment sets a field that a trial cannot have, or a linked value
            cannot be computed.
    """
    raw = job.model_dump()
    searched = job.search.parameters if job.search else {}
    for path, value in assignment.items():
        # An assignment may be read from params.json, which a cluster's storage can change. It must
        # not decide which code or which rows are used.
        is_allowed = path in searched or path == FOLD
        if not is_allowed and (
            path.partition(".")[0] in fields.NOT_SEARCHED or path in _CODE_FIELDS
        ):
            raise ValueError(f"{path} cannot differ between trials")
        fields.set_value(raw, path, _convert_whole_float(path, value))
    # Linked values come last: they read the searched ones.
    links = dict(job.linked)
    if job.search:
        links |= {
            path: p.expression
            for path, p in job.search.parameters.items()
            if p.expression is not None
        }
    for path in _sort_links(links):
        fields.set_value(
            raw, path, _convert_whole_float(path, _compute_linked_value(links[path], path, raw))
        )
    return JobSpec.model_validate(raw)


def _convert_whole_float(path: str, value: Scalar) -> Scalar:
    """Return a whole float as an integer if the field takes integers.

    A drawn 16.0 is a rank of 16.
    """
    if isinstance(value, float) and value.is_integer() and fields.is_integer(path):
        return int(value)
    return value


def _compute_linked_value(text: str, path: str, raw: dict[str, Any]) -> Scalar:
    tree = expression.parse(text)
    values = {}
    for name in expression.find_names(tree):
        value = fields.get_value(raw, fields.resolve_path(name, path))
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{path} is {text!r}, but {name} is {value!r}, which is not a number")
        values[name] = value
    try:
        return expression.evaluate(tree, values)
    except (ZeroDivisionError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is {text!r}, which cannot be computed: {error}") from error


def _sort_links(links: dict[str, str]) -> list[str]:
    """Return the linked fields, dependencies first. Raise ValueError if they form a cycle."""
    reads = {
        path: {
            fields.resolve_path(name, path)
            for name in expression.find_names(expression.parse(text))
        }
        & set(links)
        for path, text in links.items()
    }
    ordered: list[str] = []
    while len(ordered) < len(links):
        ready = [path for path in links if path not in ordered and reads[path] <= set(ordered)]
        if not ready:
            raise ValueError(
                "linked values refer to each other in a circle: "
                f"{', '.join(p for p in links if p not in ordered)}"
            )
        ordered += ready
    return ordered


def find_search_problems(job: JobSpec) -> list[Problem]:
    """Return the problems of a job's search block and links that its types do not show.

    Each parameter is tried at its end values, beside the first values of the others. A
    combination that is invalid only together is not found here; `describe_impossible`
    reports it when it is drawn.
    """
    problems = [
        problem
        for path, text in job.linked.items()
        for problem in _find_link_problems(path, text, f"{path}")
    ]
    if job.search is None:
        return problems or _find_trial_problems(job, {}, "linked")
    for path, parameter in job.search.parameters.items():
        problems += _find_parameter_problems(job, path, parameter)
    if problems:
        return problems
    if job.search.method == "grid":
        problems += _find_grid_problems(job.search)
    ends = {
        path: _list_end_values(parameter)
        for path, parameter in select_free_parameters(job.search).items()
    }
    first = {path: values[0] for path, values in ends.items()}
    if not first:
        problems += _find_trial_problems(job, {}, "search.parameters")
    for path, values in ends.items():
        for value in values:
            problems += _find_trial_problems(
                job, {**first, path: value}, f"search.parameters.{path}"
            )
    return _remove_duplicates(problems)


def _find_parameter_problems(job: JobSpec, path: str, parameter: Parameter) -> list[Problem]:
    """Return the first problem of a searched field that applies, as a list of one, or none."""
    where = f"search.parameters.{path}"
    if path not in fields.get_leaf_fields():
        suggestion = fields.suggest_path(path)
        if suggestion and (
            suggestion.split(".")[0] in fields.NOT_SEARCHED or suggestion in UNSEARCHABLE_REASONS
        ):
            suggestion = None  # the suggestion cannot be searched either
        foreign = get_foreign_hint(path)
        hint = (
            f"; {foreign}" if foreign else f"; did you mean {suggestion!r}?" if suggestion else ""
        )
        return [
            Problem(
                where,
                f"search.parameters has {path!r}, which is not a field of the job file{hint}",
            )
        ]
    if path.split(".")[0] in fields.NOT_SEARCHED:
        return [
            Problem(
                where,
                f"search.parameters has {path!r}, but {path.split('.')[0]} cannot be searched",
            )
        ]
    if path in UNSEARCHABLE_REASONS:
        return [
            Problem(where, f"search.parameters has {path!r}, which {UNSEARCHABLE_REASONS[path]}")
        ]
    if path in job.linked:
        return [
            Problem(
                where,
                f"{path} is searched, but also linked to {job.linked[path]!r}; keep one of the two",
            )
        ]
    if parameter.expression is not None:
        return _find_link_problems(path, parameter.expression, where)
    is_whole = fields.get_leaf_fields()[path].annotation in (int, int | None)
    if is_whole and parameter.distribution in ("uniform", "log_uniform_values"):
        hint = "int_uniform, q_log_uniform_values with q: 1, or values"
        return [
            Problem(
                where,
                f"{path} is a whole number, but {parameter.distribution} draws fractions: use "
                f"{hint}",
            )
        ]
    return []


def _find_link_problems(path: str, text: str, where: str) -> list[Problem]:
    if path not in fields.get_leaf_fields():
        return [Problem(where, f"linked has {path!r}, which is not a field of the job file")]
    if path.split(".")[0] in fields.NOT_SEARCHED or path in UNSEARCHABLE_REASONS:
        return [
            Problem(
                where,
                f"{path} is {text!r}, but must be a fixed value: it cannot depend on values of a "
                "trial",
            )
        ]
    problems = []
    try:
        used = expression.find_names(expression.parse(text))
    except ValueError as error:
        return [Problem(where, f"{path} is {text!r}, but {error}")]
    for name in sorted(used):
        if fields.resolve_path(name, path) not in fields.get_leaf_fields():
            suggestion = fields.suggest_path(name)
            hint = f"; did you mean {suggestion!r}?" if suggestion else ""
            problems.append(
                Problem(where, f"{path} is {text!r}, but {name!r} is not a field{hint}")
            )
    return problems


def _find_grid_problems(search: SearchSpec) -> list[Problem]:
    problems = [
        Problem(
            f"search.parameters.{path}",
            f"search.method is grid, but {path} is a {parameter.distribution} range: list its "
            "values (values: [...])",
        )
        for path, parameter in select_free_parameters(search).items()
        if parameter.values is None
    ]
    if not problems and count_grid_combinations(search) > _MAX_GRID:
        problems.append(
            Problem(
                "search.method",
                f"the grid has {count_grid_combinations(search):,} combinations, but at most "
                f"{_MAX_GRID:,} are allowed: use fewer values, or method: random",
            )
        )
    return problems


def _list_end_values(parameter: Parameter) -> list[Scalar]:
    """Return the values at which a parameter is checked: all choices, or both ends of a range."""
    if parameter.values is not None:
        return list(parameter.values)
    assert parameter.min is not None and parameter.max is not None
    return [round_value(parameter.min, parameter), round_value(parameter.max, parameter)]


def _find_trial_problems(job: JobSpec, assignment: Assignment, where: str) -> list[Problem]:
    """Return the problems of the job that an assignment makes.

    Args:
        where: Dotted key that the problems are reported at.
    """
    try:
        build_trial_job(job, assignment)
    except ValidationError as error:
        return [Problem(where, f"{where}: {problem.sentence}") for problem in list_problems(error)]
    except ValueError as error:
        return [Problem(where, str(error))]
    return []


def list_final_assignments(job: JobSpec, best: Assignment) -> list[Assignment]:
    """Return the configurations to train after a search, derived from its best one.

    With folds, the best one is trained on the complete training rows: no trial of the
    search has seen all of them. With `search.seeds` above 1, it is also trained with the
    seeds that follow its own.

    Args:
        best: The best configuration, without its fold.
    """
    assert job.search is not None
    without_folds = [best] if job.evaluate.folds else []
    return without_folds + [
        best | {SEED: job.train.seed + number} for number in range(1, job.search.seeds)
    ]


def remove_fold(assignment: Assignment) -> Assignment:
    """Return the configuration of a trial without its fold."""
    return {path: value for path, value in assignment.items() if path != FOLD}


def is_seed_repeat(job: JobSpec, assignment: Assignment) -> bool:
    """Return whether a configuration repeats an earlier one with another seed.

    A search that varies `train.seed` itself has no repeats: each seed is a configuration
    there.
    """
    return job.search is not None and SEED in assignment and SEED not in job.search.parameters


def describe_impossible(job: JobSpec, assignment: Assignment) -> str | None:
    """Return why a configuration makes no valid job, in one sentence, or None if it is valid."""
    problems = _find_trial_problems(job, assignment, "search.parameters")
    values = ", ".join(f"{path}={value}" for path, value in assignment.items())
    return (
        f"the configuration {values} is not possible: {problems[0].sentence}" if problems else None
    )


def _remove_duplicates(problems: list[Problem]) -> list[Problem]:
    return list({(problem.path, problem.sentence): problem for problem in problems}.values())
