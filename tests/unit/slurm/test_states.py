"""Slurm's words, one by one, in the forms of old and new versions."""

from __future__ import annotations

import json

import pytest

from lorafleet.jobs.runs.run import RunState
from lorafleet.slurm.accounting import JobRecord, parse_json, parse_sacct, parse_scontrol
from lorafleet.slurm.states import (
    _SHORT_CODES,
    STATES,
    describe_pending,
    get_job_state,
    parse_state,
)

MEANT = {
    RunState.PENDING: "PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT "
    "RESV_DEL_HOLD",
    RunState.RUNNING: "RUNNING COMPLETING STAGE_OUT SIGNALING RESIZING SUSPENDED STOPPED",
    RunState.FINISHED: "COMPLETED",
    RunState.STOPPED: "CANCELLED PREEMPTED REVOKED TIMEOUT DEADLINE NODE_FAIL",
    RunState.FAILED: "FAILED OUT_OF_MEMORY BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL",
}


@pytest.mark.parametrize(
    ("run", "word"), [(run, word) for run, words in MEANT.items() for word in words.split()]
)
def test_each_state_has_its_meaning(run: RunState, word: str) -> None:
    found = get_job_state(word)
    assert found.run is run
    assert found.ended is (run not in (RunState.PENDING, RunState.RUNNING))


def test_the_table_is_whole() -> None:
    assert set(STATES) == {word for words in MEANT.values() for word in words.split()}
    assert set(_SHORT_CODES.values()) <= set(STATES)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("CANCELLED by 1000", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("PD", "PENDING"),
        ("oom", "OUT_OF_MEMORY"),
        (["RUNNING"], "RUNNING"),
        (["COMPLETED", "COMPLETING"], "COMPLETING"),
        (["PENDING", "REQUEUED"], "REQUEUED"),
        ([], "UNKNOWN"),
        ("HIBERNATING", "HIBERNATING"),
    ],
)
def test_one_word_for_what_slurm_says(said: str | list[str], word: str) -> None:
    assert parse_state(said) == word


def test_a_state_of_tomorrow_ends_nothing() -> None:
    assert (get_job_state("HIBERNATING").run, get_job_state("HIBERNATING").ended) == (
        RunState.RUNNING,
        False,
    )


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "it is next"),
        ("(Priority)", "jobs with a higher priority"),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-2]", "down, drained or reserved"),
        ("QOSMaxCpuPerUserLimit", "its QOS has reached a limit (QOSMaxCpuPerUserLimit)"),
        ("AssocGrpGRES", "your account has reached a limit"),
        ("PartitionTimeLimit", "it will never start"),
        ("", "has not considered it yet"),
        ("SomethingNew", "Slurm reports SomethingNew"),
    ],
)
def test_why_a_job_waits(reason: str, words: str) -> None:
    assert words in describe_pending(reason)


SCONTROL = (
    "JobId=42 JobName=my job UserId=lab(1000) GroupId=lab(1000) MCS_label=N/A Priority=1 "
    "Account=(null) QOS=(null) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 "
    "Restarts=2 BatchFlag=1 Reboot=0 ExitCode=3:0 RunTime=00:01:02 NodeList=node[1-2] "
    "BatchHost=node1 Command=/home/lab/run dir/job.sh StdOut=/home/lab/a=b.log"
)


def test_scontrols_line() -> None:
    pending = "JobId=43 JobState=PENDING Reason=None Restarts=0 ExitCode=0:0 NodeList=(null)"
    failed, waits = parse_scontrol(f"{SCONTROL}\n{pending}\n")
    assert failed == JobRecord("42", "FAILED", "NonZeroExitCode", 3, None, 2, "node[1-2]")
    assert (waits.state, waits.reason, waits.nodes) == ("PENDING", "", "")
    assert parse_scontrol("slurm_load_jobs error: Invalid job id specified\n") == []


@pytest.mark.parametrize(
    "job",
    [
        {"job_id": 42, "job_state": "FAILED", "state_reason": "NonZeroExitCode", "exit_code": 768, "restart_cnt": 2,
         "nodes": "node[1-2]"},
        {"job_id": 42, "job_state": ["FAILED"], "state_reason": "NonZeroExitCode", "nodes": "node[1-2]",
         "exit_code": {"status": ["ERROR"], "return_code": {"set": True, "infinite": False, "number": 3},
                       "signal": {"id": {"set": False, "infinite": False, "number": 0}, "name": ""}},
         "restart_cnt": {"set": True, "infinite": False, "number": 2}},
        {"job_id": 42, "state": {"current": ["FAILED"], "reason": "NonZeroExitCode"}, "nodes": "node[1-2]",
         "exit_code": {"status": "ERROR", "return_code": 3}, "restart_cnt": 2},
    ],
    ids=["22.05", "24.05", "sacct"],
)  # fmt: skip
def test_json_of_old_and_new_versions(job: dict[str, object]) -> None:
    (found,) = parse_json(json.dumps({"jobs": [job]}))
    assert found == JobRecord("42", "FAILED", "NonZeroExitCode", 3, None, 2, "node[1-2]")


@pytest.mark.parametrize(
    "job",
    [
        {"job_id": 7, "job_state": "RUNNING", "exit_code": 0, "nodes": "node1"},
        {"job_id": 7, "job_state": ["RUNNING"], "nodes": "node1",
         "exit_code": {"status": ["SUCCESS"], "return_code": {"set": True, "infinite": False, "number": 0}}},
        {"job_id": 7, "state": {"current": ["RUNNING"]}, "nodes": "node1",
         "exit_code": {"status": "SUCCESS", "return_code": 0}},
    ],
    ids=["22.05", "24.05", "sacct"],
)  # fmt: skip
def test_a_job_that_runs_has_no_exit_code(job: dict[str, object]) -> None:
    assert parse_json(json.dumps({"jobs": [job]})) == [JobRecord("7", "RUNNING", nodes="node1")]


@pytest.mark.parametrize("nodes", ["None assigned", "(null)", "", None])
def test_a_job_that_never_started_has_no_nodes(nodes: str | None) -> None:
    job = {"job_id": 7, "state": {"current": ["CANCELLED"]}, "nodes": nodes, "exit_code": 0}
    (record,) = parse_json(json.dumps({"jobs": [job]}))
    assert record.nodes == ""
    assert parse_sacct(f"7|CANCELLED|0:0|None|{nodes or ''}|0\n")[0].nodes == ""


def test_what_is_no_answer_is_an_error() -> None:
    for text in ("[]", "{}", '{"jobs": 3}'):
        with pytest.raises(ValueError, match="no list of jobs"):
            parse_json(text)
