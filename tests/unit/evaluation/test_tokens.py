"""Runs that were trained on other tokens than this version makes are refused, and not silently
evaluated.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.cluster.local_site import detect_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.evaluation.report.across_runs import compare_runs
from lorafleet.evaluation.report.model_of_run import select_model
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.trials.trial_id import get_prompt_format
from tests.conftest import JobMaker, lorafleet_here


def run_of(loaded: LoadedJob, folder: Path, trained_with: int | None) -> Run:
    """A run with one finished trial, as an earlier version would have left it."""
    run = Run.create(folder / "runs", loaded.job.name)
    files.write_json(
        run.path / "plan.json",
        make_plan(loaded, detect_site(None), "train").model_dump(mode="json"),
    )
    if trained_with is not None:
        files.write_json(run.path / "facts.json", {"prompt_format": trained_with})
    trial = run.add_trial("aaaa", 0, {})
    trial.get_weights_folder(loaded.job.method).mkdir(parents=True)
    trial.add_rows(
        MetricsRow.model_validate(
            {
                "step": 1,
                "samples": 8,
                "loss": 1.0,
                "accuracy": 0.9,
                "evaluated": True,
                "train_seconds": 1.0,
            }
        )
    )
    trial.set_state(TrialState.FINISHED)
    run.set_state(RunState.STOPPED, reason="interrupted")
    return run


def test_a_text_run_of_an_earlier_version_is_refused(llama_job: JobMaker, tmp_path: Path) -> None:
    run = run_of(llama_job(), tmp_path, 1)
    sentence = f"{run.id} was trained with prompt format 1, but this version of lorafleet has 2"
    with pytest.raises(RunError, match=sentence):
        select_model(run, "aaaa")
    for command in ("resume", "evaluate", "export", "benchmark"):
        more = ("--to", "merged") if command == "export" else ()
        done = lorafleet_here(command, run.id, *more, "--runs", run.path.parent, cwd=tmp_path)
        assert done.returncode == 2, (command, done.stderr)
        assert sentence in done.stderr, command
    assert lorafleet_here("report", run.id, "--runs", run.path.parent, cwd=tmp_path).returncode == 0


def test_runs_of_this_version_and_classifiers_of_any_are_taken(
    llama_job: JobMaker, bert_job: JobMaker, tmp_path: Path
) -> None:
    assert select_model(run_of(llama_job(), tmp_path / "text", 2), "aaaa").trial_id == "aaaa"
    assert select_model(run_of(llama_job(), tmp_path / "none", None), "aaaa").trial_id == "aaaa"
    assert get_prompt_format(bert_job().job) == 1  # its rows become the same tokens as before
    assert select_model(run_of(bert_job(), tmp_path / "classes", 1), "aaaa").trial_id == "aaaa"


def test_runs_with_other_prompts_are_not_asked_alike(llama_job: JobMaker, tmp_path: Path) -> None:
    plain = run_of(llama_job(), tmp_path, 2)
    told = run_of(llama_job(name="told", data__system_prompt="good"), tmp_path, 2)
    words = ("evaluate", f"{plain.id}:aaaa", f"{told.id}:aaaa", "--runs", str(plain.path.parent))
    done = lorafleet_here(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        f"{told.id} was trained with a data.system_prompt that differs from the job's"
        in done.stderr
    )


def test_runs_with_other_prompts_are_not_ranked(llama_job: JobMaker, tmp_path: Path) -> None:
    runs = []
    for number, terms in enumerate(({"train_on_turns": "all"}, {"train_on_turns": "last"})):
        run = run_of(llama_job(), tmp_path / str(number), 2)
        files.write_json(run.path / "facts.json", {"prompt_format": 2, "conversation": terms})
        runs.append(run)
    arms = compare_runs(runs).arms or []
    remarks = " ".join(arms[1].remarks)
    assert (
        "the chat template, its variables or the learnt parts of a conversation differ from"
        in remarks
    )
