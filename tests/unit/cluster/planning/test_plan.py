"""What a plan says about the processes that will train."""

from __future__ import annotations

import pytest

from lorafleet.cluster.planning.plan import make_plan
from lorafleet.commands.plan import describe_plan
from lorafleet.jobs.errors import JobFileError
from lorafleet.jobs.sites.base import LocalSite, Node, RaySite, Site
from tests.conftest import JobMaker

PAIR = """
search:
  method: grid
  scheduler: {type: none, max_t: 64}
  parameters: {train.learning_rate: {values: [1e-3, 3e-3]}}
"""
LAPTOP = LocalSite(cpus=2, memory_gib=16.0)
CLUSTER = RaySite(address="auto", nodes=(Node(name="n0", cpus=8, memory_gib=64.0),))


@pytest.mark.parametrize(
    ("site", "search", "workers", "text"),
    [
        (LAPTOP, "", 1, "one process, the run's own, trains one trial after another, without Ray"),
        (LAPTOP, PAIR, 1, "one process per trial, in warm actors that keep the base model loaded"),
        (CLUSTER, "", 1, "one process per trial, in warm actors that keep the base model loaded"),
        (LAPTOP, "", 2, "ddp: 2 processes per trial, each trial in a Ray Train worker group"),
    ],
    ids=["train", "sweep", "train-on-a-cluster", "two-processes"],
)
def test_the_plan_says_which_processes_train(
    bert_job: JobMaker, site: Site, search: str, workers: int, text: str
) -> None:
    loaded = bert_job(search, resources__workers_per_node=workers)
    plan = make_plan(loaded, site, "sweep" if search else "train")
    assert plan.strategy.startswith(text)


def test_trials_that_share_a_gpu_have_its_memory_by_parts(bert_job: JobMaker) -> None:
    site = LocalSite(cpus=8, memory_gib=64, gpus=1, gpu_memory_gib=1.5)
    whole = make_plan(bert_job(PAIR), site, "sweep")
    shared = make_plan(
        bert_job(PAIR, resources__gpus_per_trial=0.5, resources__pack="auto"), site, "sweep"
    )
    assert whole.memory
    assert 0.75 < whole.memory.required < 1.5
    assert not [note for note in whole.notes if "GiB" in note]
    (note,) = [note for note in shared.notes if "GiB" in note]
    assert "but its share of a GPU is 0.8: raise resources.gpus_per_trial from 0.5, or use" in note
    assert (whole.placement.slots, shared.placement.slots) == (1, 2)
    assert shared.packing
    assert shared.packing.reason == "2 processes share a GPU (resources.gpus_per_trial)"
    (line,) = [line for line in describe_plan(shared) if line.startswith("placement")]
    assert "2 trials in parallel, each 1 process with 4 CPU cores and 1/2 of a GPU;" in line


def test_arms_do_not_share_a_gpu(bert_job: JobMaker) -> None:
    """Their times are compared."""
    arms = "compare:\n  arms: {lora: {method: lora}, full: {method: full}}\n"
    loaded = bert_job(arms, resources__gpus_per_trial=0.5)
    site = LocalSite(cpus=8, memory_gib=64, gpus=1, gpu_memory_gib=80)
    with pytest.raises(JobFileError, match=r"gpus_per_trial is 0.5, but must be 1 in a comparison"):
        make_plan(loaded, site, "compare")
