"""A run's files, and what is read from them: no service, no torch."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lorafleet.cluster import run_index as store
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.submission import write_run
from lorafleet.commands.followed_run import FollowedRun
from lorafleet.commands.view import collect_trials
from lorafleet.evaluation.metrics.predictions import Classified, RowResults, serialize
from lorafleet.evaluation.render.forms import (
    render_html,
    render_markdown,
    render_table_csv,
    render_terminal,
)
from lorafleet.evaluation.render.trial_table import build_columns, build_terminal_columns
from lorafleet.evaluation.render.write import render_report_json, write_report
from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.recommend_trial import SearchRule, recommend
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.plan import read_plan
from lorafleet.jobs.runs.records import Progress
from lorafleet.jobs.runs.report import Recommendation, Row
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.sites.base import LocalSite
from lorafleet.tuning.progress import ProgressBoard
from lorafleet.tuning.trial_table import TrialTable
from tests.conftest import JobMaker, lorafleet_here

EVIL = "<script>alert('x')</script>"
BASE = {"validation": 0.5, "test": 0.49}
SEARCH = """
search:
  num_samples: 3
  scheduler: {max_t: 72, reduction_factor: 3}
  parameters: {lora.lora_r: {values: [2, 4, 8]}, train.seed: {values: [1, 2]}}
"""


def test_a_torn_last_line_is_passed_over_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    files.append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    files.append_jsonl(path, {"step": 3})
    assert [row["step"] for row in files.read_jsonl(path)] == [1, 3]
    assert all(row["schema_version"] == 1 for row in files.read_jsonl(path))


def _rewrite_for_ever(path: Path) -> None:
    number = 0
    while True:
        number += 1
        files.write_json(path, {"number": number, "padding": "x" * 50_000})


def test_a_writer_killed_at_any_time_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    for delay in (0.05, 0.11, 0.17):
        writer = multiprocessing.get_context("spawn").Process(
            target=_rewrite_for_ever, args=(path,)
        )
        writer.start()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(int(writer.pid or 0), signal.SIGKILL)
        writer.join()
        assert len(json.loads(path.read_text())["padding"]) == 50_000


def test_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert files.read_json(tmp_path / "x.json") == {
        "schema_version": 1,
        "a": None,
        "b": [None, 1.0],
    }


def test_a_run_moves_only_where_it_can(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    run.mark_running()
    assert run.is_alive()
    run.set_state(RunState.FINISHED)
    with pytest.raises(RunError, match="is finished and cannot become stopped"):
        run.set_state(RunState.STOPPED)


def test_a_run_whose_driver_was_killed_is_not_alive(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    sleeper = subprocess.Popen(["sleep", "60"])
    run.mark_running()
    files.write_json(run.path / "status.json", run.read_status().to_dict() | {"pid": sleeper.pid})
    assert not run.is_alive()  # another process has that number: it began at another time
    sleeper.kill()
    sleeper.wait()


@pytest.fixture
def finished(bert_job: JobMaker, tmp_path: Path) -> Run:
    """A run as a sweep leaves it, written by the functions that a sweep writes it with."""
    loaded = bert_job(SEARCH, search__tolerance=0.02)
    site = LocalSite(cpus=2, memory_gib=8.0)
    run = write_run(make_plan(loaded, site, "sweep"), loaded, tmp_path / "runs")
    files.write_json(run.path / "facts.json", {
        "rows": {"train": 256, "validation": 64, "test": 64}, "labels": [EVIL, "b"], "warnings": [EVIL],
        "versions": {"torch": "2"}, "data_sha256": {"train": "ab"}, "model_revisions": {},
    })  # fmt: skip
    run.mark_running()
    scores = {
        "aaaa": (0.70, 1000, "finished"),
        "bbbb": (0.71, 4000, "finished"),
        "cccc": (0.30, 500, "stopped"),
    }
    for index, (name, (score, size, state)) in enumerate(scores.items()):
        trial = run.add_trial(name, index, {"lora.lora_r": 2 ** (index + 1), "train.seed": 1})
        for step in (1, 3):
            value = score - 0.01 * (3 - step)
            files.append_jsonl(trial.path / "metrics.jsonl", {
                "step": step, "samples": 8 * step, "evaluated": True, "rung": step // 3, "accuracy": value, "f1": value,
                "precision": value, "recall": value, "loss": 1 - value, "train_loss": float("nan") if index else 0.5,
                "intervals": {"accuracy": [value - 0.05, value + 0.05]}, "train_seconds": step, "eval_seconds": 1,
                "tokens": 100, "tokens_per_second": 50.0, "samples_per_second": 8.0, "peak_memory_gib": 0.5,
                "trainable_parameters": size,
            })  # fmt: skip
        trial.set_state(TrialState(state), rung=1)
        (trial.path / "adapter").mkdir()
        files.write_bytes(trial.validation_results, serialize(right(score, 3000), 3))
    broken = run.add_trial("dddd", 3, {"lora.lora_r": 2, "train.seed": 2})
    broken.set_state(
        TrialState.FAILED, failure={"failure_class": "nan", "sentence": f"loss {EVIL} = | `x`"}
    )
    test = {"accuracy": 0.69, "f1": 0.69, "precision": 0.7, "recall": 0.7, "loss": 0.6}
    files.write_json(
        run.get_trial("aaaa").path / "test.json", {"test": {"metrics": test, "intervals": {}}}
    )
    base = {
        split: {"metrics": {"accuracy": score}, "intervals": {}} for split, score in BASE.items()
    }
    files.write_json(run.path / "report" / "base.json", base)
    run.set_state(RunState.FINISHED, wall_seconds=12.0)
    return run


def test_the_report_has_the_shape_that_is_promised(finished: Run) -> None:
    data = json.loads(render_report_json(build_report(finished)))
    assert set(data) >= {"run", "base", "trials", "recommendation", "schema_version"}
    assert set(data["base"]) >= {"metrics", "test_metrics"}
    assert data["base"]["test_metrics"] == {"accuracy": 0.49}
    trial = data["trials"][0]
    promised = {"trial_id", "state", "rung", "params", "metrics", "train_seconds", "samples_per_second",
                "tokens_per_second", "peak_memory_gib", "trainable_parameters", "test_metrics"}  # fmt: skip
    assert set(trial) >= promised
    assert set(trial["metrics"]) == {"accuracy", "f1", "precision", "recall", "loss"}
    states = {
        row["trial_id"]: (row["state"], row["rung"], row["test_metrics"] is None)
        for row in data["trials"]
    }
    assert states == {"aaaa": ("finished", 1, False), "bbbb": ("finished", 1, True), "cccc": ("stopped", 1, True),
                      "dddd": ("failed", None, True)}  # fmt: skip
    assert set(data["recommendation"]) >= {"trial_id", "rule", "sentence"}


def test_the_speed_of_evaluation_stands_beside_that_of_training(finished: Run) -> None:
    """Two evaluations of 64 rows in one second together: half a second each, 128 rows and 4 passes
    of 32 a second.
    """
    row = build_report(finished).get_row("aaaa")
    assert (row.eval_runtime, row.eval_samples_per_second, row.eval_steps_per_second) == (
        0.5,
        128.0,
        4.0,
    )
    assert row.seconds_per_answer is None
    assert "evaluated rows/s" in render_html(build_report(finished))


def test_the_smallest_that_is_shown_to_lose_little_is_recommended(finished: Run) -> None:
    found = build_report(finished).recommendation
    assert (
        found.trial_id == "aaaa"
    )  # a quarter of the parameters, and 0.01 less on the same 3,000 rows
    assert (
        "is accuracy 0.700 [0.650, 0.750]; the best is accuracy 0.710 [0.660, 0.760] of bbbb"
        in found.sentence
    )
    assert "It loses 0.010 in accuracy, at most 0.01" in found.sentence


@pytest.mark.parametrize(
    "damage",
    [
        "missing",
        "of another step",
        "no tensors",
        "a class too many",
        "other rows",
        "no numbers",
        "a million classes",
    ],
)
def test_the_best_is_recommended_where_nothing_is_known_of_each_row(
    finished: Run, damage: str
) -> None:
    """As of runs of earlier versions."""
    path = finished.get_trial("aaaa").validation_results
    strange = right(0.7, 3000)
    if damage == "missing":
        path.unlink()
    elif damage == "of another step":
        files.write_bytes(path, serialize(strange, 1))
    elif damage == "no tensors":
        files.write_bytes(path, b"\xff" * 100)
    elif damage == "no numbers":
        assert strange.classified is not None
        files.write_bytes(
            path, serialize(replace(strange, classified=None, loss_R=np.full(3000, np.nan)), 3)
        )
    elif damage == "a million classes":
        assert strange.classified is not None
        many = replace(strange, classified=replace(strange.classified, classes=1_000_000))
        files.write_bytes(path, serialize(many, 3))
    elif damage == "other rows":
        files.write_bytes(path, serialize(right(0.7, 20), 3))
    else:
        assert strange.classified is not None
        files.write_bytes(
            path, serialize(replace(strange, classified=replace(strange.classified, classes=1)), 3)
        )
    found = build_report(finished).recommendation
    assert found.trial_id == "bbbb"
    assert (
        "There are no comparable per-row results of aaaa (not stored or not finite)"
        in found.sentence
    )


def row(name: str, score: float, size: int, state: str = "finished", half: float = 0.02) -> Row:
    return Row.model_validate(
        {"trial_id": name, "state": state, "metrics": {"accuracy": score}, "trainable_parameters": size,
         "intervals": {"accuracy": (score - half, score + half)}, "train_seconds": 1.0}
    )  # fmt: skip


def right(share: float, rows: int = 1000) -> RowResults:
    """What a classifier did that is right on the first rows."""
    wrong = (np.arange(rows) >= share * rows).astype(int)
    said = Classified(np.zeros(rows, dtype=int), wrong, np.ones(rows), 2)
    return RowResults(np.ones(rows), np.ones(rows, dtype=int), said)


def test_a_metric_that_is_no_number_costs_only_its_trial() -> None:
    """Its loss diverged: it cannot be shown to keep it, and the others are compared all the same."""
    rows = [row("a", 0.90, 900), row("b", 0.898, 100), row("c", 0.898, 50)]
    results = {one.trial_id: right(one.metrics["accuracy"] or 0) for one in rows}
    results["c"] = replace(results["c"], loss_R=np.full(1000, np.nan))
    tolerances = {"accuracy": 0.02, "loss": 0.1}
    rule = SearchRule("accuracy", "maximize", tolerances, also=(("loss", "minimize"),))
    found = recommend(rows, rule, results)
    assert found.trial_id == "b"
    assert (
        "There are no comparable per-row results of c (not stored or not finite)" in found.sentence
    )


def test_recommendations_by_hand() -> None:
    def found(*rows: Row, keep: int = 5, stored: bool = True, count: int = 1000) -> Recommendation:
        results = {
            one.trial_id: right(one.metrics["accuracy"] or 0, count) for one in rows if stored
        }
        return recommend(
            list(rows), SearchRule("accuracy", "maximize", {"accuracy": 0.02}, keep=keep), results
        )

    assert found(row("a", 0.90, 900), row("b", 0.80, 100)).trial_id == "a"  # b is shown to be worse
    assert found(row("a", 0.90, 900), row("b", 0.898, 100)).trial_id == "b"
    assert found(row("a", 0.90, 900), row("b", 0.898, 100), stored=False).trial_id == "a"
    assert (
        found(row("a", 0.90, 900), row("b", 0.89, 100), count=100).trial_id == "a"
    )  # 100 rows do not show it
    assert (
        found(row("a", 0.90, 900), row("b", 0.898, 100), keep=1).trial_id == "a"
    )  # b's adapter is not on disk
    assert found(row("a", 0.80, 900), row("cut", 0.81, 100, "stopped")).trial_id == "a"
    alone = found(row("cut", 0.81, 100, "stopped"))
    assert alone.trial_id == "cut"
    assert alone.sentence.endswith(
        "It is the only configuration with a score, so there was nothing to choose from."
    )
    ended = found(row("a", 0.81, 100), row("cut", 0.81, 100, "stopped")).sentence
    assert ended.endswith(
        "It is the only configuration trained to the end, so there was nothing to choose from."
    )
    assert found(row("x", 0.9, 1, "failed")).trial_id is None
    said = found(row("a", 0.90, 100), row("b", 0.898, 900)).sentence
    assert (
        "1 other configuration is within the tolerance, but not clearly cheaper (100 trained "
        "parameters" in said
    )
    faster = row("b", 0.898, 900).model_copy(update={"train_seconds": 0.9})
    assert (
        found(row("a", 0.90, 900), faster).trial_id == "a"
    )  # a tenth of a second of noise decides nothing
    assert (
        found(row("a", 0.90, 900), row("b", 0.90, 100)).trial_id == "b"
    )  # a tie goes to the cheapest
    few = found(row("a", 0.8, 900), row("b", 0.6, 100), count=5)
    assert (few.trial_id, few.decided) == ("a", False)
    assert few.sentence.startswith(
        "Too few rows to decide: there are 5 validation rows, but at least 6 are needed"
    )
    assert found().trial_id is None


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_is_self_contained_and_escapes_what_is_not_ours(finished: Run) -> None:
    page = render_html(build_report(finished))
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    parsed = _Page()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert all(source.startswith("data:") for source in parsed.sources)
    assert parsed.tags.count("img") == 3
    assert "default-src 'none'" in page


def test_no_text_of_the_data_becomes_markup_elsewhere(finished: Run) -> None:
    report = build_report(finished)
    assert "<script>" not in render_markdown(report)
    assert "\\|" in render_markdown(report)
    assert (
        render_table_csv(report)
        .splitlines()[0]
        .startswith("trial_id,state,rung,recommended,lora.lora_r,train.seed,accuracy")
    )
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_terminal(report, 200))
    assert "aaaa" in console.export_text()


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_no_number_is_cut_in_a_narrow_terminal(finished: Run, width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_terminal(build_report(finished), width))
    shown = console.export_text()
    assert "…" not in shown
    assert "0.700 [0.65, 0.75]" in shown
    assert "0.690" in shown


def test_the_recommended_adapter_gets_a_card(finished: Run) -> None:
    write_report(finished)
    card = (finished.get_trial("aaaa").weights / "README.md").read_text()
    assert "Base model: " in card
    assert "SHA-256 `ab`" in card
    manifest = files.read_json(finished.get_trial("aaaa").weights / "manifest.json")
    assert manifest["trial_id"] == "aaaa"
    for name in ("report.html", "report.md", "report.csv", "report.json"):
        assert (finished.path / "report" / name).stat().st_size > 100


def test_a_class_without_rows_has_no_scores(finished: Run) -> None:
    by_class = {
        "a": {"precision": 0.5, "recall": 1.0, "f1": 0.667, "support": 2.0},
        "b": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0.0},
    }
    report = build_report(finished).model_copy(
        update={"per_class": by_class, "confusion": [[2, 0], [0, 0]]}
    )
    page = render_html(report)
    assert "<tr><td>a</td><td>0.500</td><td>1.000</td><td>0.667</td><td>2</td></tr>" in page
    assert "<tr><td>b</td><td>-</td><td>-</td><td>-</td><td>0</td></tr>" in page


def test_the_plan_of_a_run_is_read_as_it_was_written(finished: Run) -> None:
    """A driver on a cluster with internet access reads it, to fetch what the job names."""
    path = finished.path / "plan.json"
    plan = read_plan(path)
    assert plan.model_dump(mode="json") | {"schema_version": 1} == files.read_json(path)
    files.write_json(path, files.read_json(path) | {"of_tomorrow": 1})
    with pytest.raises(RunError, match=r"plan\.json"):
        read_plan(path)


def test_every_metric_that_decides_has_a_column_on_both_splits(finished: Run) -> None:
    plan = files.read_json(finished.path / "plan.json")
    plan["job"]["search"]["metric"] = {
        "name": "accuracy",
        "also": [{"name": "f1", "goal": "maximize"}],
    }
    files.write_json(finished.path / "plan.json", plan)
    report = build_report(finished)
    assert (report.metric, report.also) == ("accuracy", ["f1"])
    cells = {
        heading: fill(report.get_row("aaaa")).split()[0] for heading, fill in build_columns(report)
    }
    assert (cells["validation accuracy"], cells["validation f1"]) == ("0.700", "0.700")
    assert (cells["test accuracy"], cells["test f1"]) == ("0.690", "0.690")
    headings = [heading for heading, _ in build_terminal_columns(report)]
    assert {"val accuracy", "val f1", "test accuracy", "test f1"} <= set(headings)
    assert len(headings) == len(set(headings))


def test_runs_are_found_by_id_name_folder_or_as_the_newest(finished: Run) -> None:
    runs = finished.path.parent
    assert store.find_run(runs, None).id == finished.id
    assert store.find_run(runs, "tiny").id == finished.id
    assert store.find_run(runs, finished.id).id == finished.id
    assert store.find_run(Path("elsewhere"), str(finished.path)).id == finished.id
    with pytest.raises(RunError, match="did you mean"):
        store.find_run(runs, finished.id[:-1])


def test_clean_never_touches_a_running_or_unsynced_run(finished: Run) -> None:
    offline = finished.path / "wandb" / "wandb" / "offline-run-1-x"
    offline.mkdir(parents=True)
    assert "has not been uploaded" in str(store.clean(finished, dry_run=False).kept_because)
    (offline / "run-x.wandb.synced").touch()
    assert store.clean(finished, dry_run=True).bytes > 0
    assert finished.path.exists()
    running = Run.create(finished.path.parent, "other")
    running.mark_running()
    assert "it is running" in str(store.clean(running, dry_run=False).kept_because)
    assert store.clean(finished, dry_run=False).kept_because is None
    assert not finished.path.exists()
    assert running.path.exists()


def test_clean_and_find_take_no_empty_name_and_no_other_folder(finished: Run) -> None:
    runs = finished.path.parent
    assert lorafleet_here("clean", "", "--runs", runs, cwd=runs).returncode == 2
    assert lorafleet_here("clean", "--older-than", "-5", "--runs", runs, cwd=runs).returncode == 2
    assert lorafleet_here("stop", "", "--runs", runs, cwd=runs).returncode == 2
    with pytest.raises(RunError):
        store.find_run(runs, str(finished.get_trial("aaaa").path))
    (runs / "link").symlink_to(finished.path)
    (runs / "odd").mkdir()
    (runs / "odd" / "plan.json").write_text("{}")
    (runs / "odd" / "status.json").write_text('{"state": "weird"}')
    assert [run.id for run in store.list_all_runs(runs)] == [finished.id]


def test_sync_gives_wandb_a_command_that_it_understands(finished: Run, tmp_path: Path) -> None:
    """W&B's own command line reads it; without an account it ends there, which is as far as it can
    be tried.
    """
    (finished.path / "wandb" / "wandb" / "offline-run-20260101_000000-x").mkdir(parents=True)
    done = lorafleet_here(
        "sync", "tiny", "--runs", finished.path.parent, cwd=tmp_path, WANDB_API_KEY=""
    )
    assert "options have been removed" not in done.stderr + done.stdout
    assert "No such option" not in done.stderr + done.stdout
    shown = lorafleet_here("sync", "tiny", "--show", "--runs", finished.path.parent, cwd=tmp_path)
    assert " sync " in shown.stdout


def test_a_copied_run_is_read_elsewhere(finished: Run, tmp_path: Path) -> None:
    import shutil

    copied = Run(Path(shutil.copytree(finished.path, tmp_path / "moved" / finished.id)))
    assert render_report_json(build_report(copied)) == render_report_json(build_report(finished))


def test_a_trial_that_has_not_reported_yet_is_shown_as_running(finished: Run) -> None:
    trial = finished.add_trial("eeee", 9, {"lora.lora_r": 4})
    assert collect_trials(FollowedRun(finished))[-1].state == "pending"
    board = ProgressBoard()
    board.trials = TrialTable(finished)
    board.update(trial.id, Progress(time=time.time(), step=5, train_seconds=1.0))
    board.write_if_due()
    assert collect_trials(FollowedRun(finished))[-1].state == "running"
    old = {"time": time.time() - 60, "step": 5, "train_seconds": 1.0}
    files.write_json(finished.progress_file, {"trials": {trial.id: old}})
    assert collect_trials(FollowedRun(finished))[-1].state == "pending"


def test_a_run_of_another_version_gets_a_sentence(finished: Run, tmp_path: Path) -> None:
    plan, status = finished.path / "plan.json", finished.path / "status.json"
    before = plan.read_text()
    plan.write_text(before.replace('"task":', '"task_of_tomorrow": 1, "task":', 1))
    done = lorafleet_here("report", finished.path, cwd=tmp_path)
    assert (done.returncode, "was written by another version of lorafleet" in done.stderr) == (
        2,
        True,
    )
    plan.write_text(before)
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "hibernating"}))
    done = lorafleet_here("status", finished.path, cwd=tmp_path)
    assert (
        done.returncode,
        "contains the state 'hibernating', which this version" in done.stderr,
    ) == (2, True)


def test_a_run_of_another_machine_is_not_called_dead(finished: Run, tmp_path: Path) -> None:
    status = finished.path / "status.json"
    said = json.loads(status.read_text()) | {
        "state": "running",
        "host": "node17",
        "pid": 1,
        "pid_started": 1,
    }
    for host, gone in (("node17", False), (os.uname().nodename, True)):
        status.write_text(json.dumps(said | {"host": host}))
        assert finished.has_lost_driver() is gone
        assert (
            "driver died" in lorafleet_here("status", finished.path, cwd=tmp_path).stdout
        ) is gone


def test_logs_of_an_ambiguous_trial(finished: Run, tmp_path: Path) -> None:
    for name in ("abc1", "abc2"):
        finished.add_trial(name, 7, {})
    done = lorafleet_here("logs", finished.path, "abc", cwd=tmp_path)
    assert (
        done.returncode,
        "several trials that begin with 'abc'; they are abc1, abc2" in done.stderr,
    ) == (2, True)


def test_commands_that_read_a_run(finished: Run, tmp_path: Path) -> None:
    runs = finished.path.parent
    for words in (
        ("status",),
        ("report",),
        ("list",),
        ("logs", "tiny", "aaaa"),
        ("clean", "tiny", "--dry-run"),
    ):
        done = lorafleet_here(*words, "--runs", runs, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert any(word in done.stdout for word in ("aaaa", finished.id, "step=1"))
    for words in (("status",), ("report",), ("list",)):
        json.loads(lorafleet_here(*words, "--format", "json", "--runs", runs, cwd=tmp_path).stdout)
    one = lorafleet_here("report", "tiny:aaaa", "--runs", runs, cwd=tmp_path).stdout
    assert "accuracy   0.700 [0.650, 0.750]  0.690" in one
    assert "lora.lora_r=2" in one
    found = json.loads(
        lorafleet_here(
            "report", "tiny:aaaa", "--format", "json", "--runs", runs, cwd=tmp_path
        ).stdout
    )
    assert (found["trial_id"], found["metrics"]["accuracy"]) == ("aaaa", 0.7)
    table = lorafleet_here("report", "--format", "csv", "--runs", runs, cwd=tmp_path).stdout
    assert len(list(csv.DictReader(io.StringIO(table)))) == 5
    for name in ("base", "aaaa"):
        line = lorafleet_here(
            "report", f"tiny:{name}", "--format", "csv", "--runs", runs, cwd=tmp_path
        ).stdout
        assert [row["trial_id"] for row in csv.DictReader(io.StringIO(line))] == [name]
    unknown = lorafleet_here("report", "tiny:zzz", "--runs", runs, cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "has no trial zzz; it has base, bbbb, aaaa" in unknown.stderr
    missing = lorafleet_here("report", "nothing", "--runs", runs, cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "there is no run 'nothing'" in missing.stderr


def _plan(loaded: LoadedJob, cpus: int = 2) -> dict[str, object]:
    return make_plan(loaded, LocalSite(cpus=cpus, memory_gib=8.0), "sweep").model_dump()


def test_a_plan_shows_every_trial_and_what_asha_saves(bert_job: JobMaker) -> None:
    plan = _plan(bert_job(SEARCH))
    assert len(plan["trials"]) == 3  # type: ignore[arg-type]
    assert (plan["worst_samples"], plan["rung_levels"]) == (3 * 72, [8, 24, 72])
    assert plan["expected_samples"] < plan["worst_samples"]  # type: ignore[operator]
    assert len({trial["trial_id"] for trial in plan["trials"]}) == 3  # type: ignore[attr-defined]


def test_a_plan_of_tpe_shows_the_start_up_trials_and_counts_the_others(bert_job: JobMaker) -> None:
    search = SEARCH.replace("num_samples: 3", "num_samples: 16\n  method: tpe").replace(
        "[1, 2]", "[1,2,3,4,5,6]"
    )
    plan = _plan(bert_job(search))
    assert (len(plan["trials"]), plan["later_trials"]) == (10, 6)  # type: ignore[arg-type]


def test_a_large_report_folds_its_rows_and_draws_the_best(finished: Run) -> None:
    """Of 900 trials 100 rows are seen at once and the best 100 curves are drawn; no row is left out
    of the page.
    """
    from lorafleet.evaluation.render.forms import render_html
    from lorafleet.evaluation.render.plots import draw_plots

    report = build_report(finished)
    row = report.get_row("bbbb")
    many = [row.model_copy(update={"trial_id": f"t{number:04d}"}) for number in range(900)]
    large = report.model_copy(update={"trials": [*many, *report.trials]})
    page = render_html(large)
    shown, folded = page.split("more trials, ranked lower")
    assert shown.count("<tr") < 110
    assert all(trial.trial_id in page for trial in large.trials)
    assert report.recommendation.trial_id in shown  # the recommended trial is never folded
    assert folded.count("<tr") > 790
    captions = [caption for caption, _ in draw_plots(large)]
    assert any("Only the best 101 of 904 are drawn." in caption for caption in captions)
    assert max(len(svg) for _, svg in draw_plots(large)) < 400_000
