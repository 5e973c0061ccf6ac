"""Number of trials that a plan trains together, and of the processes that do."""

from __future__ import annotations

from typing import Any

import pytest

from lorafleet.cluster.planning.plan import make_plan
from lorafleet.commands.plan import describe_plan
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.sites.base import LocalSite, Node, RaySite, Site
from tests.conftest import JobMaker

LAPTOP = LocalSite(cpus=2, memory_gib=64)
FOUR_GPUS = LocalSite(cpus=32, memory_gib=256, gpus=4, gpu_memory_gib=80)


def make_cluster(nodes: int, cpus: int, gpus: int = 0, small: int = 0) -> RaySite:
    """Equal machines, and one core on each of some small ones."""
    machines = tuple(
        Node(name=f"n{number}", cpus=cpus, memory_gib=64, gpus=gpus) for number in range(nodes)
    )
    machines += tuple(Node(name=f"s{number}", cpus=1, memory_gib=64) for number in range(small))
    return RaySite(address="auto", nodes=machines, gpu_memory_gib=80 if gpus else 0)


def plan_sweep(make: JobMaker, site: Site, trials: int, **overrides: Any) -> Plan:
    search = (
        f"search:\n  num_samples: {trials}\n  parameters:\n    train.learning_rate: "
        "{distribution: log_uniform_values, min: 1e-4, max: 1e-2}\n"
    )
    job = {"resources__pack": "auto", "train__per_device_train_batch_size": 2} | overrides
    return make_plan(make(search, **job), site, "sweep")


@pytest.mark.parametrize(
    ("site", "trials", "overrides", "processes", "pack", "cpus"),
    [
        (LAPTOP, 9, {}, 1, 9, 2),
        (LAPTOP, 40, {}, 1, 16, 2),
        (FOUR_GPUS, 16, {}, 4, 4, 8),
        (FOUR_GPUS, 6, {}, 4, 2, 8),
        (FOUR_GPUS, 200, {"resources__pack": 32}, 4, 32, 8),
        (FOUR_GPUS, 16, {"search__max_concurrent_trials": 9}, 4, 2, 8),
        (FOUR_GPUS, 16, {"search__max_concurrent_trials": 2}, 2, 1, 16),
        (make_cluster(2, 16, gpus=2), 16, {}, 4, 4, 1),
        (make_cluster(3, 8), 48, {}, 3, 16, 8),
        (make_cluster(2, 8), 10, {}, 2, 5, 5),
        (make_cluster(2, 8), 2, {}, 1, 2, 2),
        # Of unequal machines, those that give most cores: all processes have the same number.
        (make_cluster(2, 8, small=1), 17, {"resources__pack": 2}, 2, 2, 8),
        (make_cluster(1, 16, small=8), 40, {"resources__pack": 2}, 1, 2, 16),
    ],
)
def test_processes_and_their_trials(
    site: Site,
    trials: int,
    overrides: dict[str, Any],
    processes: int,
    pack: int,
    cpus: int,
    bert_job: JobMaker,
) -> None:
    plan = plan_sweep(bert_job, site, trials, **overrides)
    assert plan.packing
    assert plan.packing.trials == pack, plan.packing.reason
    placement = plan.placement
    assert (placement.slots, placement.pack, placement.cpus_per_worker) == (processes, pack, cpus)
    if pack > 1:
        assert plan.packing.unpacked
        assert "processes of Ray" in plan.strategy or placement.fits_one_process or processes == 1
        # It never takes more cores than the same trials alone.
        unpacked = plan.packing.unpacked
        assert processes * cpus <= unpacked.slots * unpacked.cpus_per_worker


@pytest.mark.parametrize(
    ("site", "trials", "overrides", "reason"),
    [
        (FOUR_GPUS, 4, {}, "there are 4 trials for 4 processes"),
        (LAPTOP, 4, {"resources__pack": "off"}, "resources.pack is off"),
        (LAPTOP, 4, {"train__per_device_train_batch_size": 64}, "above 160 a CPU gains nothing"),
        (
            FOUR_GPUS,
            16,
            {"search__max_concurrent_trials": 4},
            "two trials at once do not fit: limited by search.max_concurrent_trials",
        ),
    ],
)
def test_why_trials_are_not_packed(
    site: Site, trials: int, overrides: dict[str, Any], reason: str, bert_job: JobMaker
) -> None:
    plan = plan_sweep(bert_job, site, trials, **overrides)
    assert plan.packing
    assert plan.packing.trials == plan.placement.pack == 1
    assert reason in plan.packing.reason
    assert any(line.startswith("packing         none: ") for line in describe_plan(plan))


@pytest.mark.parametrize(("site", "pack"), [(FOUR_GPUS, 2), (LAPTOP, 1)])
def test_trials_that_cannot_be_packed_keep_a_gpu_to_themselves(
    site: Site, pack: int, bert_job: JobMaker
) -> None:
    """On a CPU, they would keep all cores."""
    search = "search:\n  method: grid\n  parameters:\n    lora.use_dora: {values: [false, true]}\n"
    search += "    train.learning_rate: {values: [1e-4, 3e-4, 1e-3, 3e-3]}\n"
    loaded = bert_job(search, resources__pack="auto", train__per_device_train_batch_size=2)
    plan = make_plan(loaded, site, "sweep")
    assert plan.packing
    assert plan.packing.trials == pack
    if pack > 1:
        lines = "\n".join(describe_plan(plan))
        assert "4 trials trained alone: DoRA, PiSSA and OLoRA are trained alone" in lines
        assert "up to 2 trials at once in each of 4 processes" in lines
    else:
        assert plan.packing.reason.startswith("some trials cannot be packed: DoRA")
