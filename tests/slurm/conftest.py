"""One rig for all tests of Slurm."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.rig import Rig, missing


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """Two nodes. Where a rig cannot be, its tests are skipped with the reason."""
    why = missing()
    if why:
        pytest.skip(why)
    made = Rig(Path(tempfile.mkdtemp(prefix="rig-", dir="/tmp")))
    try:
        made.up()
        yield made
    finally:
        made.down()
        shutil.rmtree(made.folder, ignore_errors=True)
