"""Trials over several machines: a Ray of several raylets, each with CPU cores of its own, on this
one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, lorafleet, read_step
from tests.processes.conftest import Machines, begin, interrupt, newest, save, wait_for

TWO = {"resources__num_nodes": 2}
SEARCH = """
search:
  method: grid
  scheduler: {max_t: 96, grace_period: 32, reduction_factor: 3}
  parameters: {train.learning_rate: {values: [1e-3, 1e-2]}}
"""


def log(run: Run) -> str:
    return (run.path / "logs" / "driver.log").read_text()


@pytest.mark.long
def test_trials_over_two_machines_are_trained_and_searched(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    """With three machines, one trial of two fits at once; it gives the numbers of one machine;
    nothing is left.
    """
    loaded = bert_job(SEARCH, **TWO, train__per_device_train_batch_size=4)
    path = save(loaded, place)
    planned = lorafleet("plan", path, *loaded.overrides, cwd=place, **machines.environment)
    assert planned.returncode == ExitCode.OK, planned.stderr
    assert "1 trial in parallel" in planned.stdout
    assert "over 2 machines" in planned.stdout
    refused = lorafleet(
        "plan", path, *loaded.overrides, "resources.num_nodes=4", cwd=place, **machines.environment
    )
    assert refused.returncode == ExitCode.USER_INPUT
    assert "each trial needs 4 nodes x 1 CPU core, but the Ray at" in refused.stderr
    done = lorafleet("sweep", path, *loaded.overrides, cwd=place, **machines.environment)
    run = newest(place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr + log(run)
    assert {row.nodes for trial in run.list_trials() for row in trial.read_metrics()} == {2}
    assert machines.left() == []
    alone = bert_job(train__per_device_train_batch_size=4, train__gradient_accumulation_steps=2)
    here = lorafleet("train", save(alone, place), *alone.overrides, "train.learning_rate=1e-2", "train.max_steps=12",
                     "train.eval_steps=4", cwd=place)  # fmt: skip
    assert here.returncode == ExitCode.OK, here.stderr
    longest = max((trial.read_evaluations() for trial in run.list_trials()), key=len)
    together = next(
        t for t in run.list_trials() if t.read_params().assignment["train.learning_rate"] == 1e-2
    ).read_evaluations()
    assert len(longest) == 2
    assert together[0].loss == pytest.approx(
        newest(place).list_trials()[0].read_evaluations()[0].loss, rel=1e-4
    )


def _all_of(count: int, hosts: list[str]) -> list[str]:
    return hosts if len(hosts) == count else []


@pytest.mark.long
def test_trials_stay_on_the_machines_that_are_asked_for(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    """The others would do as well: that a warm trial and a gang of two both land right by chance is
    one in nine.
    """
    loaded = bert_job(train__max_steps=1_000_000, train__eval_steps=100_000)
    for pool, nodes, actor in (("one", 1, "ResourceTrainable"), ("two", 2, "RayTrainWorker")):
        asked = [f"resources.num_nodes={nodes}", f"resources.label_selector.pool={pool}"]
        process = begin(loaded, place, *asked, command="train", **machines.environment)
        hosts = wait_for(lambda name=actor, count=nodes: _all_of(count, machines.hosts(name)))
        assert {
            node.node_id for node in machines.workers if node.node_labels["pool"] == pool
        } == set(hosts)
        interrupt(process)
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == ExitCode.INTERRUPTED, shown


CHOOSE = """
import concurrent.futures, json, pathlib, sys, time
import ray
from ray.util.placement_group import placement_group, placement_group_table
from lorafleet.jobs.sites.placement import Placement
from lorafleet.training.node_bundles import choose_machines

ray.init(log_to_driver=False)
placement = Placement(workers=4, num_nodes=2, cpus_per_worker=1, gpus_per_worker=0, slots=2,
                      waves=1, limited_by="CPU cores", labels={"pool": "large"})

def start(_):
    with choose_machines(placement, pathlib.Path(sys.argv[1])) as labels:
        time.sleep(0.5)  # as Ray Train takes, until it asks for its own bundles
        group = placement_group([{"CPU": 1}] * 4, "PACK", bundle_label_selector=labels)
        assert group.wait(30)
        time.sleep(1)
        return list(placement_group_table(group)["bundles_to_node_id"].values())

with concurrent.futures.ThreadPoolExecutor(2) as pool:
    print(json.dumps(list(pool.map(start, range(2)))))
"""


def test_each_gang_gets_the_machines_of_the_plan(machines: Machines, tmp_path: Path) -> None:
    """Two at once, each with two processes on each of two machines: all four would fit on one."""
    large = {machines.add("large", 4).node_id for _ in range(2)}
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, tmp_path],
        env=os.environ | machines.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for nodes in json.loads(done.stdout.splitlines()[-1]):
        assert Counter(nodes) == dict.fromkeys(large, 2)


@pytest.mark.long
def test_processes_are_spread_as_planned(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    """Two on each of two machines, although all four would fit on one."""
    large = [machines.add("large", 4) for _ in range(2)]
    loaded = bert_job(
        **TWO,
        resources__workers_per_node=2,
        resources__label_selector={"pool": "large"},
        train__per_device_train_batch_size=2,
        train__max_steps=1_000_000,
        train__eval_steps=4,
    )
    path = save(loaded, place)
    planned = lorafleet("plan", path, *loaded.overrides, cwd=place, **machines.environment)
    assert "4 processes per trial over 2 machines" in planned.stdout
    process = begin(loaded, place, command="train", **machines.environment)
    hosts = wait_for(lambda: _all_of(4, machines.hosts("RayTrainWorker")), 120)
    assert Counter(hosts) == {node.node_id: 2 for node in large}
    run = newest(place)
    wait_for(lambda: run.list_trials()[0].read_metrics(), 120)
    assert run.list_trials()[0].read_metrics()[0].nodes == 2
    interrupt(process)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, shown + log(run)
    assert machines.left() == []


@pytest.mark.long
def test_gangs_that_start_together_do_not_take_each_others_cores(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    large = [machines.add("large", 4) for _ in range(2)]
    loaded = bert_job(
        SEARCH,
        **TWO,
        resources__workers_per_node=2,
        resources__label_selector={"pool": "large"},
        train__per_device_train_batch_size=2,
    )
    process = begin(loaded, place, command="sweep", **machines.environment)
    hosts = wait_for(lambda: _all_of(8, machines.hosts("RayTrainWorker")), 120)
    assert Counter(hosts) == {node.node_id: 4 for node in large}
    shown, _ = process.communicate(timeout=300)
    run = newest(place)
    assert process.returncode == ExitCode.OK, shown + log(run)
    assert {row.nodes for trial in run.list_trials() for row in trial.read_metrics()} == {2}
    assert machines.left() == []


@pytest.mark.long
def test_a_lost_machine_costs_a_restart_and_a_draining_one_is_left_in_time(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    endless = {
        "train__max_steps": 1_000_000,
        "train__eval_steps": 200,
        "train__checkpoint_minutes": 0.02,
    }
    process = begin(bert_job(**TWO, **endless), place, command="train", **machines.environment)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)
    wait_for(lambda: run.list_trials() and run.list_trials()[0].checkpoint.is_dir(), 180)
    trial = run.list_trials()[0]
    machines.kill(wait_for(lambda: machines.used(run), 60))
    wait_for(lambda: trial.read_status().retries == {"worker_lost": 1}, 180)
    at = trial.read_metrics()[-1].step
    wait_for(lambda: read_step(trial) > at, 240)
    machines.workers.append(machines.add())
    drain(machines, wait_for(lambda: machines.used(run), 60))
    wait_for(lambda: trial.read_status().retries == {"worker_lost": 1, "preempted": 1}, 180)
    at = trial.read_metrics()[-1].step
    wait_for(lambda: read_step(trial) > at, 240)
    assert lorafleet("stop", run.id, cwd=place).returncode == ExitCode.OK
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == ExitCode.INTERRUPTED, shown + log(run)
    steps = [row.step for row in trial.read_metrics()]
    assert steps == sorted(set(steps))
    assert "restarted (retry 1 after preempted): its node is being preempted" in shown
    assert machines.left() == []


@pytest.mark.long
def test_a_warm_trial_leaves_a_draining_machine_in_time(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    endless = {"train__max_steps": 1_000_000, "train__eval_steps": 100_000}
    process = begin(bert_job(**endless), place, command="train", **machines.environment)
    (host,) = wait_for(lambda: machines.hosts("ResourceTrainable"), 180)
    run = newest(place)
    (trial,) = wait_for(run.list_trials)
    wait_for(lambda: read_step(trial) > 3, 60)
    drain(machines, next(node for node in machines.workers if node.node_id == host))
    wait_for(lambda: trial.read_status().retries == {"preempted": 1}, 60)
    at = read_step(trial)
    wait_for(lambda: read_step(trial) > at, 120)
    assert host not in machines.hosts("ResourceTrainable")
    interrupt(process)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, shown
    assert "its node is being preempted; the trial was saved first" in shown


@pytest.mark.long
def test_a_run_that_waits_for_machines_stops_soon(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    """No trial runs, so that none can see the request and end: the driver must."""
    endless = {"train__max_steps": 1_000_000, "train__eval_steps": 100_000}
    process = begin(bert_job(**endless), place, "resources.label_selector.pool=one", command="train",
                    **machines.environment)  # fmt: skip
    wait_for(lambda: machines.hosts("ResourceTrainable"), 180)
    run = newest(place)
    (trial,) = wait_for(run.list_trials)
    wait_for(lambda: read_step(trial) > 3, 60)
    for node in [node for node in machines.workers if node.node_labels["pool"] == "one"]:
        machines.kill(node)
    wait_for(lambda: trial.read_status().retries == {"worker_lost": 1}, 180)
    assert trial.state == "pending"
    asked = time.monotonic()
    interrupt(process)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, shown + log(run)
    assert time.monotonic() - asked < 60  # before, it was ended by force after five minutes
    assert list((run.path / "attempts").glob("*.end"))


def drain(machines: Machines, node: Any) -> None:
    """What a cloud's operator does with a notice: the machine goes in a minute."""
    subprocess.run(
        [
            str(Path(sys.executable).with_name("ray")), "drain-node", "--address", machines.cluster.address,
            "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "the test takes it", "--deadline-remaining-seconds", "60",
        ],
        check=True, capture_output=True, env=os.environ | machines.environment,
    )  # fmt: skip
