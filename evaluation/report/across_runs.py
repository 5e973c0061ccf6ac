"""Runs side by side, without training anything: ranked where they were judged alike, and marked where they were not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.scores import scores
from lorafleet.evaluation.render.trial_table import short
from lorafleet.evaluation.report.choose_arm import Choice, choose
from lorafleet.evaluation.report.comparison import (
    arms_of_run,
    compare_arms,
    finite_intervals,
    finite_metrics,
    list_pairs,
)
from lorafleet.evaluation.report.samples import differing
from lorafleet.evaluation.report.search import bare, build_report, chosen_results, run_job
from lorafleet.jobs import files
from lorafleet.jobs.runs.report import Arm, Report
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.trials.arms import own_job
from lorafleet.jobs.trials.trial_id import known_revision

_MUST_AGREE = {
    "rows": "the held-out rows",
    "model": "the base model",
    "prompt_format": "the prompt format",
    "conversation": "the chat template, its variables or what is learnt of a conversation",
    "metric_version": "the version of the metrics",
    "custom_metrics": "the metrics of one's own",
    "encoders": "the encoder of BERTScore",
    "labels": "the order of the classes",
    "max_length": "the length to which rows are cut",
    "answers": "the way in which answers are written",
}
"""What two runs must have in common to be ranked."""
_ANSWERS = {"max_new_tokens", "do_sample", "temperature", "top_p", "generation_seed", "bertscore_layer"}


@dataclass(frozen=True)
class _Entry:
    """What one run brings."""

    run: Run
    report: Report
    arm: Arm
    results: list[RowResults]
    terms: dict[str, Any]


def across(runs: Sequence[Run]) -> Report:
    """One table of what each run recommends. Those that were not judged as the first was are not ranked."""
    entries = [_entry(run) for run in runs]
    first = entries[0]
    arms = [_against(entry, first) for entry in entries]
    judged = {arm.arm: entry.results for arm, entry in zip(arms, entries, strict=True) if arm.comparable}
    job = run_job(first.run)
    metric = job.metric
    by_metric = [
        [
            each
            for group in _alike(entries)
            for each in compare_arms(
                {entry.arm.arm: dict(enumerate(entry.results)) for entry in group},
                one,
                job.evaluate.bootstrap_samples,
            )
        ]
        for one in job.decision_metrics
    ]
    deciding = [each for groups in by_metric for each in groups if first.arm.arm in each.names]
    rows = files.read_jsonl(first.run.rows_file(first.report.held_out))
    choice = Choice(
        "cheapest_within_tolerance",
        metric.name,
        metric.goal,
        "train_seconds",
        tolerances=job.tolerances,
        rows=len(rows),
    )
    labels = [str(label) for label in first.report.facts.get("labels", [])]
    firsts = {name: results[0] for name, results in judged.items() if results}
    trials = [row.model_copy(update={"arm": entry.run.id}) for entry in entries for row in entry.report.trials]
    return bare(first.report).model_copy(
        update={
            "run": " and ".join(run.id for run in runs),
            "state": "side by side",
            "arms": arms,
            "pairs": list_pairs(by_metric[0]),
            "trials": trials,
            "samples": differing(rows, firsts, labels),
            "recommendation": choose(arms, deciding, choice),
        }
    )


def _alike(entries: list[_Entry]) -> list[list[_Entry]]:
    """The entries in groups that were judged alike: a difference within one is of the models alone."""
    groups: list[list[_Entry]] = []
    for entry in entries:
        if entry.results and entry.arm.comparable:
            group = next((group for group in groups if not _odds(entry, group[0])), None)
            group.append(entry) if group else groups.append([entry])
    return groups


def _entry(run: Run) -> _Entry:
    report, job = build_report(run), run_job(run)
    split = report.held_out
    facts = files.read_json(run.path / "facts.json")
    terms = {
        "rows": facts.get("rows_sha256", {}).get(split),
        "trained_on": facts.get("rows_sha256", {}).get("train"),
        "model": known_revision(facts.get("model_revisions", {}), job),
        "prompt_format": facts.get("prompt_format"),
        "conversation": facts.get("conversation", {}),
        "metric_version": facts.get("metric_version"),
        "custom_metrics": facts.get("custom_metrics", {}),
        "encoders": facts.get("encoders", {}) if job.text_metrics else {},
        "labels": facts.get("labels", []),
        "max_length": job.model.max_length,
        "answers": job.evaluate.model_dump(include=_ANSWERS) if job.text_metrics else {},
    }
    if report.arms is not None:
        arms, judged, _ = arms_of_run(run, job, split)
        chosen = next((arm for arm in arms if arm.arm == report.recommendation.arm), None)
        if chosen is None:
            return _Entry(run, report, _nothing(run), [], terms)
        what = f"{chosen.arm}: {chosen.what}"
        own = own_job(job, chosen.arm)
        terms["model"] = known_revision(facts.get("model_revisions", {}), own)
        terms["max_length"] = own.model.max_length
        results = list(judged[chosen.arm].values())
        return _Entry(run, report, chosen.model_copy(update={"arm": run.id, "what": what}), results, terms)
    found = chosen_results(run, report).get(str(report.recommendation.trial_id))
    results = [found] if found else []
    return _Entry(run, report, _arm_of_trial(run, report, results), results, terms)


def _nothing(run: Run) -> Arm:
    return Arm(arm=run.id, what="no recommendation", remarks=["it has nothing to ship"], comparable=False)


def _arm_of_trial(run: Run, report: Report, results: list[RowResults]) -> Arm:
    trial_id, job = report.recommendation.trial_id, run_job(run)
    if trial_id is None:
        return _nothing(run)
    row = report.row(trial_id)
    found = scores(results, job.metric_names) if results else None
    return Arm(
        arm=run.id,
        what=f"{job.method}: {short(row.params) or trial_id}",
        metrics=finite_metrics(found) if found else row.test_metrics or {},
        interval=finite_intervals(found) if found else row.test_intervals,
        configuration=row.params,
        tried=len(report.trials),
        trial_id=trial_id,
        weights=report.recommendation.adapter,
        train_seconds=row.train_seconds,
        gpu_hours=row.gpu_hours,
        peak_memory_gib=row.peak_memory_gib,
        trainable_parameters=row.trainable_parameters,
    )


_NO_PREDICTIONS = "it has no predictions of the held-out rows (it was made by an older version, or has not ended)"


def _odds(entry: _Entry, first: _Entry) -> list[str]:
    """How an entry was judged otherwise than another."""
    odd = []
    for name, what in _MUST_AGREE.items():
        if entry.terms[name] != first.terms[name]:
            verb = "differ" if what.split(" of ")[0].endswith("s") else "differs"
            odd.append(f"{what} {verb} from {first.run.id}'s")
    if entry.report.held_out != first.report.held_out:
        odd.append(f"it was judged on {entry.report.held_out} rows")
    return odd


def _against(entry: _Entry, first: _Entry) -> Arm:
    """An entry's arm, marked where it was not judged as the first was."""
    odd = [] if entry.results else [f"not ranked: {_NO_PREDICTIONS}"]
    odd += [f"not ranked: {what}" for what in _odds(entry, first)]
    remarks = [*entry.arm.remarks, *odd]
    if entry.terms["trained_on"] != first.terms["trained_on"]:
        remarks.append(
            f"it was trained on other rows than {first.run.id}: whether held-out rows were among them is not known"
        )
    return entry.arm.model_copy(update={"comparable": entry.arm.comparable and not odd, "remarks": remarks})
