"""Whether what a job file names is there, or is known: files, folders, assets."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cluster.shape import shape
from jobs import fields
from jobs.assets import PREFIX, asset
from jobs.data_files import DATA_SUFFIXES, data_suffix
from jobs.deepspeed import contradictions
from jobs.errors import AssetError, DataError, JobFileError, Problem
from jobs.hub import check_whole, model_config, model_folder
from jobs.identity import ADAPTER_FILES, encoders_of, models_of
from jobs.load import LoadedJob
from jobs.own_metrics import wrong
from jobs.rows import split_files
from jobs.spec import JobSpec
from jobs.support import prompt_hides_label, prompt_too_long

_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types of transformers whose layers are Conv1D."""


def check_names(loaded: LoadedJob, *, whole: bool = True) -> None:
    """Raise JobFileError with every name that cannot be right. Hub names are not looked up.

    Without `whole` a model's folder may hold its config alone: enough for a plan.
    """
    problems = [loaded.located(Problem(path, sentence)) for path, sentence in _wrong(loaded, whole=whole)]
    if problems:
        raise JobFileError(str(loaded.path), problems)


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
    found += _wrong_strategy(loaded) + _wrong_layers(loaded) + _wrong_metrics(job) + _wrong_arms(job)
    adapter = job.train.init_adapter
    if adapter and not all((Path(adapter) / name).is_file() for name in ADAPTER_FILES):
        found.append(("train.init_adapter", f"train.init_adapter is {adapter}, but there is no PEFT adapter in it"))
    return found


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
            said = json.loads(Path(own).read_text())
        except (OSError, ValueError) as error:
            sentence = f"resources.deepspeed_config is {own}, which is no JSON file that can be read: {error}"
            return [*found, ("resources.deepspeed_config", sentence)]
        if not isinstance(said, dict):
            sentence = f"resources.deepspeed_config is {own}, but must hold a JSON object"
            return [*found, ("resources.deepspeed_config", sentence)]
        found += [(problem.path, problem.sentence) for problem in contradictions(job, said)]
    return found


def _wrong_layers(loaded: LoadedJob) -> list[tuple[str, str]]:
    """What the model's kind of layers cannot do, where its config is on this machine."""
    job = loaded.job
    methods = _possible(job, "method")
    if "prompt_tuning" in methods:
        found = _wrong_prompt(job)
        if found:
            return found
    if not {"lora", "qlora"} & set(methods) or "olora" not in _possible(job, "lora.init_lora_weights"):
        return []
    kind = (model_config(job.model.model_name_or_path, job.model.revision) or {}).get("model_type")
    if kind not in _TRANSPOSED:
        return []
    sentence = (
        f"lora.init_lora_weights is olora, but the matrices of {job.model.model_name_or_path} ({kind}) are stored "
        "transposed (Conv1D), which PEFT's OLoRA does not turn; use pissa or default"
    )
    return [("lora.init_lora_weights", sentence)]


def _possible(job: JobSpec, path: str) -> list[Any]:
    """What a field may be in some trial: its own value, or those of the search (the ends of a range)."""
    searched = job.search.parameters.get(path) if job.search else None
    if searched is None or searched.expression is not None:
        return [fields.get(job.model_dump(), path)]
    return list(searched.values) if searched.values is not None else [searched.min, searched.max]


def _wrong_prompt(job: JobSpec) -> list[tuple[str, str]]:
    """A learnt prompt that the model has no room for, or behind which it does not find its label."""
    name = job.model.model_name_or_path
    known = shape(model_config(name, job.model.revision) or {})
    if known is None:
        return []
    field = "prompt_tuning.num_virtual_tokens"
    found = []
    too_long = prompt_too_long(max(_possible(job, field)), job.model.max_length, name, known.positions)
    if too_long:
        searched = job.search is not None and field in job.search.parameters
        found.append((f"search.parameters.{field}" if searched else field, too_long))
    if job.task == "classification" and known.family != "bert":
        found.append(("method", prompt_hides_label(name)))
    return found


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
        what = "that is a folder, not a file" if path.is_dir() else "there is no such file"
        return [(field, f"{field} is {name}, but {what}")]
    if data_suffix(path) is None:
        return [(field, f"{field} is {name}, but must end in one of {', '.join(DATA_SUFFIXES)}")]
    return []
