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
from lorafleet.jobs.data.assets import get_asset, get_cache_dir
from lorafleet.jobs.data.hub import (
    get_dataset_folder,
    get_hub_cache,
    get_repository_folder_name,
)
from lorafleet.jobs.data.inputs import JobInput, resolve_inputs
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.user import get_state_folder


def list_local_inputs(job: JobSpec) -> list[tuple[str, str]]:
    """Return (field, path) of everything that a job names by a path of this machine.

    A model or data set counts as a path if it begins with `/`, `./`, `../` or `~`; anything
    else is a hub id or an asset.
    """
    return [(item.field, item.reference) for item in resolve_inputs(job).paths]


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
    for item in resolve_inputs(job).fetched:
        if item.role == "dataset":
            items.append(build_asset_item(item.path))
        else:
            items += _list_model_items(item)
    return items


def build_asset_item(folder: Path) -> UploadItem:
    """Return a folder of the local cache as an upload item.

    It gets the same path in the storage's cache.
    """
    return UploadItem(folder, str(folder.relative_to(get_cache_dir())), compute_digest(folder))


def _list_model_items(model: JobInput) -> list[UploadItem]:
    folder = model.path
    if model.source == "asset":
        return [build_asset_item(folder)]
    items = [
        UploadItem(
            folder, str(Path("hub") / folder.relative_to(get_hub_cache())), compute_digest(folder)
        )
    ]
    # Without the reference, the hub's library does not find the snapshot of a branch offline.
    reference = folder.parent.parent / "refs" / (model.revision or "main")
    if reference.is_file():
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
    missing = []
    for item in resolve_inputs(job).fetched:
        required = _get_target(item, uploaded)
        if not any(target.startswith(required) for target in uploaded):
            missing.append(item.reference)
    return missing


def _get_target(item: JobInput, uploaded: Iterable[str]) -> str:
    """Return the path in the storage's cache at which a fetched input must be stored.

    For a hub model that is its revision's reference or its snapshot, whichever was uploaded.
    """
    name = item.reference
    if item.source == "asset":
        return str(get_asset(name).folder.relative_to(get_cache_dir()))
    if item.role == "dataset":
        folder = get_dataset_folder(name, item.revision, item.config)
        return str(folder.relative_to(get_cache_dir()))
    repository = f"hub/{get_repository_folder_name(name)}"
    snapshot = f"{repository}/snapshots/{item.revision}"
    if item.revision and snapshot in uploaded:
        return snapshot
    return f"{repository}/refs/{item.revision or 'main'}"


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
