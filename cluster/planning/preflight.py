"""Whether what a job file names is there, or is known: files, folders, assets."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.adapters import ADAPTER_FILES, adapter_refusal
from lorafleet.jobs.data.assets import PREFIX, asset
from lorafleet.jobs.data.custom_metric_files import wrong
from lorafleet.jobs.data.data_files import DATA_SUFFIXES, data_suffix
from lorafleet.jobs.data.hub import check_whole, code_refusal, model_config, model_folder
from lorafleet.jobs.data.rows import split_files
from lorafleet.jobs.data.weight_names import is_named, layer_names, weight_shapes
from lorafleet.jobs.errors import AssetError, DataError, JobFileError, Problem
from lorafleet.jobs.loading.job_file import LoadedJob, load_job
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.compatibility import prompt_hides_label, prompt_too_long
from lorafleet.jobs.schema.deepspeed import contradictions
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import (
    can_pack,
    classification_refusal,
    generation_refusal,
    has_transposed_layers,
    is_causal,
    learnt_positions,
    length_refusal,
    model_type,
    packing_refusal,
    text_config,
    tied_refusal,
    tied_targets,
)
from lorafleet.jobs.trials.arms import own_job, search_job
from lorafleet.jobs.trials.trial_id import bases_of, encoders_of, models_of


def load_checked(path: Path, overrides: tuple[str, ...], *, whole: bool = True) -> LoadedJob:
    """Load a job and check its names. Raises JobFileError with all problems of both."""
    try:
        loaded = load_job(path, overrides)
    except JobFileError as error:
        if not isinstance(error.rest, LoadedJob):
            raise
        further = name_problems(error.rest, whole=whole)
        raise JobFileError(error.file, [*error.problems, *further], error.rest) from None
    check_names(loaded, whole=whole)
    return loaded


def check_names(loaded: LoadedJob, *, whole: bool = True) -> None:
    """Raise JobFileError with every name that cannot be right. Hub names are not looked up.

    Without `whole` a model's folder may hold its config alone: enough for a plan.
    """
    problems = name_problems(loaded, whole=whole)
    if problems:
        raise JobFileError(str(loaded.path), problems, loaded)


def name_problems(loaded: LoadedJob, *, whole: bool = True) -> list[Problem]:
    """Return what `check_names` raises."""
    return [loaded.located(Problem(path, sentence)) for path, sentence in _wrong(loaded, whole=whole)]


def _wrong(loaded: LoadedJob, *, whole: bool) -> list[tuple[str, str]]:
    job, found = loaded.job, []
    for name in models_of(job):
        if name.startswith(PREFIX):
            found += _unknown_asset("model.model_name_or_path", name, "model")
        elif Path(name).is_absolute():
            try:
                check_whole(name, None) if whole else model_folder(name, None)
            except AssetError as error:
                found.append(("model.model_name_or_path", str(error)))
    for name, revision in bases_of(job) if job.model.trust_remote_code else ():
        sentence = code_refusal(name, revision)
        found += [("model.trust_remote_code", sentence)] if sentence else []
    data = job.data.dataset_name
    if data and data.startswith(PREFIX):
        found += _unknown_asset("data.dataset_name", data, "dataset")
    elif data and Path(data).is_absolute():
        try:
            split_files(job.data)
        except DataError as error:
            found.append(("data.dataset_name", str(error)))
    for field in ("train_file", "validation_file", "test_file"):
        found += _wrong_file(f"data.{field}", getattr(job.data, field))
    found += _wrong_strategy(loaded) + _wrong_models(loaded) + _wrong_metrics(job) + _wrong_arms(job)
    return found + _wrong_adapter(job)


def _wrong_adapter(job: JobSpec) -> list[tuple[str, str]]:
    """Return what is against the adapter that is continued."""
    field, adapter = "train.init_adapter", job.train.init_adapter
    if not adapter:
        return []
    folder = Path(adapter)
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        return [(field, f"{field} is {adapter}, but there is no PEFT adapter in it")]
    config = model_config(job.model.model_name_or_path, job.model.revision)
    sentence = adapter_refusal(folder, job.method, config, field, generates=job.generates)
    return [(field, sentence)] if sentence else []


def _wrong_metrics(job: JobSpec) -> list[tuple[str, str]]:
    """What is not there of what answers are judged by."""
    found = []
    for name, metric in job.evaluate.custom_metrics.items():
        sentence = wrong(name, metric)
        if sentence:
            found.append((f"evaluate.custom_metrics.{name}.function", sentence))
    for encoder in encoders_of(job):
        if encoder.startswith(PREFIX):
            found += _unknown_asset("evaluate.bertscore_model", encoder, "model")
        elif Path(encoder).is_absolute():
            try:
                check_whole(encoder, None)
            except AssetError as error:
                found.append(("evaluate.bertscore_model", str(error)))
    return found


def _wrong_arms(job: JobSpec) -> list[tuple[str, str]]:
    """Weights of arms that are not there."""
    found = []
    for name, arm in job.compare.arms.items() if job.compare else ():
        if arm.weights is None:
            continue
        folder, field = Path(arm.weights), f"compare.arms.{name}.weights"
        wanted = ("config.json",) if arm.method == "full" else ADAPTER_FILES
        missing = [file for file in wanted if not (folder / file).is_file()]
        if missing:
            found.append((field, f"{field} is {folder}, but there is no {missing[0]} in it"))
        elif arm.method != "full":
            with suppress(ValueError):
                model = own_job(job, name).model
                config = model_config(model.model_name_or_path, model.revision)
                sentence = adapter_refusal(folder, str(arm.method), config, field, generates=job.generates)
                found += [(field, sentence)] if sentence else []
    return found


def _wrong_strategy(loaded: LoadedJob) -> list[tuple[str, str]]:
    """What is missing for DeepSpeed, or contradicts the job in the user's own file for it."""
    job = loaded.job
    if not job.resources.strategy.startswith("zero"):
        return []
    found = []
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        found.append(
            (
                "resources.strategy",
                f"resources.strategy is {job.resources.strategy}, but DeepSpeed needs a C++ compiler and there is no "
                f"{compiler} (apt-get install g++); fsdp needs none",
            )
        )
    own = job.resources.deepspeed_config
    if own:
        try:
            said = json.loads(files.read_plain_text(Path(own)))
        except (OSError, ValueError, RecursionError) as error:
            sentence = f"resources.deepspeed_config is {own}, which is no JSON file that can be read: {error}"
            return [*found, ("resources.deepspeed_config", sentence)]
        if not isinstance(said, dict):
            sentence = f"resources.deepspeed_config is {own}, but must hold a JSON object"
            return [*found, ("resources.deepspeed_config", sentence)]
        found += [(problem.path, problem.sentence) for problem in contradictions(job, said)]
    return found


def _wrong_models(loaded: LoadedJob) -> list[tuple[str, str]]:
    """Return what a job and its arms ask of models that their configs say they cannot do."""
    job = loaded.job
    own = _wrong_model(job)
    searched = job.search.parameters if job.search else {}
    found = [(f"search.parameters.{field}" if field in searched else field, sentence) for field, sentence in own]
    for where, arm_job in _arm_jobs(job):
        adapters = _wrong_adapter(arm_job) if arm_job.train.init_adapter != job.train.init_adapter else []
        of_arm = [one for one in _wrong_model(arm_job) + adapters if one not in own]
        found += [(where, f"{where}: {sentence}") for _, sentence in of_arm]
    return found


def _arm_jobs(job: JobSpec) -> list[tuple[str, JobSpec]]:
    """Return the job of each arm that sets something of its own, with its place in the file."""
    if job.compare is None:
        return []
    found = []
    for name, arm in job.compare.arms.items():
        if not (arm.set or arm.method != job.method or arm.parameters):
            continue
        with suppress(ValueError):  # pydantic's too: what is wrong with the arm itself is said where the file is loaded
            found.append((f"compare.arms.{name}", search_job(job, name, None) if arm.trains else own_job(job, name)))
    return found


def _wrong_model(job: JobSpec) -> list[tuple[str, str]]:
    """Return what the config of a job's model says against the job, by field; nothing where it is not here."""
    name = job.model.model_name_or_path
    config = model_config(name, job.model.revision)
    if not config:
        return []
    refusal = generation_refusal if job.generates else classification_refusal
    try:
        sentence = refusal(config, name)
        if sentence:
            return [("model.model_name_or_path", sentence)]
        further = _too_long(job, config) + _wrong_layers(job, config) + _wrong_targets(job, config)
        return further + _wrong_packing(job, config)
    except (TypeError, ValueError, AttributeError) as error:  # a config is whatever somebody wrote
        sentence = f"model.model_name_or_path is {name}, whose config.json cannot be understood: {error}"
        return [("model.model_name_or_path", sentence)]


def _wrong_packing(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Refuse packed rows for a model that is known not to keep examples apart."""
    if not job.train.packing or can_pack(config):
        return []
    return [("train.packing", packing_refusal("train.packing", job.model.model_name_or_path))]


def _too_long(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Refuse rows, or a learnt prompt before them, for which the model has no positions."""
    name, field = job.model.model_name_or_path, "model.max_length"
    longest = max(_possible(job, field))
    sentence = length_refusal(config, name, longest)
    if sentence:
        return [(field, sentence)]
    if "prompt_tuning" not in _possible(job, "method"):
        return []
    tokens = "prompt_tuning.num_virtual_tokens"
    too_long = prompt_too_long(max(_possible(job, tokens)), longest, name, learnt_positions(config))
    found = [(tokens, too_long)] if too_long else []
    if job.task == "classification" and is_causal(config):
        found.append(("method", prompt_hides_label(name)))
    return found


def _wrong_layers(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Refuse what the model's kind of layers cannot do."""
    methods = _possible(job, "method")
    if not {"lora", "qlora"} & set(methods) or "olora" not in _possible(job, "lora.init_lora_weights"):
        return []
    if not has_transposed_layers(config):
        return []
    sentence = (
        f"lora.init_lora_weights is olora, but the matrices of {job.model.model_name_or_path} "
        f"({model_type(config)}) are stored transposed (Conv1D), which PEFT's OLoRA does not turn; use pissa or default"
    )
    return [("lora.init_lora_weights", sentence)]


_TARGETS = "lora.lora_target_modules"


def _wrong_targets(job: JobSpec, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Refuse adapters on layers that the model does not have, or that are two things at once."""
    if not {"lora", "qlora"} & set(_possible(job, "method")) or job.train.init_adapter:
        return []  # an adapter that is continued has found its layers
    found = []
    layers = _layers_of(job, config)
    for value in _possible(job, _TARGETS):
        if not isinstance(value, str | list | tuple):
            continue  # said where the file is loaded
        names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
        if names == ("all-linear",):
            continue
        tied = tied_targets(names, config) if job.generates else []
        if tied:
            found.append((_TARGETS, tied_refusal(tied, job.model.model_name_or_path)))
        others = [name for name in names if name not in tied]
        unknown = [name for name in others if layers and not any(_means(name, path) for path in layers)]
        if unknown:
            last = sorted({path.rpartition(".")[2] for path in layers if not path.rpartition(".")[2].isdigit()})
            near = fields.closest(unknown[0], last)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(last[:_MOST_LAYERS])}"
            which = ", ".join(map(repr, unknown))
            sentence = f"{_TARGETS} has {which}, but {job.model.model_name_or_path} has no such layer; {hint}"
            found.append((_TARGETS, sentence))
    return found


_MOST_LAYERS = 16


def _means(name: str, path: str) -> bool:
    """Whether a target means a layer; a checkpoint's paths may lack the prefix that a loaded model's have."""
    return is_named(path, (name,)) or name.endswith(f".{path}")


def _layers_of(job: JobSpec, config: dict[str, Any]) -> set[str]:
    """Return the layers that a model's weights name; empty where they are not here, or are named otherwise when loaded.

    transformers puts the experts of a mixture together under other names than a checkpoint has.
    """
    if any("expert" in key for key in text_config(config)):
        return set()
    try:
        folder = model_folder(job.model.model_name_or_path, job.model.revision)
    except AssetError:
        return set()
    return layer_names(weight_shapes(folder))


def _possible(job: JobSpec, path: str) -> list[Any]:
    """What a field may be in some trial: its own value, or those of the search (the ends of a range)."""
    searched = job.search.parameters.get(path) if job.search else None
    if searched is None or searched.expression is not None:
        return [fields.get(job.model_dump(), path)]
    return list(searched.values) if searched.values is not None else [searched.min, searched.max]


def _unknown_asset(field: str, name: str, kind: str) -> list[tuple[str, str]]:
    try:
        known = asset(name)
    except AssetError as error:
        return [(field, f"{field}: {error}")]
    return [] if known.kind == kind else [(field, f"{field} is {name}, but that is a {known.kind}, not a {kind}")]


def _wrong_file(field: str, name: str | None) -> list[tuple[str, str]]:
    if name is None:
        return []
    path = Path(name)
    if not path.is_file():
        return [(field, f"{field} is {name}, but {files.no_file(path)}")]
    if data_suffix(path) is None:
        return [(field, f"{field} is {name}, but must end in one of {', '.join(DATA_SUFFIXES)}")]
    return []
