"""The schema of RayJob that KubeRay 1.7.0 installs (Apache-2.0), as test data."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

from lorafleet.jobs import files
from tests.conftest import ROOT

_NAME = "rayjobs-v1.7.0.json"


def unpack_crd() -> Path:
    """Path of the file; another one if the environment names it."""
    chosen = os.environ.get("LORAFLEET_RAYJOB_CRD")
    if chosen:
        return Path(chosen)
    path = ROOT / "build" / _NAME
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        packed = Path(__file__).with_name(f"{_NAME}.gz").read_bytes()
        files.write_text(path, gzip.decompress(packed).decode())
    return path


CRD = unpack_crd()
