"""A run beside other users: what they can reach of its Ray, and where secrets of its environment
appear.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.stale_folders import remove_orphans
from tests.conftest import JobMaker, read_step
from tests.processes.conftest import PAIR, begin, interrupt, newest, wait_for

NOBODY = 65534


def scratch_of(process: Any) -> Path | None:
    """The private folder of the Ray that a command's driver has started."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            found = re.search(r"(/\S*?/lf-[A-Za-z0-9_]+)/ray", " ".join(child.cmdline()))
            if found and "raylet" in child.name():
                return Path(found[1])
    return None


def listening(processes: list[psutil.Process]) -> list[str]:
    """The addresses on which they listen."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [
                one.laddr.ip
                for one in process.net_connections("tcp")
                if one.status == psutil.CONN_LISTEN
            ]
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
def test_another_user_cannot_join_the_ray_of_a_run(
    bert_job: JobMaker, place: Path, tmp_path: Path
) -> None:
    """As another uid, with the address that `ps` shows: no token, no answer.

    From other machines: nothing listens.
    """
    home = tmp_path / "home"
    home.mkdir()
    process = begin(bert_job(PAIR), place, HOME=str(home), HF_HOME=str(home / "hf"))
    try:
        scratch = wait_for(lambda: scratch_of(process))
        wait_for(lambda: newest(place).list_trials() and read_step(newest(place).list_trials()[0]))
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
        assert stat.S_IMODE((scratch / "token").stat().st_mode) == 0o600
        assert not list(home.glob(".ray/*"))
        family = psutil.Process(process.pid).children(recursive=True)
        addresses = listening(family)
        assert addresses
        assert {ip.removeprefix("::ffff:") for ip in addresses} == {"127.0.0.1"}
        gcs = next(one for one in family if "gcs_server" in one.name())
        ports = [
            one.laddr.port for one in gcs.net_connections("tcp") if one.status == psutil.CONN_LISTEN
        ]
        assert as_nobody("read", str(scratch / "token")) == "PermissionError"
        for port in ports:
            assert as_nobody("join", f"127.0.0.1:{port}") == "AuthenticationError"
            for address in own_addresses():
                with pytest.raises(OSError, match="refused"):
                    socket.create_connection((address, port), timeout=5)
    finally:
        interrupt(process)
        process.communicate(timeout=120)
    assert not scratch.exists()


def own_addresses() -> list[str]:
    """Those under which other machines reach this one."""
    every = [
        one.address
        for many in psutil.net_if_addrs().values()
        for one in many
        if one.family == socket.AF_INET
    ]
    return [address for address in every if not address.startswith("127.")]


AS_NOBODY = f"""
import os, sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError  # before: another user may not read where it is installed

os.setgid({NOBODY})
os.setuid({NOBODY})
kind, target = sys.argv[1:]
try:
    if kind == "read":
        print(open(target).read())
    else:
        print(len(GcsClient(address=target).get_all_node_info()))
except (PermissionError, AuthenticationError) as error:
    print(type(error).__name__)
"""
"""Reads a file, or asks a Ray for its nodes as a driver does that joins it; prints the answer or
the error's name.
"""


def as_nobody(kind: str, target: str) -> str:
    """What another user of the machine gets, in a process of its own: one that has used Ray cannot
    be forked.
    """
    home = {"HOME": "/nonexistent", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, kind, target],
        capture_output=True,
        text=True,
        timeout=120,
        env=home,
        cwd="/",
    )
    if "os.setgid" in done.stderr or "os.setuid" in done.stderr:
        pytest.skip(f"this root cannot become another user: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SECRETS = {
    name: f"planted-{number}-{'x7Qp' * 6}"
    for number, name in enumerate(
        "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_SECURITY_TOKEN HF_TOKEN "
        "HUGGING_FACE_HUB_TOKEN WANDB_API_KEY OPENAI_API_KEY ANTHROPIC_API_KEY GITHUB_TOKEN "
        "GITLAB_TOKEN AZURE_CLIENT_SECRET AZURE_STORAGE_KEY GOOGLE_APPLICATION_CREDENTIALS "
        "GCP_API_KEY DATABASE_PASSWORD PGPASSWORD MYSQL_PWD SLACK_BOT_TOKEN KAGGLE_KEY "
        "DOCKER_PASSWORD NPM_TOKEN PIP_INDEX_PASSWORD SSH_PASSPHRASE JWT_SECRET RAY_AUTH_TOKEN "
        "LORAFLEET_API_KEY MLFLOW_TRACKING_TOKEN COMET_API_KEY NEPTUNE_API_TOKEN".split()
    )
}


class Watcher:
    """Looks for texts in command lines and files, while something runs and after it."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders, self.found, self.ended = folders, set[tuple[str, str]](), threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.look()

    def _watch(self) -> None:
        while not self.ended.wait(0.5):
            self.look()

    def look(self) -> None:
        """Every process's command line, and every file below the folders."""
        for process in psutil.process_iter(["cmdline"]):
            self._search(
                " ".join(process.info["cmdline"] or []).encode(), f"command of {process.pid}"
            )
        for folder in self.folders:
            for path in folder.rglob("*"):
                with contextlib.suppress(OSError):
                    if (
                        path.is_file()
                        and not path.is_symlink()
                        and path.stat().st_size < 20_000_000
                    ):
                        self._search(path.read_bytes(), str(path))

    def _search(self, data: bytes, where: str) -> None:
        if b"planted-" in data:
            self.found |= {
                (name, where) for name, value in SECRETS.items() if value.encode() in data
            }


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_no_secret_of_the_environment_is_written(
    bert_job: JobMaker, place: Path, tmp_path: Path, workers: int
) -> None:
    """Neither into a file (the run's, W&B's, Ray's, temporary ones) nor onto a command line, of any
    process.
    """
    temporary = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    home = tmp_path / "home"
    home.mkdir()
    loaded = bert_job(
        train__max_steps=24,
        tracking__mode="offline",
        resources__num_workers=workers,
        resources__device="cpu",
    )
    with Watcher([place, temporary, home]) as watcher:
        process = begin(
            loaded, place, command="train", HOME=str(home), TMPDIR=str(temporary), **SECRETS
        )
        said, _ = process.communicate(timeout=400)
    assert process.returncode == ExitCode.OK, said
    assert watcher.found == set()
    assert not any(value in said for value in SECRETS.values())
    assert (newest(place).path / "wandb").is_dir()
    remove_orphans(temporary)
    assert not list(temporary.glob("lf-*"))


def test_what_a_killed_run_left_goes_with_the_next_command(bert_job: JobMaker, place: Path) -> None:
    """Its private folder, its token, and the processes that lived from it."""
    from tests.conftest import lorafleet

    process = begin(bert_job(PAIR), place)
    scratch = wait_for(lambda: scratch_of(process))
    wait_for(lambda: newest(place).list_trials() and read_step(newest(place).list_trials()[0]))
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    drivers = [one for one in family if "exec" in one.cmdline()]
    for one in (psutil.Process(process.pid), *drivers):
        one.kill()
    process.communicate(timeout=60)
    assert scratch.exists()
    lorafleet("list", cwd=place)
    assert not scratch.exists()
    _, left = psutil.wait_procs(family, timeout=20)
    assert [one.cmdline() for one in left] == []


@pytest.mark.long
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_ray_that_dies_is_a_sentence(bert_job: JobMaker, place: Path, victim: str) -> None:
    """The run says what goes on with it, and `resume` finishes it."""
    from tests.conftest import lorafleet

    process = begin(bert_job(PAIR.replace("160000", "24000")), place)
    wait_for(lambda: scratch_of(process))
    wait_for(lambda: newest(place).list_trials() and read_step(newest(place).list_trials()[0]))
    family = psutil.Process(process.pid).children(recursive=True)
    next(one for one in family if victim in one.name()).kill()
    said, _ = process.communicate(timeout=240)
    assert "`lorafleet resume" in said, said
    assert "Traceback" not in said
    assert process.returncode != ExitCode.OK
    assert not newest(place).is_alive()
    done = lorafleet("resume", newest(place).path, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
