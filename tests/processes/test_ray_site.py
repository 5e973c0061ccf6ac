"""A site of kind `ray`: the verbs of every cluster, on a real Ray that was started by somebody
else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cluster.ray.client import JobCommandRunner, JobInfo, RayJobs
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.events import AttemptEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, hears_ctrl_c
from tests.processes.conftest import _free_port, wait_for

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent
GRID = """
search:
  method: grid
  scheduler: {type: none, time_attr: samples, max_t: SAMPLES}
  parameters: {train.learning_rate: {values: [1e-3, 1e-2]}}
"""


@dataclass
class User:
    """Somebody who knows the address of a Ray, and a folder that its machines share."""

    home: Path
    storage: Path
    address: str

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "LORAFLEET_CACHE"}
        own = {"XDG_CONFIG_HOME": self.home / "config", "XDG_STATE_HOME": self.home / "state"}
        return (
            kept
            | {name: str(path) for name, path in own.items()}
            | {
                "LORAFLEET_CACHE": str(self.home / "cache"),
                "RAY_ADDRESS": "http://127.0.0.1:9",  # of another Ray: the site's own counts
            }
        )

    def command(self, *words: str | Path) -> list[str]:
        return [str(BIN / "lorafleet"), *map(str, words)]

    def lorafleet(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*words), cwd=self.home, env=self.environment, capture_output=True, text=True,
                              timeout=400, check=False)  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def write_site(self, **changes: Any) -> None:
        tree = {"kind": "ray", "address": self.address, "storage": str(self.storage)} | changes
        folder = self.home / "config" / "lorafleet" / "sites"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "up.yaml").write_text(json.dumps(tree))

    def job(self, loaded: LoadedJob) -> Path:
        path = self.home / "job.yaml"
        path.write_text(loaded.text)
        return path

    def there(self, run: Run) -> Run:
        return Run(self.storage / "runs" / run.id)

    def state(self, run: Run) -> str:
        return str(json.loads(self.lorafleet("status", run.id, "--format", "json").stdout)["state"])


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    """A Ray of one machine with two cores, as `ray start --head` makes it."""
    from ray.cluster_utils import Cluster
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    port = _free_port()
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": port}
    head["dashboard_agent_listen_port"] = _free_port()
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
    (tmp_path / "storage").mkdir()
    made = User(tmp_path, tmp_path / "storage", f"http://127.0.0.1:{port}")
    made.write_site()

    def answers() -> bool:
        try:
            client = JobSubmissionClient(made.address)
            name = client.submit_job(
                entrypoint="true"
            )  # the head's agent starts some seconds after its dashboard
        except (ConnectionError, RuntimeError):
            return False
        return wait_for(lambda: client.get_job_status(name).is_terminal()) or True

    try:
        wait_for(answers, 90)
        yield made
    finally:
        cluster.shutdown()


@pytest.mark.long
def test_fetch_sweep_stop_resume_pull(user: User, bert_job: JobMaker) -> None:
    """Everything a user types, on one Ray: nothing of the run is on this machine but what is
    brought.
    """
    job = user.job(bert_job(GRID.replace("SAMPLES", "40000"), train__checkpoint_minutes=5))
    refused = user.lorafleet("sweep", job, "train.checkpoint_minutes=5", "--on", "up", check=False)
    assert refused.returncode == ExitCode.USER_INPUT
    assert (
        "which site up cannot read: upload it with `lorafleet fetch JOB.yaml --on SITE`"
        in refused.stderr
    )
    assert not list(user.home.glob("runs/*"))
    assert "uploaded to the storage of site up" in user.lorafleet("fetch", job, "--on", "up").stdout
    assert "2 trials in parallel" in user.lorafleet("plan", job, "--on", "up").stdout
    typo = user.home / "typo.yaml"
    typo.write_text(job.read_text().replace("train.jsonl", "trian.jsonl"))
    assert "trian.jsonl" in user.lorafleet("fetch", typo, "--on", "up", check=False).stderr

    follower = subprocess.Popen(user.command("sweep", job, "train.checkpoint_minutes=5", "--on", "up"), cwd=user.home,
                                env=user.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                start_new_session=True, preexec_fn=hears_ctrl_c)  # fmt: skip
    wait_for(lambda: list((user.home / "runs").glob("*/site.json")), 60)
    (folder,) = (user.home / "runs").iterdir()
    run, there = Run(folder), user.there(Run(folder))
    wait_for(
        lambda: len([trial for trial in there.list_trials() if trial.read_metrics()]) == 2, 120
    )
    os.killpg(follower.pid, signal.SIGINT)
    said, _ = follower.communicate(timeout=30)
    assert (follower.returncode, "continues to run: follow it with `lorafleet logs -f" in said) == (
        ExitCode.INTERRUPTED,
        True,
    ), said
    assert user.state(run) == "running"
    assert run.list_trials()[0].read_metrics()  # brought by `status`
    assert "attempt" in user.lorafleet("logs", run.id).stdout
    live = user.lorafleet("resume", run.id, check=False)
    assert f"{run.id} has job {run.id}-1, which is RUNNING" in live.stderr

    assert "is saving its trials and will stop" in user.lorafleet("stop", run.id).stdout
    wait_for(lambda: user.state(run) == "stopped", 90)
    assert all((trial.checkpoint / "checksums.json").is_file() for trial in there.list_trials())
    again = user.lorafleet("stop", run.id, check=False)
    assert "has no pending or running job: it is stopped" in again.stderr

    done = user.lorafleet("resume", run.id)
    assert run.state == there.state == "finished", done.stdout + done.stderr
    assert f"`lorafleet pull {run.id}` downloads the adapter" in done.stderr
    for trial in there.list_trials():
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(set(steps))
    best = json.loads((run.path / "report" / "report.json").read_text())["recommendation"][
        "trial_id"
    ]
    user.lorafleet("pull", run.id)
    weights = Path("trials") / best / "adapter" / "adapter_model.safetensors"
    assert (run.path / weights).read_bytes() == (there.path / weights).read_bytes()
    assert len(there.read_events(AttemptEvent)) == 2
    user.lorafleet("pull", run.id, "--on", "up", "--runs", user.home / "elsewhere")
    assert Run(user.home / "elsewhere" / run.id).state == "finished"


def test_short_jobs_leave_nothing_on_a_shared_ray(user: User, bert_job: JobMaker) -> None:
    """Neither in its list of jobs, which other people read, nor on the user's terminal."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(user.address)

    def relays() -> list[str]:
        return [job.status.value for job in client.list_jobs() if "relay" in str(job.submission_id)]

    fetched = user.lorafleet("fetch", user.job(bert_job()), "--on", "up")
    time.sleep(4)  # Ray writes a job that was deleted at once again, as FAILED
    before = relays()
    assert set(before) == {"SUCCEEDED"}
    assert "INFO" not in fetched.stderr
    assert "gcs://" not in fetched.stderr
    process = subprocess.Popen(
        user.command("doctor", "--on", "up"), cwd=user.home, env=user.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=hears_ctrl_c,
    )  # fmt: skip
    wait_for(lambda: len(relays()) > len(before), 60)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, output
    time.sleep(4)
    assert relays() == before
    runner = JobCommandRunner(RayJobs(user.address), {})
    runner._delete_earlier(JobInfo("SUCCEEDED", "", 0, {}, 10**15))  # a minute after all of them
    time.sleep(4)
    assert relays() == []


@pytest.mark.long
def test_a_job_whose_driver_fails_and_the_doctor(user: User, bert_job: JobMaker) -> None:
    rows = json.loads(user.lorafleet("doctor", "--on", "up", "--format", "json").stdout)["findings"]
    assert {row["verdict"] for row in rows} == {"ok"}, rows
    job = user.job(bert_job(GRID.replace("SAMPLES", "400")))
    user.lorafleet("fetch", job, "--on", "up")
    (staged,) = (user.storage / "cache" / "staged").glob("*/train.jsonl")
    staged.write_text("")
    done = user.lorafleet("sweep", job, "--on", "up", "--wait", check=False)
    assert done.returncode == ExitCode.USER_INPUT, done.stdout + done.stderr
    assert "train.jsonl" in done.stderr


def test_nobody_there(tmp_path: Path, bert_job: JobMaker) -> None:
    made = User(tmp_path, tmp_path, f"http://127.0.0.1:{_free_port()}")
    made.write_site()
    done = made.lorafleet("train", made.job(bert_job()), "--on", "up", check=False)
    assert done.returncode == ExitCode.USER_INPUT
    assert f"the Ray cluster at {made.address} is unreachable (" in done.stderr
    assert "Traceback" not in done.stderr
