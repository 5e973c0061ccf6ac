"""Find models and data sets of the Hugging Face Hub on this machine.

Only the client's functions for its cache are used, which need no network. Downloads are in
`cluster/fetch.py`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX, get_asset, get_asset_folder, get_cache_dir
from lorafleet.jobs.data.verified_files import check_cache, check_unchanged
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.runs.trust import find_other_writer


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, with an optional revision."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def get_hub_cache() -> Path:
    """Return the hub client's cache: HF_HUB_CACHE, or `hub` below HF_HOME.

    The variables are huggingface_hub's, which reads them once, when it is imported; a site file
    may change them later. Without them it is `huggingface/hub` below XDG_CACHE_HOME or ~/.cache.
    The folder may not exist.
    """
    override = os.environ.get("HF_HUB_CACHE")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or user_cache / "huggingface")
    folder = Path(override) if override else home / "hub"
    return Path(os.path.expandvars(folder.expanduser()))  # as the client does


_MAX_JSON_BYTES = 200_000_000
"""Maximum size of a JSON file, in bytes: enough for a tokenizer's vocabulary or an index of
shards.
"""
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.tiktoken", "tekken.json")
_WITHOUT_VOCABULARY = ("CanineTokenizer", "ByT5Tokenizer", "PerceiverTokenizer")


def describe_missing_files(folder: Path, *, code: bool = False) -> str | None:
    """Return which files a model's folder lacks for training, or None.

    An interrupted download leaves such a folder. transformers would report it late, or
    train with an empty tokenizer. A folder with a GGUF asset counts as complete: it is
    converted first.

    Args:
        folder: The model's folder.
        code: True to check also for the Python files that its config names.
    """
    if (folder / "model.gguf").is_file():
        return None
    return (
        describe_missing_weights(folder)
        or describe_missing_tokenizer(folder)
        or (_describe_missing_code(folder) if code else None)
    )


def describe_missing_weights(folder: Path) -> str | None:
    """Return which weights a model's folder lacks, or None.

    Only safetensors count: pickled weights could run code when they are loaded. All shards
    that the index names must be present; they are not opened.

    Raises:
        AssetError: If the index is not JSON.
    """
    if not any(folder.glob("*.safetensors")):
        pickle_note = (
            " (its .bin file is a pickle, which lorafleet does not read: convert it to safetensors)"
            if any(folder.glob("*.bin"))
            else ""
        )
        return f"no weights in safetensors{pickle_note}"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        shards = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        # The index comes from the model's author. A name with a path could point outside of the
        # folder.
        if not all(
            isinstance(name, str) and Path(name).name == name and name.isprintable()
            for name in shards
        ):
            return f"an {index.name} whose weight_map names files outside of the folder"
        missing = sorted(shard for shard in set(shards) if not (folder / shard).is_file())
        if missing:
            return f"no {missing[0]}, which {index.name} refers to"
    return None


def describe_missing_tokenizer(folder: Path) -> str | None:
    """Return which tokenizer files a model's folder lacks, or None.

    Without a tokenizer, transformers creates an empty one, and a model would be trained on
    unknown tokens only.
    """
    tokenizer = folder / "tokenizer_config.json"
    config = _read_json(tokenizer) if tokenizer.is_file() else {}
    has_own_vocabulary = (
        "auto_map" in config or config.get("tokenizer_class") in _WITHOUT_VOCABULARY
    )
    if not has_own_vocabulary and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return "no tokenizer (tokenizer.json, vocab.txt, ...)"
    return None


def _describe_missing_code(folder: Path) -> str | None:
    """Return which Python files of its config a model's folder lacks, or None."""
    auto_map = _read_json(folder / "config.json").get("auto_map") or {}
    local_classes = [
        name for name in auto_map.values() if isinstance(name, str) and "--" not in name
    ]
    modules = [name.partition(".")[0] for name in local_classes]
    missing = [module for module in modules if not (folder / f"{module}.py").is_file()]
    return f"no {missing[0]}.py, which config.json refers to" if missing else None


def check_complete(name: str, revision: str | None) -> None:
    """Raise AssetError if a model's folder on this machine lacks weights or a tokenizer."""
    folder = get_model_folder(name, revision)
    raise_if_missing(name, folder, describe_missing_files(folder))


def raise_if_missing(name: str, folder: Path, missing: str | None) -> None:
    """Raise AssetError if something is missing from a model's folder."""
    if missing:
        raise AssetError(
            f"model.model_name_or_path is {name}, but {folder} has {missing}. If a download was "
            "interrupted, complete it with `lorafleet fetch JOB.yaml`"
        )


def find_hub_model_folder(name: str, revision: str | None) -> Path | None:
    """Return the snapshot of a hub model in the cache, or None if it is not downloaded.

    Args:
        name: Hub id.
        revision: A branch, a tag or a commit; None for `main`. A branch means the commit
            that was last downloaded for it.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(
            name, "config.json", cache_dir=get_hub_cache(), revision=revision
        )
    except (HFValidationError, OSError, ValueError):
        return None
    # Not a path if the file is not there, or is known not to exist.
    return Path(config).parent if isinstance(config, str) else None


def get_repository_folder_name(name: str) -> str:
    """Return the name of a hub model's folder in the client's cache."""
    from huggingface_hub.file_download import repo_folder_name

    return str(repo_folder_name(repo_id=name, repo_type="model"))


def get_dataset_folder(name: str, revision: str | None, config: str | None = None) -> Path:
    """Return the folder in which the splits of a hub data set are stored as JSON Lines."""
    folder = f"{name.replace('/', '--')}@{revision or 'main'}"
    return get_cache_dir() / "datasets" / (f"{folder}+{config}" if config else folder)


def get_model_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model on this machine.

    The folder has a config, but may be incomplete or changed: see `check_complete` and
    `check_fetched`. Files of assets are checked here already.

    Args:
        name: A hub id, an asset or an absolute path. The loader has made paths absolute.
        revision: Revision of a hub model. Ignored for assets and folders.

    Raises:
        AssetError: If it is not on this machine; the message says what to do.
    """
    if name.startswith(PREFIX):
        return get_asset_folder(name)
    if Path(name).is_absolute():
        try:
            if (Path(name) / "config.json").is_file():
                return Path(name)
            reason = "has no config.json" if Path(name).is_dir() else "does not exist"
        except OSError as error:
            reason = f"cannot be accessed: {error.strerror}"
        raise AssetError(f"model.model_name_or_path is {name}, but that folder {reason}")
    folder = find_hub_model_folder(name, revision)
    if folder is None:
        raise AssetError(
            f"model.model_name_or_path is {HubName(name, revision)}, which is not on this machine: "
            "run `lorafleet fetch JOB.yaml` where the hub can be reached (HF_HOME sets the "
            "folder), or name a local folder"
        )
    return folder


def get_converted_folder(folder: Path) -> Path:
    """Return the folder for the safetensors that a GGUF asset is converted to."""
    return folder.with_name(f"{folder.name}-safetensors")


def read_model_config(name: str, revision: str | None) -> dict[str, Any] | None:
    """Return the config.json of a model, or None if it is not on this machine.

    For a GGUF asset it is the shape of the model that `fetch` has stored.

    Raises:
        AssetError: If the file is not a JSON object.
    """
    try:
        folder = get_model_folder(name, revision)
    except AssetError:
        return None
    # `fetch` writes shape.json beside a GGUF file, which has no config.json before it is converted.
    for file in ("config.json", "shape.json"):
        if (folder / file).is_file():
            return _read_json(folder / file)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises AssetError if there is none."""
    try:
        value = json.loads(files.read_regular_text(path, _MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(
            f"{path} is not JSON: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not isinstance(value, dict):
        raise AssetError(f"{path} must contain a JSON object")
    return value


def resolve_model_revision(name: str, revision: str | None) -> str:
    """Return what identifies a model's weights and tokenizer.

    It is the pin of an asset, the commit of a hub model, or a digest of the files of a
    folder, which are all read. The result is part of trial ids and of the key of cached
    tokens.

    Raises:
        AssetError: If downloaded files do not match the pin or the commit.
    """
    if name.startswith(PREFIX):
        get_asset_folder(name)  # checks its files
        return get_asset(name).sha256
    folder = get_model_folder(name, revision)
    if folder.parent.name == "snapshots":
        check_fetched(name, folder)
        return folder.name
    return _compute_folder_digest(folder)


def resolve_public_base(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return (id, revision) under which others can load a base model.

    For an asset, this is the hub model that it is a copy of. The revision of a hub model is its
    commit if the model is on this machine. A local folder stays a path.
    """
    if name.startswith(PREFIX):
        return get_asset(name).hub_id or name, None
    if Path(name).is_absolute():
        return name, None
    folder = find_hub_model_folder(name, revision)
    return name, folder.name if folder is not None else revision


def check_fetched(name: str, folder: Path) -> None:
    """Raise AssetError if a hub model's files do not match its commit.

    The error is also raised if others can change the files.
    """
    if not Path(name).is_absolute() and folder.parent.name == "snapshots":
        check_cache(get_hub_cache())
        check_unchanged(folder)


def _compute_folder_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a model folder's files, in hex."""
    import hashlib

    digest = hashlib.sha256()
    named_templates = folder / "additional_chat_templates"
    for file in sorted(
        [*folder.iterdir(), *(named_templates.iterdir() if named_templates.is_dir() else ())]
    ):
        if (
            # Only files that transformers reads: a README or a log beside the weights must not
            # change trial ids.
            file.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")
            and file.is_file()
        ):
            digest.update(f"{file.name}:{files.compute_file_digest(file)}\n".encode())
    return digest.hexdigest()


def compute_code_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and bytes of a model folder's files, in hex.

    Weights are left out, because they are large and run no code. Every other file counts,
    also in subfolders: code can read any of them. Users copy this value into
    `model.revision` after they have read the code.
    """
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix not in _WEIGHT_SUFFIXES and file.is_file():
            digest.update(
                f"{file.relative_to(folder).as_posix()}\0{files.compute_sha256(file)}\n".encode()
            )
    return digest.hexdigest()


_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


_LOCAL_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
"""Matches a class in a module of the model's own folder, as `auto_map` names it."""
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_code_refusal(name: str, revision: str | None) -> str | None:
    """Return why a model's code must not be run, or None.

    None means that the code is completely pinned, or that the model is not on this machine
    yet. A hub model is pinned by its commit. A folder can change, so the hash of its
    current content must be named. Code that the config takes from another repository
    (`org/other--module.Class`) is pinned by neither.

    Args:
        name: A hub id, an asset or a folder.
        revision: The job's `model.revision`.

    Raises:
        AssetError: If a config is not JSON.
    """
    try:
        folder = get_model_folder(name, revision)
    except AssetError:
        return None
    for file in (
        "config.json",
        "tokenizer_config.json",
        "processor_config.json",
        "generation_config.json",
    ):
        auto_map = _read_json(folder / file).get("auto_map") if (folder / file).is_file() else None
        external_classes = [
            text for text in _collect_texts(auto_map) if not _LOCAL_CLASS.fullmatch(text)
        ]
        if external_classes:
            return (
                f"model.trust_remote_code is true, but {folder / file} loads code from another "
                f"repository ({external_classes[0][:100]!r}), which model.revision does not pin: "
                "copy the code into the model's folder"
            )
    if not Path(name).is_absolute():
        if name.startswith(PREFIX) or _FULL_COMMIT.fullmatch(revision or ""):
            return None
        return (
            f"model.trust_remote_code is true and model.revision is {revision}, but must be a "
            "commit of 40 hex digits"
        )
    # `rglob` does not follow links to folders, so the files behind one would not be part of the
    # digest.
    folder_link = next(
        (path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()), None
    )
    if folder_link is not None:
        return (
            f"model.trust_remote_code is true, but {folder_link} is a link to a folder, whose "
            "files cannot be pinned: replace it by a copy"
        )
    # The files are read once here and loaded later. Nobody else may change them in between.
    sentence = find_other_writer(folder)
    if sentence:
        return (
            f"model.trust_remote_code is true, but {sentence}, so its code could change after you "
            "reviewed it"
        )
    current_digest = compute_code_digest(folder)
    if revision == current_digest:
        return None
    return (
        f"model.trust_remote_code is true and model.revision is {revision}, but the files of "
        f"{folder} have the SHA-256 {current_digest}: read its code, and set model.revision to "
        "that value if it may run"
    )


def _collect_texts(value: Any) -> list[str]:
    """Return every text in a tree of JSON values."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _collect_texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _collect_texts(inner)]
    return [value] if isinstance(value, str) else []


def check_code(name: str, revision: str | None) -> None:
    """Raise AssetError if a model's code must not be run."""
    sentence = find_code_refusal(name, revision)
    if sentence:
        raise AssetError(sentence)


def count_parameters(name: str, revision: str | None) -> int | None:
    """Return the number of weights of a model; None if it is not known.

    It is pinned for an asset, and read from the safetensors headers for a folder: a tied
    matrix that is stored once counts once.

    Raises:
        AssetError: If a safetensors file is damaged.
    """
    if name.startswith(PREFIX):
        return get_asset(name).parameters
    try:
        folder = get_model_folder(name, revision)
    except AssetError:
        return None
    counts = [_count_safetensors_parameters(file) for file in folder.glob("*.safetensors")]
    return sum(counts) or None


def _count_safetensors_parameters(file: Path) -> int:
    """Return the number of weights in a safetensors file.

    Only its header is read (8 bytes of length, then JSON).
    """
    import math

    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length)) if length < 100_000_000 else {}
            return sum(
                math.prod(tensor["shape"])
                for key, tensor in header.items()
                if key != "__metadata__"
            )
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            raise AssetError(f"{file} is damaged or not a complete safetensors file") from error
