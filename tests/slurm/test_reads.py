"""Count how often a command reads the user's files before it submits a job."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.conftest import JobMaker
from tests.slurm.conftest import Login
from tests.slurm.test_launch import SEARCH

COUNT_OPENS = """
import os, sys
log, *words = sys.argv[1:]
def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(args[0])
        if path in os.environ["COUNTED"].split(":"):
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(handle, path.encode() + b"\\n")
            os.close(handle)
sys.addaudithook(note)
from lorafleet.commands.cli import main
sys.argv = ["lorafleet", *words]
main()
"""


def test_a_sweep_opens_each_data_file_three_times(
    login: Login, bert_job: JobMaker, tmp_path: Path
) -> None:
    """Once to hash it, once to recognise its format, once for its rows."""
    loaded = bert_job(SEARCH)
    data = loaded.job.data
    paths = [str(path) for path in (data.train_file, data.validation_file, data.test_file)]
    job, log = login.home / "job.yaml", tmp_path / "opened"
    job.write_text(loaded.text)
    words = ["sweep", str(job), *loaded.overrides, "--on", "rig", "--detach"]
    done = subprocess.run(
        [sys.executable, "-c", COUNT_OPENS, str(log), *words],
        cwd=login.home,
        env=login.environment | {"COUNTED": ":".join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    login.lorafleet("stop", done.stdout.strip())
    opened = Counter(log.read_text().split())
    assert set(opened) == set(paths)
    assert max(opened.values()) <= 3, opened
