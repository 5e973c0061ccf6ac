"""Turn the arms of a `compare` block into jobs of their own, for training and evaluation.

All functions are pure.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lorafleet.jobs.errors import Problem
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.aliases import get_foreign_hint
from lorafleet.jobs.schema.comparison import ArmSpec
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import SEED, Parameter
from lorafleet.jobs.schema.types import Assignment
from lorafleet.jobs.schema.validation_messages import list_problems
from lorafleet.jobs.trials import sampling as search


def get_arm(job: JobSpec, name: str) -> ArmSpec:
    """Return an arm by its name."""
    return job.comparison.arms[name]


def list_trained_arms(job: JobSpec) -> list[str]:
    """Return the names of the arms that train, in the file's order."""
    return [name for name, arm in job.comparison.arms.items() if arm.needs_training]


def build_arm_job(job: JobSpec, name: str) -> JobSpec:
    """Return the job with an arm's values applied, without search and comparison.

    Raises:
        ValidationError: If the arm's values do not make a valid job (pydantic).
    """
    arm = get_arm(job, name)
    raw = job.model_dump()
    raw |= {"compare": None, "search": None, "method": _get_method(arm)}
    if arm.quantization != "none":
        raw["qlora"]["quant_type"] = arm.quantization
    overrides = (get_arm(job, arm.adapter_of).set if arm.adapter_of else {}) | arm.set
    if "model.model_name_or_path" in overrides:
        raw["model"]["revision"] = None  # the job's revision belongs to another model
    linked = dict(raw["linked"])
    for path, value in overrides.items():
        linked.pop(path, None)
        if isinstance(value, str) and path in fields.get_leaf_fields() and fields.is_number(path):
            linked[path] = value  # arithmetic on the arm's own values
        else:
            fields.set_value(raw, path, value)
    raw["linked"] = linked
    return search.build_trial_job(JobSpec.model_validate(raw), {})


def _get_method(arm: ArmSpec) -> str:
    """Return the method that describes an arm's base and adapter.

    An adapter on a quantised base is what `qlora` has.
    """
    if arm.needs_training or arm.weights:
        return str(arm.method)
    return "lora" if arm.quantization == "none" else "qlora"


def build_search_job(job: JobSpec, name: str, samples: int | None) -> JobSpec:
    """Return the job of an arm's own search, including its additional seeds.

    Args:
        job: The job with the `compare` block.
        name: The arm.
        samples: Training rows of each training; None: as the job's `train` block says.
    """
    compare, arm = job.comparison, get_arm(job, name)
    arm_job = build_arm_job(job, name)
    # An arm that searches nothing is trained once for each seed: none of them is stopped early for
    # doing worse.
    seeds = [arm_job.train.seed + number for number in range(compare.seeds)]
    parameters = arm.parameters or {SEED: Parameter(values=tuple(seeds))}
    block: dict[str, Any] = {
        "method": compare.method if arm.parameters else "grid",
        "metric": job.metric.model_dump(
            exclude={"also"}
        ),  # `also` (what must be kept) is decided between arms
        "num_samples": compare.num_samples,
        "keep": 1 if arm.parameters else compare.seeds,
        "seeds": compare.seeds if arm.parameters else 1,
        "scheduler": compare.scheduler.model_dump()
        | _make_sample_limit(samples)
        | ({} if arm.parameters else {"type": "none"}),
        "seed": job.search.seed if job.search else 0,
        "parameters": {
            path: value.model_dump(exclude_none=True) for path, value in parameters.items()
        },
    }
    raw = arm_job.model_dump() | {"search": block}
    if not arm.parameters:
        raw["evaluate"]["folds"] = None  # nothing to choose: folds are not needed
    return JobSpec.model_validate(raw)


def build_evaluation_job(job: JobSpec, name: str, best: Assignment | None) -> JobSpec:
    """Return the job as which an arm is evaluated: base, method and its best configuration.

    Args:
        job: The job with the `compare` block.
        name: The arm.
        best: The configuration that the arm's search chose; None for the arm's own values.
    """
    if not get_arm(job, name).needs_training:
        return build_arm_job(job, name)
    return search.build_trial_job(build_search_job(job, name, None), best or {}).model_copy(
        # The links are already computed; evaluated again, they would replace values of the trial.
        update={"search": None, "linked": {}}
    )


def _make_sample_limit(samples: int | None) -> dict[str, Any]:
    """Return the scheduler settings that end a training after `samples` rows."""
    return {} if samples is None else {"time_attr": "samples", "max_t": samples}


def find_compare_problems(job: JobSpec) -> list[Problem]:
    """Return the problems of the arms that their types alone do not show.

    Checks across arms (grids, budgets, packing) run only if every arm is valid by itself,
    because they build the arms' jobs.
    """
    if job.compare is None:
        return []
    all_problems = []
    for name, arm in job.comparison.arms.items():
        arm_path = f"compare.arms.{name}"
        unknown_paths = [path for path in arm.set if path not in fields.get_leaf_fields()]
        for path in unknown_paths:
            suggestion = fields.suggest_path(path)
            foreign_note = get_foreign_hint(path)
            hint = (
                f"; {foreign_note}"
                if foreign_note
                else f"; did you mean {suggestion!r}?"
                if suggestion
                else ""
            )
            all_problems.append(
                Problem(
                    f"{arm_path}.set",
                    f"{arm_path}.set has {path!r}, which is not a field of the job file{hint}",
                )
            )
        # The arm's job cannot be built with these.
        if unknown_paths:
            continue
        try:
            arm_job = (
                build_search_job(job, name, None)
                if arm.needs_training
                else build_arm_job(job, name)
            )
        except ValidationError as error:
            all_problems += [
                Problem(arm_path, f"{arm_path}: {problem.sentence}")
                for problem in list_problems(error)
            ]
            continue
        except ValueError as error:
            all_problems.append(Problem(arm_path, f"{arm_path}: {error}"))
            continue
        problems = search.find_search_problems(arm_job) if arm.needs_training else []
        all_problems += [
            Problem(arm_path, f"{arm_path}: {problem.sentence}") for problem in problems
        ]
    return all_problems or _check_grid_sizes(job) + _check_device_seconds(job) + _check_packing(job)


def _check_device_seconds(job: JobSpec) -> list[Problem]:
    """Refuse a budget in device-seconds for a job of several processes.

    Only the speed of a single process can be measured alone.
    """
    if job.comparison.budget.device_seconds is None or job.resources.world_size == 1:
        return []
    sentence = (
        "compare.budget.device_seconds works only for trials of one process, whose speed can be "
        f"measured; with {job.resources.world_size} processes use samples or tokens"
    )
    return [Problem("compare.budget.device_seconds", sentence)]


def _check_packing(job: JobSpec) -> list[Problem]:
    """Refuse a budget in rows if only some of the arms pack their rows.

    The same number of rows is then not the same work for all arms.
    """
    packed = {build_arm_job(job, name).train.packing for name in list_trained_arms(job)}
    budget = job.comparison.budget
    if len(packed) < 2 or budget.tokens is not None or budget.device_seconds is not None:
        return []
    sentence = (
        "compare.budget must be tokens or device_seconds if arms differ in train.packing, because "
        "packed rows are not comparable"
    )
    return [Problem("compare.budget", sentence)]


def _check_grid_sizes(job: JobSpec) -> list[Problem]:
    """Refuse arms whose searches try different numbers of configurations.

    The arm with the larger grid would have the better chance.
    """
    sizes = {}
    for name in list_trained_arms(job):
        spec = build_search_job(job, name, None).search
        if spec is not None and get_arm(job, name).parameters:
            is_finite = all(
                parameter.values
                for parameter in spec.parameters.values()
                if parameter.expression is None
            )
            grid = search.count_grid_combinations(spec) if is_finite else None
            num_drawn = None if job.comparison.method == "grid" else job.comparison.num_samples
            sizes[name] = min(size for size in (grid, num_drawn) if size is not None)
    if len(set(sizes.values())) <= 1:
        return []
    sizes_text = ", ".join(f"{name} {size}" for name, size in sizes.items())
    sentence = (
        "compare.method is grid, but the arms try different numbers of configurations "
        f"({sizes_text}), which is not a fair comparison"
    )
    return [Problem("compare.method", sentence)]
