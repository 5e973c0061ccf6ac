"""A run as a few texts, for places that do not see the folder of the one who submits: packed there, unpacked here."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run, RunState

DOCUMENT = "run.json"
"""Which of the texts says what the others are."""
TEXTS = ("job.yaml", "resolved.json", "plan.json")
SUBMISSION = "submission.json"
"""File of a run on a storage with the number of its newest submission."""


def pack(name: str, texts: dict[str, str], submission: int = 1, ray: str | None = None) -> dict[str, str]:
    """The texts of a run by file: those that it begins with, and one with the job's name, lorafleet's version, Ray's
    where that must be a certain one, and how often the run was submitted."""
    own = {"schema_version": 1, "lorafleet": version("lorafleet"), "name": name, "submission": submission}
    own |= {"ray": ray} if ray else {}
    return {DOCUMENT: json.dumps(own) + "\n"} | {file: texts[file] for file in TEXTS}


def unpack(folder: Path, document: Path) -> Run:
    """The run in a folder, which is made from the texts beside the document where it is not there yet: whole, or not
    at all.

    Raises RunError when the document was written by another version of lorafleet, or is none.
    """
    told = files.read_json(document)
    if not {"lorafleet", "name"} <= set(told):
        raise RunError(f"{document} is not the document of a run")
    for package in ("lorafleet", "ray"):
        here = version(package)
        if told.get(package, here) != here:
            raise RunError(
                f"the job was submitted by {package} {told[package]}, and this is {here}: the image must have the "
                "version of the one who submits"
            )
    run = Run(folder)
    if (folder / "plan.json").is_file():
        if told.get("submission", 1) > files.read_json(folder / SUBMISSION).get("number", 1):
            (folder / "stop").unlink(missing_ok=True)  # its user has resumed it since
            files.write_json(folder / SUBMISSION, {"number": told["submission"]})
        return run
    scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(mode=0o700)
    try:
        for name in TEXTS:
            files.write_text(scratch / name, (document.parent / name).read_text())
        made = Run(scratch)
        made.set_state(RunState.PENDING, created=time.time(), name=told["name"])
        made.keep_reserve()
        (scratch / "logs").mkdir()
        scratch.rename(folder)
    except OSError:
        if not (folder / "plan.json").is_file():  # another attempt was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return run
