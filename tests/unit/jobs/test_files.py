"""Files that are none: pipes, devices, endless and folded ones, wherever a job or a site can name a
file.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from tests.conftest import lorafleet_here, write_rows

SITE = "kind: slurm\nname: s\ncpus_per_node: 4\nmemory_gb_per_node: 8\n"
JOB = """
name: x
task: generation
model: {model_name_or_path: MODEL}
data: {train_file: TRAIN, validation_file: VALIDATION}
"""
NAMED = {
    "the job file": ("PATH", []),
    "data.train_file": (JOB, ["data.train_file=PATH.jsonl"]),
    "data.validation_file": (JOB, ["data.validation_file=PATH.csv"]),
    "data.test_file": (JOB, ["data.test_file=PATH.parquet"]),
    "data.chat_template": (JOB, ["data.chat_template=PATH.jinja"]),
    "resources.deepspeed_config": (
        JOB,
        ["resources.deepspeed_config=PATH", "resources.strategy=zero2"],
    ),
    "model.model_name_or_path": (JOB, ["model.model_name_or_path=FOLDER"]),
    "train.init_adapter": (JOB, ["train.init_adapter=FOLDER"]),
    "evaluate.custom_metrics": (JOB, ['evaluate.custom_metrics={"m": {"function": "PATH.py:m"}}']),
}


def make(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:  # far larger than it is on disk
        with path.open("wb") as file:
            file.truncate(2**41)


@pytest.mark.parametrize("kind", ["pipe", "device", "terminal", "folder", "loop", "huge"])
@pytest.mark.parametrize("field", NAMED)
def test_no_file_of_a_job_is_waited_for(kind: str, field: str, tmp_path: Path) -> None:
    if kind == "huge" and field.startswith("data.") and field != "data.chat_template":
        pytest.skip(
            "rows may be as large as they are: a file of two terabytes is read as long as there is "
            "memory"
        )
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 4)
    text, overrides = NAMED[field]
    folder = tmp_path / "folder"
    folder.mkdir()
    path = tmp_path / "strange"
    for ending in (".jsonl", ".csv", ".parquet", ".jinja", ".py", ""):
        make(kind, path.with_name(f"strange{ending}"))
    for name in (
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    ):
        make(kind, folder / name)
    job = path
    if text != "PATH":
        job = tmp_path / "job.yaml"
        told = text.replace("MODEL", "asset:smollm2-135m-instruct").replace("TRAIN", str(rows))
        job.write_text(told.replace("VALIDATION", str(rows)))
    words = [word.replace("PATH", str(path)).replace("FOLDER", str(folder)) for word in overrides]
    for command in (["validate"], ["plan"]):
        began = time.monotonic()
        done = lorafleet_here(*command, job, *words, cwd=tmp_path)
        assert time.monotonic() - began < 5
        assert done.returncode == 2, (command, done.stderr)
        assert "Traceback" not in done.stderr
        assert "bug in lorafleet" not in done.stderr
        assert len(done.stderr.splitlines()) <= 3
        assert all(len(line) < 1200 for line in done.stderr.splitlines())


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "loop"])
@pytest.mark.parametrize("field", ["the site file", "extends", "template"])
def test_no_file_of_a_site_is_waited_for(kind: str, field: str, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    make(kind, strange)
    site = tmp_path / "site.yaml"
    site.write_text(
        SITE
        + {"extends": f"extends: {strange}\n", "template": f"template: {strange}\n"}.get(field, "")
    )
    if field == "the site file":
        make(kind, site)
    began = time.monotonic()
    done = lorafleet_here("doctor", "--on", site, cwd=tmp_path)
    assert time.monotonic() - began < 5
    assert done.returncode == 2, done.stderr
    assert "bug in lorafleet" not in done.stderr


@pytest.mark.parametrize("ending", [".jsonl.gz", ".csv.zst", ".json.gz"])
def test_a_file_that_unpacks_without_end(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow

    from lorafleet.jobs.data import data_files
    from lorafleet.jobs.data.data_files import read_records
    from lorafleet.jobs.errors import DataError

    monkeypatch.setattr(data_files, "_MIN_UNPACKED_LIMIT", 1_000_000)
    text = b"\n" * 50_000_000
    path = tmp_path / f"bomb{ending}"
    path.write_bytes(
        gzip.compress(text)
        if ending.endswith("gz")
        else pyarrow.compress(text, "zstd", asbytes=True)
    )
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        list(read_records(path))
    usual = tmp_path / "usual.jsonl.gz"
    usual.write_bytes(
        gzip.compress(b"".join(json.dumps({"a": n}).encode() + b"\n" for n in range(1000)))
    )
    assert len(list(read_records(usual))) == 1000
