"""Find a job's inputs on this machine and map them to paths on a remote storage.

Files of the user are stored under their digest, so equal inputs are uploaded once. What
this machine has uploaded is recorded in the user's state folder: a plan can then be
made without asking the storage.
"""

from __future__ import annotations

import hashlib
import posixpath
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafleet.cluster.remote.transfer import UploadItem, compute_digest, list_files
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX, get_asset, get_cache_dir
from lorafleet.jobs.data.custom_metric_files import get_metric_file
from lorafleet.jobs.data.hub import (
    find_hub_model_folder,
    get_dataset_folder,
    get_hub_cache,
    get_model_folder,
)
from lorafleet.jobs.data.rows import get_split_files
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.trial_id import list_base_models, list_metric_models, list_model_names
from lorafleet.jobs.user import get_state_folder

_FILE_FIELDS = ("train_file", "validation_file", "test_file")


def list_local_inputs(job: JobSpec) -> list[tuple[str, str]]:
    """Return (field, path) of everything that a job names by a path of this machine.

    A value counts as a path if it begins with `/`, `./`, `../` or `~`; anything else is a
    hub id or an asset.
    """
    inputs: list[tuple[str, str | None]] = [
        (f"data.{field}", getattr(job.data, field)) for field in _FILE_FIELDS
    ]
    inputs += [
        ("data.dataset_name", job.data.dataset_name),
        ("train.init_adapter", job.train.init_adapter),
    ]
    inputs += [("resources.deepspeed_config", job.resources.deepspeed_config)]
    inputs += [("model.model_name_or_path", name) for name in list_model_names(job)]
    inputs += [("evaluate.bertscore_model", name) for name in list_metric_models(job)]
    arms = job.compare.arms if job.compare else {}
    inputs += [(f"compare.arms.{name}.weights", arm.weights) for name, arm in arms.items()]
    metrics = job.evaluate.custom_metrics
    inputs += [
        (f"evaluate.custom_metrics.{name}.function", get_metric_file(metric))
        for name, metric in metrics.items()
    ]
    return [
        (field, path) for field, path in inputs if path and path.startswith(("/", "./", "../", "~"))
    ]


def build_upload_item(path: str) -> UploadItem:
    """Return a user's file or folder as an upload item, stored under its digest. Raises OSError."""
    source = files.resolve_links(files.expand_home(path))
    content_digest = compute_digest(source)
    return UploadItem(source, f"staged/{content_digest[:16]}/{source.name}", content_digest)


def list_fetched_items(job: JobSpec) -> list[UploadItem]:
    """Return the upload items of a job's fetched models and data.

    Their paths in the storage's cache are the same as in this machine's cache.
    """
    items = []
    for name, revision in list_base_models(job):
        if not Path(name).is_absolute():
            items += _list_model_items(name, revision)
    for name in list_metric_models(job):
        if not Path(name).is_absolute():
            items += _list_model_items(name, None)
    data = job.data.dataset_name
    if data and not Path(data).is_absolute():
        folder = get_dataset_folder(data, job.data.dataset_revision, job.data.dataset_config_name)
        if data.startswith(PREFIX):
            folder = next(iter(get_split_files(job.data).values())).parent
        items.append(build_asset_item(folder))
    return items


def build_asset_item(folder: Path) -> UploadItem:
    """Return a folder of the local cache as an upload item.

    It gets the same path in the storage's cache.
    """
    return UploadItem(folder, str(folder.relative_to(get_cache_dir())), compute_digest(folder))


def _list_model_items(name: str, revision: str | None) -> list[UploadItem]:
    folder = get_model_folder(name, revision)
    if name.startswith(PREFIX):
        return [build_asset_item(folder)]
    items = [
        UploadItem(
            folder, str(Path("hub") / folder.relative_to(get_hub_cache())), compute_digest(folder)
        )
    ]
    # Without the reference, the hub's library does not find the snapshot of a branch offline.
    reference = folder.parent.parent / "refs" / (revision or "main")
    if find_hub_model_folder(name, revision) and reference.is_file():
        items.append(
            UploadItem(
                reference,
                str(Path("hub") / reference.relative_to(get_hub_cache())),
                compute_digest(reference),
            )
        )
    return items


def _get_ledger_path() -> Path:
    return get_state_folder() / "staged.jsonl"


def record_uploads(storage: str, items: Iterable[UploadItem]) -> None:
    """Record what is now stored on a storage.

    Args:
        storage: Key of the storage (`RemoteBackend.storage`).
        items: Items that were uploaded or present already.
    """
    for item in items:
        row = {
            "time": time.time(),
            "storage": storage,
            "digest": item.digest,
            "target": item.target,
        }
        looks = {"source": str(item.source), "looks": compute_stat_digest(item.source)}
        files.append_jsonl(_get_ledger_path(), row | looks)


def map_uploaded_paths(storage: str, job: JobSpec, cache: str) -> dict[str, str]:
    """Return local path -> path in the pods, for inputs that a storage has unchanged.

    These are the inputs of the job that `fetch --on` has uploaded and that have not changed
    since.
    """
    rows = [row for row in files.read_jsonl(_get_ledger_path()) if row.get("storage") == storage]
    targets = {row["digest"]: str(row["target"]) for row in rows}
    # Hashing a model for every plan would take too long; size and modification time of its files
    # are enough.
    unchanged = {(row.get("source"), row.get("looks")): row["digest"] for row in rows}
    remote_paths = {}
    for _, path in list_local_inputs(job) if targets else ():
        source = files.resolve_links(files.expand_home(path))
        try:
            content_digest = unchanged.get(
                (str(source), compute_stat_digest(source))
            ) or compute_digest(source)
        except OSError:
            continue
        if content_digest in targets:
            # A path in pods or on nodes, not on this machine.
            remote_paths[path] = posixpath.join(cache, targets[content_digest])
    return remote_paths


def list_missing_uploads(storage: str, job: JobSpec) -> list[str]:
    """Return the job's hub models and assets that this machine has never uploaded to a storage.

    Another machine may have uploaded them, which only the storage knows; so these are
    warnings and not errors.
    """
    uploaded = {
        str(row["target"])
        for row in files.read_jsonl(_get_ledger_path())
        if row.get("storage") == storage
    }
    data = [(job.data.dataset_name, _get_dataset_target(job))] if job.data.dataset_name else []
    bases = [*list_base_models(job), *((name, None) for name in list_metric_models(job))]
    models = [
        (name, target)
        for name, revision in bases
        for target in _list_model_targets(name, revision, uploaded)
    ]
    required = [(str(name), target) for name, target in [*models, *data] if target]
    return [
        name
        for name, target in required
        if not any(uploaded_target.startswith(target) for uploaded_target in uploaded)
    ]


def _get_dataset_target(job: JobSpec) -> str:
    name = str(job.data.dataset_name)
    if Path(name).is_absolute():
        return ""
    hub = get_dataset_folder(name, job.data.dataset_revision, job.data.dataset_config_name)
    folder = get_asset(name).folder if name.startswith(PREFIX) else hub
    return str(folder.relative_to(get_cache_dir()))


def _list_model_targets(name: str, revision: str | None, uploaded: Iterable[str]) -> list[str]:
    """Return where a model must be stored.

    For a hub model that is its revision's reference or its snapshot, whichever was uploaded.
    """
    if Path(name).is_absolute():
        return []
    if name.startswith(PREFIX):
        return [str(get_asset(name).folder.relative_to(get_cache_dir()))]
    repository = f"hub/models--{name.replace('/', '--')}"
    snapshot = f"{repository}/snapshots/{revision}"
    return [
        snapshot if revision and snapshot in uploaded else f"{repository}/refs/{revision or 'main'}"
    ]


def compute_stat_digest(source: Path) -> str:
    """Return a digest of the names, sizes and modification times of a file or a folder's files.

    If it is unchanged, the contents count as unchanged.
    """
    stats = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in list_files(source)
    ]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:32]


def replace_paths(tree: Any, replacements: Mapping[str, str]) -> Any:
    """Return a tree in which every string that is one of these paths is replaced.

    Args:
        tree: Any JSON value.
        replacements: Local path -> path on the storage.
    """
    if isinstance(tree, dict):
        return {key: replace_paths(value, replacements) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace_paths(value, replacements) for value in tree]
    if not isinstance(tree, str):
        return tree
    path, colon, name = tree.partition(".py:")  # a `file.py:function` value moves with its file
    return (
        f"{replacements[f'{path}.py']}:{name}"
        if colon and f"{path}.py" in replacements
        else replacements.get(tree, tree)
    )
