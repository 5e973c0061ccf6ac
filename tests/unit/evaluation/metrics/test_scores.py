"""Metrics of texts are those of the field's own packages; answers are what the model would write
one by one.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

from lorafleet.evaluation.inference.generate import decode_answer, generate_answers
from lorafleet.evaluation.metrics import bertscore, custom
from lorafleet.evaluation.metrics.predictions import Classified, RowResults, from_records
from lorafleet.evaluation.metrics.scores import compute_confusion, compute_per_class, compute_scores
from lorafleet.evaluation.metrics.summary import read_results, summarize_results
from lorafleet.evaluation.metrics.text import MAX_WORDS, compute_text_metrics
from lorafleet.jobs import files
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.encoding import RowEncoder
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.errors import AssetError, JobFileError, UserError
from lorafleet.jobs.runs.records import SplitScores, read_typed
from lorafleet.jobs.schema.job import CustomMetric, EvaluateSpec
from lorafleet.training.data import prepare_tokens
from lorafleet.training.evaluation import evaluate_rows
from lorafleet.training.methods import attach, get_trained_parameters, load_weights
from lorafleet.training.model import check_class_order, load_base, load_tokenizer
from tests.conftest import JobMaker, opinions, write_rows
from tests.unit.training.test_session import CPU, finish, session

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
PAIRS = [
    ("the actor was superb", "a superb actor was in the film"),
    ("It ran. It was running! Was it?", "It runs. He was running."),
    ("", "nothing was said"),
    ("something", ""),
    ("", ""),
    ("don't stop_me now 3.14", "Don't stop me now, 3.14!"),
    ("same words\nsame lines", "same words\nsame lines"),
]


def prompt_tokens(row: Row, tokenizer: Any) -> list[int]:
    return RowEncoder(ChatFormat(tokenizer), 512).encode_prompt(row, 512)


def values(name: str, predictions: list[str], references: list[str]) -> np.ndarray:
    return compute_text_metrics([name], predictions, references)[name][0]


def test_rouge_is_rouge_scores() -> None:
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = compute_text_metrics(ROUGES, *map(list, zip(*PAIRS, strict=True)))
    for row, (prediction, reference) in enumerate(PAIRS):
        expected = theirs.score(reference, prediction)
        for name, score in expected.items():
            assert found[name][0][row] == pytest.approx(score.fmeasure, abs=1e-9), (
                name,
                prediction,
            )


def test_rouge_lsum_takes_sentences_apart() -> None:
    prediction, reference = "He was late. It rained all day.", "It rained. He was late again."
    lines = ["He was late.\nIt rained all day.", "It rained.\nHe was late again."]
    expected = (
        RougeScorer(["rougeLsum"], use_stemmer=True).score(lines[1], lines[0])["rougeLsum"].fmeasure
    )
    assert values("rougeLsum", [prediction], [reference])[0] == pytest.approx(expected, abs=1e-9)
    assert expected > values("rougeL", [prediction], [reference])[0]


@given(
    st.lists(
        st.tuples(*[st.text(alphabet=st.characters(max_codepoint=127), max_size=60)] * 2),
        min_size=1,
    )
)
def test_words_of_english_letters_are_rouge_scores(pairs: list[tuple[str, str]]) -> None:
    theirs = RougeScorer(["rouge1"], use_stemmer=True)
    found = values("rouge1", [p for p, _ in pairs], [r for _, r in pairs])
    assert found == pytest.approx(
        [theirs.score(r, p)["rouge1"].fmeasure for p, r in pairs], abs=1e-9
    )


@pytest.mark.parametrize(
    "text",
    [
        "Der Schauspieler spielt großartig",
        "электронная почта",
        "他今天很高兴",
        "हिन्दी में लिखा",
        "naïve café",
    ],
)
def test_other_scripts_have_words_too(text: str) -> None:
    assert values("rouge1", [text], [text])[0] == 1.0
    assert values("length_ratio", [text], [text])[0] > 1
    assert values("rouge1", ["他很高兴"], ["他今天很高兴"])[0] == pytest.approx(2 * 4 / (4 + 6))


def test_a_text_of_a_book_is_cut_and_not_waited_for() -> None:
    draw = random.Random(0)
    book = " ".join(draw.choice(["film", "story", "actor", "plot"]) for _ in range(40 * MAX_WORDS))
    found = compute_text_metrics(("rouge1", "length_ratio"), [book], ["film"])
    assert found["rouge1"][0][0] == pytest.approx(2 / (MAX_WORDS + 1), rel=1e-6)
    assert found["length_ratio"][0][0] == 40 * MAX_WORDS  # and its length is counted whole


def test_what_is_equal_and_what_holds_the_other() -> None:
    predictions, references = [" Good ", "it is Good.", "", "bad"], ["good", "good", "", ""]
    assert values("exact_match", predictions, references).tolist() == [1, 0, 1, 0]
    assert values("contains", predictions, references).tolist() == [1, 1, 0, 0]


def test_a_ratio_of_lengths_is_of_all_words() -> None:
    ratios = compute_text_metrics(
        ("length_ratio",), ["one two three", "one"], ["one", "one two three"]
    )
    results = RowResults(np.zeros(2), np.ones(2, dtype=int), None, ("", ""), ratios)
    assert (
        compute_scores(results, ["length_ratio"]).metrics["length_ratio"] == 1.0
    )  # and not the mean of 3 and 1/3


# ---- BERTScore ----


def test_bertscore_is_bert_scores(tiny_bert: Path, tmp_path: Path) -> None:
    from bert_score import BERTScorer  # it takes its time

    sentences = [row["text"] for row in opinions(40, 5)]
    predictions, references = sentences[:20], sentences[20:]
    told = shutil.copytree(
        tiny_bert, tmp_path / "told"
    )  # it cannot do without a tokenizer that says its length
    config = json.loads((told / "tokenizer_config.json").read_text())
    (told / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 64}))
    for layer in (1, 2):
        theirs = BERTScorer(
            model_type=str(told), num_layers=layer, rescale_with_baseline=False, device="cpu"
        )
        expected = theirs.score(predictions, references)[2].double().numpy()
        found = bertscore.load(tiny_bert, layer, "cpu").compute_f1(predictions, references)
        assert found == pytest.approx(expected, abs=1e-6)
    assert bertscore.load(tiny_bert, None, "cpu").compute_f1(
        predictions, references
    ) == pytest.approx(expected, abs=1e-6)


def test_bertscore_of_nothing_and_of_too_much(tiny_bert: Path) -> None:
    scorer = bertscore.load(tiny_bert, None, "cpu")
    long = "film " * 500  # the encoder has 64 positions
    found = scorer.compute_f1(["", "good film", long, "  "], ["good", "good film", long, ""])
    assert found[0] == found[3] == 0.0
    assert found[1:3] == pytest.approx(1.0)


def test_an_encoder_without_that_layer(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"bertscore_layer is 3, but .* has 2 layers"):
        bertscore.load(tiny_bert, 3, "cpu")
    with pytest.raises(AssetError, match="cannot be loaded"):
        bertscore.load(tmp_path, None, "cpu")


# ---- classes ----


def test_classes_are_told_apart() -> None:
    said = Classified(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0]), np.ones(6), 3)
    assert compute_confusion(said) == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    table = compute_per_class(said, ["bad", "good", "mixed"])
    assert table["bad"] == {
        "precision": 0.5,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 7),
        "support": 3,
    }
    assert table["mixed"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


# ---- a user's own ----


METRIC = """
def short(prediction, reference):
    return 1.0 if len(prediction) < 5 else 0.0


def asked(prediction, reference, prompt):
    return len(prompt)


def broken(prediction, reference):
    return prediction.nothing


def words(prediction, reference):
    return "many"
"""


@pytest.fixture
def metric_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(METRIC)
    return path


def own(path: Path, name: str) -> tuple[dict, dict]:
    function = f"{path}:{name}" if name else str(path)
    return custom.compute_custom_metrics(
        {"mine": CustomMetric(function=function)}, ["abc", "abcdef"], ["x", "y"], ["p", "pp"]
    )


def test_a_function_of_the_users_own(metric_file: Path) -> None:
    assert own(metric_file, "short")[0]["mine"][0].tolist() == [1.0, 0.0]
    assert own(metric_file, "asked")[0]["mine"][0].tolist() == [1.0, 2.0]
    with pytest.raises(
        UserError, match=r"custom_metrics.mine raised an error at held-out row 0: AttributeError"
    ):
        own(metric_file, "broken")
    with pytest.raises(UserError, match="returned 'many' for row 0"):
        own(metric_file, "words")


def test_a_module_of_the_package_evaluate(tmp_path: Path) -> None:
    path = tmp_path / "longest.py"
    path.write_text("""
import datasets
import evaluate


class Longest(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"longest": max(map(len, predictions))}
""")
    by_row, whole = own(path, "")
    assert (by_row, whole) == ({}, {"mine": 6.0})
    results = RowResults(np.arange(6.0), np.ones(6, dtype=int), None, ("",) * 6, {}, whole)
    found = compute_scores(results, ["loss", "mine"])
    assert found.metrics["mine"] == 6.0
    assert set(found.intervals) == {"loss"}


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("mine.txt:short", "must be FILE.py:NAME"),
        ("gone.py:short", "cannot be read: No such file"),
        (
            "mine.py:shorter",
            "does not define a function shorter (it defines short, asked, broken, words)",
        ),
    ],
)
def test_a_path_is_looked_at_before_anything_runs(
    function: str, sentence: str, metric_file: Path, llama_job: JobMaker
) -> None:
    from lorafleet.cluster.planning.preflight import check_names

    loaded = llama_job("evaluate: {custom_metrics: {mine: {function: " + function + "}}}")
    with pytest.raises(JobFileError) as caught:
        check_names(loaded)
    assert sentence in str(caught.value)


def test_metrics_that_do_not_go_with_a_job(bert_job: JobMaker, llama_job: JobMaker) -> None:
    for make, block, sentence in (
        (llama_job, "evaluate: {metrics: [rouge9]}", "has 'rouge9', but may only contain rouge1"),
        (bert_job, "evaluate: {metrics: [rouge1]}", "classification has its own metrics"),
        (
            llama_job,
            "evaluate: {custom_metrics: {loss: {function: a.py:f}}}",
            "choose another name",
        ),
        (
            llama_job,
            _searched_by("rougeL"),
            "one of loss, perplexity for generation (add it to evaluate.metrics)",
        ),
        (
            llama_job,
            _searched_by("length_ratio") + "evaluate: {metrics: [length_ratio]}",
            "describes answers",
        ),
    ):
        with pytest.raises(JobFileError) as caught:
            make(block)
        assert sentence in str(caught.value)


def _searched_by(metric: str) -> str:
    return f"search: {{metric: {metric}, parameters: {{train.learning_rate: [1e-3]}}}}\n"


def test_a_search_may_look_at_what_is_written(llama_job: JobMaker) -> None:
    job = llama_job(_searched_by("rougeL") + "evaluate: {metrics: [rougeL], max_new_tokens: 3}").job
    assert set(session(job).evaluate().metrics) == {"loss", "perplexity", "rougeL"}
    assert set(session(llama_job().job).evaluate().metrics) == {"loss", "perplexity"}


# ---- answers ----


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_gpt_neo"])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_answers_of_a_batch_are_those_one_by_one(
    model: str, method: str, llama_job: JobMaker, request: pytest.FixtureRequest
) -> None:
    """Rows of different lengths are padded on the left, behind a learnt prompt too: nothing of it
    may be seen.
    """
    folder = str(request.getfixturevalue(model))
    job = llama_job(model__model_name_or_path=folder, method=method).job
    made = session(job)
    torch.manual_seed(3)
    for value in get_trained_parameters(made.model).values():
        nn.init.normal_(value, std=0.3)
    tokenizer = load_tokenizer(folder, None, trust_remote_code=False)
    prompts = [prompt_tokens(row, tokenizer) for row in prepare_tokens(job).read_rows("test")[:7]]
    assert len({len(prompt) for prompt in prompts}) > 3
    spec = EvaluateSpec(max_new_tokens=6)
    together = generate_answers(made.model.eval(), tokenizer, prompts, spec, batch_rows=4)
    alone = [
        generate_answers(made.model, tokenizer, [prompt], spec, batch_rows=1)[0]
        for prompt in prompts
    ]
    assert together == alone
    assert any(together)


def test_drawn_answers_follow_their_seed_alone(llama_job: JobMaker, tiny_llama: Path) -> None:
    job = llama_job().job
    model = load_base(job, 0, CPU).model
    tokenizer = load_tokenizer(str(tiny_llama), None, trust_remote_code=False)
    prompts = [prompt_tokens(row, tokenizer) for row in prepare_tokens(job).read_rows("test")[:4]]

    def drawn(seed: int, **more: float) -> list[str]:
        torch.manual_seed(random.randrange(1000))
        spec = EvaluateSpec(do_sample=True, max_new_tokens=8, generation_seed=seed, **more)
        return generate_answers(model, tokenizer, prompts, spec, batch_rows=2)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    greedy = generate_answers(
        model, tokenizer, prompts, EvaluateSpec(max_new_tokens=8), batch_rows=2
    )
    assert drawn(1, temperature=1e-4) == greedy
    assert drawn(1, top_p=1e-6) == greedy


def test_an_answer_ends_at_its_end_token(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama), None, trust_remote_code=False)
    good, end = tokenizer("good")["input_ids"][-1], tokenizer.eos_token_id
    assert decode_answer([good, end, good, good], [end], tokenizer) == "good"
    assert decode_answer([end], [end], tokenizer) == ""


def test_a_learnt_answer_is_written(llama_job: JobMaker, tmp_path: Path) -> None:
    """From training to the file of answers and back: the same metrics, and the same once more from
    the file.
    """
    block = "evaluate: {metrics: [exact_match, rouge1, length_ratio], max_new_tokens: 4}"
    job = llama_job(block, train__max_steps=60).job
    made = session(job)
    finish(made)
    data = prepare_tokens(job)
    results = evaluate_rows(made.model, job, data, "test", CPU, metrics=job.extra_metrics)
    found = compute_scores(results, job.metric_names)
    rows = data.read_rows("test")
    assert found.metrics["exact_match"] == np.mean(
        [answer == row.reference for answer, row in zip(results.answers, rows, strict=True)]
    )
    assert set(results.answers) <= {
        "good",
        "bad",
        "",
    }  # it has learnt how to answer, if not yet what
    assert found.metrics["exact_match"] > 0.3
    files.write_jsonl(tmp_path / "p.jsonl", results.to_records())
    scores = summarize_results(results, job, ())
    assert scores.metrics == found.metrics
    again = read_results(tmp_path / "p.jsonl", scores)
    assert again is not None
    assert compute_scores(again, job.metric_names) == found
    assert again.answers == results.answers


def test_metrics_of_any_name_and_no_number_come_back(tmp_path: Path) -> None:
    """A user's metric may be called as a field of the file is, and a module may have no number for
    one model.
    """
    ratios = {
        name: (np.array([0.25, 0.75]), np.ones(2))
        for name in ("answer", "tokens", "predicted", "row")
    }
    results = RowResults(
        np.ones(2), np.full(2, 3), None, ("a", "b"), ratios, {"matthews": math.nan}
    )
    files.write_jsonl(tmp_path / "p.jsonl", results.to_records())
    files.write_json(tmp_path / "s.json", {"whole": dict(results.whole)})
    again = read_results(tmp_path / "p.jsonl", read_typed(tmp_path / "s.json", SplitScores))
    assert again is not None
    assert again.answers == ("a", "b")
    found = compute_scores(again, ["loss", *ratios, "matthews"])
    assert (found.metrics["answer"], found.metrics["loss"]) == (0.5, 1 / 3)
    assert math.isnan(found.metrics["matthews"])


@pytest.mark.parametrize("name", ["step", "evaluated", "learning_rate"])
def test_a_word_of_a_runs_files_is_no_metric(name: str, bert_job: JobMaker) -> None:
    with pytest.raises(
        JobFileError,
        match=f"has '{name}', which is a key of every row of metrics: choose another name",
    ):
        bert_job(f"evaluate: {{custom_metrics: {{{name}: mine.py:short}}}}")


def test_a_models_own_settings_do_not_change_its_answers(llama_job: JobMaker) -> None:
    """A penalty that a base comes with would count differently for a learnt prompt, which goes in
    as embeddings.
    """
    job = llama_job("evaluate: {max_new_tokens: 12}").job
    model = load_base(job, 0, CPU).model
    tokenizer = load_tokenizer(job.model.model_name_or_path, None, trust_remote_code=False)
    prompts = [prompt_tokens(row, tokenizer) for row in prepare_tokens(job).read_rows("test")[:4]]
    plain = generate_answers(model, tokenizer, prompts, job.evaluate, 2)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert generate_answers(model, tokenizer, prompts, job.evaluate, 2) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_a_few_answers_for_the_report(llama_job: JobMaker) -> None:
    job = llama_job().job
    base = load_base(job, 0, CPU)
    results = evaluate_rows(base.model, job, prepare_tokens(job), "test", CPU, rows_to_answer=3)
    assert [answer is None for answer in results.answers] == [False] * 3 + [True] * 29
    assert set(compute_scores(results, job.metric_names).metrics) == {"loss", "perplexity"}


def test_a_text_alone_is_continued(llama_job: JobMaker, tmp_path: Path) -> None:
    rows = [{"text": " ".join(row["text"] for row in opinions(3, seed))} for seed in range(24)]
    for split, few in (("train", rows[:16]), ("validation", rows[16:20]), ("test", rows[20:])):
        write_rows(tmp_path / f"{split}.jsonl", few)
    own = {
        f"data__{split}_file": str(tmp_path / f"{split}.jsonl")
        for split in ("train", "validation", "test")
    }
    job = llama_job("evaluate: {metrics: [rouge1], max_new_tokens: 4, sample_rows: 2}", **own).job
    data = prepare_tokens(job)
    row, tokenizer = (
        data.read_rows("test")[0],
        load_tokenizer(job.model.model_name_or_path, None, trust_remote_code=False),
    )
    assert row.text.startswith(row.prompt)
    assert f"{row.prompt} {row.reference}" == row.text
    assert len(row.prompt.split()) == len(row.text.split()) // 2
    first = data.splits["test"]
    learnt = first.ids[first.starts[0] : first.starts[1]].tolist()
    given = prompt_tokens(row, tokenizer)
    assert given == learnt[: len(given)]  # as it stands in training
    base = load_base(job, 0, CPU)
    shown = evaluate_rows(base.model, job, data, "test", CPU, rows_to_answer=2).answers
    assert [answer is None for answer in shown] == [False, False, True, True]
    assert "rouge1" in evaluate_rows(base.model, job, data, "test", CPU, metrics=("rouge1",)).ratios


def test_how_a_text_is_cut_to_be_continued() -> None:
    assert (Row(text="one").prompt, Row(text="one").reference) == ("one", "")
    assert (Row(text=" one\ttwo  three").prompt, Row(text=" one\ttwo  three").reference) == (
        " one",
        "two  three",
    )
    assert len(Row(text="word " * 1000).prompt.split()) == 48
    assert (Row(text="a b", label="x").prompt, Row(text="a b", label="x").reference) == ("a b", "x")


def test_an_answer_needs_room(llama_job: JobMaker) -> None:
    job = llama_job("evaluate: {max_new_tokens: 125}").job
    base = load_base(job, 0, CPU)
    with pytest.raises(UserError, match=r"max_new_tokens is 125, but .* has only 128 positions"):
        evaluate_rows(base.model, job, prepare_tokens(job), "test", CPU, rows_to_answer=1)


def test_classes_come_back_from_their_file(bert_job: JobMaker, tmp_path: Path) -> None:
    job = bert_job("evaluate: {custom_metrics: {short: {function: mine.py:short}}}").job
    (tmp_path / "mine.py").write_text(METRIC)
    made = session(job)
    finish(made)
    made.save_weights(tmp_path / "adapter")
    base = load_base(job, 2, CPU)
    data = prepare_tokens(job)
    results = evaluate_rows(
        load_weights(job, base, tmp_path / "adapter"), job, data, "test", CPU, metrics=("short",)
    )
    again = from_records(list(results.to_records()), 2, {})
    assert compute_scores(again, job.metric_names) == compute_scores(results, job.metric_names)
    assert compute_scores(again, ["short"]).metrics["short"] == 1.0  # `good` and `bad` are short


def test_a_saved_model_names_its_classes(bert_job: JobMaker, tmp_path: Path) -> None:
    made = session(bert_job(method="full").job)
    made.save_weights(tmp_path / "model")
    named = json.loads((tmp_path / "model" / "config.json").read_text())["id2label"]
    assert named == {"0": "bad", "1": "good"}
    check_class_order(named, ("bad", "good"), "it")
    check_class_order(named, ("neg", "pos"), "it")  # who knows
    check_class_order({0: "LABEL_0", 1: "LABEL_1"}, ("good", "bad"), "it")
    with pytest.raises(
        UserError, match=r"classes in the order bad, good, but the data in .* set data.labels"
    ):
        check_class_order(named, ("Good", "Bad"), "it")


def test_a_classifier_with_a_metric_of_the_users_own_trains(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(METRIC)
    made = session(bert_job("evaluate: {custom_metrics: {short: {function: mine.py:short}}}").job)
    assert "short" not in made.evaluate().metrics  # it waits for the end
    text = (
        "search: {metric: short, parameters: {lr: [1e-3]}}\nevaluate: {custom_metrics: {short: "
        "mine.py:short}}"
    )
    assert session(bert_job(text).job).evaluate().metrics["short"] == 1.0


def test_what_generation_leaves_of_a_model(llama_job: JobMaker) -> None:
    """The next trial trains as if nothing had been written."""
    job = llama_job("evaluate: {metrics: [rouge1], max_new_tokens: 3}").job
    base = load_base(job, 0, CPU)
    losses = []
    for looked_at in (False, True):
        made = session(job, base)
        if looked_at:
            evaluate_rows(
                made.model, job, prepare_tokens(job), "validation", CPU, metrics=("rouge1",)
            )
        losses.append(finish(made)[0])
        made.close()
    assert losses[0] == losses[1]
    assert attach(job, base).training
