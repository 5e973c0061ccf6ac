"""The arms of a `compare` block as jobs of their own: what each trains, and as what it is judged. Pure."""

from __future__ import annotations

from typing import Any

from lorafleet.jobs.errors import Problem
from lorafleet.jobs.loading.aliases import foreign_hint
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.comparison import ArmSpec
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import SEED, Parameter
from lorafleet.jobs.schema.validation_messages import sentences
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.sampling import Assignment
from pydantic import ValidationError


def arm_of(job: JobSpec, name: str) -> ArmSpec:
    """An arm by its name."""
    assert job.compare is not None
    return job.compare.arms[name]


def trained(job: JobSpec) -> list[str]:
    """The arms that train, in the file's order."""
    assert job.compare is not None
    return [name for name, arm in job.compare.arms.items() if arm.trains]


def own_job(job: JobSpec, name: str) -> JobSpec:
    """The job with what an arm sets, and without search and comparison. Raises pydantic's ValidationError."""
    arm = arm_of(job, name)
    raw = job.model_dump()
    raw |= {"compare": None, "search": None, "method": _method(arm)}
    if arm.quantization != "none":
        raw["qlora"]["quant_type"] = arm.quantization
    given = (arm_of(job, arm.adapter_of).set if arm.adapter_of else {}) | arm.set
    if "model.model_name_or_path" in given:
        raw["model"]["revision"] = None  # the job's is of another model
    linked = dict(raw["linked"])
    for path, value in given.items():
        linked.pop(path, None)
        if isinstance(value, str) and path in fields.leaves() and fields.is_number(path):
            linked[path] = value  # arithmetic on the arm's own values
        else:
            fields.put(raw, path, value)
    raw["linked"] = linked
    return search.trial(JobSpec.model_validate(raw), {})


def _method(arm: ArmSpec) -> str:
    """The method whose base and adapter an arm has: an adapter on a quantised base is what qlora has."""
    if arm.trains or arm.weights:
        return str(arm.method)
    return "lora" if arm.quantization == "none" else "qlora"


def search_job(job: JobSpec, name: str, samples: int | None) -> JobSpec:
    """The job of an arm's own search, with its further seeds; each training sees `samples` rows (None: what `train`
    says)."""
    assert job.compare is not None
    compare, arm = job.compare, arm_of(job, name)
    own = own_job(job, name)
    # An arm that searches nothing is trained once for each seed: none of them is stopped early for doing worse.
    seeds = [own.train.seed + number for number in range(compare.seeds)]
    parameters = arm.parameters or {SEED: Parameter(values=tuple(seeds))}
    block: dict[str, Any] = {
        "method": compare.method if arm.parameters else "grid",
        "metric": job.metric.model_dump(exclude={"also"}),  # what must be kept is decided between arms
        "num_samples": compare.num_samples,
        "keep": 1 if arm.parameters else compare.seeds,
        "seeds": compare.seeds if arm.parameters else 1,
        "scheduler": compare.scheduler.model_dump() | _until(samples) | ({} if arm.parameters else {"type": "none"}),
        "seed": job.search.seed if job.search else 0,
        "parameters": {path: value.model_dump(exclude_none=True) for path, value in parameters.items()},
    }
    raw = own.model_dump() | {"search": block}
    if not arm.parameters:
        raw["evaluate"]["folds"] = None  # there is nothing to choose
    return JobSpec.model_validate(raw)


def judged_job(job: JobSpec, name: str, best: Assignment | None) -> JobSpec:
    """The job as which an arm is evaluated: its base, its method, and the best configuration that it found."""
    if not arm_of(job, name).trains:
        return own_job(job, name)
    return search.trial(search_job(job, name, None), best or {}).model_copy(update={"search": None, "linked": {}})


def _until(samples: int | None) -> dict[str, Any]:
    return {} if samples is None else {"time_attr": "samples", "max_t": samples}


def compare_problems(job: JobSpec) -> list[Problem]:
    """What is wrong with the arms that their own types do not show."""
    if job.compare is None:
        return []
    found = []
    for name, arm in job.compare.arms.items():
        where = f"compare.arms.{name}"
        unknown = [path for path in arm.set if path not in fields.leaves()]
        for path in unknown:
            meant = fields.suggest_path(path)
            foreign = foreign_hint(path)
            hint = f"; {foreign}" if foreign else f"; did you mean {meant!r}?" if meant else ""
            found.append(Problem(f"{where}.set", f"{where}.set has {path!r}, which is not a field of a job{hint}"))
        if unknown:
            continue
        try:
            made = search_job(job, name, None) if arm.trains else own_job(job, name)
        except ValidationError as error:
            found += [Problem(where, f"{where}: {problem.sentence}") for problem in sentences(error)]
            continue
        except ValueError as error:
            found.append(Problem(where, f"{where}: {error}"))
            continue
        problems = search.search_problems(made) if arm.trains else []
        found += [Problem(where, f"{where}: {problem.sentence}") for problem in problems]
    return found or _unequal(job) + _seconds_of_a_group(job) + _unequal_rows(job)


def _seconds_of_a_group(job: JobSpec) -> list[Problem]:
    assert job.compare is not None
    if job.compare.budget.device_seconds is None or job.resources.world_size == 1:
        return []
    sentence = (
        "compare.budget.device_seconds is for trials of one process, whose speed can be measured alone; with "
        f"{job.resources.world_size} processes use samples or tokens"
    )
    return [Problem("compare.budget.device_seconds", sentence)]


def _unequal_rows(job: JobSpec) -> list[Problem]:
    """Refuse a budget of rows where some arms pack theirs: a number of rows is not the same work for all."""
    assert job.compare is not None
    packed = {own_job(job, name).train.packing for name in trained(job)}
    budget = job.compare.budget
    if len(packed) < 2 or budget.tokens is not None or budget.device_seconds is not None:
        return []
    sentence = "compare.budget must be tokens or device_seconds where arms differ in train.packing: rows are not equal"
    return [Problem("compare.budget", sentence)]


def _unequal(job: JobSpec) -> list[Problem]:
    """Arms whose grids have different numbers of configurations: the larger has had the better chance."""
    assert job.compare is not None
    sizes = {}
    for name in trained(job):
        found = search_job(job, name, None).search
        if found is not None and arm_of(job, name).parameters:
            finite = all(parameter.values for parameter in found.parameters.values() if parameter.expression is None)
            grid = search.grid_size(found) if finite else None
            drawn = None if job.compare.method == "grid" else job.compare.num_samples
            sizes[name] = min(size for size in (grid, drawn) if size is not None)
    if len(set(sizes.values())) <= 1:
        return []
    said = ", ".join(f"{name} {size}" for name, size in sizes.items())
    sentence = f"compare.method is grid, and the arms try different numbers of configurations ({said}): not fair"
    return [Problem("compare.method", sentence)]
