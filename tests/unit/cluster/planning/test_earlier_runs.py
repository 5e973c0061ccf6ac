"""Time and memory that earlier runs measured, as a plan takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cluster.planning.earlier_runs import read_earlier_trials
from lorafleet.cluster.planning.memory import RUNTIME_CUDA_GIB
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.submission import write_run
from lorafleet.commands.plan import describe_plan
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.plan import TrainingLoad
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.trust import remove_run_record
from lorafleet.jobs.sites.base import LocalSite, Node, RaySite
from lorafleet.jobs.trials.trial_id import compute_provenance
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


def train(
    loaded: LoadedJob,
    folder: Path,
    *rows: dict[str, Any],
    oom: int = 0,
    **placement: Any,
) -> Run:
    """A run whose only trial has these rows of metrics."""
    plan = make_plan(loaded, LAPTOP, "train")
    plan = plan.model_copy(update={"placement": plan.placement.model_copy(update=placement)})
    run = write_run(plan, loaded, folder)
    digests = compute_provenance(loaded.job).data_sha256
    (run.path / "facts.json").write_text(json.dumps({"data_sha256": digests}))
    trial = run.path / "trials" / "0a"
    trial.mkdir(parents=True)
    resolved = plan.trials[0].resolved
    (trial / "params.json").write_text(json.dumps({"index": 0, "resolved": resolved}))
    (trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (trial / "status.json").write_text(json.dumps({"state": "finished", "retries": {"oom": oom}}))
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
    # Another rank costs about the same; another length, batch, site or number of cores does not.
    assert plan_again(bert_job(lora__lora_r=8)).rate == plan.rate
    assert plan_again(bert_job(model__max_length=8)).rate is None
    assert plan_again(bert_job(train__per_device_train_batch_size=2)).rate is None
    assert plan_again(bert_job(resources__cpus_per_worker=2)).rate is None
    assert plan_again(loaded, "cluster").rate is None
    # Other rows are used with a remark, until there is a run with the same ones.
    other_rows = bert_job(data__split_seed=7)
    assert plan_again(other_rows).rate.source == f"{run.id}, with other rows"
    second = train(other_rows, tmp_path, measured(100, 4.0, 1.0))
    again = plan_again(other_rows).rate
    assert (again.seconds_per_row, again.source) == (pytest.approx(0.05), second.id)


def test_rows_that_were_changed_in_place_are_others(tmp_path: Path, bert_job: JobMaker) -> None:
    loaded = bert_job()
    run = train(loaded, tmp_path, measured(640, 2.0, 0.5))
    assert plan_again(loaded).memory.measured == 0.5
    path = Path(str(loaded.job.data.train_file))
    text = path.read_text()
    try:
        path.write_text(text + text.splitlines()[0] + "\n")
        plan = plan_again(loaded)
        assert plan.memory.measured is None
        assert plan.rate.source == f"{run.id}, with other rows"
    finally:
        path.write_text(text)


def test_memory_that_was_measured_decides(tmp_path: Path, bert_job: JobMaker) -> None:
    """The estimate allows one trial at a time; the measured memory allows two."""
    search = bert_job(PAIR)
    plan = plan_again(search)
    expected = plan.memory.expected
    train(bert_job(lora__lora_r=2), tmp_path, measured(80, 2.0, 0.5), measured(640, 4.0, 0.4))
    plan = plan_again(search)
    assert [trial.memory.measured for trial in plan.trials] == [0.5, None]  # a smaller rank
    assert plan.memory.required == expected
    train(bert_job(lora__lora_r=4), tmp_path, measured(640, 2.0, 0.6))
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


@pytest.mark.parametrize(
    "how",
    [
        {"samples": 8},  # it did not see its longest row
        {"oom": 1},  # with half the micro-batch that its values say
        {"strategy": "fsdp"},
        {"workers": 2},
        {"gpus_per_worker": 1},
    ],
    ids=str,
)
def test_peaks_that_do_not_belong_to_the_shape(
    tmp_path: Path, bert_job: JobMaker, how: dict[str, Any]
) -> None:
    loaded = bert_job()
    samples = how.pop("samples", 640)
    train(loaded, tmp_path, measured(samples, 2.0, 0.5), **how)
    assert plan_again(loaded).memory.measured is None
    train(loaded, tmp_path, measured(640, 2.0, 0.7))
    assert plan_again(loaded).memory.measured == 0.7


def test_a_sharded_peak_does_not_choose_full_copies(tmp_path: Path, bert_job: JobMaker) -> None:
    """Four processes that shard the weights needed little each; four full copies do not fit."""
    loaded = bert_job(resources__workers_per_node=4)
    peak = measured(640, 2.0, 0.01)
    train(loaded, tmp_path, peak, workers=4, strategy="fsdp", gpus_per_worker=1)
    nodes = (Node(name="n", cpus=8, memory_gib=64.0, gpus=4),)
    site = RaySite(address="auto", nodes=nodes, gpu_memory_gib=0.5)
    earlier = read_earlier_trials(loaded.job.model.model_name_or_path, "here")
    assert make_plan(loaded, site, "train").placement.strategy == "fsdp"
    plan = make_plan(loaded, site, "train", earlier=earlier)
    assert plan.placement.strategy == "fsdp"
    assert plan.memory is not None
    # CUDA's own memory is no part of what was measured.
    assert plan.memory.measured == pytest.approx(0.01 + RUNTIME_CUDA_GIB)


def test_the_duration_counts_waves_and_the_longest_trial() -> None:
    load = TrainingLoad(
        slots=8, workers=1, waves=2, longest_rows=100, expected_rows=450, worst_rows=900
    )
    # Nine trials in eight slots last as long as two; a search cannot be faster than one trial.
    assert load.compute_seconds(0.5) == (50.0, 100.0)
    pair = load.model_copy(update={"workers": 2, "expected_rows": 900})
    assert pair.compute_seconds(0.5) == (28.125, 50.0)


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


def test_what_a_run_measured_about_packs_is_shown(tmp_path: Path, bert_job: JobMaker) -> None:
    packed = {"resources__pack": "auto", "train__per_device_train_batch_size": 2}
    loaded = bert_job(PAIR, **packed)
    run = train(bert_job(**packed), tmp_path, measured(80, 2.0, 1.0) | {"pack": 2})
    choice = {"trials": 2, "trials_per_pass": 2, "together": {"1": 300.0, "2": 500.0}}
    sentence = "up to 2 trials at once: 2 trials in a forward pass train 500 tokens/s"
    (run.path / "pack.json").write_text(json.dumps(choice | {"sentence": sentence}))
    plan = plan_again(loaded)
    assert plan.packing.trials == 2
    assert plan.packing.earlier == f"{run.id} measured: {sentence}"
    lines = describe_plan(plan)
    place = next(number for number, line in enumerate(lines) if line.startswith("packing"))
    assert lines[place + 1] == f"                {run.id} measured: {sentence}"
    assert plan.rate is None  # a packed trial's time says nothing of a trial alone
    assert plan.memory.measured is None
    other = bert_job(PAIR, **packed | {"train__per_device_train_batch_size": 4})
    assert plan_again(other).packing.earlier is None
    (run.path / "pack.json").write_text(json.dumps({"measuring": 2, "together": {"1": 300.0}}))
    assert plan_again(loaded).packing.earlier is None  # it died while it measured
