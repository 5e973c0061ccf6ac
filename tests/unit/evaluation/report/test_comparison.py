"""Comparisons: what a block may say, what jobs its arms are, and which arm ships. No Ray here."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lorafleet.cluster.local_site import detect_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.commands.compare import compare
from lorafleet.commands.evaluate import resolve_class_order
from lorafleet.commands.options import LaunchOptions
from lorafleet.evaluation.metrics.paired import Candidate
from lorafleet.evaluation.metrics.paired import Comparison as Paired
from lorafleet.evaluation.metrics.predictions import Classified, RowResults
from lorafleet.evaluation.metrics.scores import compute_scores
from lorafleet.evaluation.metrics.summary import summarize_results
from lorafleet.evaluation.render.arm_table import build_pair_matrix, build_pairs_table
from lorafleet.evaluation.render.forms import render_html, render_markdown, render_terminal
from lorafleet.evaluation.render.plots import _place_labels, draw_arm_plots, draw_plots
from lorafleet.evaluation.render.wandb import _build_tables
from lorafleet.evaluation.report.across_runs import compare_runs
from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.choose_arm import Choice, choose, find_pareto_front
from lorafleet.evaluation.report.comparison import (
    compare_arms,
    get_finite_intervals,
    get_finite_metrics,
    list_pairs,
    summarize_batches,
)
from lorafleet.evaluation.report.samples import select_differing, select_mistakes, select_worst
from lorafleet.evaluation.tokens import Split, assign_folds, concat
from lorafleet.jobs import files
from lorafleet.jobs.data.inputs import list_base_models
from lorafleet.jobs.errors import JobFileError, UserError
from lorafleet.jobs.loading.evaluate_job import ModelArm, check_base, make_folder_arm, name_arms
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.report import Answer, Arm, Inference, Pair, Report, Row, Sample
from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.jobs.schema.comparison import Cost
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import NamedMetric
from lorafleet.jobs.schema.types import Assignment
from lorafleet.jobs.trials import arms
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.trial_id import get_base_revision
from lorafleet.training.data import prepare_tokens
from lorafleet.tuning.compare import Comparison
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.proposals import ListProposals, SearchThenSeeds, TpeProposals
from tests.conftest import JobMaker

ACCURACY = NamedMetric(name="accuracy", goal="maximize")
LOSS = NamedMetric(name="loss", goal="minimize")
ARMS = """
compare:
  arms:
    base: {method: base}
    lora:
      method: lora
      parameters: {lr: [1e-3, 1e-2], lora.lora_r: [2, 4]}
    qlora: {method: qlora, set: {train.learning_rate: 5e-3, lora.lora_r: 8}}
    base-int8: {method: base, quantization: int8}
    hybrid: {adapter_of: lora, quantization: int8}
  budget: {samples: 64}
  method: grid
  seeds: 3
"""


def block(make: JobMaker, text: str = ARMS) -> JobSpec:
    return make(text).job


# ---- the block ----


def test_arms_are_jobs_of_their_own(bert_job: JobMaker) -> None:
    job = block(bert_job)
    assert arms.list_trained_arms(job) == ["lora", "qlora"]
    lora = arms.build_search_job(job, "lora", 64)
    assert lora.search is not None
    assert search.count_grid_combinations(lora.search) == 4
    assert (lora.search.seeds, lora.search.scheduler.max_t, lora.search.scheduler.type) == (
        3,
        64,
        "none",
    )
    assert (
        search.build_trial_job(
            lora, {"lora.lora_r": 2, "train.learning_rate": 1e-3}
        ).lora.lora_alpha
        == 4
    )  # the file's link
    qlora = arms.build_search_job(job, "qlora", 64)
    assert qlora.search is not None
    assert list(search.iterate_assignments(qlora)) == [
        {"train.seed": seed} for seed in (42, 43, 44)
    ]
    assert (qlora.lora.lora_r, qlora.lora.lora_alpha, qlora.train.learning_rate) == (8, 16, 5e-3)
    best = arms.build_evaluation_job(job, "lora", {"lora.lora_r": 2, "train.learning_rate": 1e-3})
    assert (best.method, best.lora.lora_r, best.lora.lora_alpha, best.search) == (
        "lora",
        2,
        4,
        None,
    )
    assert arms.build_evaluation_job(job, "base", None).method == "lora"
    int8 = arms.build_arm_job(job, "base-int8")
    assert (int8.method, int8.qlora.quant_type) == ("qlora", "int8")
    assert arms.build_arm_job(job, "hybrid").qlora.quant_type == "int8"


def test_every_arm_is_planned(bert_job: JobMaker) -> None:
    made = make_plan(bert_job(ARMS), detect_site(None), "compare")
    assert [trial.arm for trial in made.trials] == ["lora"] * 4 + ["qlora"] * 3
    assert made.later_trials == 2  # lora's best with two further seeds
    assert made.worst_samples == (4 + 2 + 3) * 64
    assert made.command == "compare"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("arms: {a: {method: lora}}", "must be a list of at least 2 entries"),
        ("arms: {a: {method: base}, b: {}}", "must have exactly one of method and adapter_of"),
        (
            "arms: {a: {method: base}, b: {adapter_of: a}}",
            "adapter_of is 'a', but must be an arm with an adapter",
        ),
        (
            "arms: {a: {method: base}, b: {method: lora, quantization: int8}}",
            "quantization is only for base and adapter_of",
        ),
        (
            "arms: {a: {method: base, parameters: {lr: [1]}}, b: {method: lora}}",
            "this arm trains nothing",
        ),
        (
            "arms: {a: {method: base}, b: {method: lora, set: {data.text_column: x}}}",
            "is the same for all arms",
        ),
        (
            "arms: {a: {method: base}, b: {method: lora, set: {lora.lora_rr: 8}}}",
            "did you mean 'lora.lora_r'?",
        ),
        (
            "arms: {a: {method: base}, b: {method: lora, set: {lora.lora_r: 0}}}",
            "lora.lora_r is 0, but must be at",
        ),
        (
            "arms: {a: {method: base}, b: {method: lora, parameters: {lr: [1e-3, 0]}}}",
            "compare.arms.b: search.parameters.train.learning_rate",
        ),
        (
            "arms: {a: {method: base}, b: {method: base}}\n  budget: {samples: 1, tokens: 2}",
            "must have only one of them",
        ),
        (
            "arms: {a: {method: base}, b: {method: base}}\n  scheduler: {max_t: 8}",
            "is set by compare.budget",
        ),
        (
            "method: grid\n  arms: {a: {method: lora, parameters: {lr: [1, 2]}}, b: {method: full, "
            "parameters: {lr: [1]}}}",
            "different numbers of configurations (a 2, b 1), which is not a fair comparison",
        ),
        (
            "arms: {a: {method: base}, b: {method: base}}\n  metric: rougeL",
            "must be one of accuracy, f1",
        ),
        (
            "arms: {a: {method: lora}, b: {adapter_of: a, set: {model.max_length: 9}}}",
            "'model.max_length' is fixed by the training of a; only fields of qlora may differ",
        ),
        (
            "num_samples: 4\n  arms: {a: {method: lora, parameters: {lr: [1, 2]}}, b: {method: "
            "full, parameters: {lr: {min: 0.1, max: 1.0}}}}",
            "different numbers of configurations (a 2, b 4), which is not a fair comparison",
        ),
        (
            "arms: {a: {weights: x}, b: {method: base}}",
            "weights requires the method that they were trained with",
        ),
    ],
)
def test_a_wrong_block_gets_its_sentence(text: str, sentence: str, bert_job: JobMaker) -> None:
    with pytest.raises(JobFileError) as caught:
        bert_job(f"compare:\n  {text}\n")
    assert sentence in str(caught.value)
    assert "job.yaml:" in str(caught.value)  # and its line


def test_seeds_follow_the_search(bert_job: JobMaker) -> None:
    text = (
        "search: {method: grid, seeds: 3, scheduler: {type: none, max_t: 16}, parameters: {lr: "
        "[1e-3, 1e-2]}}"
    )
    job = bert_job(text).job
    best: list[Assignment] = []
    searched = ListProposals(list(search.iterate_assignments(job)))
    proposals = SearchThenSeeds(searched, job, lambda: best[0] if best else None, lambda: False)
    assert [proposals.next() for _ in range(2)] == [
        {"train.learning_rate": 1e-3},
        {"train.learning_rate": 1e-2},
    ]
    assert proposals.next() is None  # the search has not ended
    best.append({"train.learning_rate": 1e-2})
    assert proposals.next() == {"train.learning_rate": 1e-2, "train.seed": 43}
    assert proposals.next() == {"train.learning_rate": 1e-2, "train.seed": 44}
    assert proposals.next() is None
    assert search.is_seed_repeat(job, {"train.learning_rate": 1e-2, "train.seed": 44})
    assert not search.is_seed_repeat(job, {"train.learning_rate": 1e-2})
    with pytest.raises(JobFileError, match=r"train.seed is searched as well"):
        bert_job(text.replace("{lr: [1e-3, 1e-2]}", "{train.seed: [1, 2]}"))


def test_given_models_are_arms(tmp_path: Path) -> None:
    adapter = tmp_path / "ab" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    found = name_arms([make_folder_arm(adapter), make_folder_arm(adapter)])
    assert list(found) == ["ab", "ab-2"]
    assert found["ab"] == {"method": "lora", "weights": str(adapter)}
    alone = name_arms([make_folder_arm(adapter), ModelArm("ab", {"method": "base"})])
    assert [arm["method"] for arm in alone.values()] == ["lora", "base"]


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, bert_job: JobMaker) -> None:
    job = bert_job().job
    job = job.model_copy(
        update={"model": job.model.model_copy(update={"model_name_or_path": "org/ours"})}
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/theirs"}
    files.write_json(tmp_path / "adapter_config.json", config)
    with pytest.raises(
        UserError, match=r"was trained on org/theirs, but the job's base is org/ours"
    ):
        check_base(make_folder_arm(tmp_path), job)
    files.write_json(
        tmp_path / "adapter_config.json", config | {"base_model_name_or_path": "Org/Ours"}
    )
    check_base(make_folder_arm(tmp_path), job)
    resolved = {
        "method": "qlora",
        "model": {"model_name_or_path": "org/theirs"},
        "qlora": {"quant_type": "nf4"},
    }
    files.write_json(
        tmp_path / "manifest.json", {"resolved": resolved}
    )  # a card says what the adapter is of
    given = make_folder_arm(tmp_path)
    assert given.arm["method"] == "qlora"
    assert given.arm["set"]["model.model_name_or_path"] == "org/theirs"
    check_base(given, job)


def test_a_path_in_an_arm_starts_at_the_job_file(bert_job: JobMaker) -> None:
    other = (
        "other: {method: lora, set: {model.model_name_or_path: ../models/mine, "
        "train.learning_rate: 1e-3}}"
    )
    job = bert_job(f"compare: {{arms: {{a: {{method: base}}, {other}}}}}")
    given = Path(str(arms.get_arm(job.job, "other").set["model.model_name_or_path"]))
    assert given == (job.path.parent / "../models/mine").absolute()


def test_classes_in_another_order_are_not_judged_together(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    runs = [Run(tmp_path / name) for name in ("a", "b", "old")]
    for run, facts in zip(
        runs, ({"labels": ["bad", "good"]}, {"labels": ["good", "bad"]}, {}), strict=True
    ):
        files.write_json(run.path / "facts.json", facts)
    job = bert_job().job
    assert resolve_class_order([runs[0], runs[2]], job) == ["bad", "good"]
    assert resolve_class_order([runs[2]], job) == []
    with pytest.raises(
        UserError, match=r"classes of b are good, bad in this order, but those of a are bad, good"
    ):
        resolve_class_order(runs, job)
    with pytest.raises(
        UserError, match=r"classes of a are bad, good in this order, but the job's data.labels are"
    ):
        resolve_class_order(runs, bert_job(data__labels=["good", "bad"]).job)


# ---- pairs ----


def classified(right: np.ndarray) -> RowResults:
    """Results that are right or wrong on given rows."""
    labels = np.zeros(len(right), dtype=int)
    said = Classified(labels, np.where(right, 0, 1), np.full(len(right), 0.9), 2)
    return RowResults(np.where(right, 0.1, 2.0), np.ones(len(right), dtype=int), said)


def test_pairs_are_finer_than_intervals() -> None:
    """Two models that agree on nearly all rows are told apart, though their own intervals overlap
    widely.
    """
    right = np.random.default_rng(0).random(400) < 0.7
    better = right.copy()
    better[np.flatnonzero(~right)[:12]] = True
    one, other = classified(right), classified(better)
    low, high = (
        compute_scores(found, ["accuracy"]).intervals["accuracy"] for found in (other, one)
    )
    assert low[0] < high[1]
    apart = against([other], [one])
    assert apart.compute_difference("a", "b") == pytest.approx(12 / 400)
    assert (apart.compute_interval("a", "b") or (0, 0))[0] > 0
    assert (apart.compute_p_value("a", "b") or 1) < 0.01
    assert against([one], [other]).compute_p_value("a", "b") == apart.compute_p_value("a", "b")


def against(ours: list[RowResults], theirs: list[RowResults], metric: str = "accuracy") -> Paired:
    """Two arms by their models."""
    goal = "minimize" if metric == "loss" else "maximize"
    return Paired([Candidate("a", ours), Candidate("b", theirs)], metric, goal)


def p_of(ours: list[RowResults], theirs: list[RowResults], metric: str = "accuracy") -> float:
    found = against(ours, theirs, metric).compute_p_value("a", "b")
    assert found is not None
    return found


def test_the_same_model_is_not_told_apart_from_itself() -> None:
    found = classified(np.random.default_rng(0).random(50) < 0.5)
    apart = against([found], [found])
    assert (apart.compute_difference("a", "b"), apart.compute_p_value("a", "b")) == (0.0, 1.0)
    low, high = apart.compute_interval("a", "b") or (1, 1)
    assert low == pytest.approx(-high) and high > 0  # 50 equal answers leave a few per cent open


def test_p_values_are_as_often_small_as_they_say() -> None:
    """Models that differ by chance alone get p < 0.05 about once in twenty times."""
    random, small = np.random.default_rng(1), 0
    for _ in range(300):
        one, other = (classified(random.random(200) < 0.6) for _ in range(2))
        small += p_of([one], [other]) < 0.05
    assert 3 <= small <= 30


def test_seeds_are_averaged() -> None:
    right = np.arange(10) < 5
    models = [classified(right), classified(np.arange(10) < 7)]
    assert compute_scores(models, ["accuracy"]).metrics["accuracy"] == pytest.approx(0.6)
    judged = {"a": dict(enumerate(models)), "b": {0: classified(right)}, "gone": {}}
    pairs = list_pairs(compare_arms(judged, ACCURACY, 200))
    assert [(pair.one, pair.other) for pair in pairs] == [("a", "b")]
    assert pairs[0].difference == pytest.approx(0.1)


# ---- the choice ----


def arm(name: str, accuracy: float, seconds: float, gib: float = 1.0) -> Arm:
    return Arm(
        arm=name,
        what=name,
        metrics={"accuracy": accuracy, "loss": 1 - accuracy},
        interval={"accuracy": (accuracy - 0.02, accuracy + 0.02)},
        train_seconds=seconds,
        inference=Inference(peak_memory_gib=gib, latency_ms=10 * gib),
    )


TABLE = [
    arm("base", 0.50, 0, 1.0),
    arm("lora", 0.79, 10, 1.1),
    arm("full", 0.80, 50, 1.0),
    arm("hybrid", 0.78, 10, 0.6),
]
PAIRED = Paired(
    [
        Candidate(arm.arm, [classified(np.arange(5000) < 5000 * (arm.metrics["accuracy"] or 0))])
        for arm in TABLE
    ],
    "accuracy",
    "maximize",
)
PAIRS = [pair for pair in list_pairs([PAIRED]) if "full" in (pair.one, pair.other)]


def choice(
    rule: str, cost: str = "train_seconds", within: float = 0.0, metric: str = "accuracy"
) -> Choice:
    goal = "maximize" if metric == "accuracy" else "minimize"
    return Choice(rule, metric, goal, cost, within, {metric: 0.02}, 5000)  # type: ignore[arg-type]


WITHIN_TOLERANCE = choice("cheapest_within_tolerance")


def report_of(table: list[Arm], pairs: list[Pair], cost: Cost = "train_seconds") -> Report:
    """A report of a comparison."""
    return Report(
        run="tiny-1",
        state="finished",
        task="classification",
        model="m",
        data="d",
        metric="accuracy",
        goal="maximize",
        metrics=["accuracy", "loss"],
        rows_count={},
        rungs=[],
        time_attr="samples",
        base=Row(trial_id="base", state="finished"),
        trials=[],
        recommendation=choose(table, [PAIRED], choice("cheapest_within_tolerance", cost)),
        arms=table,
        pairs=pairs,
    )


def chosen(
    rule: str, cost: str = "train_seconds", within: float = 0.0, metric: str = "accuracy"
) -> tuple[str, str]:
    found = choose(
        TABLE, [PAIRED] if metric == "accuracy" else [], choice(rule, cost, within, metric)
    )
    assert found.arm is not None
    assert found.rule
    return found.arm, found.sentence


def test_rules_choose_as_they_say() -> None:
    assert chosen("best")[0] == chosen("best", metric="loss")[0] == "full"
    name, sentence = chosen("cheapest_within_tolerance")
    assert name == "lora"
    assert sentence.startswith(
        "Ship lora: it has the lowest cost (10.0 seconds of training) of the 2 arms within the "
        "tolerance. Its score on 5,000 held-out rows is accuracy 0.790 [0.770, 0.810]; the best is "
        "accuracy 0.800 [0.780, 0.820] of full (50.0 seconds of training). It loses 0.010 in "
        "accuracy, at most 0.01"
    )
    assert sentence.endswith(" with 95 % confidence (tolerance 0.02).")
    assert chosen("smallest_within", "inference_memory_gib", 0.03)[0] == "hybrid"
    assert chosen("smallest_within", "inference_memory_gib", 0.015)[0] == "full"
    name, sentence = chosen("pareto", "inference_memory_gib")
    assert name == "full"
    assert "hybrid (0.780 [0.760, 0.800], 0.60 GiB in inference), full (0.800" in sentence
    assert "base" not in sentence


def test_the_front_is_what_nothing_beats() -> None:
    names = [found.arm for found in find_pareto_front(TABLE, choice("pareto"))]
    assert names == ["base", "lora", "full"]
    by_loss = [
        found.arm
        for found in find_pareto_front(
            TABLE, Choice("pareto", "loss", "minimize", "inference_memory_gib")
        )
    ]
    assert by_loss == ["hybrid", "full"]


def test_nothing_to_choose_from() -> None:
    empty = [Arm(arm="a", what="a"), arm("b", 0.9, 1).model_copy(update={"comparable": False})]
    assert choose(empty, [], Choice("best", "accuracy", "maximize", "train_seconds")).arm is None


def test_what_was_not_judged_alike_has_no_winner() -> None:
    apart = arm("b", 0.9, 1).model_copy(update={"comparable": False})
    by_quality = Choice("best", "accuracy", "maximize", "train_seconds")
    for two in ([arm("a", 0.5, 1), apart], [apart, arm("a", 0.5, 1)]):
        found = choose(two, [], by_quality)
        assert (found.arm, found.trial_id) == (None, None)
        assert found.sentence.startswith("Nothing is ranked: no two")
    alone = choose([arm("a", 0.5, 1), apart, Arm(arm="c", what="NaN")], [], by_quality)
    assert alone.arm == "a"  # two are alike, and one of them has no number
    among = choose([arm("a", 0.5, 1), apart, arm("c", 0.6, 1)], [], by_quality)
    assert among.arm == "c"
    assert among.sentence.endswith("Not ranked with the other 2: b.")


def test_differences_are_shown_with_their_intervals() -> None:
    """Few pairs whole, many against the best in a terminal; all of them in Markdown and on the
    page.
    """
    pair = Pair(
        one="full",
        other="hybrid",
        metric="accuracy",
        difference=0.02,
        interval=(-0.01, 0.05),
        p_value=0.2,
    )
    report = report_of(TABLE, [*PAIRS[:2], pair])
    headings, few = build_pairs_table(report, all_pairs=False)
    assert headings == ["difference", "test accuracy [95 %]", "p"]
    assert [
        "hybrid - full",
        "-0.020 [-0.050, +0.010]",
        "0.200",
    ] in few  # the best is what is taken away
    many = [*PAIRS, pair.model_copy(update={"one": "base", "other": "lora"})]
    assert len(build_pairs_table(report_of(TABLE, many), all_pairs=False)[1]) == 3
    assert len(build_pairs_table(report_of(TABLE, many), all_pairs=True)[1]) == 4
    names, cells = build_pair_matrix(report)
    assert dict(cells)["hybrid"][names.index("full")] == "-0.020 (p 0.200)\n[-0.050, +0.010]"
    shown = io.StringIO()
    Console(file=shown, width=120).print(render_terminal(report, 120))
    for text in (shown.getvalue(), render_markdown(report), render_html(report)):
        assert "[-0.050, +0.010]" in text or "[-0.010, +0.050]" in text
        assert "among the arms that lose at most 0.02 of accuracy against the best" in " ".join(
            text.split()
        )


def test_a_comparison_draws_every_searched_field_and_the_cost_of_its_rule() -> None:
    def trial(name: str, of: str, score: float, **params: object) -> Row:
        curve = [{"samples": seen, "train_loss": 1.0 / seen, "accuracy": score} for seen in (8, 16)]
        return Row(
            trial_id=name,
            arm=of,
            state="finished",
            params=params,
            metrics={"accuracy": score},
            curve=curve,
        )

    trials = [
        trial(
            f"{of}{lr}",
            of,
            0.5 + lr,
            **{"train.learning_rate": lr, "lora.lora_target_modules": layers},
        )
        for of in ("lora", "qlora")
        for lr, layers in ((0.01, "q_proj"), (0.1, "all-linear"))
    ]
    trials.append(trial("seed", "lora", 0.6, **{"train.seed": 43}))
    sized = [one.model_copy(update={"weights_mb": place}) for place, one in enumerate(TABLE)]
    report = report_of(sized, PAIRS, "weights_mb").model_copy(update={"trials": trials})
    drawn = dict(draw_plots(report))
    assert [text for text in drawn if " against " in text] == [
        "Validation accuracy against train.learning_rate; crosses mark trials that were stopped early.",
        "Validation accuracy against lora.lora_target_modules; crosses mark trials that were stopped early.",
    ]
    assert (
        "all-linear"
        in drawn[
            "Validation accuracy against lora.lora_target_modules; crosses mark trials that were stopped early."
        ]
    )
    assert all(
        ">qlora<" in svg for text, svg in drawn.items()
    )  # colours are arms, and the legend says which
    many = [
        trial(
            f"{of}{lr}",
            f"arm-{of}",
            0.5,
            **{"train.learning_rate": lr} | ({"lora.lora_r": 8 * of} if of < 3 else {}),
        )
        for of in range(1, 11)
        for lr in (0.01, 0.1)
    ]
    for text, svg in draw_plots(report.model_copy(update={"trials": many})):
        if (
            "train.learning_rate" in text
        ):  # more arms than colours: all of them are there, by what some searched too
            assert svg.count("<use ") >= len(many)
    captions = [text for text, _ in draw_arm_plots(report)]
    assert (
        captions[0]
        == "test accuracy against MB of trained weights. The line connects the arms that no other arm beats in both."
    )
    assert len(captions) == 4


def test_the_tables_of_a_tracker_have_the_analysis_of_errors() -> None:
    sample = Sample(
        row=3, prompt="p", reference="good", answers={"lora": Answer(text="bad", confidence=0.9)}
    )
    known = {
        "good": {"precision": 0.5, "recall": 1.0, "f1": 0.7, "support": 2.0},
        "bad": dict.fromkeys("abcd", 0.0),
    }
    report = report_of(TABLE, PAIRS).model_copy(
        update={"per_class": known, "confusion": [[2, 0], [2, 0]], "mistakes": [sample]}
    )
    quiet = _build_tables(report, samples=False)
    assert quiet["confusion"] == (["truth", "good", "bad"], [["good", 2, 0], ["bad", 2, 0]])
    assert quiet["per_class"][1][0] == ["good", 0.5, 1.0, 0.7, 2.0]
    assert len(quiet["pairs"][1]) == 3
    assert not {"samples", "mistakes", "worst"} & set(quiet)  # texts go nowhere unasked
    columns, rows = _build_tables(report, samples=True)["mistakes"]
    assert columns == ["row", "prompt", "reference", "lora", "lora confidence"]
    assert rows == [[3, "p", "good", "bad", 0.9]]


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--on, --wait has no effect in a comparison of existing runs"
    ):
        compare(["one", "other"], LaunchOptions(on="rig", wait=True))
    (tmp_path / "job.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="--output has no effect in a comparison of a job file"):
        compare([str(tmp_path / "job.yaml")], LaunchOptions(), into=tmp_path)


def test_an_arms_own_revision_is_another_model(bert_job: JobMaker) -> None:
    job = block(
        bert_job,
        "compare: {arms: {a: {method: base}, b: {method: base, set: {model.revision: r2}}, c: "
        "{method: base, set: {model.model_name_or_path: /other}}}}",
    )
    name = job.model.model_name_or_path
    assert list_base_models(job) == [(name, None), (name, "r2"), ("/other", None)]
    known = {name: "first", f"{name}@r2": "second", "/other": "third"}
    assert [get_base_revision(known, arms.build_arm_job(job, of)) for of in "abc"] == [
        "first",
        "second",
        "third",
    ]


def alike(*names: str) -> list[Paired]:
    """Arms of which the second is right on one row of 5,000 less."""
    right = [classified(np.arange(5000) < 3550 - place) for place in range(len(names))]
    found = [Candidate(name, [one]) for name, one in zip(names, right, strict=True)]
    return [Paired(found, "accuracy", "maximize")]


def test_an_unmeasured_arm_is_not_the_cheapest() -> None:
    table = [arm("a", 0.8, 1), arm("b", 0.8, 1).model_copy(update={"inference": None})]
    assert (
        choose(table, alike("a", "b"), choice("cheapest_within_tolerance", "latency_ms")).arm == "a"
    )


def test_costs_that_differ_by_less_than_two_runs_of_one_thing_are_the_same() -> None:
    near = choose(
        [arm("lora", 0.71, 22.2), arm("qlora", 0.70, 21.6)],
        alike("lora", "qlora"),
        WITHIN_TOLERANCE,
    )
    assert near.arm == "lora"
    assert (
        "1 other arm is within the tolerance, but not clearly cheaper (22.2 seconds of training for"
        in near.sentence
    )
    far = choose(
        [arm("lora", 0.71, 30.0), arm("qlora", 0.70, 21.6)],
        alike("lora", "qlora"),
        WITHIN_TOLERANCE,
    )
    assert far.arm == "qlora"


def test_sizes_of_batches_are_put_together_over_rounds() -> None:
    def measured(seconds: float) -> dict[str, object]:
        return {
            "at": [
                {
                    "batch_size": 4,
                    "length": 128,
                    "latency_ms": seconds,
                    "samples_per_second": 4 / seconds,
                }
            ]
        }

    (found,) = summarize_batches([measured(1.0), measured(2.0)])
    assert (found.batch_size, found.length, found.latency_ms, found.samples_per_second) == (
        4,
        128,
        1.5,
        3.0,
    )
    assert found.tokens_per_second is None
    assert summarize_batches([{"latency_ms": 3.0}]) == []


def test_names_in_a_plot_do_not_lie_on_each_other() -> None:
    """Arms as good as each other, and nearly as fast: the marks differ, and the names would not."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    labels = [
        (f"a-long-name-{number}", (1.0 + 0.06 * number, 0.5), "#000000") for number in range(5)
    ]
    axes.plot([1.0, 2.0], [0.4, 0.6])
    _place_labels(axes, labels)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    pyplot.close(figure)


# ---- samples ----


def test_rows_on_which_models_differ_come_first() -> None:
    rows = [{"prompt": f"p{row}", "reference": "good"} for row in range(4)]
    models = {
        "a": classified(np.array([1, 1, 0, 1], bool)),
        "b": classified(np.array([1, 0, 0, 0], bool)),
    }
    found = select_differing(rows, models, ["good", "bad"])
    assert [sample.row for sample in found] == [1, 3]
    assert {name: answer.text for name, answer in found[0].answers.items()} == {
        "a": "good",
        "b": "bad",
    }
    wrong = select_mistakes(rows, "b", models["b"], ["good", "bad"])
    assert [sample.row for sample in wrong] == [1, 2, 3]
    assert wrong[0].answers["b"].right is False


def test_the_worst_rows_of_several_classes_are_not_the_surest_mistakes() -> None:
    rows = [{"prompt": f"p{row}", "reference": "x"} for row in range(4)]
    said = Classified(
        np.array([0, 1, 2, 0]), np.array([0, 0, 0, 1]), np.array([0.9, 0.8, 0.5, 0.4]), 3
    )
    found = RowResults(np.array([0.1, 1.7, 4.0, 2.0]), np.ones(4, dtype=int), classified=said)
    wrong = select_mistakes(rows, "m", found, ("a", "b", "c"), max_rows=2)
    assert [sample.row for sample in wrong] == [1, 2]
    assert [
        sample.row for sample in select_worst(rows, "m", found, ("a", "b", "c"), max_rows=2)
    ] == [3]
    assert select_worst(rows, "m", found, ("a", "b")) == []


def test_answers_are_set_apart_by_their_metric() -> None:
    def wrote(values: list[float]) -> RowResults:
        ratios = {"rouge1": (np.array(values), np.ones(3))}
        return RowResults(np.ones(3), np.ones(3, dtype=int), None, ("x", None, "z"), ratios)

    rows = [{"prompt": "p", "reference": "r"}] * 3
    found = select_differing(rows, {"a": wrote([0.1, 0.9, 0.2]), "b": wrote([0.2, 0.0, 0.9])}, [])
    assert [sample.row for sample in found] == [2, 0]  # the middle one was not answered
    assert found[0].answers["b"].score == 0.9


def test_seeds_widen_what_is_not_known() -> None:
    """Two arms whose seeds cross are not told apart by rows alone."""
    rows = np.arange(1000)
    ours = [classified(rows < share) for share in (560, 700, 760)]
    theirs = [classified(rows < share) for share in (600, 650, 640)]
    assert p_of(ours, theirs) > 0.1
    assert p_of(ours[1:], theirs[1:]) < 0.3  # two seeds each leave two degrees of freedom


def test_an_adapter_on_another_base_is_compared_seed_by_seed() -> None:
    """What the base costs is not hidden by how far seeds lie apart: both arms have the same
    adapters.
    """
    rows = np.arange(400)
    lora = {seed: classified(rows < share) for seed, share in ((42, 300), (43, 268), (44, 332))}
    hybrid = {seed: classified(rows < share) for seed, share in ((44, 316), (42, 284), (43, 252))}
    both = {"lora": lora, "hybrid": hybrid}
    apart = list_pairs(compare_arms(both, ACCURACY, 1000, {"hybrid": "lora"}))[0]
    assert apart.difference == pytest.approx(0.04)
    assert apart.p_value < 0.01
    alone = list_pairs(compare_arms(both, ACCURACY, 1000))[0]
    assert (alone.p_value or 0) > 0.1  # as arms of their own


def test_few_seeds_say_little() -> None:
    """Arms that differ by their seeds alone (all rows move together, as losses do) are seldom told
    apart.
    """
    random, small = np.random.default_rng(3), 0
    rows = random.normal(1.0, 0.2, 200)

    def seeds() -> list[RowResults]:
        shifts = random.normal(0.0, 0.05, 3)
        return [RowResults(rows + shift, np.ones(200, dtype=int)) for shift in shifts]

    for _ in range(200):
        small += p_of(seeds(), seeds(), "loss") < 0.05
    assert small <= 16  # one in twenty, give or take


@pytest.mark.parametrize(
    ("method", "named"),
    [("base", "test.jsonl"), ("lora", "train.jsonl")],
    ids=["nothing is trained", "trained"],
)
def test_a_report_names_the_rows_that_were_judged(
    method: str, named: str, tmp_path: Path, llama_job: JobMaker
) -> None:
    arms = f"{{base: {{method: base}}, a: {{method: {method}}}}}"
    job = llama_job(f"compare: {{arms: {arms}}}", data__test_file="test.jsonl").job
    data = job.data.model_copy(update={"train_file": "train.jsonl"})
    run = Run.create(tmp_path, "tiny")
    plan = {
        "job": job.model_copy(update={"data": data}).model_dump(mode="json"),
        "command": "compare",
    }
    files.write_json(run.path / "plan.json", plan)
    assert Path(build_report(run).data).name == named


def test_arms_whose_losses_are_of_other_tokens_are_not_ranked(
    tmp_path: Path, llama_job: JobMaker
) -> None:
    job = llama_job(
        "compare: {arms: {a: {method: base}, b: {method: base, set: {model.max_length: 32}}}}"
    ).job
    run = Run.create(tmp_path, "tiny")
    files.write_json(
        run.path / "plan.json", {"job": job.model_dump(mode="json"), "command": "compare"}
    )
    for name, tokens in (("a", 10), ("b", 5)):
        results = RowResults(np.full(6, 9.0), np.full(6, tokens))
        folder = run.get_arm(name).get_evaluation_folder(42)
        files.write_jsonl(folder / "predictions-test.jsonl", results.to_records())
        files.write_json(folder / "test.json", {"test": {"whole": {}}})
    report = build_report(run)
    assert report.arms is not None
    assert [arm.comparable for arm in report.arms] == [True, False]
    assert "its model splits the rows into other tokens than that of a" in report.arms[1].remarks[0]
    assert report.recommendation.arm is None
    assert report.recommendation.sentence.startswith("Nothing is ranked")
    beside = compare_runs([run, run])  # nor is one of them taken for what the run recommends
    assert beside.arms is not None
    assert [(arm.comparable, arm.remarks[0]) for arm in beside.arms] == [
        (False, "it has no model to ship")
    ] * 2


def test_a_budget_of_tokens_is_of_the_arms_own_tokens(llama_job: JobMaker) -> None:
    text = (
        "compare: {arms: {a: {method: lora}, b: {method: lora, set: {model.max_length: 8}}}, "
        "budget: {tokens: 500}}"
    )
    job = llama_job(text).job
    data = prepare_tokens(job)
    comparison = Comparison.__new__(Comparison)
    comparison.job = job
    rows = [comparison._compute_sample_budget(name, data) for name in ("a", "b")]
    lengths = [
        prepare_tokens(arms.build_arm_job(job, name)).splits["train"].lengths.mean()
        for name in ("a", "b")
    ]
    assert rows == [math.ceil(500 / mean) for mean in lengths]
    assert rows[1] is not None
    assert rows[1] > (rows[0] or 0)


def test_an_arm_that_searches_nothing_has_all_its_seeds(bert_job: JobMaker) -> None:
    job = block(bert_job, ARMS.replace("seeds: 3", "seeds: 3\n  scheduler: {type: asha}"))
    lora, qlora = (arms.build_search_job(job, name, 64).search for name in ("lora", "qlora"))
    assert lora is not None
    assert qlora is not None
    assert (lora.scheduler.type, qlora.scheduler.type) == ("asha", "none")


def test_models_with_other_metrics_are_set_apart_by_their_loss() -> None:
    def wrote(name: str, values: list[float], losses: list[float]) -> RowResults:
        ratios = {name: (np.array(values), np.ones(2))}
        return RowResults(np.array(losses), np.ones(2, dtype=int), None, ("x", "y"), ratios)

    models = {
        "a": wrote("rougeL", [0.1, 0.9], [1.0, 1.0]),
        "b": wrote("exact_match", [1, 0], [1.0, 3.0]),
    }
    found = select_differing([{"prompt": "p", "reference": "r"}] * 2, models, [])
    assert [sample.row for sample in found] == [1, 0]


def test_a_model_that_gives_no_numbers_costs_its_own_alone() -> None:
    broken = classified(np.arange(10) < 5)
    broken = RowResults(np.full(10, np.nan), broken.targets_R, broken.classified)
    found = compute_scores([broken], ["accuracy", "loss"])
    assert get_finite_metrics(found) == {"accuracy": 0.5, "loss": None}
    assert set(get_finite_intervals(found)) == {"accuracy"}
    assert (
        compare_arms({"a": {0: broken}, "b": {0: classified(np.arange(10) < 3)}}, LOSS, 100) == []
    )


def test_losses_of_other_tokens_are_no_pair() -> None:
    one, other = (RowResults(np.ones(4), np.full(4, tokens)) for tokens in (5, 10))
    assert compare_arms({"a": {0: one}, "b": {0: other}}, LOSS, 100) == []


def test_arms_that_were_not_compared_row_by_row() -> None:
    sentence = choose(TABLE[:2], [], WITHIN_TOLERANCE).sentence
    assert "p =" not in sentence
    assert sentence.endswith(
        "There are no comparable per-row results of base (not stored or not finite); only their "
        "scores were compared."
    )
    bare = [found.model_copy(update={"inference": None}) for found in TABLE[1:3]]
    sentence = choose(bare, [PAIRED], choice("smallest_within", "latency_ms", 0.02)).sentence
    assert sentence.endswith("ms per answer was not measured for any arm.")


def test_tpe_makes_way_for_the_seeds(bert_job: JobMaker) -> None:
    text = "search: {method: tpe, num_samples: 3, seeds: 2, scheduler: {type: none}, "
    text += "parameters: {lr: {min: 0.1, max: 0.2}}}"
    job = bert_job(text).job
    made: list[Assignment] = []
    tpe = TpeProposals(job, search.list_planned_assignments(job, repr), repr)
    proposals = SearchThenSeeds(tpe, job, lambda: made[0], lambda: len(made) >= 3)
    for _ in range(3):
        made.append(proposals.next() or {})
    assert not any("train.seed" in one for one in made)
    assert proposals.next() == made[0] | {"train.seed": 43}
    assert proposals.next() is None


# ---- runs side by side ----


def ended(loaded: LoadedJob, folder: Path, right: int, **facts: object) -> Run:
    """A run of one trial that was judged on 40 rows, of which so many were right."""
    run = Run.create(folder, loaded.job.name)
    files.write_json(
        run.path / "plan.json",
        make_plan(loaded, detect_site(None), "train").model_dump(mode="json"),
    )
    known = {
        "labels": ["bad", "good"],
        "rows_sha256": {"train": "a", "test": "b"},
        "chosen_on_test": False,
    }
    files.write_json(run.path / "facts.json", known | facts)
    trial = run.add_trial("aaaa", 0, {})
    trial.add_rows(
        MetricsRow.model_validate(
            {
                "step": 1,
                "samples": 8,
                "accuracy": 0.5,
                "loss": 1.0,
                "evaluated": True,
                "train_seconds": right,
            }
        )
    )
    trial.set_state(TrialState.FINISHED)
    trial.weights.mkdir()
    results = classified(np.arange(40) < right)
    files.write_jsonl(trial.get_predictions_file("test"), results.to_records())
    files.write_json(
        trial.path / "test.json",
        {"test": summarize_results(results, loaded.job, ("bad", "good")).to_dict()},
    )
    files.write_jsonl(
        run.get_rows_file("test"),
        [{"prompt": f"row {row}", "reference": "bad"} for row in range(40)],
    )
    return run


def test_runs_side_by_side_are_ranked_where_they_were_judged_alike(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    job = bert_job()
    own = bert_job("evaluate: {custom_metrics: {short: {function: mine.py:short}}}")
    last_week, now = ended(job, tmp_path / "1", 20), ended(job, tmp_path / "2", 38)
    elsewhere = ended(job, tmp_path / "3", 40, rows_sha256={"train": "c", "test": "b"})
    other_rows = ended(job, tmp_path / "4", 40, rows_sha256={"train": "a", "test": "z"})
    other_metric = ended(own, tmp_path / "5", 40, custom_metrics={"short": "0:short"})
    found = compare_runs([last_week, now, elsewhere, other_rows, other_metric])
    assert found.arms is not None
    marks = {arm.arm: (arm.comparable, arm.remarks) for arm in found.arms}
    assert marks[last_week.id] == marks[now.id] == (True, [])
    assert marks[elsewhere.id][0]
    assert "it was trained on other rows than" in marks[elsewhere.id][1][0]
    assert marks[other_rows.id] == (
        False,
        [f"not ranked: the held-out rows differ from {last_week.id}'s"],
    )
    assert marks[other_metric.id][1] == [
        f"not ranked: the custom metrics differ from {last_week.id}'s"
    ]
    assert found.recommendation.arm in (now.id, elsewhere.id)
    pair = next(pair for pair in found.pairs if {pair.one, pair.other} == {last_week.id, now.id})
    assert (abs(pair.difference), pair.p_value < 0.01) == (pytest.approx(18 / 40), True)
    assert {arm.arm for arm in found.arms if not arm.comparable}.isdisjoint(
        {pair.other for pair in found.pairs}
    )
    assert (found.ratings, found.folds) == (None, [])
    # Those that are unlike the first, and like each other, are compared with each other; the first
    # has no match here.
    twin = ended(job, tmp_path / "6", 30, rows_sha256={"train": "a", "test": "z"})
    apart = compare_runs([now, other_rows, twin])
    assert apart.recommendation.arm is None
    assert [{pair.one, pair.other} for pair in apart.pairs] == [{other_rows.id, twin.id}]


# ---- folds ----


FOLDS = """
evaluate: {folds: 4}
search: {method: grid, seeds: 2, scheduler: {type: none}, parameters: {lora.lora_r: [2, 4]}}
"""


def test_folds_hold_every_row_back_once(bert_job: JobMaker) -> None:
    job = bert_job(FOLDS).job
    data = prepare_tokens(job)
    pool = len(data.splits["train"]) + len(data.splits["validation"])
    parts = [data.for_fold(search.build_trial_job(job, {"data.fold": fold})) for fold in range(4)]
    held = [tuple(row.tolist()) for part in parts for row in rows_of(part.splits["validation"])]
    assert len(held) == pool
    together = concat(data.splits["train"], data.splits["validation"])
    assert sorted(held) == sorted(tuple(row.tolist()) for row in rows_of(together))
    for part in parts:
        train = {tuple(row.tolist()) for row in rows_of(part.splits["train"])}
        held_here = {tuple(row.tolist()) for row in rows_of(part.splits["validation"])}
        assert not train & held_here  # equal rows are together
        assert len(part.splits["train"]) + len(part.splits["validation"]) == pool
        shares = [float(np.mean(split.targets)) for split in (part.splits["validation"], together)]
        assert shares[0] == pytest.approx(shares[1], abs=0.05)
        assert part.splits["test"] is data.splits["test"]
    again = data.for_fold(search.build_trial_job(job, {"data.fold": 1}))
    assert np.array_equal(again.splits["train"].ids, parts[1].splits["train"].ids)
    assert data.for_fold(job) is data


def test_plain_texts_have_folds_too() -> None:
    rows = [[2, 5 + number, 6] for number in range(9)]
    starts = np.arange(0, 28, 3)
    split = Split.from_texts(np.array(rows, dtype=np.int32).ravel(), starts)
    assert np.bincount(assign_folds(split, 3, 0, classifies=False)).tolist() == [3, 3, 3]


def rows_of(split: Split) -> list[np.ndarray]:
    return [
        np.asarray(split.ids[split.starts[row] : split.starts[row + 1]])
        for row in range(len(split))
    ]


def test_every_configuration_is_tried_on_every_fold(bert_job: JobMaker) -> None:
    job = bert_job(FOLDS).job
    found = search.list_planned_assignments(job, repr)
    assert [one["data.fold"] for one in found] == [0, 1, 2, 3] * 2
    assert search.list_final_assignments(job, {"lora.lora_r": 4}) == [
        {"lora.lora_r": 4},
        {"lora.lora_r": 4, "train.seed": 43},
    ]
    made = make_plan(bert_job(FOLDS), detect_site(None), "sweep")
    assert (len(made.trials), made.later_trials) == (8, 2)
    assert len({trial.trial_id for trial in made.trials}) == 8


def test_the_best_mean_over_folds_is_trained_whole(bert_job: JobMaker, tmp_path: Path) -> None:
    job = bert_job(FOLDS).job
    run = Run.create(tmp_path, "folds")
    ledger = Ledger(run, job, searching=True)
    scores = {2: [0.9, 0.5, 0.9, 0.5], 4: [0.8, 0.8, 0.8, 0.7]}
    for index, assignment in enumerate(search.list_planned_assignments(job, repr)):
        trial = ledger.add_trial(f"t{index}", index, assignment)
        score = scores[int(assignment["lora.lora_r"])][int(assignment["data.fold"])]
        ledger.report(
            trial,
            MetricsRow.model_validate(
                {"step": 1, "samples": 8, "accuracy": score, "loss": 1.0, "evaluated": True}
            ),
        )
        trial.weights.mkdir()
        assert ledger.find_best_assignment() is None
        ledger.end_trial(trial, TrialState.FINISHED)
        assert not trial.weights.is_dir()  # a fold's weights are nobody's
    assert ledger.find_best_assignment() == {"lora.lora_r": 4}
    whole = ledger.add_trial("whole", 8, {"lora.lora_r": 4})
    ledger.report(
        whole,
        MetricsRow.model_validate(
            {"step": 1, "samples": 8, "accuracy": 0.75, "loss": 1.0, "evaluated": True}
        ),
    )
    whole.weights.mkdir()
    ledger.end_trial(whole, TrialState.FINISHED)
    assert ledger.find_best_assignment() == {"lora.lora_r": 4}
    assert whole.weights.is_dir()
    plan = make_plan(bert_job(FOLDS), detect_site(None), "sweep")
    files.write_json(run.path / "plan.json", plan.model_dump(mode="json"))
    report = build_report(run)
    assert [(one.params["lora.lora_r"], one.mean) for one in report.folds] == [
        (4, pytest.approx(0.775)),
        (2, pytest.approx(0.7)),
    ]
    assert report.recommendation.trial_id == "whole"
    assert (
        "it has the best score, mean accuracy 0.775 ± 0.050 over 4 folds"
        in report.recommendation.sentence
    )
    assert "Over the folds" in render_html(report)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (FOLDS.replace("type: none", "type: asha"), "must be none with evaluate.folds"),
        (
            FOLDS.replace("method: grid", "method: tpe"),
            "must be random or grid with evaluate.folds",
        ),
        ("data: {fold: 4}\n" + FOLDS, "data.fold is 4, but must be below evaluate.folds = 4"),
    ],
)
def test_what_does_not_go_with_folds(text: str, sentence: str, bert_job: JobMaker) -> None:
    overrides = {"data__fold": 4} if text.startswith("data") else {}
    with pytest.raises(JobFileError) as caught:
        bert_job(text.removeprefix("data: {fold: 4}\n"), **overrides)
    assert sentence in str(caught.value)
