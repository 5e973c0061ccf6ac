"""What a real Slurm says of jobs that ended in different ways, read by our code."""

from __future__ import annotations

import time
from collections.abc import Callable

from lorafleet.slurm.accounting import JobRecord, parse_json, parse_scontrol
from lorafleet.slurm.states import describe_pending, get_job_state
from tests.slurm.rig import Rig


def both(rig: Rig, job: str) -> tuple[JobRecord, JobRecord]:
    """A job as scontrol and as squeue's JSON have it, which lists jobs that have ended for a while
    too.
    """
    (plain,) = parse_scontrol(rig.asked("scontrol", "show", "job", "-o", job))
    listed = parse_json(rig.asked("squeue", "--json", "--states=all"))
    return plain, next(record for record in listed if record.job_id == job)


def once(
    rig: Rig, job: str, condition: Callable[[JobRecord], bool], seconds: float = 60
) -> JobRecord:
    """The job when something holds of it, alike in both answers."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        plain, listed = both(rig, job)
        if condition(plain) and condition(listed):
            assert (plain.state, plain.restarts, plain.nodes) == (
                listed.state,
                listed.restarts,
                listed.nodes,
            )
            return listed if plain.exit_code is None else plain
        time.sleep(0.2)
    raise AssertionError(f"it did not come to that: {both(rig, job)}")


def ended(record: JobRecord) -> bool:
    return get_job_state(record.state).ended


def test_jobs_end_as_they_do(rig: Rig) -> None:
    fine = rig.sbatch("true")
    code = rig.sbatch("exit 3")
    killed = rig.sbatch("kill -9 $$")
    stopped = rig.sbatch("sleep 600")
    assert (once(rig, fine, ended).state, once(rig, fine, ended).exit_code) == ("COMPLETED", 0)
    once(rig, code, ended)
    for record in both(rig, code):
        assert (record.state, record.exit_code, record.signal) == ("FAILED", 3, None)
    once(rig, killed, ended)
    for record in both(rig, killed):
        assert (record.state, record.signal) == ("FAILED", 9)
    once(rig, stopped, lambda record: record.state == "RUNNING")
    rig.asked("scancel", stopped)
    assert once(rig, stopped, ended).state == "CANCELLED"


def test_a_job_that_waits_says_why(rig: Rig) -> None:
    holds = [rig.sbatch("sleep 600", "--exclusive") for _ in range(rig.nodes)]
    for job in holds:
        once(rig, job, lambda record: record.state == "RUNNING")
    waits = rig.sbatch("true")
    record = once(
        rig,
        waits,
        lambda found: found.state == "PENDING" and found.reason in ("Resources", "Priority"),
    )
    assert any(
        words in describe_pending(record.reason)
        for words in ("it is next, and waits for free nodes", "higher priority")
    )
    held = rig.sbatch("true", "--hold")
    assert "scontrol release" in describe_pending(
        once(rig, held, lambda found: bool(found.reason)).reason
    )
    rig.asked("scancel", *holds, waits, held)
    for job in holds:
        once(rig, job, ended)


def test_a_requeued_job_is_counted(rig: Rig) -> None:
    job = rig.sbatch("sleep 600", "--requeue")
    once(rig, job, lambda record: record.state == "RUNNING")
    rig.asked("scontrol", "requeue", job)
    record = once(rig, job, lambda found: found.state == "PENDING" and found.restarts == 1)
    assert not get_job_state(record.state).ended
    rig.asked("scancel", job)
    once(rig, job, ended)


def test_a_job_that_is_not_there(rig: Rig) -> None:
    assert parse_scontrol(rig.asked("scontrol", "show", "job", "-o", "999999")) == []
