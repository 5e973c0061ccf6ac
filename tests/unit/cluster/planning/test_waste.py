"""Messages of a plan about requested machines that it does not use."""

from __future__ import annotations

import pytest

from lorafleet.cluster.planning.waste import describe_waste
from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.sites.base import Allocation, LocalSite, Node, RaySite, Site
from lorafleet.jobs.sites.placement import compute_placement
from tests.conftest import JobMaker


def make_site(nodes: int, cpus: int, gpus: int = 0, memory: float = 0.0) -> Allocation:
    machines = tuple(
        Node(name=f"node {number}", cpus=cpus, memory_gib=256, gpus=gpus) for number in range(nodes)
    )
    return Allocation(cluster="a", nodes=machines, gpu_memory_gib=memory)


def estimate(gib: float, measured: float | None = None) -> MemoryEstimate:
    return MemoryEstimate(
        components={}, low=gib, expected=gib, high=gib, of="GPU memory", measured=measured
    )


@pytest.mark.parametrize(
    ("site", "trials", "resources", "gib", "messages"),
    [
        (make_site(2, 8, 4, 80), 8, {}, 60, []),
        (
            make_site(4, 8, 4, 80),
            6,
            {},
            60,
            [
                "2 of 4 machines stay idle, because there are only 6 trials: request 2 with "
                "--nodes 2",
                "2 of 8 GPUs stay idle, because there are only 6 trials: request fewer GPUs",
            ],
        ),
        (
            make_site(1, 8, 8, 80),
            8,
            {"cpus_per_worker": 4},
            60,
            [
                "6 of 8 GPUs stay idle, because the trials are limited by CPU cores: lower "
                "resources.cpus_per_worker, or request more cores per node"
            ],
        ),
        (
            make_site(1, 64, 8, 80),
            8,
            {"workers_per_node": 3},
            60,
            [
                "2 of 8 GPUs stay idle, because the trials are limited by GPUs: choose "
                "resources.workers_per_node so that it divides the GPUs of a node"
            ],
        ),
        (
            make_site(1, 8, 4, 80),
            4,
            {"device": "cpu"},
            1,
            ["none of the 4 GPUs is used, because resources.device is cpu"],
        ),
        (
            make_site(1, 8, 4, 80),
            4,
            {},
            3.1,
            ["a trial needs about 3.1 GiB of a GPU's 80.0: a smaller GPU costs less"],
        ),
        (
            make_site(1, 16, 4, 80),
            12,
            {},
            25,
            [
                "a trial needs about 25.0 GiB of a GPU's 80.0: set resources.gpus_per_trial to "
                "0.33, so that 3 trials share each GPU; a smaller GPU costs less"
            ],
        ),
        (make_site(1, 16, 4, 80), 12, {"gpus_per_trial": 0.33}, 25, []),
        (
            make_site(1, 16, 4, 80),
            3,
            {"gpus_per_trial": 0.5},
            25,
            ["2 of 4 GPUs stay idle, because there are only 3 trials: request fewer GPUs"],
        ),
        (
            make_site(1, 32),
            2,
            {},
            1,
            [
                "30 of 32 CPU cores stay idle, because there are only 2 trials: raise "
                "resources.cpus_per_worker, or request fewer cores"
            ],
        ),
        (LocalSite(cpus=32, memory_gib=64), 2, {}, 1, []),
        (
            RaySite(
                address="auto",
                nodes=tuple(
                    Node(name=name, cpus=8, memory_gib=64, labels={"pool": name[0]})
                    for name in ("a1", "a2", "a3", "b1")
                ),
            ),
            8,
            {"label_selector": {"pool": "a"}, "cpus_per_worker": 4, "workers_per_node": 1},
            1,
            [],
        ),
    ],
    ids=[
        "full",
        "few-trials",
        "few-cores",
        "three-of-eight",
        "cpu",
        "small-trials",
        "small-trials-in-turn",
        "shared-gpus",
        "few-trials-on-shared-gpus",
        "idle-cores",
        "this-machine",
        "labelled-machines",
    ],
)
def test_unused_machines(
    site: Site,
    trials: int,
    resources: dict[str, object],
    gib: float,
    messages: list[str],
    bert_job: JobMaker,
) -> None:
    job = bert_job(**{f"resources__{name}": value for name, value in resources.items()}).job
    placement = compute_placement(job, site, trials, 1.0)
    assert describe_waste(job, site, placement, trials, estimate(gib)) == messages


def test_what_was_measured_counts_before_the_estimate(bert_job: JobMaker) -> None:
    job = bert_job(train__per_device_train_batch_size=4, train__gradient_accumulation_steps=8).job
    site = make_site(1, 8, 4, 80)
    placement = compute_placement(job, site, 4, 1.0)
    assert describe_waste(job, site, placement, 4, estimate(3.0, measured=60.0)) == []
    (message,) = describe_waste(job, site, placement, 4, estimate(60.0, measured=10.0))
    assert message == (
        "a trial needs about 11.0 GiB of a GPU's 80.0: raise train.per_device_train_batch_size "
        "from 4 (a step has 8 micro-batches), and lower train.gradient_accumulation_steps as much; "
        "a smaller GPU costs less"
    )
