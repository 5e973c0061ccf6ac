"""Serialise a run for clusters that cannot read the submitter's disk.

`pack` runs on the client, `unpack` on the cluster.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run, RunState

DOCUMENT = "run.json"
"""File of a bundle that describes the others."""
TEXTS = ("job.yaml", "resolved.json", "plan.json")
SUBMISSION = "submission.json"
"""File of a run on a cluster's storage that holds the number of its latest submission."""


def pack(
    name: str, texts: dict[str, str], submission: int = 1, ray: str | None = None
) -> dict[str, str]:
    """Return the bundle of a run: file name -> text.

    It holds the files with which a run begins, and a document with the job's name, lorafleet's
    version and the number of the submission.

    Args:
        name: The job's name.
        texts: File name -> text; at least those of TEXTS.
        submission: How often the run was submitted.
        ray: Version of Ray that the cluster must have; None if any will do.
    """
    metadata = {
        "schema_version": 1,
        "lorafleet": _get_version("lorafleet"),
        "name": name,
        "submission": submission,
    }
    metadata |= {"ray": ray} if ray else {}
    return {DOCUMENT: json.dumps(metadata) + "\n"} | {file: texts[file] for file in TEXTS}


def unpack(folder: Path, document: Path) -> Run:
    """Return the run in a folder, and create it from a bundle if it does not exist yet.

    The folder is created completely or not at all.

    Args:
        folder: The run's folder.
        document: The bundle's document; its other files are beside it.

    Raises:
        RunError: If the file is not such a document, or was written by another version of
            lorafleet.
    """
    metadata = files.read_json(document)
    if not {"lorafleet", "name"} <= set(metadata):
        raise RunError(f"{document} is not a packed run")
    for package in ("lorafleet", "ray"):
        installed = _get_version(package)
        if metadata.get(package, installed) != installed:
            raise RunError(
                f"the job was submitted by {package} {metadata[package]}, but this image has "
                f"{installed}: use an image with the same version as the submitting machine"
            )
    run = Run(folder)
    if (folder / "plan.json").is_file():
        if metadata.get("submission", 1) > files.read_json(folder / SUBMISSION).get("number", 1):
            (folder / "stop").unlink(
                missing_ok=True
            )  # the user has resumed the run since it was stopped
            files.write_json(folder / SUBMISSION, {"number": metadata["submission"]})
        return run
    # Several attempts may start at once. Each fills a folder of its own, and the first rename wins.
    scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(mode=0o700)
    try:
        for name in TEXTS:
            files.write_text(scratch / name, (document.parent / name).read_text())
        new_run = Run(scratch)
        new_run.set_state(RunState.PENDING, created=time.time(), name=metadata["name"])
        new_run.create_reserve()
        (scratch / "logs").mkdir()
        scratch.rename(folder)
    except OSError:
        if not (folder / "plan.json").is_file():  # otherwise another attempt has created it first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return run


def _get_version(package: str) -> str:
    """Return the installed version of a package."""
    # Imported here, because it takes a while and most commands do not need it.
    from importlib.metadata import version

    return version(package)
