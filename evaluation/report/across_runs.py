"""Compare runs without training: rank those that were evaluated alike and mark the others.

This is `lorafleet compare RUN RUN`. It reads only the files of the runs. A difference
between two scores says something about the models only if everything else was equal, so
each run is compared with the first one in `_MUST_AGREE` before it is ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.scores import compute_scores
from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.choose_arm import Choice, choose
from lorafleet.evaluation.report.comparison import (
    compare_arms,
    get_finite_intervals,
    get_finite_metrics,
    list_pairs,
    load_arms,
)
from lorafleet.evaluation.report.format import format_short_params
from lorafleet.evaluation.report.samples import select_differing
from lorafleet.evaluation.report.search import clear_run_results, load_chosen_results, load_run_job
from lorafleet.jobs import files
from lorafleet.jobs.runs.report import Arm, Report
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.trials.arms import build_arm_job
from lorafleet.jobs.trials.trial_id import get_base_revision

_MUST_AGREE = {
    "rows": "the held-out rows",
    "model": "the base model",
    "prompt_format": "the prompt format",
    "conversation": "the chat template, its variables or the learnt parts of a conversation",
    "metric_version": "the version of the metrics",
    "custom_metrics": "the custom metrics",
    "encoders": "the encoder of BERTScore",
    "labels": "the order of the classes",
    "max_length": "the maximum length of rows",
    "answers": "the generation settings of answers",
}
"""Properties that two runs must share to be ranked: key of `_Entry.terms` -> its text."""
_GENERATION_FIELDS = {
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "generation_seed",
    "bertscore_layer",
}


@dataclass(frozen=True)
class _Entry:
    """One run with its recommended model and the terms of its evaluation."""

    run: Run
    report: Report
    arm: Arm
    results: list[RowResults]
    terms: dict[str, Any]


def compare_runs(runs: Sequence[Run]) -> Report:
    """Build a report with one arm per run: the model that the run recommends.

    Runs that were not evaluated like the first run are shown with the reason and not
    ranked. Runs that agree with each other, but not with the first one, still have their
    differences listed.

    Args:
        runs: At least two. The report takes its data, base and baselines from the first.
    """
    entries = [_load_entry(run) for run in runs]
    first = entries[0]
    arms = [_mark_differences(entry, first) for entry in entries]
    results_by_arm = {
        arm.arm: entry.results for arm, entry in zip(arms, entries, strict=True) if arm.comparable
    }
    job = load_run_job(first.run)
    metric = job.metric
    by_metric = [
        [
            comparison
            for group in _group_alike(entries)
            for comparison in compare_arms(
                {entry.arm.arm: dict(enumerate(entry.results)) for entry in group},
                decision_metric,
                job.evaluate.bootstrap_samples,
            )
        ]
        for decision_metric in job.decision_metrics
    ]
    deciding = [
        comparison
        for groups in by_metric
        for comparison in groups
        if first.arm.arm in comparison.names
    ]
    rows = files.read_jsonl(first.run.get_rows_file(first.report.held_out))
    choice = Choice(
        "cheapest_within_tolerance",
        metric.name,
        metric.goal,
        "train_seconds",
        tolerances=job.tolerances,
        rows=len(rows),
    )
    labels = [str(label) for label in first.report.facts.get("labels", [])]
    first_results = {name: results[0] for name, results in results_by_arm.items() if results}
    trials = [
        row.model_copy(update={"arm": entry.run.id})
        for entry in entries
        for row in entry.report.trials
    ]
    return clear_run_results(first.report).model_copy(
        update={
            "run": " and ".join(run.id for run in runs),
            "state": "side by side",
            "arms": arms,
            "pairs": list_pairs(by_metric[0]),
            "trials": trials,
            "samples": select_differing(rows, first_results, labels),
            "recommendation": choose(arms, deciding, choice),
        }
    )


def _group_alike(entries: list[_Entry]) -> list[list[_Entry]]:
    """Group the entries that were evaluated alike.

    Differences within a group are due to the models alone. Entries that are marked as not
    comparable are in no group.
    """
    groups: list[list[_Entry]] = []
    for entry in entries:
        if entry.results and entry.arm.comparable:
            group = next(
                (group for group in groups if not _list_differences(entry, group[0])), None
            )
            group.append(entry) if group else groups.append([entry])
    return groups


def _load_entry(run: Run) -> _Entry:
    """Load the recommended model of a run and the terms of its evaluation.

    The terms come from `facts.json`, which the run's driver wrote. Terms that cannot
    influence a run are left empty, so that they do not keep runs apart: generation settings
    and the encoder of BERTScore only count if answers were evaluated.
    """
    report, job = build_report(run), load_run_job(run)
    split = report.held_out
    metadata = run.read_metadata()
    terms = {
        "rows": metadata.rows_sha256.get(split),
        "trained_on": metadata.rows_sha256.get("train"),
        "model": get_base_revision(metadata.model_revisions, job),
        "prompt_format": metadata.prompt_format,
        "conversation": metadata.conversation,
        "metric_version": metadata.metric_version,
        "custom_metrics": metadata.custom_metrics,
        "encoders": metadata.encoders if job.text_metrics else {},
        "labels": metadata.labels or [],
        "max_length": job.model.max_length,
        "answers": job.evaluate.model_dump(include=_GENERATION_FIELDS) if job.text_metrics else {},
    }
    if report.arms is not None:
        arms, results_by_arm, _ = load_arms(run, job, split)
        chosen = next((arm for arm in arms if arm.arm == report.recommendation.arm), None)
        if chosen is None:
            return _Entry(run, report, _make_empty_arm(run), [], terms)
        description = f"{chosen.arm}: {chosen.what}"
        # An arm may have a base or a maximum length of its own. Those of its job are then the
        # terms.
        arm_job = build_arm_job(job, chosen.arm)
        terms["model"] = get_base_revision(metadata.model_revisions, arm_job)
        terms["max_length"] = arm_job.model.max_length
        results = list(results_by_arm[chosen.arm].values())
        return _Entry(
            run,
            report,
            chosen.model_copy(update={"arm": run.id, "what": description}),
            results,
            terms,
        )
    row_results = load_chosen_results(run, report).get(str(report.recommendation.trial_id))
    results = [row_results] if row_results else []
    return _Entry(run, report, _make_trial_arm(run, report, results), results, terms)


def _make_empty_arm(run: Run) -> Arm:
    """Return the arm of a run that recommends nothing."""
    return Arm(
        arm=run.id, what="no recommendation", remarks=["it has no model to ship"], comparable=False
    )


def _make_trial_arm(run: Run, report: Report, results: list[RowResults]) -> Arm:
    """Return the recommended trial of a search as an arm."""
    trial_id, job = report.recommendation.trial_id, load_run_job(run)
    if trial_id is None:
        return _make_empty_arm(run)
    row = report.get_row(trial_id)
    trial_scores = compute_scores(results, job.metric_names) if results else None
    return Arm(
        arm=run.id,
        what=f"{job.method}: {format_short_params(row.params) or trial_id}",
        metrics=get_finite_metrics(trial_scores) if trial_scores else row.test_metrics or {},
        interval=get_finite_intervals(trial_scores) if trial_scores else row.test_intervals,
        configuration=row.params,
        tried=len(report.trials),
        trial_id=trial_id,
        weights=report.recommendation.adapter,
        train_seconds=row.train_seconds,
        gpu_hours=row.gpu_hours,
        peak_memory_gib=row.peak_memory_gib,
        trainable_parameters=row.trainable_parameters,
    )


_NO_PREDICTIONS = (
    "it has no predictions on the held-out rows (an older version made it, or it has not ended)"
)


def _list_differences(entry: _Entry, first: _Entry) -> list[str]:
    """Return how the evaluation of an entry differs from that of another, one phrase each.

    Empty if their scores can be compared.
    """
    differences = []
    for name, description in _MUST_AGREE.items():
        if entry.terms[name] != first.terms[name]:
            verb = "differ" if description.split(" of ")[0].endswith("s") else "differs"
            differences.append(f"{description} {verb} from {first.run.id}'s")
    if entry.report.held_out != first.report.held_out:
        differences.append(f"it was evaluated on {entry.report.held_out} rows")
    return differences


def _mark_differences(entry: _Entry, first: _Entry) -> Arm:
    """Return the arm of an entry, with remarks if it was not evaluated like the first entry.

    Other training rows are a remark only: the scores remain comparable, but the reader must
    know that held-out rows may have been trained on.
    """
    reasons = [] if entry.results else [f"not ranked: {_NO_PREDICTIONS}"]
    reasons += [f"not ranked: {difference}" for difference in _list_differences(entry, first)]
    remarks = [*entry.arm.remarks, *reasons]
    if entry.terms["trained_on"] != first.terms["trained_on"]:
        remarks.append(
            f"it was trained on other rows than {first.run.id}, so its training may have included "
            "held-out rows"
        )
    return entry.arm.model_copy(
        update={"comparable": entry.arm.comparable and not reasons, "remarks": remarks}
    )
