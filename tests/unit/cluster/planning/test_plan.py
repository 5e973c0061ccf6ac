"""What a plan says about the processes that will train."""

from __future__ import annotations

import pytest

from lorafleet.cluster.planning.plan import make_plan
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
