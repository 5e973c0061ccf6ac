"""Comparisons as a user runs them: arms that are trained and arms that are not, in one table, on
real Ray.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from lorafleet.deployment.export import export
from lorafleet.evaluation.report.model_of_run import select_model
from lorafleet.evaluation.report.rating_sheet import build_run_sheet
from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.report import Report
from lorafleet.jobs.runs.run import Run, RunState
from tests.conftest import JobMaker, lorafleet, opinions, write_rows
from tests.export.test_targets import trained
from tests.processes.conftest import begin, interrupt, newest, sweep, wait_for

ARMS = """
compare:
  arms:
    base: {method: base}
    lora: {method: lora, parameters: {train.learning_rate: [3e-3, 1e-2]}}
    full: {method: full, set: {train.learning_rate: 3e-3}}
    hybrid: {adapter_of: lora, quantization: int8}
  budget: {samples: 1280}
  method: grid
  seeds: 2
  inference: {rounds: 1, rows: 4}
"""


def test_arms_end_in_a_decision(bert_job: JobMaker, place: Path) -> None:
    run, done = sweep(bert_job(ARMS), place, "--wait", command="compare")
    said = done.stdout + done.stderr
    assert done.returncode == ExitCode.OK, said + (run.path / "logs" / "driver.log").read_text()
    raw = json.loads((run.path / "report" / "report.json").read_text())
    report = Report.model_validate_json(json.dumps(raw))
    assert run.state is RunState.FINISHED
    arms = {arm["arm"]: arm for arm in raw["arms"]}
    assert list(arms) == ["base", "lora", "full", "hybrid"]
    for arm in arms.values():
        assert {
            "arm",
            "metrics",
            "interval",
            "train_seconds",
            "gpu_hours",
            "peak_memory_gib",
            "inference",
        } <= set(arm)
        assert (
            arm["interval"]["accuracy"][0]
            <= arm["metrics"]["accuracy"]
            <= arm["interval"]["accuracy"][1]
        )
        assert arm["inference"]["latency_ms"] > 0
        assert arm["inference"]["samples_per_second"] > 0
        assert arm["inference"]["peak_memory_gib"] > arm["inference"]["begun_gib"]
        assert arm["inference"]["ttft_ms"] is None
    assert (
        set(arms["lora"]["seeds"])
        == set(arms["hybrid"]["seeds"])
        == set(arms["full"]["seeds"])
        == {"42", "43"}
    )
    assert (arms["base"]["train_seconds"], arms["base"]["tried"], arms["lora"]["tried"]) == (
        0.0,
        0,
        2,
    )
    assert arms["hybrid"]["train_seconds"] == arms["lora"]["train_seconds"] > 0
    assert arms["full"]["trainable_parameters"] > 5 * arms["lora"]["trainable_parameters"]
    # INT8 rounds the base: the hybrid's answers are the adapter's own, or nearly.
    assert abs(arms["hybrid"]["metrics"]["accuracy"] - arms["lora"]["metrics"]["accuracy"]) <= 0.06
    assert max(arms["lora"]["metrics"]["accuracy"], arms["full"]["metrics"]["accuracy"]) > 0.65
    assert len(raw["pairs"]) == 6
    assert report.recommendation.arm in arms
    assert report.recommendation.sentence in " ".join(said.split())
    assert (
        len([row for row in report.trials if row.arm == "lora"]) == 3
    )  # two that were searched, one more seed
    with (run.path / "report" / "arms.csv").open() as table:
        assert [line["arm"] for line in csv.DictReader(table)] == list(arms)
    for name in ("lora", "full"):
        assert (run.get_arm(name).path / "wandb").is_dir()
    again = lorafleet("report", "--format", "json", cwd=place)
    assert json.loads(again.stdout)["arms"] == raw["arms"]

    # Judged once more on other rows, with another's adapter: nothing is trained, and what is alike
    # is the same.
    rows = write_rows(place / "more.jsonl", opinions(80, 9))
    adapter = run.path / arms["lora"]["weights"]
    judged = lorafleet("evaluate", run.id, adapter, "--data", rows, "--format", "json", cwd=place)
    assert judged.returncode == ExitCode.OK, judged.stderr
    other = json.loads(judged.stdout)
    assert other["rows_count"]["test"] == 80
    assert not other["trials"]
    both = [arm["metrics"]["accuracy"] for arm in other["arms"]]
    assert len(both) == 2
    assert other["pairs"][0]["difference"] == pytest.approx(both[0] - both[1])

    # And the two runs side by side: they were not judged on the same rows.
    beside = lorafleet(
        "compare", run.id, other["run"], "--format", "json", "--output", "side", cwd=place
    )
    assert beside.returncode == ExitCode.OK, beside.stderr
    first, second = json.loads(beside.stdout)["arms"]
    assert (first["comparable"], second["comparable"]) == (True, False)
    assert f"not ranked: the held-out rows differ from {run.id}'s" in second["remarks"]
    assert "not ranked" in (place / "side" / "report.html").read_text()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_models_of_every_kind_are_judged_together(
    kind: str,
    bert_job: JobMaker,
    llama_job: JobMaker,
    tiny_bert: Path,
    tiny_llama: Path,
    place: Path,
) -> None:
    """A run, an adapter's folder, a merged model, and a base that is no run's; one process takes
    the whole machine.
    """
    if kind == "bert":
        job, base, metric = bert_job(train__max_steps=60), tiny_bert, "accuracy"
    else:
        asked = "evaluate: {metrics: [rouge1], max_new_tokens: 3}"
        job, base, metric = llama_job(asked, train__max_steps=60), tiny_llama, "rouge1"
    run = trained(job, place)
    export(select_model(run), ["merged"], place / "out", lambda _: None)
    models = (run.id, run.get_trial("aaaa").weights, place / "out" / "merged", base)
    more = ("--measure", f"resources.cpus_per_worker={os.cpu_count()}", "--format", "json")
    judged = lorafleet("evaluate", *models, *more, cwd=place)
    assert judged.returncode == ExitCode.OK, (
        judged.stderr + (newest(place).path / "logs" / "driver.log").read_text()
    )
    found = json.loads(judged.stdout)
    arms = found["arms"]
    assert len(arms) == 4
    scores = [arm["metrics"][metric] for arm in arms]
    assert scores[1:3] == pytest.approx([scores[0]] * 2, abs=0.02)
    assert scores[3] < scores[0] - 0.1
    assert all(arm["inference"]["latency_ms"] > 0 for arm in arms)
    assert not found["trials"]
    loads = [
        files.read_json(record)["base_loads"]
        for arm in arms[:2]
        for record in newest(place).get_arm(arm["arm"]).path.rglob("test.json")
    ]
    assert loads == [1, 1]  # the base stayed, and adapters went on and off it


WRITERS = """
evaluate: {metrics: [rouge1, exact_match], max_new_tokens: 3}
compare:
  arms:
    base: {method: base}
    lora: {method: lora, set: {train.learning_rate: 1e-2}}
  budget: {device_seconds: 1.5}
  metric: rouge1
  seeds: 2
  rule: pareto
  cost: latency_ms
  inference: {rounds: 2, rows: 2, new_tokens: 4}
"""


@pytest.mark.long
def test_arms_that_write_are_shown_side_by_side(llama_job: JobMaker, place: Path) -> None:
    run, done = sweep(llama_job(WRITERS), place, command="compare")
    assert done.returncode == ExitCode.OK, (
        done.stderr + (run.path / "logs" / "driver.log").read_text()
    )
    report = Report.model_validate_json((run.path / "report" / "report.json").read_text())
    assert report.arms is not None
    base, lora = report.arms
    assert (lora.metrics["rouge1"] or 0) > (base.metrics["rouge1"] or 0)
    assert base.inference is not None
    assert (base.inference.tokens_per_second or 0) > 0
    assert base.inference.rounds == 2
    assert set(base.inference.spread) >= {"ttft_ms", "tokens_per_second"}
    pace = files.read_json(run.get_arm("lora").path / "pace.json")["seconds_per_row"]
    trained = [row for row in report.trials if row.arm == "lora"]
    assert [row.samples for row in trained] == [trained[0].samples] * 2
    assert abs(trained[0].samples - 1.5 / pace) <= 4  # to the next whole step
    assert set(report.samples[0].answers) == {"base", "lora"}
    assert "Side by side" in (run.path / "report" / "report.html").read_text()
    assert build_run_sheet(run, "ann", 5)


@pytest.mark.long
def test_a_comparison_goes_on_where_it_was_stopped(bert_job: JobMaker, place: Path) -> None:
    longer = ARMS.replace("samples: 1280", "samples: 9600")
    process = begin(bert_job(longer), place, "--wait", command="compare")
    run = Run(
        wait_for(
            lambda: next((place / "runs").glob("*"), None) if (place / "runs").is_dir() else None
        )
    )

    def trained() -> list[Path]:
        return [trial.path for trial in run.list_trials() if trial.state.has_ended]

    wait_for(lambda: trained() and len(run.list_trials()) > 1)
    interrupt(process)
    assert process.wait(timeout=120) == ExitCode.INTERRUPTED
    assert newest(place).state is RunState.STOPPED
    before = {path: (path / "status.json").stat().st_mtime_ns for path in trained()}
    done = lorafleet("resume", run.id, "--wait", cwd=place)
    assert done.returncode == ExitCode.OK, (
        done.stderr + (run.path / "logs" / "driver.log").read_text()
    )
    report = Report.model_validate_json((run.path / "report" / "report.json").read_text())
    assert report.arms is not None
    assert all(arm.metrics for arm in report.arms)
    assert {path: (path / "status.json").stat().st_mtime_ns for path in before} == before
