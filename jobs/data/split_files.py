"""Find the file of each split of a job's data. Nothing is read."""

from __future__ import annotations

from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX, get_asset_folder
from lorafleet.jobs.data.data_files import DATA_SUFFIXES
from lorafleet.jobs.data.hub import HubName, get_dataset_folder
from lorafleet.jobs.errors import AssetError, DataError
from lorafleet.jobs.schema.job import DataSpec, JobSpec

SPLIT_VERSION = 3
"""Version of how rows are held back from a split (`splits.py`). It is increased whenever other
rows are. Here, so that trial ids can be computed without numpy.
"""


def get_split_files(data: DataSpec) -> dict[str, Path]:
    """Return the file of each split that the job names.

    Files that the job names take the place of the data set's splits.

    Returns:
        Split -> its file, for those that exist. `train` is always among them.

    Raises:
        AssetError: If the data set is not on this machine.
        DataError: If a named file does not exist, or there is no train split.
    """
    if data.train_file:
        return _get_named_files(data)
    return _find_dataset_splits(data) | _get_named_files(data)


def _get_named_files(data: DataSpec) -> dict[str, Path]:
    named = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    paths = {split: Path(path) for split, path in named.items() if path}
    for split, path in paths.items():
        if not path.is_file():
            raise DataError(f"data.{split}_file is {path}, but {files.describe_non_file(path)}")
    return paths


def get_split_file(split: str, job: JobSpec) -> Path:
    """Return the file that a split's rows were read from.

    A split without a file was held back from the split before it: test rows from the
    validation file, or else from the training file.
    """
    sources = get_split_files(job.data)
    return (
        sources.get(split)
        or (sources.get("validation") if split == "test" else None)
        or sources["train"]
    )


def _find_dataset_splits(data: DataSpec) -> dict[str, Path]:
    name = str(data.dataset_name)
    if Path(name).is_absolute():
        return _find_folder_splits(Path(name))
    hub = get_dataset_folder(name, data.dataset_revision, data.dataset_config_name)
    folder = get_asset_folder(name) if name.startswith(PREFIX) else hub
    if not folder.is_dir():
        raise AssetError(
            f"data.dataset_name is {HubName(name, data.dataset_revision)}, which is not on this "
            "machine: run `lorafleet fetch JOB.yaml` where the hub can be reached, or name files "
            "in data.train_file"
        )
    paths = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    paths = {split: path for split, path in paths.items() if path.is_file()}
    if "train" not in paths:
        raise DataError(f"data.dataset_name is {name}, but it has no split named train")
    return paths


def _find_folder_splits(folder: Path) -> dict[str, Path]:
    """Return the files `train`, `validation` and `test` of a user's folder.

    They may have any format that can be read. Other files of the folder are ignored.

    Raises:
        DataError: If there is no train file, or a split has two files: it would not be
            clear which one counts.
    """
    if not folder.is_dir():
        raise DataError(f"data.dataset_name is {folder}, but that folder does not exist")
    paths: dict[str, Path] = {}
    for split in ("train", "validation", "test"):
        for path in (folder / f"{split}{suffix}" for suffix in DATA_SUFFIXES):
            if path.is_file() and split in paths:
                raise DataError(
                    f"data.dataset_name is {folder}, which has both {paths[split].name} and "
                    f"{path.name}: keep one"
                )
            if path.is_file():
                paths[split] = path
    if "train" not in paths:
        raise DataError(
            f"data.dataset_name is {folder}, but that folder has no train file (train.jsonl, "
            "train.csv, ...): name the file in data.train_file"
        )
    return paths
