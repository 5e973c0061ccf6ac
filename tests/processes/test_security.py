"""A run beside other users: what they can reach of its Ray, and where secrets of its environment appear."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.errors import ExitCode
from jobs.orphans import clear_orphans
from tests.conftest import JobMaker
from tests.processes.conftest import begin, interrupt, newest, wait_for

NOBODY = 65534
LONG = {"train__max_steps": 20_000}


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
            found += [one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
def test_another_user_cannot_join_the_ray_of_a_run(bert_job: JobMaker, place: Path, tmp_path: Path) -> None:
    """As another uid, with the address that `ps` shows: no token, no answer. From other machines: nothing listens."""
    home = tmp_path / "home"
    home.mkdir()
    process = begin(bert_job(**LONG), place, command="train", HOME=str(home), HF_HOME=str(home / "hf"))
    try:
        scratch = wait_for(lambda: scratch_of(process))
        wait_for(lambda: newest(place).trials() and newest(place).trials()[0].progress())
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
        assert stat.S_IMODE((scratch / "token").stat().st_mode) == 0o600
        assert not list(home.glob(".ray/*"))
        family = psutil.Process(process.pid).children(recursive=True)
        addresses = listening(family)
        assert addresses
        assert {ip.removeprefix("::ffff:") for ip in addresses} == {"127.0.0.1"}
        gcs = next(one for one in family if "gcs_server" in one.name())
        ports = [one.laddr.port for one in gcs.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        assert as_nobody(lambda: (scratch / "token").read_text()) == "PermissionError"
        for port in ports:
            assert as_nobody(lambda port=port: nodes_at(f"127.0.0.1:{port}")) == "AuthenticationError"
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((own_address(), port), timeout=5)
    finally:
        interrupt(process)
        process.communicate(timeout=120)
    assert not scratch.exists()


def nodes_at(address: str) -> int:
    """Ask a Ray what nodes it has, as a driver does that joins it."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return len(GcsClient(address=address).get_all_node_info())


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(("192.0.2.1", 9))
        return str(asked.getsockname()[0])


def as_nobody(ask: Any) -> str:
    """The name of the exception that a call ends with as another user, or what it returns."""
    import ray  # noqa: F401 - another user may not read where it is installed

    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.environ["HOME"] = "/nonexistent"
        try:
            said = repr(ask())
        except BaseException as error:
            said = type(error).__name__
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as answer:
        return answer.read()


SECRETS = {
    name: f"planted-{number}-{'x7Qp' * 6}"
    for number, name in enumerate(
        "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_SECURITY_TOKEN HF_TOKEN HUGGING_FACE_HUB_TOKEN "
        "WANDB_API_KEY OPENAI_API_KEY ANTHROPIC_API_KEY GITHUB_TOKEN GITLAB_TOKEN AZURE_CLIENT_SECRET "
        "AZURE_STORAGE_KEY GOOGLE_APPLICATION_CREDENTIALS GCP_API_KEY DATABASE_PASSWORD PGPASSWORD MYSQL_PWD "
        "SLACK_BOT_TOKEN KAGGLE_KEY DOCKER_PASSWORD NPM_TOKEN PIP_INDEX_PASSWORD SSH_PASSPHRASE JWT_SECRET "
        "RAY_AUTH_TOKEN LORAFLEET_API_KEY MLFLOW_TRACKING_TOKEN COMET_API_KEY NEPTUNE_API_TOKEN".split()
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
            self._search(" ".join(process.info["cmdline"] or []).encode(), f"command of {process.pid}")
        for folder in self.folders:
            for path in folder.rglob("*"):
                with contextlib.suppress(OSError):
                    if path.is_file() and not path.is_symlink() and path.stat().st_size < 20_000_000:
                        self._search(path.read_bytes(), str(path))

    def _search(self, data: bytes, where: str) -> None:
        if b"planted-" in data:
            self.found |= {(name, where) for name, value in SECRETS.items() if value.encode() in data}


@pytest.mark.parametrize("workers", [1, 2])
def test_no_secret_of_the_environment_is_written(bert_job: JobMaker, place: Path, tmp_path: Path, workers: int) -> None:
    """Neither into a file (the run's, W&B's, Ray's, temporary ones) nor onto a command line, of any process."""
    temporary = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    home = tmp_path / "home"
    home.mkdir()
    loaded = bert_job(
        train__max_steps=24, tracking__mode="offline", resources__num_workers=workers, resources__device="cpu"
    )
    with Watcher([place, temporary, home]) as watcher:
        process = begin(loaded, place, command="train", HOME=str(home), TMPDIR=str(temporary), **SECRETS)
        said, _ = process.communicate(timeout=400)
    assert process.returncode == ExitCode.OK, said
    assert watcher.found == set()
    assert not any(value in said for value in SECRETS.values())
    assert (newest(place).path / "wandb").is_dir()
    clear_orphans(temporary)
    assert not list(temporary.glob("lf-*"))


def test_what_a_killed_run_left_goes_with_the_next_command(bert_job: JobMaker, place: Path) -> None:
    """Its private folder, its token, and the processes that lived from it."""
    from tests.conftest import lorafleet

    process = begin(bert_job(**LONG), place, command="train")
    scratch = wait_for(lambda: scratch_of(process))
    wait_for(lambda: newest(place).trials() and newest(place).trials()[0].progress())
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


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_ray_that_dies_is_a_sentence(bert_job: JobMaker, place: Path, victim: str) -> None:
    """The run says what goes on with it, and `resume` finishes it."""
    from tests.conftest import lorafleet

    process = begin(bert_job(train__max_steps=3000), place, command="train")
    wait_for(lambda: scratch_of(process))
    wait_for(lambda: newest(place).trials() and newest(place).trials()[0].progress())
    family = psutil.Process(process.pid).children(recursive=True)
    next(one for one in family if victim in one.name()).kill()
    said, _ = process.communicate(timeout=240)
    assert "`lorafleet resume" in said, said
    assert "Traceback" not in said
    assert process.returncode != ExitCode.OK
    assert not newest(place).alive()
    done = lorafleet("resume", newest(place).path, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
