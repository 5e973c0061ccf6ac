"""What a job names that lies on this machine, and where it goes on the storage of a cluster that does not see it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafleet.cluster.remote.transfer import Cargo, digest, files_of
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX, asset, cache_dir
from lorafleet.jobs.data.custom_metric_files import file_of
from lorafleet.jobs.data.hub import dataset_folder, hub_cache, hub_model_folder, model_folder
from lorafleet.jobs.data.rows import split_files
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.trial_id import bases_of, encoders_of, models_of
from lorafleet.jobs.user import state_folder

_FILES = ("train_file", "validation_file", "test_file")


def named_paths(job: JobSpec) -> list[tuple[str, str]]:
    """(field, path) of everything that a job names by a path of this machine."""
    named: list[tuple[str, str | None]] = [(f"data.{field}", getattr(job.data, field)) for field in _FILES]
    named += [("data.dataset_name", job.data.dataset_name), ("train.init_adapter", job.train.init_adapter)]
    named += [("resources.deepspeed_config", job.resources.deepspeed_config)]
    named += [("model.model_name_or_path", name) for name in models_of(job)]
    named += [("evaluate.bertscore_model", name) for name in encoders_of(job)]
    given = job.compare.arms if job.compare else {}
    named += [(f"compare.arms.{name}.weights", arm.weights) for name, arm in given.items()]
    own = job.evaluate.custom_metrics
    named += [(f"evaluate.custom_metrics.{name}.function", file_of(metric)) for name, metric in own.items()]
    return [(field, path) for field, path in named if path and path.startswith(("/", "./", "../", "~"))]


def own_cargo(path: str) -> Cargo:
    """A file or folder of the user's: on the storage it lies under the digest of its bytes. Raises OSError."""
    source = files.real(files.in_home(path))
    mark = digest(source)
    return Cargo(source, f"staged/{mark[:16]}/{source.name}", mark)


def fetched_cargo(job: JobSpec) -> list[Cargo]:
    """The models and data of a job that were fetched by name: they go where this machine's cache has them."""
    found = []
    for name, revision in bases_of(job):
        if not Path(name).is_absolute():
            found += _model(name, revision)
    for name in encoders_of(job):
        if not Path(name).is_absolute():
            found += _model(name, None)
    data = job.data.dataset_name
    if data and not Path(data).is_absolute():
        folder = dataset_folder(data, job.data.dataset_revision, job.data.dataset_config_name)
        if data.startswith(PREFIX):
            folder = next(iter(split_files(job.data).values())).parent
        found.append(asset_cargo(folder))
    return found


def asset_cargo(folder: Path) -> Cargo:
    """A folder of the cache here, for the same place in the storage's."""
    return Cargo(folder, str(folder.relative_to(cache_dir())), digest(folder))


def _model(name: str, revision: str | None) -> list[Cargo]:
    folder = model_folder(name, revision)
    if name.startswith(PREFIX):
        return [asset_cargo(folder)]
    found = [Cargo(folder, str(Path("hub") / folder.relative_to(hub_cache())), digest(folder))]
    reference = folder.parent.parent / "refs" / (revision or "main")
    if hub_model_folder(name, revision) and reference.is_file():
        found.append(Cargo(reference, str(Path("hub") / reference.relative_to(hub_cache())), digest(reference)))
    return found


def _ledger() -> Path:
    return state_folder() / "staged.jsonl"


def remember(storage: str, brought: Iterable[Cargo]) -> None:
    """Note what lies on a storage now."""
    for cargo in brought:
        row = {"time": time.time(), "storage": storage, "digest": cargo.digest, "target": cargo.target}
        looks = {"source": str(cargo.source), "looks": looks_of(cargo.source)}
        files.append_jsonl(_ledger(), row | looks)


def staged(storage: str, job: JobSpec, cache: str) -> dict[str, str]:
    """Path here -> path in the pods, of what a job names and `fetch --on` has brought to a storage as it is now."""
    rows = [row for row in files.read_jsonl(_ledger()) if row.get("storage") == storage]
    there = {row["digest"]: str(row["target"]) for row in rows}
    unchanged = {(row.get("source"), row.get("looks")): row["digest"] for row in rows}
    found = {}
    for _, path in named_paths(job) if there else ():
        source = files.real(files.in_home(path))
        try:
            mark = unchanged.get((str(source), looks_of(source))) or digest(source)
        except OSError:
            continue
        if mark in there:
            found[path] = os.path.join(cache, there[mark])  # noqa: PTH118 - of pods, not of this machine
    return found


def not_brought(storage: str, job: JobSpec) -> list[str]:
    """What a job names of the hub and of the assets, and this machine has never brought to a storage."""
    there = {str(row["target"]) for row in files.read_jsonl(_ledger()) if row.get("storage") == storage}
    data = [(job.data.dataset_name, _target_of_data(job))] if job.data.dataset_name else []
    bases = [*bases_of(job), *((name, None) for name in encoders_of(job))]
    models = [(name, target) for name, revision in bases for target in _targets_of_model(name, revision, there)]
    named = [(str(name), target) for name, target in [*models, *data] if target]
    return [name for name, target in named if not any(known.startswith(target) for known in there)]


def _target_of_data(job: JobSpec) -> str:
    name = str(job.data.dataset_name)
    if Path(name).is_absolute():
        return ""
    hub = dataset_folder(name, job.data.dataset_revision, job.data.dataset_config_name)
    folder = asset(name).folder if name.startswith(PREFIX) else hub
    return str(folder.relative_to(cache_dir()))


def _targets_of_model(name: str, revision: str | None, there: Iterable[str]) -> list[str]:
    """Where a model must lie: of the hub its revision's name or its snapshot, whichever was brought."""
    if Path(name).is_absolute():
        return []
    if name.startswith(PREFIX):
        return [str(asset(name).folder.relative_to(cache_dir()))]
    repository = f"hub/models--{name.replace('/', '--')}"
    snapshot = f"{repository}/snapshots/{revision}"
    return [snapshot if revision and snapshot in there else f"{repository}/refs/{revision or 'main'}"]


def looks_of(source: Path) -> str:
    """Names, sizes and times of change of a file or a folder's files: where they are the same, so are the bytes."""
    told = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(source)]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def moved(tree: Any, places: Mapping[str, str]) -> Any:
    """A tree with every text that is one of these paths replaced."""
    if isinstance(tree, dict):
        return {key: moved(value, places) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [moved(value, places) for value in tree]
    if not isinstance(tree, str):
        return tree
    path, colon, name = tree.partition(".py:")  # a function in a file goes with its file
    return f"{places[f'{path}.py']}:{name}" if colon and f"{path}.py" in places else places.get(tree, tree)
