"""What nodes say of themselves, where they differ, which ports they agree on, and what they keep on
their own disks.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cluster.execution.allocation import (
    Allocation,
    count_idle_restarts,
    describe_last_end,
)
from lorafleet.cluster.execution.node import (
    PINNED,
    NodeReport,
    StatedResources,
    check_starts,
    choose_ports,
    collect_versions,
    count_starts_without_driver,
    find_busy_ports,
    find_disagreements,
    find_missing_resources,
    read_reports,
    stop_before_deletion,
)
from lorafleet.jobs import files
from lorafleet.jobs.data.local_copy import create_node_copy, resolve_node_copy
from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.runs.records import AttemptRecord, StartRecord
from lorafleet.jobs.runs.run import Run


def report(number: int, **changed: Any) -> NodeReport:
    versions = dict.fromkeys(PINNED, "1.0") | {
        name: value for name, value in changed.items() if name in PINNED
    }
    values = {
        "node": f"node{number + 1}", "number": number, "address": f"10.0.0.{number + 1}", "problem": None, "nonce": "n",
        "driver": "550.1", "gpus": 4, "gpu_memory_gib": 79.6, "busy": [],
    }  # fmt: skip
    others = {name: value for name, value in changed.items() if name not in PINNED}
    return NodeReport.model_validate(values | others | {"versions": versions})


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (
            {"torch": "2.0"},
            "node2 has torch 2.0, but node1 has 1.0: the setup lines of the site file",
        ),
        (
            {"nonce": "old"},
            "node2 does not see the current contents of /runs/x: runs_dir must be a folder that all nodes share",
        ),
        ({"problem": "has no address on ib0"}, "node2 has no address on ib0"),
        (
            {"driver": "470.2"},
            "node2 has driver 470.2, but node1 has 550.1: request nodes of one kind",
        ),
        ({"gpu_memory_gib": 39.6}, "node2 has GPU memory 39.6 GiB, but node1 has 79.6 GiB"),
        ({}, None),
    ],
)
def test_a_node_that_differs_is_named(second: dict[str, Any], sentence: str | None) -> None:
    found = find_disagreements([report(1, **second), report(0)], "n", 2, {}, "/runs/x")
    assert (found == []) if sentence is None else (len(found) == 1 and sentence in found[0])


def test_nodes_that_do_not_answer() -> None:
    assert (
        "only 1 of 2 nodes answered (node1)" in find_disagreements([report(0)], "n", 2, {}, "x")[0]
    )


def test_a_head_without_gpus_has_no_driver_to_compare() -> None:
    assert (
        find_disagreements(
            [report(0, gpus=0, driver="", gpu_memory_gib=0.0), report(1), report(2)],
            "n",
            3,
            {},
            "x",
        )
        == []
    )


STATED = StatedResources(cpus=16, memory_gb=128, gpus=4, gpu_memory_gb=80)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, None),
        (
            {"gpus": 0, "gpu_memory_gib": 0.0, "driver": ""},
            "node2 has no GPU (nvidia-smi is missing, fails, or lists no visible GPU), but "
            "gpus_per_node of the site file is 4",
        ),
        ({"gpus": 3}, "node2 has only 3 GPUs, but gpus_per_node of the site file is 4"),
        ({"gpus": 8}, None),
        ({"gpu_memory_gib": 0.0}, None),  # not known
        (
            {"gpu_memory_gib": 39.6},
            "node2 has GPUs of 43 GB, but gpu_memory_gb of the site file is 80",
        ),
        ({"cpus": 8}, "node2 has 8 CPU cores, but cpus_per_node of the site file is 16"),
        (
            {"memory_gib": 60.0},
            "node2 has 64 GB of memory, but memory_gb_per_node of the site file is 128",
        ),
        ({"memory_gib": 118.0}, None),  # of 128 GB (119.2 GiB), the kernel has taken some
        ({"cpus": None, "memory_gib": None}, None),
    ],
)
def test_what_the_site_file_states_must_be_there(
    changed: dict[str, Any], sentence: str | None
) -> None:
    whole = {"cpus": 16, "memory_gib": 125.0}
    reports = [report(1, **(whole | changed)), report(0, **whole)]
    sentences = find_missing_resources(reports, STATED, head_works=True)
    advice = "correct the site file, or have the node checked"
    assert sentences == ([] if sentence is None else [f"{sentence}: {advice}"])


def test_a_head_of_its_own_has_other_resources() -> None:
    head = report(0, gpus=0, gpu_memory_gib=0.0, cpus=2, memory_gib=8.0)
    reports = [head, report(1, cpus=16, memory_gib=125.0)]
    assert find_missing_resources(reports, STATED, head_works=False) == []
    assert len(find_missing_resources(reports, STATED, head_works=True)) == 3


def test_a_site_file_without_the_memory_of_gpus_demands_none() -> None:
    stated = STATED.model_copy(update={"gpu_memory_gb": 0.0})
    assert find_missing_resources([report(0, gpu_memory_gib=8.0)], stated, head_works=True) == []


def test_the_environment_that_began_a_run_is_held_to() -> None:
    pinned = dict.fromkeys(PINNED, "1.0") | {"torch": "0.9", "schema_version": 1}
    (sentence,) = find_disagreements([report(0), report(1)], "n", 2, pinned, "x")
    assert (
        "the environment has changed since the run started: node1 has torch 1.0 instead of 0.9"
        in sentence
    )
    missing = [report(0, peft="not installed"), report(1, peft="not installed")]
    assert "peft is not installed" in find_disagreements(missing, "n", 2, {}, "x")[0]


def test_what_programs_of_a_site_print_is_passed_over() -> None:
    text = f'Loading module cuda\n{report(0).model_dump_json()}\n[1, 2]\n{{"node": 1}}\nbye'
    assert read_reports(text) == [report(0)]
    assert set(collect_versions()) == set(PINNED)


@given(
    st.sets(st.integers(20_000, 32_700), max_size=40), st.integers(1, 256), st.integers(1, 10**7)
)
def test_a_block_of_ports_is_free_everywhere(busy: set[int], cpus: int, job: int) -> None:
    try:
        first, last = choose_ports(sorted(busy), cpus, job)
    except PlacementRefused:
        assert len(busy) >= 10
        return
    assert 20_000 <= first < last < 32_768
    assert last - first + 1 >= 20 + 4 * cpus
    assert not busy & set(range(first, last + 1))


def test_jobs_with_near_numbers_begin_at_different_blocks() -> None:
    assert len({choose_ports([], 8, job) for job in range(100)}) == 100
    with pytest.raises(PlacementRefused, match="is free on all nodes"):
        choose_ports(list(range(20_000, 32_700, 50)), 8, 1)


def test_a_port_that_listens_is_busy() -> None:
    with socket.socket() as listener:
        for port in range(31_000, 31_100):
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            break
        listener.listen()
        assert port in find_busy_ports()
    assert port not in find_busy_ports()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    monkeypatch.setenv("LORAFLEET_STAGE", str(tmp_path / "stage"))
    return folder


def test_a_model_is_staged_once_and_checked(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert resolve_node_copy(model) == model
    copy = create_node_copy(model, tmp_path / "stage", said.append)
    assert resolve_node_copy(model) == copy
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (tmp_path / "stage").stat().st_mode & 0o777 == 0o700
    made = copy.stat().st_ino
    assert create_node_copy(model, tmp_path / "stage", said.append).stat().st_ino == made
    assert said == []
    with (copy / "model.safetensors").open("r+b") as file:
        file.write(b"damaged")
    again = create_node_copy(model, tmp_path / "stage", said.append)
    assert "is damaged and is copied again" in said[0]
    assert (again / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    (tmp_path / "stage" / f".{again.name}-killed").mkdir()  # what a copy that was killed left
    create_node_copy(model, tmp_path / "stage", said.append)
    assert not list((tmp_path / "stage").glob(".*"))
    (model / "config.json").write_text('{"changed": 1}')
    assert resolve_node_copy(model) == model  # the copy is of what was there before


def test_no_room_for_a_copy(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**20))
    said: list[str] = []
    assert create_node_copy(model, tmp_path / "stage", said.append) == model
    assert "no room for 0.0 GB" in said[0]


def line(job: str, restart: int, event: str, submission: str | None = None) -> StartRecord:
    return StartRecord(job=job, restart=restart, event=event, submission=submission)


def ended_by_slurm(job: str, reason: str) -> StartRecord:
    return StartRecord(job=job, restart=0, event="ended-by-slurm", reason=reason)


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        ([line("7", 0, "began")], None),
        ([line("7", 0, "began"), line("7", 0, "time-limit"), line("7", 1, "began")],
         "Slurm started job 7 again (restart 1): it reached its time limit, after saving"),
        ([line("7", 0, "began"), line("7", 1, "began")], "Slurm started job 7 again (restart 1): it was killed"),
        ([line("5", 0, "began"), line("5", 0, "preemption"), line("7", 0, "began")],
         "job 7 continues after job 5: it was preempted, after saving"),
        ([line("5", 0, "began"), line("5", 0, "ended"), line("7", 0, "began")], None),
        ([line("5", 0, "began"), line("5", 0, "cut-off"), ended_by_slurm("5", "it was cancelled"), line("7", 0, "began")],
         "job 7 continues after job 5: it was cancelled"),
    ],
)  # fmt: skip
def test_how_the_incarnation_before_ended(history: list[StartRecord], sentence: str | None) -> None:
    here = Allocation("7", history[-1].restart, "1")
    said = describe_last_end(history, here)
    assert said is None if sentence is None else (said or "").startswith(sentence)


def test_starts_that_never_come_to_a_driver_are_counted() -> None:
    def began(job: str, restart: int, submission: str = "2") -> StartRecord:
        return line(job, restart, "began", submission)

    history = [
        began("7", 0),
        line("7", 0, "time-limit"),
        began("7", 1),
        line("7", 1, "time-limit"),
        began("7", 2),
    ]
    driven = [AttemptRecord(slurm_job="7", slurm_restart=0)]
    assert count_starts_without_driver(history, [], "2") == 3
    assert count_starts_without_driver(history, driven, "2") == 2
    assert (
        count_starts_without_driver(
            [began("5", 0, "1"), began("5", 1, "1"), began("7", 0)], [], "2"
        )
        == 1
    )


def test_a_job_that_only_starts_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LF_MAX_RESTARTS", "1")
    monkeypatch.setenv("LF_SUBMISSION", "1")
    for restart in range(3):
        began = line("7", restart, "began", "1").to_dict()
        files.append_jsonl(tmp_path / "slurm" / "history.jsonl", began)
        if restart < 2:
            check_starts(tmp_path)
    with pytest.raises(
        PlacementRefused, match="stopped after 2 starts that Slurm ended before training began"
    ):
        check_starts(tmp_path)


def test_restarts_that_bring_nothing_are_counted() -> None:
    def of(*marks: str, submission: str = "1") -> list[AttemptRecord]:
        return [AttemptRecord(submission=submission, saved=mark) for mark in marks]

    assert count_idle_restarts(of("a")) == 0
    assert count_idle_restarts(of("a", "b", "b", "b")) == 2
    assert count_idle_restarts(of("b", "b", "c")) == 0
    assert count_idle_restarts([*of("b", "b"), *of("b", submission="2")]) == 0  # resumed by hand


def test_a_pod_that_goes_has_the_run_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head asks the driver to end, and waits for it; where no driver has the run there is
    nothing to do.
    """
    run = Run.create(tmp_path, "x")
    stop, attempts = run.path / "stop", run.path / "attempts"
    stop_before_deletion(run, 60, drain=False)
    assert not stop.exists()
    attempts.mkdir()
    here, elsewhere = [os.uname().nodename], ["another"]
    files.write_json(attempts / "1.json", {"machine": here})
    slept: list[float] = []

    def ends(seconds: float) -> None:
        slept.append(seconds)
        assert stop.read_text() == ""
        (attempts / "1.end").touch()

    monkeypatch.setattr("lorafleet.cluster.execution.node.time.sleep", ends)
    stop_before_deletion(run, 60, drain=False)
    assert len(slept) == 1
    stop.unlink()
    stop_before_deletion(run, 60, drain=False)  # that driver has ended
    assert not stop.exists()
    files.write_json(attempts / "2.json", {"machine": elsewhere})
    stop_before_deletion(run, 60, drain=False)  # the next one is on another head
    assert not stop.exists()
    files.write_json(attempts / "2.json", {"machine": here})
    stop.write_text("asked for by a user\n")
    stop_before_deletion(run, 0, drain=False)
    assert stop.read_text() == "asked for by a user\n"


def test_a_worker_that_goes_says_so_to_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, "x")
    (run.path / "attempts").mkdir()
    files.write_json(run.path / "attempts" / "1.json", {"machine": ["head"]})
    said = tmp_path / "said"
    (tmp_path / "ray").write_text(
        f'#!/bin/sh\necho "$@" >{said}\ntouch {run.path}/attempts/1.end\n'
    )
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stop_before_deletion(run, 60, drain=True)
    assert said.read_text().startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert not (run.path / "stop").exists()
