"""Intervals, paired tests and the rule that ships: hand-worked numbers, scikit-learn's, and
coverage by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, log_loss, precision_score, recall_score

from lorafleet.evaluation.metrics import paired
from lorafleet.evaluation.metrics.baselines import evaluate_majority_class, evaluate_trivial_answers
from lorafleet.evaluation.metrics.intervals import (
    compute_confidence_interval,
    compute_contributions,
    compute_mean_interval,
    compute_wilson_interval,
    explain_missing_interval,
)
from lorafleet.evaluation.metrics.paired import Candidate, Comparison, run_sign_flip_test
from lorafleet.evaluation.metrics.predictions import Classified, RowResults
from lorafleet.evaluation.metrics.scores import compute_scores
from lorafleet.evaluation.report.decide import (
    Option,
    Wording,
    decide,
    explain,
    explain_open_question,
)
from lorafleet.evaluation.report.verdict import (
    check_against_baselines,
    check_convergence,
    check_predictions,
    check_rows,
    check_scores,
)
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.errors import JobFileError
from lorafleet.jobs.runs.report import Baseline, Recommendation
from lorafleet.jobs.runs.report import Row as TrialRow
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.types import Goal
from lorafleet.jobs.text import format_decimal
from tests.conftest import JobMaker

DATA_SETS = 4000
"""In each simulation of the long tests."""


def classified(label: np.ndarray, predicted: np.ndarray, classes: int) -> RowResults:
    rows = len(label)
    said = Classified(np.asarray(label), np.asarray(predicted), np.ones(rows), classes)
    return RowResults(np.ones(rows), np.ones(rows, dtype=int), said)


def right_or_wrong(right: np.ndarray) -> RowResults:
    return classified(np.zeros(len(right), dtype=int), 1 - np.asarray(right).astype(int), 2)


def judged(values: np.ndarray, name: str = "rougeL") -> RowResults:
    rows = len(values)
    ratios = {name: (np.asarray(values, dtype=float), np.ones(rows))}
    return RowResults(np.ones(rows), np.ones(rows, dtype=int), ratios=ratios)


def losses(loss: np.ndarray, tokens: np.ndarray) -> RowResults:
    return RowResults(np.asarray(loss, dtype=float), np.asarray(tokens, dtype=int))


# ---- one candidate


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "theirs"), [("f1", f1_score), ("precision", precision_score), ("recall", recall_score)]
)
def test_contributions_have_the_metric_as_their_mean(
    name: str, theirs: Callable[..., float], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    label, predicted = draw.integers(0, 3, 40), draw.integers(0, 4, 40)  # one class is never right
    found = classified(label, predicted, 5)  # and one occurs nowhere
    expected = theirs(label, predicted, average="macro", zero_division=0)
    assert compute_contributions(found, name).mean() == pytest.approx(expected)
    assert compute_scores(found, [name]).metrics[name] == pytest.approx(expected)


def test_a_macro_average_of_many_classes() -> None:
    draw = np.random.default_rng(8)
    label = np.concatenate([np.arange(1000), draw.integers(0, 1000, 3000)])
    predicted = np.where(draw.random(4000) < 0.6, label, draw.integers(0, 1000, 4000))
    added_R = compute_contributions(classified(label, predicted, 1000), "f1")
    assert added_R.mean() == pytest.approx(f1_score(label, predicted, average="macro"))


def test_a_row_moves_a_macro_average_by_its_contribution() -> None:
    """To first order: with one row more of a kind the metric changes by (contribution - metric) /
    rows.
    """
    draw = np.random.default_rng(0)
    label = draw.integers(0, 3, 3000)
    predicted = np.where(draw.random(3000) < 0.7, label, draw.integers(0, 3, 3000))
    for name, theirs in (
        ("f1", f1_score),
        ("precision", precision_score),
        ("recall", recall_score),
    ):
        before = theirs(label, predicted, average="macro")
        added_R = compute_contributions(classified(label, predicted, 3), name)
        for row in range(20):
            after = theirs(
                np.append(label, label[row]), np.append(predicted, predicted[row]), average="macro"
            )
            assert after - before == pytest.approx(
                (added_R[row] - before) / 3001, rel=0.02, abs=1e-8
            )


def test_losses_and_perplexities() -> None:
    found = losses(np.array([10.0, 30.0]), np.array([10, 10]))
    assert compute_contributions(found, "loss").tolist() == pytest.approx([1.0, 3.0])
    assert compute_contributions(found, "perplexity").mean() == pytest.approx(math.exp(2.0))
    uneven = losses(np.array([10.0, 30.0]), np.array([5, 15]))
    assert compute_contributions(uneven, "loss").tolist() == pytest.approx(
        [2.0, 2.0]
    )  # both have 2 nats a token


def test_wilsons_interval() -> None:
    """10 of 20, and 0 of 10, worked by hand: (p + z2/2n ± z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)."""
    assert compute_wilson_interval(10, 20) == pytest.approx((0.29930, 0.70070), abs=1e-5)
    assert compute_wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    theirs = stats.binomtest(17, 30).proportion_ci(method="wilson")
    assert compute_confidence_interval(
        right_or_wrong(np.arange(30) < 17), "accuracy"
    ) == pytest.approx((theirs.low, theirs.high))


def test_a_mean_of_symmetric_numbers_has_students_interval() -> None:
    values = np.array([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    half = stats.t.ppf(0.975, 6) * values.std(ddof=1) / math.sqrt(7)
    assert compute_mean_interval(values) == pytest.approx((-half, half))


def test_what_rows_cannot_bear_is_not_given() -> None:
    assert compute_confidence_interval(right_or_wrong(np.ones(5)), "accuracy") is None
    assert "5 rows are too few" in str(
        explain_missing_interval([right_or_wrong(np.ones(5))], "accuracy")
    )
    label = np.array([0] * 50 + [1] * 9)
    assert compute_confidence_interval(classified(label, label, 2), "f1") is None
    assert (
        explain_missing_interval([classified(label, label, 2)], "f1")
        == "a class has 9 rows, and an interval of f1 needs at least 10 rows of every class"
    )
    assert compute_confidence_interval(classified(label, label, 2), "accuracy") is not None
    more = np.append(label, 1)
    low, high = compute_confidence_interval(classified(more, more, 2), "f1") or (0.0, 0.0)
    assert (0.8 < low < 0.95, high) == (True, 1.0)
    assert (
        compute_confidence_interval(judged(np.full(30, 0.5)), "rougeL") is None
    )  # all the same: nothing is known of the spread
    low, high = compute_confidence_interval(judged(np.zeros(30)), "rougeL") or (0.5, 0.5)
    assert (low, high) == pytest.approx((0.0, 0.11351), abs=1e-4)  # as of 0 of 30


def test_intervals_stay_where_the_metric_is() -> None:
    low, high = compute_confidence_interval(judged(np.array([0.0] * 29 + [1.0])), "rougeL") or (
        -1,
        2,
    )
    assert 0 <= low < high <= 1
    low, high = compute_confidence_interval(
        [judged(np.array([0.1] * 29 + [0.9])), judged(np.array([0.1] * 28 + [0.9] * 2))], "rougeL"
    ) or (0, 0)
    assert 0 <= low < 0.145 < high <= 1


def test_seeds_widen_an_interval() -> None:
    draw = np.random.default_rng(1)
    one = draw.random(400) < 0.7
    alike = [right_or_wrong(one), right_or_wrong(one), right_or_wrong(one)]
    apart = [right_or_wrong(draw.random(400) < share) for share in (0.6, 0.7, 0.8)]

    def width(models: list[RowResults]) -> float:
        low, high = compute_confidence_interval(models, "accuracy") or (0.0, 0.0)
        return high - low

    assert width(apart) > 3 * width(alike)


# ---- two candidates


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([1, 1], 2 / 4),  # 2 rows cannot give less
        ([1, 0], 1.0),
        ([0, 0], 1.0),
        ([1] * 5, 2 / 32),  # nor can 5 give less than 0.0625
        ([1, 1, 1, 1, -1], 12 / 32),  # sums of 3 and 5: 5 + 1 of 32 choices, and as many below 0
        ([3, 1, 1, 1, 1], 2 / 32),
        ([2, 1, -1], 6 / 8),  # sums 4 (1), 2 (2), 0 (2), -2 (2), -4 (1): 6 of 8 are as far
        ([1] * 12 + [-1] * 3 + [0] * 5, 2 * (455 + 105 + 15 + 1) / 2**15),  # ties do not count
        ([1] * 20, 2 / 2**20),
    ],
)
def test_the_sign_flip_test_by_hand(differences: list[float], p_value: float) -> None:
    assert run_sign_flip_test(np.array(differences, dtype=float)) == pytest.approx(p_value)


def test_the_sign_flip_test_is_scipys() -> None:
    draw = np.random.default_rng(2)
    for rows in (4, 9, 12):
        values = draw.normal(0.4, 1, rows)
        theirs = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert run_sign_flip_test(values) == pytest.approx(theirs.pvalue)
    many = draw.normal(0.2, 1, 100)
    assert run_sign_flip_test(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def two(one: RowResults, other: RowResults, metric: str, goal: str = "maximize") -> Comparison:
    return Comparison([Candidate("a", [one]), Candidate("b", [other])], metric, goal)  # type: ignore[arg-type]


def test_two_candidates_have_the_paired_t_interval() -> None:
    draw = np.random.default_rng(3)
    tokens = np.ones(300, dtype=int)
    base = draw.gamma(2, 1, 300)
    one, other = losses(base, tokens), losses(base + draw.normal(0.05, 0.2, 300), tokens)
    found = two(one, other, "loss", "minimize")
    theirs = stats.ttest_rel(one.loss_R, other.loss_R)
    expected = theirs.confidence_interval()
    assert found.compute_interval("a", "b") == pytest.approx(
        (expected.low, expected.high), rel=0.02
    )
    assert found.compute_p_value("a", "b") == pytest.approx(theirs.pvalue, abs=2e-4)
    assert (
        found.compute_loss("b", "a") > 0,
        found.is_worse("b", "a"),
        found.is_worse("a", "b"),
    ) == (True, True, False)


@pytest.mark.parametrize(("rows", "least"), [(2, 0.5), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_few_rows_have_their_floor(rows: int, least: float) -> None:
    found = two(right_or_wrong(np.ones(rows)), right_or_wrong(np.zeros(rows)), "accuracy")
    assert found.compute_p_value("a", "b") == pytest.approx(least)
    assert (found.compute_interval("a", "b") is None) == (rows < 6)
    assert found.is_worse("b", "a") == (rows >= 6)


def test_rows_on_which_nothing_differs_do_not_show_that_nothing_ever_will() -> None:
    """As by the rule of three: 100 equal answers leave 3 % of the rows open, 1,000 leave 0.3 %."""
    for rows, shown in ((100, False), (1000, True)):
        same = right_or_wrong(np.arange(rows) < rows // 2)
        assert (two(same, same, "accuracy").compute_max_loss("b", "a") <= 0.01) == shown
    assert two(same, same, "accuracy").compute_p_value("a", "b") == 1.0


def test_macro_averages_of_rare_classes_decide_nothing() -> None:
    label = np.array([0] * 200 + [1] * 5)
    found = two(classified(label, label, 2), classified(label, label * 0, 2), "f1")
    assert (
        found.compute_interval("a", "b"),
        found.compute_p_value("a", "b"),
        found.is_worse("b", "a"),
    ) == (
        None,
        None,
        False,
    )
    assert (
        found.missing_reason
        == "a class has 5 rows, and an interval of f1 needs at least 10 rows of every class"
    )


def test_seeds_that_two_candidates_share_are_no_difference() -> None:
    draw = np.random.default_rng(4)
    tokens = np.ones(500, dtype=int)
    base = draw.gamma(2, 1, 500)
    lucky = (0.0, 0.3, 0.6)
    lora = [losses(base + shift, tokens) for shift in lucky]
    hybrid = [losses(base + shift + 0.05 + draw.normal(0, 0.01, 500), tokens) for shift in lucky]
    shared = Comparison(
        [Candidate("lora", lora), Candidate("hybrid", hybrid, "lora")], "loss", "minimize"
    )
    alone = Comparison([Candidate("lora", lora), Candidate("hybrid", hybrid)], "loss", "minimize")
    assert (shared.is_worse("hybrid", "lora"), alone.is_worse("hybrid", "lora")) == (True, False)


# ---- many candidates, and the rule


def test_more_candidates_need_more() -> None:
    """With the best of 30 equal ones beside it, a difference that two alone would have is none."""
    draw = np.random.default_rng(5)
    best, next_best = draw.random(400) < 0.8, draw.random(400) < 0.72
    alone = two(right_or_wrong(best), right_or_wrong(next_best), "accuracy")
    others = [Candidate(f"c{n}", [right_or_wrong(draw.random(400) < 0.72)]) for n in range(30)]
    near = [Candidate("a", [right_or_wrong(best)]), Candidate("b", [right_or_wrong(next_best)])]
    among = Comparison([*near, *others], "accuracy", "maximize")
    assert alone.compute_critical_value(0, 1) == pytest.approx(stats.t.ppf(0.975, 399), abs=1e-3)
    assert (
        3.4 < among.compute_critical_value(0, 1) < 4.0
    )  # the studentised range of 32, over the root of 2
    assert (among.compute_p_value("a", "b") or 0) > 5 * (alone.compute_p_value("a", "b") or 0)


def options(prices: dict[str, float], comparison: Comparison) -> list[Option]:
    sign = 1 if comparison.goal == "maximize" else -1
    return [
        Option(name, sign * comparison.get_value(name), price) for name, price in prices.items()
    ]


def three(rows: int, rates: tuple[float, float, float], seed: int = 0) -> Comparison:
    """Three classifiers that differ on few rows: a good one, and two that lose some of its right
    answers.
    """
    draw = np.random.default_rng(seed)
    hard = draw.random(rows)
    found = [
        Candidate(name, [right_or_wrong(hard < rate)])
        for name, rate in zip("abc", rates, strict=True)
    ]
    return Comparison(found, "accuracy", "maximize")


WORDING = Wording(
    noun="arm",
    row_noun="row",
    describe=lambda name: name,
    format_cost=lambda option: f"{option.cost:g} s",
    format_score=lambda name: f"score of {name}",
)


def test_the_cheapest_ships_of_which_it_is_shown_that_it_loses_little() -> None:
    found = three(4000, (0.8, 0.798, 0.7))
    decision = decide(options({"a": 30, "b": 20, "c": 10}, found), [found], {}, 4000)
    assert (decision.best.name, decision.chosen.name) == ("a", "b")
    assert [one.name for one in decision.worse] == ["c"]
    assert decision.undecided == ()
    assert explain_open_question(decision, [found], {}, WORDING) is None
    sentence = explain(decision, [found], {}, WORDING)
    assert sentence.startswith(
        "Ship b: it has the lowest cost (20 s) of the 2 arms within the tolerance. Its score on "
        "4,000 rows is score of b; the best is score of a of a (30 s). It loses 0.00"
    )
    assert sentence.endswith(" with 95 % confidence (tolerance 0.01).")


def test_the_best_ships_where_the_rows_do_not_show_it() -> None:
    found = three(200, (0.8, 0.795, 0.7))
    decision = decide(options({"a": 30, "b": 20, "c": 10}, found), [found], {}, 200)
    assert (decision.chosen.name, [one.name for one in decision.cheaper_undecided]) == ("a", ["b"])
    sentence = explain(decision, [found], {}, WORDING)
    assert sentence.startswith(
        "Ship a: it has the best score, score of a, on 200 rows. b is cheaper (20 s), but 200 rows are not enough to show whether it is within the tolerance: it loses 0.005 ["
    )
    assert "] in accuracy (tolerance 0.01). About " in sentence
    assert sentence.endswith(" rows would be enough.")
    needed = int(sentence.rpartition("About ")[2].split()[0].replace(",", ""))
    more = three(int(1.3 * needed), (0.8, 0.795, 0.7), seed=1)
    assert decide(options({"a": 30, "b": 20, "c": 10}, more), [more], {}, 200).chosen.name == "b"
    generous = decide(options({"a": 30, "b": 20, "c": 10}, found), [found], {"accuracy": 0.05}, 200)
    assert generous.chosen.name == "b"


def test_the_sentence_names_what_is_worse_and_what_is_not_shown_to_be() -> None:
    worse = three(4000, (0.8, 0.7, 0.6))
    decision = decide(options({"a": 1, "b": 2, "c": 3}, worse), [worse], {}, 4000)
    sentence = explain(decision, [worse], {}, WORDING)
    assert "The next best, b, is worse in accuracy by 0.099 [" in sentence
    assert sentence.endswith("] (p < 0.001).")
    close = three(200, (0.8, 0.795, 0.79))
    decision = decide(options({"a": 1, "b": 2, "c": 3}, close), [close], {}, 200)
    assert decision.cheaper_undecided == []
    sentence = explain(decision, [close], {}, WORDING)
    assert sentence.endswith(" b, c are not shown to be worse, but not cheaper either.")


def test_every_metric_that_decides_must_be_kept() -> None:
    found = three(4000, (0.8, 0.798, 0.7))
    draw = np.random.default_rng(6)
    other = Comparison(
        [
            Candidate(name, [judged(draw.beta(2, 2, 4000) * much)])
            for name, much in (("a", 1), ("b", 0.9), ("c", 1))
        ],
        "rougeL",
        "maximize",
    )
    decision = decide(options({"a": 30, "b": 20, "c": 10}, found), [found, other], {}, 4000)
    assert (decision.chosen.name, [one.name for one in decision.worse]) == ("a", ["b", "c"])


def test_a_tie_goes_to_the_cheapest() -> None:
    same = right_or_wrong(np.arange(20) < 10)
    found = Comparison([Candidate(name, [same]) for name in "abc"], "accuracy", "maximize")
    decision = decide(options({"a": 3, "b": 1, "c": 2}, found), [found], {}, 20)
    assert (decision.best.name, decision.chosen.name) == ("b", "b")


def test_without_results_row_by_row_only_the_best_ships() -> None:
    found = [Option("a", 0.8, 2.0), Option("b", 0.8, 3.0), Option("c", 0.7, 1.0)]
    decision = decide(found, [], {}, 100)
    assert (decision.chosen.name, [one.name for one in decision.unranked]) == ("a", ["b", "c"])


def test_no_number_is_minus_nothing() -> None:
    assert [format_decimal(value) for value in (-0.0001, -0.0, 0.0004, -0.001)] == [
        "0.000",
        "0.000",
        "0.000",
        "-0.001",
    ]


@pytest.mark.parametrize("block", ["search", "compare"])
def test_several_metrics_of_one_decision(block: str, llama_job: JobMaker) -> None:
    what = (
        "parameters: {lr: [0.001, 0.01]}"
        if block == "search"
        else "arms: {a: {method: lora}, b: {method: base}}"
    )
    text = (
        f"evaluate: {{metrics: [rougeL, exact_match]}}\n{block}: {{metric: [eval_rougeL, "
        f"exact_match, loss], {what}}}"
    )
    job = llama_job(text).job
    assert [(one.name, one.goal) for one in job.decision_metrics] == [
        ("rougeL", "maximize"), ("exact_match", "maximize"), ("loss", "minimize"),
    ]  # fmt: skip
    assert job.tolerances == dict.fromkeys(("rougeL", "exact_match", "loss"))
    longer = text.replace("loss],", "loss], tolerance: {loss: 0.2},")
    assert llama_job(longer).job.tolerances == {"rougeL": None, "exact_match": None, "loss": 0.2}
    assert JobSpec.model_validate_json(job.model_dump_json()) == job
    for wrong, sentence in (
        (text.replace(", loss]", ", rougeL]"), "has rougeL twice"),
        (text.replace(", loss]", ", bleu]"), "bleu, but must be one of"),
        (
            longer.replace("{loss:", "{rouge1:"),
            f"{block}.tolerance has rouge1, but may only contain metrics of",
        ),
    ):
        with pytest.raises(JobFileError, match=sentence):
            llama_job(wrong)


# ---- what needs no training, and what speaks against a decision


def test_the_commonest_class_is_scikit_learns() -> None:
    train, held_out = {"a": 50, "b": 30, "c": 20}, {"a": 10, "b": 25, "c": 5, "d": 0}
    common, metrics = evaluate_majority_class(train, held_out)
    label = np.repeat(["a", "b", "c"], [10, 25, 5])
    said = np.full(40, "a")
    assert common == "a"
    assert metrics["accuracy"] == 0.25
    for name, theirs in (
        ("f1", f1_score),
        ("precision", precision_score),
        ("recall", recall_score),
    ):
        assert metrics[name] == pytest.approx(theirs(label, said, average="macro", zero_division=0))
    chances = np.tile([0.5, 0.3, 0.2], (40, 1))
    assert metrics["loss"] == pytest.approx(log_loss(label, chances, labels=["a", "b", "c"]))
    assert (
        "loss" not in evaluate_majority_class(train, held_out | {"d": 1})[1]
    )  # no training row has it
    assert evaluate_majority_class(train, {})[1] == {}


def test_answers_that_need_no_model() -> None:
    rows = [
        Row(messages=(Message("user", "the cat sat"), Message("assistant", "the cat sat"))),
        Row(
            messages=(
                Message("system", "be brief"),
                Message("user", "the dog"),
                Message("assistant", "a tree"),
            )
        ),
    ]
    found = evaluate_trivial_answers(rows, ["rougeL", "exact_match", "bertscore_f1"])
    assert found["an empty answer"] == {"rougeL": 0.0, "exact_match": 0.0}
    assert found["the question as the answer"] == {"rougeL": 0.5, "exact_match": 0.5}
    assert (
        evaluate_trivial_answers(rows, ["bertscore_f1"])
        == evaluate_trivial_answers([], ["rougeL"])
        == {}
    )


SHIP = Recommendation(trial_id="t", rule="r", sentence="Ship t: it has the best accuracy.")


def check(
    value: float,
    interval: tuple[float, float] | None,
    *baselines: float,
    metric: str = "accuracy",
    goal: Goal = "maximize",
    recommendation: Recommendation = SHIP,
) -> tuple[bool, str, list[str]]:
    known = [
        Baseline(what=f"baseline {place}", metrics={metric: one})
        for place, one in enumerate(baselines)
    ]
    found, cautions = check_against_baselines(
        recommendation, metric, goal, value, interval, known, "validation rows"
    )
    return found.decided, found.sentence, cautions


def test_what_does_not_beat_the_baseline_is_not_shipped() -> None:
    assert check(0.8, (0.7, 0.9), 0.5, 0.6) == (True, SHIP.sentence, [])
    decided, sentence, _ = check(0.58, (0.5, 0.65), 0.58)
    assert not decided
    assert sentence == (
        "Do not ship: on the validation rows, the best is t with accuracy 0.580 [0.500, 0.650], "
        "which does not beat baseline 0 (0.580)."
    )
    assert check(0.6, (0.5, 0.7), 0.58)[2] == [
        "t (accuracy 0.600 [0.500, 0.700]) is not clearly better than baseline 0 (0.580)."
    ]
    assert (
        "a model that is always wrong (0.000)" in check(0.0, None)[1]
    )  # arms that all score nothing
    assert check(1.2, (1.0, 1.4), 2.0, metric="loss", goal="minimize") == (True, SHIP.sentence, [])
    assert check(2.1, None, 2.0, metric="loss", goal="minimize")[1].startswith("Do not ship")
    assert check(2.1, None, metric="loss", goal="minimize")[0]  # nothing to compare with


def test_what_was_not_decided_is_not_refused_either() -> None:
    """Three rows do not show that a model is no better than a baseline."""
    few = SHIP.model_copy(update={"decided": False, "sentence": "Too few rows to decide."})
    assert check(0.3, None, 0.5, recommendation=few) == (False, "Too few rows to decide.", [])


def test_cautions_about_rows_and_models() -> None:
    counts = {"validation": {"a": 5, "b": 0, "c": 0}, "test": {"a": 1, "b": 2, "c": 3}}
    assert check_rows(counts, "validation", 5) == [
        "The decision is based on 5 validation rows; with fewer than 100, only large differences can be shown.",
        "2 classes have no validation rows, so their quality is unknown: b, c.",
    ]
    assert check_rows({"test": {"a": 9, "b": 0}}, "validation", 100) == [
        "1 class has no test rows, so its quality is unknown: b."
    ]
    assert check_rows({}, "test", 100) == []
    curve = [
        {"step": 1, "accuracy": 0.6},
        {"step": 2, "accuracy": 0.7},
        {"step": 2},
        {"step": 3, "accuracy": 0.75},
    ]
    row = TrialRow(trial_id="t", state="finished", curve=curve)
    assert check_predictions([[3, 0], [2, 0]], ["a", "b"]) == ["1 class is never predicted: b."]
    assert (
        check_predictions([[3, 0], [0, 2]], ["a", "b"]) == check_predictions([], ["a", "b"]) == []
    )
    assert check_convergence("t", row, "accuracy", "maximize") == [
        "The accuracy of t was still improving when its training ended (0.700, then 0.750). Longer "
        "training may help."
    ]
    assert (
        check_convergence("t", row, "accuracy", "minimize")
        == check_convergence(None, None, "loss", "minimize")
        == []
    )
    assert check_scores("rougeL", [0.0, 0.0, None]) == [
        "All 2 candidates have rougeL 0. Check the metric and the format of the answers."
    ]
    assert check_scores("rougeL", [0.0, 0.1]) == check_scores("loss", [0.0, 0.0]) == []


# ---- coverage


@pytest.mark.long
@pytest.mark.parametrize("rows", [30, 100, 1000])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_coverage_of_accuracy(rows: int, share: float) -> None:
    right = np.random.default_rng(rows).binomial(rows, share, DATA_SETS)
    inside = [
        low <= share <= high
        for low, high in (compute_wilson_interval(int(number), rows) for number in right)
    ]
    assert 0.92 <= np.mean(inside) <= 0.98


@pytest.mark.long
@pytest.mark.parametrize("rows", [30, 100, 1000])
@pytest.mark.parametrize("kind", ["normal", "beta", "gamma"])
def test_coverage_of_means(rows: int, kind: str) -> None:
    draw = np.random.default_rng(rows)
    make, mean = {
        "normal": (lambda: draw.normal(1, 1, rows), 1.0),
        "beta": (lambda: draw.beta(2, 3, rows), 0.4),
        "gamma": (lambda: draw.gamma(2, 0.5, rows), 1.0),
    }[kind]
    found = [compute_mean_interval(make()) or (0.0, 0.0) for _ in range(DATA_SETS)]
    assert 0.92 <= np.mean([low <= mean <= high for low, high in found]) <= 0.97


@pytest.mark.long
@pytest.mark.parametrize("rows", [100, 1000])
@pytest.mark.parametrize(
    ("shares", "right"),
    [((0.5, 0.5), (0.8, 0.9)), ((0.85, 0.15), (0.95, 0.6)), ((0.2, 0.2, 0.6), (0.5, 0.7, 0.9))],
)
def test_coverage_of_macro_f1(
    rows: int, shares: tuple[float, ...], right: tuple[float, ...]
) -> None:
    draw, classes = np.random.default_rng(rows), len(shares)
    said_CC = (np.eye(classes) * np.array(right)[:, None]) + (1 - np.eye(classes)) * (
        (1 - np.array(right)) / (classes - 1)
    )[:, None]
    cells_CC = np.array(shares)[:, None] * said_CC
    true_C, said_C = cells_CC.sum(axis=1), cells_CC.sum(axis=0)
    truth = float((2 * np.diagonal(cells_CC) / (true_C + said_C)).mean())
    inside = []
    for _ in range(DATA_SETS):
        label = draw.choice(classes, rows, p=shares)
        if np.bincount(label, minlength=classes).min() < 10:
            continue
        predicted = (said_CC[label].cumsum(axis=1) < draw.random(rows)[:, None]).sum(axis=1)
        low, high = compute_confidence_interval(classified(label, predicted, classes), "f1") or (
            0.0,
            0.0,
        )
        inside.append(low <= truth <= high)
    assert len(inside) > DATA_SETS / 2
    assert 0.92 <= np.mean(inside) <= 0.97


@pytest.mark.long
@pytest.mark.parametrize("kind", ["accuracy", "loss"])
@pytest.mark.parametrize(
    ("candidates", "rows", "data_sets"),
    [(2, 30, 4000), (2, 300, 4000), (10, 100, 4000), (50, 100, 4000)],
)
def test_equal_candidates_are_rarely_said_to_differ(
    kind: str, candidates: int, rows: int, data_sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any of them from the best, which is picked on the same rows."""
    monkeypatch.setattr(paired, "_FLIPS", 500)
    draw = np.random.default_rng(7)
    wrong = 0
    for _ in range(DATA_SETS):
        hard = draw.random(rows)
        if kind == "accuracy":
            chance = np.where(hard < 0.6, 0.97, 0.5)
            models = [right_or_wrong(draw.random(rows) < chance) for _ in range(candidates)]
        else:
            models = [
                losses(hard + draw.normal(0, 0.2, rows), np.ones(rows)) for _ in range(candidates)
            ]
        goal = "maximize" if kind == "accuracy" else "minimize"
        found = Comparison(
            [Candidate(str(n), [one]) for n, one in enumerate(models)], kind, goal, 500
        )  # type: ignore[arg-type]
        best = str(
            int(np.argmax(found._means_K) if goal == "maximize" else np.argmin(found._means_K))
        )
        wrong += any(found.is_worse(name, best) for name in found.names if name != best)
    assert wrong / DATA_SETS <= 0.06
