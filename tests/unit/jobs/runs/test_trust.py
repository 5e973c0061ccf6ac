"""A run folder is this user's own, or it is only read: tried as what a stranger may hand over."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.cluster.backends import get_backend
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.processes import get_machine_id, get_process_start
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.stale_folders import remove_orphans
from lorafleet.jobs.runs.trust import find_distrust_reason, record_own_run, remove_run_record
from lorafleet.jobs.user import get_state_folder, load_user_config
from tests.conftest import lorafleet_here
from tests.unit.evaluation.report.test_search import finished  # noqa: F401 - a fixture

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def own(tmp_path: Path) -> Run:
    """A run that this user has made."""
    run = Run.create(tmp_path / "runs", "x")
    files.write_json(run.path / "plan.json", {"job": {}})
    return run


def test_what_was_made_here_is_the_users_own(own: Run) -> None:
    assert find_distrust_reason(own.path) is None
    assert find_distrust_reason(own.path / "arms" / "a") is None
    assert find_distrust_reason(own.path / "parts" / "0") is None
    assert stat.S_IMODE(own.path.stat().st_mode) == 0o700
    own.path.rename(own.path.with_name("moved-x"))
    assert (
        find_distrust_reason(own.path.with_name("moved-x")) is not None
    )  # another name is another run
    own.path.with_name("moved-x").rename(own.path)
    (own.path.parent / "other").mkdir()
    moved = own.path.rename(own.path.parent / "other" / own.path.name)
    assert find_distrust_reason(moved) is None


def test_a_copy_is_not(own: Run) -> None:
    copy = own.path.parent.parent / "else" / own.path.name
    shutil.copytree(own.path, copy)
    assert "was not created by your lorafleet" in str(find_distrust_reason(copy))
    record_own_run(copy)
    assert find_distrust_reason(copy) is None
    remove_run_record(copy)
    assert find_distrust_reason(copy) is not None


@as_root
def test_another_users_folder_is_not(own: Run) -> None:
    os.chown(own.path, NOBODY, -1)
    assert f"{own.path} belongs to user nobody" in str(find_distrust_reason(own.path))


@pytest.mark.parametrize(
    ("mode", "words"),
    [(0o770, "can be written by group"), (0o707, "by every user"), (0o1777, "by every user")],
)
def test_what_others_can_write_is_not(own: Run, mode: int, words: str) -> None:
    if os.geteuid() == 0:
        os.chown(own.path, -1, NOBODY)
    own.path.chmod(mode)
    if os.geteuid() == 0 or words == "by every user":
        assert words in str(find_distrust_reason(own.path))


def test_a_file_inside_that_others_can_write(own: Run) -> None:
    own.path.chmod(0o755)
    assert find_distrust_reason(own.path) is None
    (own.path / "plan.json").chmod(0o666)
    assert "plan.json can be written by every user" in str(find_distrust_reason(own.path))
    own.path.chmod(0o700)  # where nobody else comes to
    assert find_distrust_reason(own.path) is None


def test_a_folder_above_that_others_can_write(own: Run) -> None:
    own.path.parent.chmod(0o777)
    assert f"{own.path.parent} can be written by every user" in str(find_distrust_reason(own.path))
    own.path.parent.chmod(0o1777)  # as /tmp
    assert find_distrust_reason(own.path) is None
    link = own.path.parent.parent / "open" / "link"
    link.parent.mkdir()
    link.symlink_to(own.path.parent)
    link.parent.chmod(0o777)
    assert "open can be written by every user" in str(find_distrust_reason(link / own.path.name))


@pytest.mark.parametrize("tag", [0x02, 0x08])
def test_an_access_list_counts(own: Run, tag: int) -> None:
    """Entries of another user and of another group, below a mask that lets them write or does not."""

    def acl(mask: int) -> bytes:
        entries = [(0x01, 7, 0xFFFFFFFF), (tag, 7, NOBODY), (0x04, 0, 0xFFFFFFFF), (0x10, mask, 0xFFFFFFFF),
                   (0x20, 0, 0xFFFFFFFF)]  # fmt: skip
        return struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", *entry) for entry in sorted(entries)
        )

    try:
        os.setxattr(own.path, "system.posix_acl_access", acl(7))
    except OSError as error:
        pytest.skip(f"no access lists on this file system: {error.strerror}")
    assert f"can be written by {'user' if tag == 2 else 'group'} no" in str(
        find_distrust_reason(own.path)
    )
    os.setxattr(own.path, "system.posix_acl_access", acl(5))
    assert find_distrust_reason(own.path) is None


def test_notes_that_others_can_write_prove_nothing(own: Run) -> None:
    get_state_folder().chmod(0o777)
    assert "can be written by every user" in str(find_distrust_reason(own.path))


def test_a_group_that_the_user_trusts(own: Run, tmp_path: Path) -> None:
    own.path.parent.chmod(0o777)
    config = tmp_path / "config" / "lorafleet" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"trusted_folders: [{own.path.parent}]\n")
    assert find_distrust_reason(own.path) is None
    config.write_text("trusted_folders: /x\nshar: group\n")
    with pytest.raises(RunError.__mro__[1], match="share"):
        load_user_config()


def test_a_group_may_read_where_the_site_says_so(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs", "x", share="group")
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o750
    assert stat.S_IMODE(Run.create(tmp_path / "runs", "x").path.stat().st_mode) == 0o700


def test_a_group_may_read_where_the_user_says_so(tmp_path: Path) -> None:
    config = tmp_path / "config" / "lorafleet" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("share: group\n")
    run = Run.create(tmp_path / "runs", "x")
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o750
    assert find_distrust_reason(run.path) is None


# --- a stranger's run


@pytest.fixture
def strangers(finished: Run, tmp_path: Path) -> Run:  # noqa: F811
    """A run that was handed over as an archive, with all that it can name."""
    marker = tmp_path / "it-ran"
    metric = tmp_path / "metric.py"
    metric.write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef m(p, r): return 1.0\n"
    )
    folder = tmp_path / "from-elsewhere" / finished.path.name
    shutil.copytree(finished.path, folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan["job"]["environment"] = {"TZ": "UTC"}
    plan["job"]["evaluate"]["custom_metrics"] = {
        "m": {"function": f"{metric}:m", "goal": "maximize"}
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return Run(folder)


@pytest.mark.parametrize(
    "words",
    [
        ["sync"],
        ["resume"],
        ["stop"],
        ["pull"],
        ["evaluate"],
        ["export"],
        ["benchmark"],
        ["rate"],
        ["exec"],
    ],
)
def test_nothing_of_a_strangers_run_is_run(
    strangers: Run, tmp_path: Path, words: list[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in strangers.path.rglob("*")}
    done = lorafleet_here(*words, strangers.path, cwd=tmp_path)
    assert done.returncode == 2
    for said in (
        "was not created by your lorafleet",
        "custom metric m (",
        "environment TZ",
        "--trust",
        "security.md",
    ):
        assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "it-ran").exists()
    assert {path: path.stat().st_mtime_ns for path in strangers.path.rglob("*")} == before


@pytest.mark.parametrize("words", [["status"], ["logs"], ["list"], ["report"]])
def test_a_strangers_run_is_read(strangers: Run, tmp_path: Path, words: list[str]) -> None:
    """Without a word to the cluster that it names, and without a byte written."""
    with listening() as (port, heard):
        site = {
            "name": "evil",
            "kind": "ray",
            "address": f"http://127.0.0.1:{port}",
            "storage": "/data",
        }
        files.write_json(
            strangers.path / "site.json",
            {"kind": "ray", "site": site, "submission": 1, "handed_over": True},
        )
        files.write_json(
            strangers.path / "status.json",
            strangers.read_status().to_dict() | {"state": "running", "pid": 1},
        )
        before = {path: path.stat().st_mtime_ns for path in strangers.path.rglob("*")}
        name = [] if words == ["list"] else [strangers.path]
        done = lorafleet_here(*words, *name, "--runs", strangers.path.parent, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not heard
        assert {path: path.stat().st_mtime_ns for path in strangers.path.rglob("*")} == before


class listening:
    """A port, and whether anybody came."""

    def __enter__(self) -> tuple[int, list[object]]:
        self.socket, self.heard = socket.create_server(("127.0.0.1", 0)), list[object]()
        threading.Thread(target=self._accept, daemon=True).start()
        return self.socket.getsockname()[1], self.heard

    def _accept(self) -> None:
        while True:
            try:
                self.heard.append(self.socket.accept())
            except OSError:
                return

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user's, with a word on its command line as Ray's have."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_no_process_that_a_run_names_is_touched(
    strangers: Run, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    running = {
        "state": "running",
        "pid": sleeper.pid,
        "pid_started": get_process_start(sleeper.pid),
        "host": os.uname().nodename,
    }
    files.write_json(strangers.path / "status.json", strangers.read_status().to_dict() | running)
    assert lorafleet_here("stop", strangers.path, cwd=tmp_path).returncode == 2
    time.sleep(0.2)
    assert sleeper.poll() is None


@pytest.mark.parametrize("trust", [False, True])
def test_no_folder_that_a_run_names_is_deleted(
    strangers: Run,
    sleeper: subprocess.Popen[bytes],
    tmp_path: Path,
    trust: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `--trust` as well: what a killed driver has left is known otherwise."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").touch()
    files.write_json(
        strangers.path / "logs" / "ray.json",
        {"own": True, "scratch": str(victim), "session_dir": "/x/session_60", "attempt": 1},
    )
    files.write_json(
        strangers.path / "status.json", strangers.read_status().to_dict() | {"state": "stopped"}
    )
    monkeypatch.setattr("lorafleet.cluster.local.LocalBackend.start", lambda *_: None)
    backend = get_backend(strangers, trust=trust)
    if trust:
        backend.resume(strangers)
    else:
        with pytest.raises(RunError, match="use --trust to continue"):
            backend.resume(strangers)
    assert (victim / "thesis.tex").exists()
    assert sleeper.poll() is None


# --- what killed commands left


def left_behind(parent: Path, name: str = "lf-abcdefgh", **owner: object) -> Path:
    folder = parent / name
    (folder / "ray" / "session_1").mkdir(parents=True)
    facts = {"machine": get_machine_id(), "pid": 2**22 + 1, "started": 1} | owner
    (folder / "owner.json").write_text(json.dumps(facts))
    return folder


def test_what_a_killed_driver_left_goes(tmp_path: Path) -> None:
    """Its folder, and its processes: this user's, with the folder on their command line."""
    dead, alive = (
        left_behind(tmp_path),
        left_behind(
            tmp_path, "lf-stillhere", pid=os.getpid(), started=get_process_start(os.getpid())
        ),
    )
    process = subprocess.Popen(["bash", "-c", "sleep 60; :", f"{dead}/ray/session_1"])
    other = subprocess.Popen(["sleep", "60"])
    try:
        time.sleep(0.3)
        remove_orphans(tmp_path)
        assert (
            get_process_start(process.pid) is None
        )  # psutil has waited for it: it was a child of this process
        assert other.poll() is None
    finally:
        for one in (process, other):
            one.kill()
            one.wait()
    assert not dead.exists()
    assert alive.exists()


def test_only_what_is_surely_ours_goes(tmp_path: Path) -> None:
    elsewhere = tmp_path / "else" / "thesis"
    elsewhere.mkdir(parents=True)
    (elsewhere / "owner.json").write_text(
        json.dumps({"machine": get_machine_id(), "pid": 2**22 + 1, "started": 1})
    )
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    (tmp / "lf-linked01").symlink_to(elsewhere)
    left_behind(tmp, "lf-far-away1", machine=["other", "pid:[1]"])
    left_behind(tmp, "mine-abcdefgh")
    linked = left_behind(tmp, "lf-linkedown")
    (linked / "owner.json").unlink()
    (linked / "owner.json").symlink_to(elsewhere / "owner.json")
    damaged = left_behind(tmp, "lf-damaged01")
    (damaged / "owner.json").write_text("{")
    kept = tmp / "lf-my-music"
    (kept / "ray").mkdir(parents=True)
    (kept / "song.mp3").touch()
    os.utime(kept, (0, 0))
    before = sorted(path.name for path in tmp.iterdir())
    remove_orphans(tmp)
    assert sorted(path.name for path in tmp.iterdir()) == before
    assert (elsewhere / "owner.json").exists()


@as_root
def test_another_users_folder_stays(tmp_path: Path) -> None:
    folder = left_behind(tmp_path)
    os.chown(folder, NOBODY, -1)
    remove_orphans(tmp_path)
    assert folder.exists()
    os.chown(folder, 0, -1)
    os.chown(folder / "owner.json", NOBODY, -1)
    remove_orphans(tmp_path)
    assert folder.exists()


def test_what_ray_made_anew_goes_in_time(tmp_path: Path) -> None:
    for name in ("lf-younger01", "lf-older0001"):
        (tmp_path / name / "ray" / "session_1").mkdir(parents=True)
    os.utime(tmp_path / "lf-older0001", (0, 0))
    remove_orphans(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lf-younger01"]


def test_the_state_of_a_run_that_is_not_ours(strangers: Run) -> None:
    files.write_json(
        strangers.path / "status.json", strangers.read_status().to_dict() | {"state": "running"}
    )
    assert get_backend(strangers).status(strangers).state is RunState.RUNNING


def test_doctor_says_who_can_change_what_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("LORAFLEET_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        "no other user can change caches or runs" in lorafleet_here("doctor", cwd=tmp_path).stdout
    )
    cache.chmod(0o777)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    (tmp_path / ".ray" / "auth_token").chmod(0o644)
    said = json.loads(lorafleet_here("doctor", "--format", "json", cwd=tmp_path).stdout)
    found = {row["what"]: row["verdict"] for row in said["findings"]}
    assert found["access to caches"] == "missing"
    assert found["Ray's old token"] == "note"


NEVER = ["environment.LD_PRELOAD", "evaluate.custom_metrics", "model.trust_remote_code", "model.revision",
         "tracking.mode", "data.train_file", "resources.deepspeed_config"]  # fmt: skip


@pytest.mark.parametrize("path", NEVER)
def test_a_trials_record_does_not_say_what_runs(path: str, finished: Run) -> None:  # noqa: F811
    """It may come from a cluster's storage, and is put into the job by `export` and `evaluate`."""
    from lorafleet.evaluation.report.model_of_run import load_trial_job

    trial = finished.get_trial("aaaa")
    files.write_json(trial.path / "params.json", {"index": 0, "assignment": {path: "/tmp/evil"}})
    with pytest.raises((RunError, ValueError), match="cannot differ between trials"):
        load_trial_job(trial)


def test_what_is_written_in_place_follows_no_link(own: Run, tmp_path: Path) -> None:
    victim = tmp_path / "authorized_keys"
    victim.write_text("key")
    for name in (".reserve", "attempts/1.beat", "attempts/1.end", "logs/driver.log"):
        (own.path / name).parent.mkdir(exist_ok=True)
        (own.path / name).unlink(missing_ok=True)
        (own.path / name).symlink_to(victim)
    from lorafleet.jobs.runs.lease import Lease

    with pytest.raises(RunError, match="remove it"):
        own.create_reserve()
    with pytest.raises(RunError, match="remove it"):
        Lease(own.path, 1).release()
    with pytest.raises(RunError, match="remove it"):
        files.open_to_append(own.path / "logs" / "driver.log")
    assert victim.read_text() == "key"


def test_an_inode_alone_proves_nothing(own: Run) -> None:
    """A folder that was removed gives its inode to the next one, which may be an archive of the
    same name.
    """
    (own.path / ".own").write_text("another")
    assert "was not created by your lorafleet" in str(find_distrust_reason(own.path))


def test_a_trusted_folder_says_nothing_of_its_neighbours(
    own: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.path.parent.chmod(0o777)
    neighbour = tmp_path / "runs" / "team"
    neighbour.mkdir()
    monkeypatch.setenv("LORAFLEET_TRUSTED_FOLDERS", str(neighbour))
    assert "can be written by every user" in str(find_distrust_reason(own.path))
    link = tmp_path / "link"
    link.symlink_to(own.path.parent)
    monkeypatch.setenv("LORAFLEET_TRUSTED_FOLDERS", str(link))
    assert find_distrust_reason(own.path) is None
    assert find_distrust_reason(link / own.path.name) is None
    (own.path / "plan.json").chmod(0o666)
    own.path.chmod(0o755)
    assert find_distrust_reason(own.path) is None
