"""Where things of the model hub lie on this machine: the hub's own cache, read without its client."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX, asset, asset_folder, cache_dir
from lorafleet.jobs.data.verified_files import check_cache, check_unchanged
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.runs.trust import others_can_write


@dataclass(frozen=True)
class HubName:
    """A repository of the hub."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def hub_cache() -> Path:
    """The hub client's cache: HF_HUB_CACHE, or hub below HF_HOME."""
    own = os.environ.get("HF_HUB_CACHE")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(own) if own else home / "hub"


_MOST_JSON = 200_000_000
"""Bytes of a tokenizer's vocabulary, or of an index of shards."""
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.tiktoken", "tekken.json")
_WITHOUT_VOCABULARY = ("CanineTokenizer", "ByT5Tokenizer", "PerceiverTokenizer")


def lacks(folder: Path, *, code: bool = False) -> str | None:
    """What a model's folder lacks to be trained, or None: weights (every shard), a tokenizer and, with `code`, the
    Python files that its config names."""
    if (folder / "model.gguf").is_file():
        return None
    return lacks_weights(folder) or lacks_tokenizer(folder) or (_lacks_code(folder) if code else None)


def lacks_weights(folder: Path) -> str | None:
    """What is missing of a folder's weights, or None."""
    if not any(folder.glob("*.safetensors")):
        pickled = " (its .bin is a pickle, which is not read: convert it)" if any(folder.glob("*.bin")) else ""
        return f"no weights in safetensors{pickled}"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        mapped = _json(index).get("weight_map", {})
        shards = list(mapped.values()) if isinstance(mapped, dict) else [mapped]
        if not all(isinstance(name, str) and Path(name).name == name and name.isprintable() for name in shards):
            return f"an {index.name} whose weight_map does not name files of the folder"
        missing = sorted(shard for shard in set(shards) if not (folder / shard).is_file())
        if missing:
            return f"no {missing[0]}, which {index.name} names"
    return None


def lacks_tokenizer(folder: Path) -> str | None:
    """What is missing of a folder's tokenizer, or None.

    transformers makes up an empty one where there is none, and a model would be trained on unknown tokens alone.
    """
    tokenizer = folder / "tokenizer_config.json"
    said = _json(tokenizer) if tokenizer.is_file() else {}
    own = "auto_map" in said or said.get("tokenizer_class") in _WITHOUT_VOCABULARY
    if not own and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return "no tokenizer (tokenizer.json, vocab.txt, ...)"
    return None


def _lacks_code(folder: Path) -> str | None:
    named = _json(folder / "config.json").get("auto_map") or {}
    own = [name for name in named.values() if isinstance(name, str) and "--" not in name]
    modules = [name.partition(".")[0] for name in own]
    missing = [module for module in modules if not (folder / f"{module}.py").is_file()]
    return f"no {missing[0]}.py, which config.json names" if missing else None


def check_whole(name: str, revision: str | None) -> None:
    """Raise AssetError when a model's folder on this machine lacks weights or a tokenizer."""
    folder = model_folder(name, revision)
    refuse(name, folder, lacks(folder))


def refuse(name: str, folder: Path, missing: str | None) -> None:
    """Raise AssetError where something is missing of a model's folder."""
    if missing:
        raise AssetError(f"model.model_name_or_path is {name}, but {folder} has {missing}")


def hub_model_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot of a hub model in the cache, or None when it was not fetched."""
    repository = hub_cache() / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = files.read_plain_text(repository / "refs" / wanted, 1000).strip()
    except (OSError, ValueError):
        commit = wanted
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").exists() else None


def dataset_folder(name: str, revision: str | None, config: str | None = None) -> Path:
    """Where the splits of a hub data set are kept as JSON lines."""
    folder = f"{name.replace('/', '--')}@{revision or 'main'}"
    return cache_dir() / "datasets" / (f"{folder}+{config}" if config else folder)


def model_folder(name: str, revision: str | None) -> Path:
    """The folder that a model's name means, on this machine. Raises AssetError with what to do when it is not here."""
    if name.startswith(PREFIX):
        return asset_folder(name)
    if Path(name).is_absolute():
        try:
            if (Path(name) / "config.json").is_file():
                return Path(name)
            what = "has no config.json" if Path(name).is_dir() else "does not exist"
        except OSError as error:
            what = f"cannot be looked at: {error.strerror}"
        raise AssetError(f"model.model_name_or_path is {name}, but that folder {what}")
    folder = hub_model_folder(name, revision)
    if folder is None:
        raise AssetError(
            f"model.model_name_or_path is {HubName(name, revision)}, which is not on this machine: run "
            "`lorafleet fetch JOB.yaml` where the hub can be reached (HF_HOME says where), or name a local folder"
        )
    return folder


def converted_folder(folder: Path) -> Path:
    """Where the safetensors lie that a GGUF asset was converted to, once it was."""
    return folder.with_name(f"{folder.name}-safetensors")


def model_config(name: str, revision: str | None) -> dict[str, Any] | None:
    """config.json of a model, or None where it is not on this machine."""
    try:
        folder = model_folder(name, revision)
    except AssetError:
        return None
    for file in ("config.json", "shape.json"):
        if (folder / file).is_file():
            return _json(folder / file)
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(files.read_plain_text(path, _MOST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{path} is not JSON: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(value, dict):
        raise AssetError(f"{path} must hold a JSON object")
    return value


def model_revision(name: str, revision: str | None) -> str:
    """What identifies a model's weights and tokenizer: a pin, a commit, or a digest of the folder's files.

    Raises AssetError where fetched files are not what the pin or the commit stands for.
    """
    if name.startswith(PREFIX):
        asset_folder(name)  # which looks at its files
        return asset(name).sha256
    folder = model_folder(name, revision)
    if folder.parent.name == "snapshots":
        check_fetched(name, folder)
        return folder.name
    return _folder_digest(folder)


def public_base(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return (id, revision) under which others can load a base model: of an asset, the hub model that it is a copy of.

    The revision of a hub model is its commit if the model is on this machine. A local folder stays a path.
    """
    if name.startswith(PREFIX):
        return asset(name).hub_id or name, None
    if Path(name).is_absolute():
        return name, None
    folder = hub_model_folder(name, revision)
    return name, folder.name if folder is not None else revision


def check_fetched(name: str, folder: Path) -> None:
    """Raise AssetError where a hub model's files are not those of its commit, or others can change them."""
    if not Path(name).is_absolute() and folder.parent.name == "snapshots":
        check_cache(hub_cache())
        check_unchanged(folder)


def _folder_digest(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    named_templates = folder / "additional_chat_templates"
    for file in sorted([*folder.iterdir(), *(named_templates.iterdir() if named_templates.is_dir() else ())]):
        if file.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja", ".py") and file.is_file():
            digest.update(f"{file.name}:{files.sha256_file(file)}\n".encode())
    return digest.hexdigest()


def code_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and bytes of all files of a model's folder but its weights, in hex."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix not in _WEIGHTS and file.is_file():
            digest.update(f"{file.relative_to(folder).as_posix()}\0{files.sha256_file(file)}\n".encode())
    return digest.hexdigest()


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


_OWN_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
"""A class in a module of the model's folder, as `auto_map` names it."""
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


def code_refusal(name: str, revision: str | None) -> str | None:
    """Say why code of a model must not be run; None where it is pinned as a whole, or is not on this machine yet.

    A hub model is pinned by its commit; a folder can change, so that the hash of what is in it now must be named. Code
    that the config takes from another repository (`org/other--module.Class`) is pinned by neither.
    """
    try:
        folder = model_folder(name, revision)
    except AssetError:
        return None
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        named = _json(folder / file).get("auto_map") if (folder / file).is_file() else None
        elsewhere = [text for text in _texts(named) if not _OWN_CODE.fullmatch(text)]
        if elsewhere:
            return (
                f"model.trust_remote_code is true, but {folder / file} takes code from another place "
                f"({elsewhere[0][:100]!r}), which model.revision does not pin: copy it into the model's folder"
            )
    if not Path(name).is_absolute():
        if name.startswith(PREFIX) or _FULL_COMMIT.fullmatch(revision or ""):
            return None
        return (
            f"model.trust_remote_code is true and model.revision is {revision}, but must be a commit of 40 hex digits"
        )
    linked = next((path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()), None)
    if linked is not None:
        return f"model.trust_remote_code is true, but {linked} is a link to a folder, which has no hash of its own"
    sentence = others_can_write(folder)
    if sentence:
        return f"model.trust_remote_code is true, but {sentence}: its code can change after it was looked at"
    now = code_digest(folder)
    if revision == now:
        return None
    return (
        f"model.trust_remote_code is true and model.revision is {revision}, but the files of {folder} have the SHA-256 "
        f"{now}: read its code, and name that revision if it may run"
    )


def _texts(value: Any) -> list[str]:
    """Return every text in a tree."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def check_code(name: str, revision: str | None) -> None:
    """Raise AssetError where code of a model must not be run."""
    sentence = code_refusal(name, revision)
    if sentence:
        raise AssetError(sentence)


def parameter_count(name: str, revision: str | None) -> int | None:
    """Weights of a model: pinned for an asset, read from safetensors headers for a folder; None when unknown."""
    if name.startswith(PREFIX):
        return asset(name).parameters
    try:
        folder = model_folder(name, revision)
    except AssetError:
        return None
    counts = [_safetensors_parameters(file) for file in folder.glob("*.safetensors")]
    return sum(counts) or None


def _safetensors_parameters(file: Path) -> int:
    """Sum of the tensors' sizes in a safetensors file, from its header alone (8 bytes of length, then JSON)."""
    import math

    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length)) if length < 100_000_000 else {}
            return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise AssetError(f"{file} is not a whole safetensors file") from error
