"""Recommend a trial of a search: the smallest that loses little against the best.

`decide.py` has the rule that sweeps and comparisons share. This module supplies what is
particular to a search: which trials take part, the number of trained parameters as
their cost, and the choice over the folds of a cross-validation. Pure: rows and results
come from the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from lorafleet.evaluation.metrics.paired import (
    DEFAULT_DRAWS,
    Candidate,
    Comparison,
    select_comparable_candidates,
)
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.report.decide import (
    Decision,
    Option,
    Tolerances,
    Wording,
    decide,
    describe_tolerances,
    explain,
    format_interval,
)
from lorafleet.evaluation.report.format import format_params
from lorafleet.jobs.runs.report import FoldScores, Recommendation, Row
from lorafleet.jobs.schema.types import Goal
from lorafleet.jobs.trials.sampling import remove_fold

MAX_COMPARED = 50
"""Only this many candidates, the best by score, are compared row by row."""


@dataclass(frozen=True)
class SearchRule:
    """How a search chooses a trial.

    `build_search_rule` makes it from a job. The report and the ledger of a running search
    use the same rule, so the configuration that is trained after a cross-validation is the
    one that is recommended.
    """

    metric: str
    goal: Goal
    tolerances: Tolerances
    """One entry for every metric that decides, the first metric first."""
    also: tuple[tuple[str, Goal], ...] = ()
    """Further metrics that decide."""
    keep: int = 5
    """Number of best trials whose adapters are on disk."""
    rows: int = 0
    """Number of validation rows; 0 if unknown."""
    draws: int = DEFAULT_DRAWS
    labels: Mapping[str, str] = field(default_factory=dict)
    """Trial id -> its searched values as text."""

    def describe(self, candidates: str) -> str:
        """Return the rule as text for the given kind of candidates."""
        return (
            f"of {candidates}, the one with the fewest trained parameters that loses at most "
            f"{describe_tolerances(self.tolerances)} against the best (simultaneous 95 % intervals "
            "of paired differences on the validation rows); if there is none, the best"
        )

    def describe_trial(self, trial_id: str) -> str:
        """Return a trial id with its searched values."""
        label = self.labels.get(trial_id)
        return f"{trial_id} ({label})" if label else trial_id


def recommend(
    rows: list[Row], rule: SearchRule, results: Mapping[str, RowResults]
) -> Recommendation:
    """Recommend a trial.

    Trials that were stopped early are ignored if any trial was trained to the end: their
    scores and costs are those of a shorter training.

    Args:
        rows: All trials.
        rule: How to choose.
        results: Trial id -> its results on every validation row. May be incomplete.

    Returns:
        The recommendation. `trial_id` is None without any score. `decided` is False if
            there are too few rows to show any difference; the trial with the best score is
            named all the same.
    """
    rule_text = rule.describe(
        "the best configurations that were trained to the end (search.keep of them)"
    )
    trials = _rank_trials(rows, rule)
    if not trials:
        sentence = "No trial has a score yet, so there is nothing to ship."
        return Recommendation(trial_id=None, rule=rule_text, sentence=sentence)
    by_id = {row.trial_id: row for row in trials}
    compared = {
        row.trial_id: results[row.trial_id]
        for row in trials[:MAX_COMPARED]
        if row.trial_id in results
    }
    comparisons = _compare(compared, rule)
    decision = decide(
        _build_options(trials[: rule.keep], rule),
        comparisons,
        rule.tolerances,
        _count_rows(compared, rule),
    )
    wording = Wording(
        noun="configuration",
        row_noun="validation row",
        describe=rule.describe_trial,
        format_cost=_format_size,
        format_score=lambda trial_id: _format_score(by_id[trial_id], rule.metric),
    )
    sentence = explain(decision, comparisons, rule.tolerances, wording)
    if len(trials) == 1:
        ended = "trained to the end" if trials[0].state == "finished" else "with a score"
        sentence += f" It is the only configuration {ended}, so there was nothing to choose from."
    option = decision.best if decision.has_too_few_rows else decision.chosen
    return Recommendation(
        trial_id=option.name,
        rule=rule_text,
        sentence=sentence,
        decided=not decision.has_too_few_rows,
    )


def _rank_trials(rows: list[Row], rule: SearchRule) -> list[Row]:
    """Return the trials to choose from, the best first.

    Trials of a fold saw only part of the rows, and repetitions with further seeds belong to
    another trial, so both are left out.
    """
    scored = [
        row
        for row in rows
        if row.state in ("finished", "stopped", "running", "paused")
        and row.fold is None
        and not row.repeats
        and row.metrics.get(rule.metric) is not None
    ]
    finished = [row for row in scored if row.state == "finished"]
    return sorted(
        finished or scored,
        key=lambda row: row.metrics[rule.metric] or 0.0,
        reverse=rule.goal == "maximize",
    )


def _compare(results: Mapping[str, RowResults], rule: SearchRule) -> list[Comparison]:
    """Compare candidates in every deciding metric.

    Candidates with other numbers of rows are left out: results of an incomplete evaluation
    cannot be paired with the others.

    Returns:
        One comparison per metric, the first metric first. A metric in which fewer than two
            candidates are finite has none.
    """
    comparisons = []
    max_rows = max((len(row_results) for row_results in results.values()), default=0)
    candidates = [
        Candidate(name, [row_results])
        for name, row_results in results.items()
        if len(row_results) == max_rows
    ]
    for metric, goal in ((rule.metric, rule.goal), *rule.also):
        comparable = select_comparable_candidates(candidates, metric)
        if len(comparable) > 1:
            comparisons.append(Comparison(comparable, metric, goal, rule.draws))
    return comparisons


def _build_options(rows: Sequence[Row], rule: SearchRule) -> list[Option]:
    """Return the trials as options of the shared rule, with their trained parameters as cost."""
    sign = 1 if rule.goal == "maximize" else -1
    options = []
    for row in rows:
        score = sign * (row.metrics[rule.metric] or 0.0)
        options.append(Option(row.trial_id, score, row.trainable_parameters))
    return options


def _count_rows(results: Mapping[str, RowResults], rule: SearchRule) -> int:
    return max((len(row_results) for row_results in results.values()), default=rule.rows)


def _format_size(option: Option) -> str:
    return "unknown size" if option.cost is None else f"{option.cost:,} trained parameters"


def _format_score(row: Row, metric: str) -> str:
    interval = row.intervals.get(metric)
    return f"{metric} {row.metrics[metric]:.3f}" + (
        f" {format_interval(interval)}" if interval else ""
    )


def summarize_folds(rows: list[Row], metric: str, goal: Goal) -> list[FoldScores]:
    """Return the configurations of a cross-validation with their means, the best first.

    Configurations with more folds come before those with fewer: a mean over the folds that
    went well says little.

    Args:
        rows: Trials of any kind. Only finished trials of a fold count.
        metric: Name of the metric.
        goal: Whether more or less of it is better.
    """
    scores_by_key: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for row in rows:
        score = row.metrics.get(metric)
        if row.fold is not None and row.state == "finished" and score is not None:
            params = remove_fold(row.params)
            scores_by_key.setdefault(repr(params), (params, []))[1].append(score)
    configurations = []
    for params, scores in scores_by_key.values():
        deviation = stdev(scores) if len(scores) > 1 else 0.0
        configurations.append(
            FoldScores(params=params, scores=scores, mean=fmean(scores), deviation=deviation)
        )
    sign = -1 if goal == "maximize" else 1
    return sorted(
        configurations,
        key=lambda configuration: (-len(configuration.scores), sign * configuration.mean),
    )


def decide_over_folds(
    folds: list[FoldScores],
    rule: SearchRule,
    results: Mapping[str, RowResults],
    sizes: Mapping[str, int | None],
) -> tuple[Decision, list[Comparison]]:
    """Choose a configuration of a cross-validation on the rows of all folds.

    Configurations that lack a fold are ignored if another has all of them.

    Args:
        folds: All configurations, the best first; at least one.
        rule: How to choose.
        results: `get_configuration_key` -> its results on the rows of all folds.
        sizes: `get_configuration_key` -> trained parameters.

    Returns:
        (decision, one comparison per deciding metric). Names of options are configuration
            keys.
    """
    max_folds = len(folds[0].scores)
    complete = [configuration for configuration in folds if len(configuration.scores) == max_folds]
    sign = 1 if rule.goal == "maximize" else -1
    options = []
    for configuration in complete:
        key = get_configuration_key(configuration)
        options.append(Option(key, sign * configuration.mean, sizes.get(key)))
    keys = [option.name for option in options[:MAX_COMPARED]]
    compared = {key: results[key] for key in keys if key in results}
    comparisons = _compare(compared, rule)
    return decide(options, comparisons, rule.tolerances, _count_rows(compared, rule)), comparisons


def get_configuration_key(configuration: FoldScores) -> str:
    """Return the key of a configuration for dictionaries: its values as text."""
    return repr(configuration.params)


def recommend_over_folds(
    rows: list[Row],
    folds: list[FoldScores],
    rule: SearchRule,
    results: Mapping[str, RowResults],
) -> Recommendation:
    """Recommend the trial of the chosen configuration that was trained on all training rows.

    The driver trains that trial after all folds have ended. A run of an earlier version may
    have trained another configuration than the current rule chooses; the sentence says so
    then.

    Args:
        rows: All trials.
        folds: What `summarize_folds` returned.
        rule: How to choose.
        results: `get_configuration_key` -> its results on the rows of all folds.
    """
    rule_text = rule.describe("the configurations, on the validation rows of all folds together")
    trials = [
        row
        for row in rows
        if row.fold is None and not row.repeats and row.metrics.get(rule.metric) is not None
    ]
    if not trials or not folds:
        sentence = (
            "The best configuration over the folds is not trained yet, so there is nothing to ship."
        )
        return Recommendation(trial_id=None, rule=rule_text, sentence=sentence)
    trial = trials[0]
    trial_key = repr(remove_fold(trial.params))
    sizes = {repr(remove_fold(row.params)): row.trainable_parameters for row in rows}
    decision, comparisons = decide_over_folds(folds, rule, results, sizes)
    by_key = {get_configuration_key(configuration): configuration for configuration in folds}

    def describe_configuration(key: str) -> str:
        return (
            rule.describe_trial(trial.trial_id)
            if key == trial_key
            else format_params(by_key[key].params)
        )

    def format_score(key: str) -> str:
        configuration = by_key[key]
        return (
            f"mean {rule.metric} {configuration.mean:.3f} ± {configuration.deviation:.3f} over "
            f"{len(configuration.scores)} folds"
        )

    wording = Wording(
        noun="configuration",
        row_noun="row",
        describe=describe_configuration,
        format_cost=_format_size,
        format_score=format_score,
    )
    sentence = explain(decision, comparisons, rule.tolerances, wording)
    option = decision.best if decision.has_too_few_rows else decision.chosen
    if trial_key != option.name:
        sentence = (
            f"{trial.trial_id} was selected by the rule of an earlier version. By the current "
            f"rule: {sentence}"
        )
    return Recommendation(
        trial_id=trial.trial_id,
        rule=rule_text,
        sentence=sentence,
        decided=not decision.has_too_few_rows,
    )
