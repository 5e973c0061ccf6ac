"""Time and memory that earlier runs measured, as a plan takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cluster.planning.earlier_runs import read_earlier_trials
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.submission import write_run
from lorafleet.commands.plan import describe_plan
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.trust import remove_run_record
from lorafleet.jobs.sites.base import LocalSite
from tests.conftest import JobMaker

LAPTOP = LocalSite(cpus=8, memory_gib=8.0)
PAIR = """
search:
  method: grid
  scheduler: {type: none, max_t: 64}
  parameters: {lora.lora_r: {values: [2, 4]}}
"""


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def train(loaded: LoadedJob, folder: Path, *rows: dict[str, Any], site: str = "here") -> Run:
    """A run whose only trial has these rows of metrics."""
    plan = make_plan(loaded, LAPTOP, "train").model_copy(update={"site": site})
    run = write_run(plan, loaded, folder)
    trial = run.path / "trials" / "0a"
    trial.mkdir(parents=True)
    resolved = plan.trials[0].resolved
    (trial / "params.json").write_text(json.dumps({"index": 0, "resolved": resolved}))
    (trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def measured(samples: int, seconds: float, peak: float) -> dict[str, Any]:
    return {"step": samples // 8, "samples": samples, "train_seconds": seconds,
            "eval_seconds": seconds / 4, "peak_memory_gib": peak}  # fmt: skip


def plan_again(loaded: LoadedJob, site: str = "here") -> Any:
    earlier = read_earlier_trials(loaded.job.model.model_name_or_path, site)
    return make_plan(loaded, LAPTOP, "sweep" if loaded.job.search else "train", earlier=earlier)


def test_the_time_of_a_row_is_that_of_earlier_trials(tmp_path: Path, bert_job: JobMaker) -> None:
    loaded = bert_job()
    assert plan_again(loaded).rate is None
    run = train(loaded, tmp_path, measured(80, 2.0, 1.0), measured(160, 4.0, 1.0))
    plan = plan_again(loaded)
    assert plan.rate.seconds_per_row == pytest.approx((4.0 + 1.0) / 160)
    assert plan.rate.source == run.id
    (line,) = [line for line in describe_plan(plan) if line.startswith("duration")]
    seconds = plan.worst_samples * 5 / 160
    assert line == (
        f"duration        {seconds:.1f} s with 1 trial in parallel, at 31.2 ms of a process per "
        f"row (measured: {run.id}); start-up comes on top"
    )
    # Another rank costs about the same; another length, batch or site does not.
    assert plan_again(bert_job(lora__lora_r=8)).rate == plan.rate
    assert plan_again(bert_job(model__max_length=8)).rate is None
    assert plan_again(bert_job(train__per_device_train_batch_size=2)).rate is None
    assert plan_again(loaded, "cluster").rate is None
    # Other rows are used with a remark, until there is a run with the same ones.
    other_rows = bert_job(data__split_seed=7)
    assert plan_again(other_rows).rate.source == f"{run.id}, with other rows"
    second = train(other_rows, tmp_path, measured(100, 4.0, 1.0))
    again = plan_again(other_rows).rate
    assert (again.seconds_per_row, again.source) == (pytest.approx(0.05), second.id)


def test_memory_that_was_measured_decides(tmp_path: Path, bert_job: JobMaker) -> None:
    """The estimate of 8 GiB allows one trial where 1.5 GiB were needed."""
    search = bert_job(PAIR)
    plan = plan_again(search)
    expected = plan.memory.expected
    train(bert_job(lora__lora_r=2), tmp_path, measured(80, 2.0, 0.5), measured(160, 4.0, 0.4))
    plan = plan_again(search)
    assert [trial.memory.measured for trial in plan.trials] == [0.5, None]  # a smaller rank
    assert plan.memory.required == expected
    train(bert_job(lora__lora_r=4), tmp_path, measured(80, 2.0, 0.6))
    plan = plan_again(search)
    assert [trial.memory.measured for trial in plan.trials] == [0.6, 0.6]
    assert plan.memory.required == pytest.approx(0.66)
    assert "earlier trials of this shape had at most 0.6, which decides" in " ".join(
        describe_plan(plan)
    )
    tight = LocalSite(cpus=8, memory_gib=1.4)
    earlier = read_earlier_trials(search.job.model.model_name_or_path, "here")
    assert make_plan(search, tight, "sweep").placement.slots == 1
    assert make_plan(search, tight, "sweep", earlier=earlier).placement.slots == 2


def test_foreign_and_damaged_runs_are_not_read(tmp_path: Path, bert_job: JobMaker) -> None:
    loaded = bert_job()
    strangers = train(loaded, tmp_path, measured(80, 2.0, 1.0))
    remove_run_record(strangers.path)
    damaged = train(loaded, tmp_path, measured(80, 2.0, 1.0))
    (damaged.path / "trials" / "0a" / "metrics.jsonl").write_text('{"step": "x"}\n')
    halved = train(loaded, tmp_path, measured(80, 2.0, 1.0))
    (halved.path / "plan.json").write_text("{")
    empty = train(loaded, tmp_path)
    assert plan_again(loaded).rate is None
    assert empty.path.is_dir()
