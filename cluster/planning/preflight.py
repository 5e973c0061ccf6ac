"""Check that everything a job file names exists or is known: files, models, assets.

These checks run on the submitting machine before anything starts, and report all
problems together. What is not stored on this machine cannot be checked; the same checks
run again when the model is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.adapters import ADAPTER_FILES, find_adapter_refusal
from lorafleet.jobs.data.assets import get_asset
from lorafleet.jobs.data.custom_metric_files import find_metric_problem
from lorafleet.jobs.data.data_files import DATA_SUFFIXES, get_data_suffix
from lorafleet.jobs.data.hub import (
    find_code_refusal,
    get_model_folder,
    read_model_config,
)
from lorafleet.jobs.data.inputs import JobInput, resolve_inputs
from lorafleet.jobs.data.split_files import get_split_files
from lorafleet.jobs.data.weight_names import is_named, list_layer_names, read_weight_shapes
from lorafleet.jobs.errors import AssetError, DataError, JobFileError, Problem
from lorafleet.jobs.loading.job_file import LoadedJob, load_job
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.compatibility import check_prompt_length, describe_hidden_label
from lorafleet.jobs.schema.deepspeed import find_contradictions
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import (
    can_pack,
    describe_packing_refusal,
    describe_tied_targets,
    find_tied_targets,
    get_classification_refusal,
    get_generation_refusal,
    get_length_refusal,
    get_max_positions,
    get_model_type,
    get_text_config,
    has_transposed_layers,
    is_causal,
)
from lorafleet.jobs.trials.arms import build_arm_job, build_search_job


def load_checked(
    path: Path, overrides: tuple[str, ...], *, require_weights: bool = True
) -> LoadedJob:
    """Load a job and check its names.

    Args:
        require_weights: Also check that model folders hold complete weights, not only the
            config.

    Raises:
        JobFileError: With all problems of loading and of the names together.
    """
    try:
        loaded = load_job(path, overrides)
    except JobFileError as error:
        # `rest` is the job without its invalid fields, if one could be built.
        if not isinstance(error.rest, LoadedJob):
            raise
        more_problems = find_name_problems(error.rest, require_weights=require_weights)
        raise JobFileError(error.file, [*error.problems, *more_problems], error.rest) from None
    check_names(loaded, require_weights=require_weights)
    return loaded


def check_names(loaded: LoadedJob, *, require_weights: bool = True) -> None:
    """Raise JobFileError with every name that cannot be right. Hub names are not looked up.

    Without `require_weights` a model's folder may hold its config alone, which is enough for
    a plan.
    """
    problems = find_name_problems(loaded, require_weights=require_weights)
    if problems:
        raise JobFileError(str(loaded.path), problems, loaded)


def find_name_problems(loaded: LoadedJob, *, require_weights: bool = True) -> list[Problem]:
    """Return the problems that `check_names` raises.

    Each has the line of the job file that it belongs to.
    """
    return [
        loaded.locate(Problem(path, message))
        for path, message in _find_problems(loaded, require_weights=require_weights)
    ]


def _find_problems(loaded: LoadedJob, *, require_weights: bool) -> list[tuple[str, str]]:
    job, problems = loaded.job, []
    inputs = resolve_inputs(job)
    for item in inputs.items:
        problems += _check_input(item, job, require_weights=require_weights)
    for model in inputs.models if job.model.trust_remote_code else ():
        message = find_code_refusal(model.reference, model.revision)
        problems += [("model.trust_remote_code", message)] if message else []
    problems += (
        _check_strategy(loaded) + _check_models(loaded) + _check_metrics(job) + _check_arms(job)
    )
    # A model that is named twice, with two revisions, has the same problem twice.
    return list(dict.fromkeys(problems + _check_adapter(job)))


def _check_input(item: JobInput, job: JobSpec, *, require_weights: bool) -> list[tuple[str, str]]:
    """Return the problems with a model, an encoder, a data set or a data file.

    Inputs of the hub may be fetched later, so they are not looked up. Adapters, metrics and
    DeepSpeed files have checks of their own.
    """
    kinds = {"model": "model", "encoder": "model", "dataset": "dataset"}
    if item.source == "asset":
        return _check_asset(item.field, item.reference, kinds[item.role])
    if item.source == "hub":
        return []
    try:
        if item.role == "encoder" or (item.role == "model" and require_weights):
            item.check_complete()
        elif item.role == "model":
            _ = item.path  # raises if there is no such folder
        elif item.role == "dataset":
            get_split_files(job.data)
    except (AssetError, DataError) as error:
        return [(item.field, str(error))]
    return _check_file(item.field, item.reference) if item.role == "data_file" else []


def _check_adapter(job: JobSpec) -> list[tuple[str, str]]:
    """Return the problems with the adapter that training continues.

    PEFT would find some of them only after the base is loaded, and others never.
    """
    field, adapter = "train.init_adapter", job.train.init_adapter
    if not adapter:
        return []
    folder = Path(adapter)
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        return [
            (
                field,
                (
                    f"{field} is {adapter}, but that folder has no PEFT adapter "
                    "(adapter_config.json and its weights)"
                ),
            )
        ]
    config = read_model_config(job.model.model_name_or_path, job.model.revision)
    message = find_adapter_refusal(folder, job.method, config, field, generates=job.is_generative)
    return [(field, message)] if message else []


def _check_metrics(job: JobSpec) -> list[tuple[str, str]]:
    """Return the problems with custom metrics."""
    problems = []
    for name, metric in job.evaluate.custom_metrics.items():
        message = find_metric_problem(name, metric)
        if message:
            problems.append((f"evaluate.custom_metrics.{name}.function", message))
    return problems


def _check_arms(job: JobSpec) -> list[tuple[str, str]]:
    """Return the problems with the weights that arms name: missing or unsuitable files."""
    problems = []
    for name, arm in job.compare.arms.items() if job.compare else ():
        if arm.weights is None:
            continue
        folder, field = Path(arm.weights), f"compare.arms.{name}.weights"
        required_files = ("config.json",) if arm.method == "full" else ADAPTER_FILES
        missing = [file for file in required_files if not (folder / file).is_file()]
        if missing:
            problems.append((field, f"{field} is {folder}, but that folder has no {missing[0]}"))
        elif arm.method != "full":
            # An invalid arm has been reported by the loader already.
            with suppress(ValueError):
                model = build_arm_job(job, name).model
                config = read_model_config(model.model_name_or_path, model.revision)
                message = find_adapter_refusal(
                    folder, str(arm.method), config, field, generates=job.is_generative
                )
                problems += [(field, message)] if message else []
    return problems


def _check_strategy(loaded: LoadedJob) -> list[tuple[str, str]]:
    """Return the problems with DeepSpeed.

    These are what is missing for it, and what contradicts the job in the user's own DeepSpeed
    file.
    """
    job = loaded.job
    if not job.resources.strategy.startswith("zero"):
        return []
    problems = []
    # torch's extension builder reads the same variable.
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        problems.append(
            (
                "resources.strategy",
                f"resources.strategy is {job.resources.strategy}, but DeepSpeed needs a C++ "
                f"compiler and {compiler} is not installed. Install one (apt-get install g++), or "
                "use strategy: fsdp, which needs none",
            )
        )
    config_path = job.resources.deepspeed_config
    if config_path:
        try:
            config = json.loads(files.read_regular_text(Path(config_path)))
        except (OSError, ValueError, RecursionError) as error:
            message = (
                f"resources.deepspeed_config is {config_path}, which cannot be read as JSON: "
                f"{error}"
            )
            return [*problems, ("resources.deepspeed_config", message)]
        if not isinstance(config, dict):
            message = (
                f"resources.deepspeed_config is {config_path}, but the file must contain a JSON "
                "object"
            )
            return [*problems, ("resources.deepspeed_config", message)]
        problems += [
            (problem.path, problem.sentence) for problem in find_contradictions(job, config)
        ]
    return problems


def _check_models(loaded: LoadedJob) -> list[tuple[str, str]]:
    """Return what a job and its arms require of models that the models' configs rule out.

    A problem that the job itself has is not repeated for its arms.
    """
    job = loaded.job
    job_problems = _check_model(job)
    searched = job.search.parameters if job.search else {}
    problems = [
        (f"search.parameters.{field}" if field in searched else field, message)
        for field, message in job_problems
    ]
    for location, arm_job in _build_arm_jobs(job):
        adapters = (
            _check_adapter(arm_job) if arm_job.train.init_adapter != job.train.init_adapter else []
        )
        arm_problems = [
            problem for problem in _check_model(arm_job) + adapters if problem not in job_problems
        ]
        problems += [(location, f"{location}: {message}") for _, message in arm_problems]
    return problems


def _build_arm_jobs(job: JobSpec) -> list[tuple[str, JobSpec]]:
    """Return (location in the file, job) of each arm that changes something in the job."""
    if job.compare is None:
        return []
    arm_jobs = []
    for name, arm in job.compare.arms.items():
        if not (arm.set or arm.method != job.method or arm.parameters):
            continue
        with suppress(ValueError):  # pydantic's errors too: loading the file reports invalid arms
            arm_jobs.append(
                (
                    f"compare.arms.{name}",
                    build_search_job(job, name, None)
                    if arm.needs_training
                    else build_arm_job(job, name),
                )
            )
    return arm_jobs


def _check_model(job: JobSpec) -> list[tuple[str, str]]:
    """Return the problems, by field, that the config of a job's model shows.

    Returns none if the config is not on this machine.
    """
    name = job.model.model_name_or_path
    config = read_model_config(name, job.model.revision)
    if not config:
        return []
    refusal = get_generation_refusal if job.is_generative else get_classification_refusal
    try:
        message = refusal(config, name)
        if message:
            return [("model.model_name_or_path", message)]
        problems = (
            _check_length(job, config) + _check_layers(job, config) + _check_targets(job, config)
        )
        return problems + _check_packing(job, config)
    except (
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # a config.json is untrusted input of any form
        message = (
            f"model.model_name_or_path is {name}, but its config.json cannot be interpreted: "
            f"{error}"
        )
        return [("model.model_name_or_path", message)]


def _check_packing(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a problem if rows are packed for a model that cannot keep examples apart."""
    if not job.train.packing or can_pack(config):
        return []
    return [
        ("train.packing", describe_packing_refusal("train.packing", job.model.model_name_or_path))
    ]


def _check_length(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a problem if rows, with any learnt prompt, are longer than the model's positions.

    Only models with learnt positions have a limit. In a search, the longest possible row
    counts.
    """
    name, field = job.model.model_name_or_path, "model.max_length"
    max_length = max(_list_possible_values(job, field))
    message = get_length_refusal(config, name, max_length)
    if message:
        return [(field, message)]
    if "prompt_tuning" not in _list_possible_values(job, "method"):
        return []
    tokens_field = "prompt_tuning.num_virtual_tokens"
    prompt_message = check_prompt_length(
        max(_list_possible_values(job, tokens_field)), max_length, name, get_max_positions(config)
    )
    problems = [(tokens_field, prompt_message)] if prompt_message else []
    if job.task == "classification" and is_causal(config):
        problems.append(("method", describe_hidden_label(name)))
    return problems


def _check_layers(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a problem if the model's layers do not support the LoRA initialisation."""
    methods = _list_possible_values(job, "method")
    if not {"lora", "qlora"} & set(methods) or "olora" not in _list_possible_values(
        job, "lora.init_lora_weights"
    ):
        return []
    if not has_transposed_layers(config):
        return []
    message = (
        "lora.init_lora_weights is olora, but the weight matrices of "
        f"{job.model.model_name_or_path} ({get_model_type(config)}) are stored transposed "
        "(Conv1D), which PEFT's OLoRA does not support; use pissa or default"
    )
    return [("lora.init_lora_weights", message)]


_TARGETS_FIELD = "lora.lora_target_modules"


def _check_targets(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return problems for LoRA targets that the model lacks, or that are tied to another layer."""
    if not {"lora", "qlora"} & set(_list_possible_values(job, "method")) or job.train.init_adapter:
        return []  # a continued adapter already has its layers
    problems = []
    layers = _load_layer_names(job, config)
    for value in _list_possible_values(job, _TARGETS_FIELD):
        if not isinstance(value, str | list | tuple):
            continue  # reported when the file is loaded
        names = (
            tuple(part.strip() for part in value.split(","))
            if isinstance(value, str)
            else tuple(value)
        )
        if names == ("all-linear",):
            continue
        tied = find_tied_targets(names, config) if job.is_generative else []
        if tied:
            problems.append(
                (_TARGETS_FIELD, describe_tied_targets(tied, job.model.model_name_or_path))
            )
        untied_names = [name for name in names if name not in tied]
        unknown = [
            name
            for name in untied_names
            if layers and not any(_is_target_match(name, path) for path in layers)
        ]
        if unknown:
            layer_suffixes = sorted(
                {
                    path.rpartition(".")[2]
                    for path in layers
                    if not path.rpartition(".")[2].isdigit()
                }
            )
            closest_name = fields.find_closest(unknown[0], layer_suffixes)
            hint = (
                f"did you mean {closest_name!r}?"
                if closest_name
                else f"it has {', '.join(layer_suffixes[:_MAX_LAYERS_SHOWN])}"
            )
            unknown_names = ", ".join(map(repr, unknown))
            message = (
                f"{_TARGETS_FIELD} has {unknown_names}, but {job.model.model_name_or_path} has no "
                f"such layer; {hint}"
            )
            problems.append((_TARGETS_FIELD, message))
    return problems


_MAX_LAYERS_SHOWN = 16


def _is_target_match(name: str, path: str) -> bool:
    """Return whether a target selects a layer.

    A checkpoint's paths may lack the prefix that a loaded model's paths have.
    """
    return is_named(path, (name,)) or name.endswith(f".{path}")


def _load_layer_names(job: JobSpec, config: dict[str, Any]) -> set[str]:
    """Return the layer names in a model's weights.

    Returns an empty set if the weights are not on this machine, or if transformers renames
    layers on loading, as it does for the experts of a mixture.
    """
    # transformers fuses the matrices of experts on loading, under names that the files do not have.
    if any("expert" in key for key in get_text_config(config)):
        return set()
    try:
        folder = get_model_folder(job.model.model_name_or_path, job.model.revision)
    except AssetError:
        return set()
    return list_layer_names(read_weight_shapes(folder))


def _list_possible_values(job: JobSpec, path: str) -> list[Any]:
    """Return the values that a field may take in some trial.

    These are its own value, or those of the search (the ends of a range).
    """
    searched = job.search.parameters.get(path) if job.search else None
    if searched is None or searched.expression is not None:
        return [fields.get_value(job.model_dump(), path)]
    # For the checks that use it, the ends of a range are its worst cases.
    return list(searched.values) if searched.values is not None else [searched.min, searched.max]


def _check_asset(field: str, name: str, kind: str) -> list[tuple[str, str]]:
    try:
        known_asset = get_asset(name)
    except AssetError as error:
        return [(field, f"{field}: {error}")]
    return (
        []
        if known_asset.kind == kind
        else [(field, f"{field} is {name}, but that is a {known_asset.kind}, not a {kind}")]
    )


def _check_file(field: str, name: str) -> list[tuple[str, str]]:
    path = Path(name)
    if not path.is_file():
        return [(field, f"{field} is {name}, but {files.describe_non_file(path)}")]
    if get_data_suffix(path) is None:
        return [(field, f"{field} is {name}, but must end in one of {', '.join(DATA_SUFFIXES)}")]
    return []
