"""The training core on real torch, transformers and PEFT: what it sums, what it forgets, what it
remembers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from lorafleet.evaluation.metrics.predictions import Classified, RowResults
from lorafleet.evaluation.metrics.scores import compute_scores
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.data.encoding import fit_to_length
from lorafleet.jobs.errors import TrainingFailure
from lorafleet.jobs.schema.job import JobSpec, TrainSpec
from lorafleet.jobs.schema.metrics import LIKELIHOOD_METRICS
from lorafleet.jobs.trials.sampling import build_trial_job
from lorafleet.jobs.trials.schedule import build_schedule
from lorafleet.training import loss
from lorafleet.training.checkpoint import find_newest_intact, get_previous_folder
from lorafleet.training.data import BatchPlan, make_batch, prepare_tokens, split_micro_batches
from lorafleet.training.loss import LossModule
from lorafleet.training.methods import uses_gradient_checkpointing
from lorafleet.training.model import Base, load_base
from lorafleet.training.optim import compute_rate_factor
from lorafleet.training.session import TrainingSession
from lorafleet.tuning.failures import classify_exception
from lorafleet.tuning.trial_run import halve_micro_batch
from tests.conftest import JobMaker

CPU = torch.device("cpu")


def session(job: JobSpec, base: Base | None = None) -> TrainingSession:
    data = prepare_tokens(job)
    base = base or load_base(job, len(data.labels), CPU)
    return TrainingSession.build(
        job, base, data, build_schedule(job, data.count_training_rows(job), searching=False)
    )


def finish(made: TrainingSession) -> tuple[float, dict[str, torch.Tensor]]:
    """(training loss, trained values) at the end."""
    made.reset_loss()
    loss = made.advance(made.schedule.total_steps)["train_loss"]
    return loss, {
        name: value.detach().clone()
        for name, value in made.model.named_parameters()
        if value.requires_grad
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checksum(model: torch.nn.Module) -> float:
    return float(
        sum(
            p.detach().double().abs().sum()
            for n, p in model.named_parameters()
            if "classifier" not in n
        )
    )


# ---- batches ----


@given(st.integers(1, 70), st.integers(1, 12), st.booleans())
def test_every_epoch_shows_every_row_once(rows: int, batch: int, grouped: bool) -> None:
    plan = BatchPlan(np.arange(1, rows + 1), batch, seed=1, grouped=grouped)
    steps = 32 * rows // np.gcd(32 * batch, rows) // 32 * 1 or 1
    stretch = 32 * batch
    whole = (
        stretch * rows // np.gcd(stretch, rows)
    )  # rows after which stretches and epochs end together
    steps = min(whole // batch, 2000)
    seen = np.concatenate([plan.select_rows(step) for step in range(steps)])
    assert len(seen) == steps * batch
    if steps == whole // batch:
        assert set(np.bincount(seen, minlength=rows)) == {whole // rows}


def test_the_order_is_the_seeds_alone_and_groups_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 640)
    one, same, other = (BatchPlan(lengths, 8, seed, grouped=True) for seed in (1, 1, 2))
    assert [one.select_rows(s).tolist() for s in (3, 40, 7)] == [
        same.select_rows(s).tolist() for s in (3, 40, 7)
    ]
    assert one.select_rows(3).tolist() != other.select_rows(3).tolist()
    plain = BatchPlan(lengths, 8, 1, grouped=False)

    def padding(plan: BatchPlan) -> float:
        cells = sum(8 * lengths[plan.select_rows(step)].max() for step in range(80))
        return 1 - sum(lengths[plan.select_rows(step)].sum() for step in range(80)) / cells

    assert padding(one) < 0.1 < padding(plain)


def test_two_processes_share_the_passes_of_one() -> None:
    rows = np.arange(16)
    alone = [chunk.tolist() for chunk in split_micro_batches(rows, 4, 0, 1)]
    dealt = [[chunk.tolist() for chunk in split_micro_batches(rows, 4, rank, 2)] for rank in (0, 1)]
    assert dealt == [[alone[0], alone[2]], [alone[1], alone[3]]]


def test_a_long_row_loses_the_middle_of_its_prompt_and_keeps_its_answer() -> None:
    prompt, answer = fit_to_length(list(range(100)), [7] * 20, 60)
    assert (len(prompt), len(answer)) == (40, 20)
    assert prompt == [*range(24), *range(84, 100)]
    prompt, answer = fit_to_length([1] * 10, [7] * 200, 60)
    assert len(prompt) + len(answer) == 60
    assert len(prompt) == 10


# ---- loss ----


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_the_chunked_loss_is_the_plain_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 0)  # so 64 rows a chunk
    torch.manual_seed(rows)
    hidden, head = torch.randn(rows, 16, requires_grad=True), torch.randn(97, 16)
    targets = torch.randint(0, 97, (rows,))
    targets[::3] = -100
    weights = torch.rand(rows)
    plain = torch.nn.functional.cross_entropy(
        hidden @ head.t(), targets, ignore_index=-100, reduction="none"
    )
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)
    chunked = loss.ChunkedNll.apply(hidden, head, targets)
    (found,) = torch.autograd.grad((chunked * weights).sum(), hidden)
    assert torch.allclose(chunked, plain, atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(loss.ChunkedNll.apply(hidden, head, targets), chunked)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "qlora", "full"])
@pytest.mark.parametrize(
    "model", ["tiny_llama", "tiny_gpt2", pytest.param("tiny_gpt_neo", marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    "how", [{"train__chunked_loss": False}, {"train__gradient_checkpointing": True}]
)
def test_cheaper_ways_have_the_same_loss(
    how: dict[str, object],
    model: str,
    method: str,
    llama_job: JobMaker,
    request: pytest.FixtureRequest,
) -> None:
    named = {"model__model_name_or_path": str(request.getfixturevalue(model)), "method": method}
    rate = {"train__learning_rate": 1e-3}
    plain, other = (session(llama_job(**named | rate | more).job) for more in ({}, how))
    assert finish(other)[0] == pytest.approx(finish(plain)[0], rel=1e-5)
    assert other.evaluate().metrics["loss"] == pytest.approx(
        plain.evaluate().metrics["loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    "model", ["tiny_llama", "tiny_gpt2", pytest.param("tiny_gpt_neo", marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    "how", [{"method": "lora"}, {"method": "full"}, {"train__chunked_loss": False}]
)
def test_rows_end_to_end_have_the_loss_of_padded_ones(
    how: dict[str, object], model: str, llama_job: JobMaker, request: pytest.FixtureRequest
) -> None:
    named = {
        "model__model_name_or_path": str(request.getfixturevalue(model)),
        "lora__lora_dropout": 0.0,
    }
    rate = {"train__learning_rate": 1e-3}
    padded, laid = (
        session(llama_job(**named | rate | how, train__padding_free=free).job)
        for free in (False, True)
    )
    assert finish(laid)[0] == pytest.approx(finish(padded)[0], rel=1e-5)
    assert laid.evaluate().metrics["loss"] == pytest.approx(
        padded.evaluate().metrics["loss"], rel=1e-4
    )
    assert laid.meter.tokens == padded.meter.tokens


def test_which_heads_make_losses(
    llama_job: JobMaker, bert_job: JobMaker, tiny_gpt_neo: Path
) -> None:
    def chunked(job: JobSpec) -> bool:
        return session(job).strategy.module.frozen_head is not None

    assert chunked(llama_job().job)
    assert not chunked(llama_job(train__chunked_loss=False).job)
    assert not chunked(llama_job(method="full").job)  # its head learns
    assert not chunked(bert_job().job)


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_models_that_do_something_to_their_logits_keep_the_plain_loss(
    kind: str, tiny_llama: Path, llama_job: JobMaker
) -> None:
    """Gemma 2 caps its logits, Granite divides them: the losses in their place must not be touched
    so.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = {
        "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
        "granite": {"logits_scaling": 8.0},
    }
    job = llama_job().job
    data = prepare_tokens(job)
    size = {
        "vocab_size": load_base(job, 0, CPU).model.config.vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 1,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **size, **heads, **shapes[kind])
    ).eval()
    model.requires_grad_(False)
    batch = make_batch(data.splits["train"], np.arange(8), data.pad_id, CPU, classifies=False)
    module, plain = LossModule(model, "generation"), LossModule(model, "generation", chunked=False)
    assert module.frozen_head is not None
    for _ in range(2):
        assert module(batch)[0].item() == pytest.approx(plain(batch)[0].item(), rel=1e-6)
    assert module.frozen_head is None


def test_gradient_checkpointing_ends_with_its_trial(llama_job: JobMaker) -> None:
    job = llama_job(train__gradient_checkpointing=True).job
    made = session(job)
    assert uses_gradient_checkpointing(made.base.model)
    made.close()
    assert not uses_gradient_checkpointing(made.base.model)


def test_only_the_answer_is_learnt(llama_job: JobMaker) -> None:
    data = prepare_tokens(llama_job().job)
    split = data.splits["train"]
    batch = make_batch(split, np.arange(4), data.pad_id, CPU, classifies=False)
    learnt = (batch.labels != -100).sum().item()
    assert learnt == batch.targets == 4 * 2  # one word and the end token a row


def test_the_loss_is_that_of_the_whole_logits(llama_job: JobMaker) -> None:
    """Against transformers' own loss, which works out every position."""
    job = llama_job().job
    data = prepare_tokens(job)
    base = load_base(job, 0, CPU)
    batch = make_batch(data.splits["train"], np.arange(8), data.pad_id, CPU, classifies=False)
    ours, per_row = LossModule(base.model, job.task)(batch)
    theirs = base.model(
        input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=batch.labels
    ).loss
    assert ours.item() / batch.targets == pytest.approx(theirs.item(), rel=1e-5)
    assert per_row.sum().item() == pytest.approx(ours.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["bert_job", "llama_job"])
def test_accumulation_does_not_change_the_loss(kind: str, request: pytest.FixtureRequest) -> None:
    """The same rows a step in 1, 2 or 4 passes: the sums are divided by all targets, not averaged
    by pass.
    """
    make: JobMaker = request.getfixturevalue(kind)
    results = []
    for rows, accumulation in ((8, 1), (4, 2), (2, 4)):
        job = make(
            train__per_device_train_batch_size=rows, train__gradient_accumulation_steps=accumulation
        ).job
        made = session(job)
        loss, _ = finish(made)
        results.append((loss, made.evaluate().metrics["loss"]))
    for loss, validation in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-4)
        assert validation == pytest.approx(results[0][1], rel=1e-4)


# ---- warm bases ----


@pytest.mark.parametrize("kind", ["bert_job", "llama_job"])
def test_a_trial_is_the_same_alone_and_after_another(
    kind: str, request: pytest.FixtureRequest
) -> None:
    make: JobMaker = request.getfixturevalue(kind)
    first, second = make(lora__lora_r=8, train__seed=1).job, make(lora__lora_r=4, train__seed=2).job
    alone = finish(session(second))
    data = prepare_tokens(first)
    base = load_base(first, len(data.labels), CPU)
    before = checksum(base.model)
    earlier = session(first, base)
    finish(earlier)
    earlier.close()
    assert checksum(base.model) == before
    after = finish(session(second, base))
    assert after[0] == alone[0]
    assert equal(after[1], alone[1])


def test_dropout_is_the_trials_own(bert_job: JobMaker) -> None:
    job = bert_job(lora__lora_dropout=0.3).job
    one = finish(session(job))
    torch.rand(17)  # something else drew from the same generator in between
    assert equal(one[1], finish(session(job))[1])


def test_the_bases_own_dropout_is_on_from_the_first_step(bert_job: JobMaker) -> None:
    """And alike whether the trial was evaluated on the way, is the first of its process, or a later
    one.
    """
    job = bert_job().job
    data = prepare_tokens(job)
    base = load_base(job, len(data.labels), CPU)
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    first = session(job, base)
    assert all(module.training for module in first.model.modules())
    first.evaluate()
    assert all(module.training for module in first.model.modules())
    whole = finish(first)
    first.close()
    assert not base.model.training
    again = session(job, base)
    assert equal(finish(again)[1], whole[1])


def test_the_base_learns_nothing(bert_job: JobMaker) -> None:
    job = bert_job().job
    data = prepare_tokens(job)
    base = load_base(job, len(data.labels), CPU)
    made = session(job, base)
    trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert made.trainable_parameters == trained
    assert all(
        "lora_" in n or "classifier" in n
        for n, p in made.model.named_parameters()
        if p.requires_grad
    )


# ---- resume ----


@pytest.mark.parametrize("kind", ["bert_job", "llama_job"])
def test_a_resumed_trial_ends_where_an_unbroken_one_does(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    make: JobMaker = request.getfixturevalue(kind)
    job = make(lora__lora_dropout=0.2, train__weight_decay=0.1).job
    unbroken = session(job)
    unbroken.reset_loss()
    unbroken.advance(3)
    unbroken.reset_loss()
    loss = unbroken.advance(100)["train_loss"]
    broken = session(job)
    broken.reset_loss()
    broken.advance(3)
    broken.save(tmp_path / "c", {"best": 0.5})
    torch.manual_seed(999)
    resumed = session(job)
    assert resumed.load(tmp_path / "c") == {"best": 0.5}
    assert resumed.step == 3
    resumed.reset_loss()
    assert resumed.advance(100)["train_loss"] == loss
    values = [dict(made.model.named_parameters()) for made in (unbroken, resumed)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert resumed.meter.samples == unbroken.meter.samples


def test_a_checkpoint_that_was_being_replaced_when_all_died_is_found_again(tmp_path: Path) -> None:
    from lorafleet.training.checkpoint import restore_replaced

    (tmp_path / "last.old").mkdir()
    (tmp_path / "last.old" / "x").touch()
    (tmp_path / ".last.abc").mkdir()  # half written
    assert (restore_replaced(tmp_path / "last") / "x").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]


@pytest.mark.parametrize("victim", ["trained.safetensors", "training_state.pt", "checksums.json"])
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    victim: str, bert_job: JobMaker, tmp_path: Path
) -> None:
    made = session(bert_job().job)
    last = tmp_path / "last"
    for _ in range(2):
        made.advance(made.step + 2)
        made.save(last)
    assert find_newest_intact(last) == (last, None)
    (last / victim).write_bytes((last / victim).read_bytes()[:-20])
    folder, wrong = find_newest_intact(last)
    assert folder == last
    assert wrong is not None
    assert "last" in wrong
    resumed = session(bert_job().job)
    resumed.load(folder)
    assert resumed.step == 2
    assert not get_previous_folder(
        last
    ).exists()  # the damaged one is nowhere, so no save can make it the one before
    (last / victim).unlink()
    assert find_newest_intact(last)[0] is None


def test_training_goes_on_from_an_adapter(bert_job: JobMaker, tmp_path: Path) -> None:
    made = session(bert_job().job)
    finish(made)
    made.save_weights(tmp_path / "adapter")
    score = made.evaluate().metrics
    job = bert_job(train__init_adapter=str(tmp_path / "adapter")).job
    assert session(job).evaluate().metrics == score


# ---- learning ----


def test_a_classifier_learns(bert_job: JobMaker) -> None:
    made = session(
        bert_job(train__max_steps=150, lora__lora_r=8, train__per_device_train_batch_size=16).job
    )
    before = made.evaluate().metrics["accuracy"]
    finish(made)
    assert made.evaluate("test").metrics["accuracy"] > max(0.8, before)


def test_a_language_model_learns(llama_job: JobMaker) -> None:
    made = session(llama_job().job)
    before = made.evaluate().metrics["perplexity"]
    finish(made)
    assert made.evaluate("test").metrics["perplexity"] < 0.7 * before


def test_a_decoder_classifies(tiny_llama: Path, bert_job: JobMaker) -> None:
    job = bert_job(model__model_name_or_path=str(tiny_llama), train__max_steps=4).job
    made = session(job)
    finish(made)
    assert set(made.evaluate().metrics) == {"accuracy", "f1", "precision", "recall", "loss"}


def test_a_learning_rate_beyond_sense_is_a_failure_with_a_class(bert_job: JobMaker) -> None:
    made = session(
        bert_job(train__learning_rate=9.0, train__max_grad_norm=1e30, train__max_steps=300).job
    )
    with torch.no_grad():
        next(p for p in made.strategy.trained.values() if p.ndim > 1).fill_(torch.inf)
    with pytest.raises(TrainingFailure) as caught:
        finish(made)
    assert classify_exception(caught.value).failure_class == "nan"


def test_the_chunked_loss_keeps_small_gradients_in_bfloat16() -> None:
    """Tokens that the model is nearly sure of: their gradient is the small difference of large
    rows.
    """
    torch.manual_seed(0)
    head = (torch.randn(4000, 64) / 8).bfloat16()
    targets = torch.randint(0, 4000, (96,))
    hidden = (14 * head[targets].float() + 0.1 * torch.randn(96, 64)).bfloat16().requires_grad_()

    def apart(nll: torch.Tensor) -> float:
        (found,) = torch.autograd.grad(nll, hidden)
        return float(((found.double() - expected).norm(dim=1) / expected.norm(dim=1)).median())

    exact = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(exact @ head.double().t(), targets, reduction="sum"),
        exact,
    )
    logits = (hidden @ head.t()).float()
    assert 1e-3 < float(torch.nn.functional.cross_entropy(logits.detach(), targets)) < 0.5
    plain = apart(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert apart(loss.ChunkedNll.apply(hidden, head, targets).sum()) < 1.2 * plain


def test_out_of_memory_halves_the_pass_and_keeps_the_batch(bert_job: JobMaker) -> None:
    job = bert_job(train__per_device_train_batch_size=8, train__gradient_accumulation_steps=3).job
    smaller = halve_micro_batch(job)
    assert smaller is not None
    assert (
        smaller.train.per_device_train_batch_size,
        smaller.train.gradient_accumulation_steps,
    ) == (4, 6)
    job = bert_job(train__per_device_train_batch_size=12).job
    passes = []
    while job := halve_micro_batch(job):
        passes.append(
            (job.train.per_device_train_batch_size, job.train.gradient_accumulation_steps)
        )
    assert passes == [(6, 2), (3, 4), (1, 12)]


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("linear", [0.5, 1.0, 0.875, 0.125]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("constant_with_warmup", [0.5, 1.0, 1.0, 1.0]),
        ("warmup_stable_decay", [0.5, 1.0, 1.0, 0.5]),  # falls from 1 at step 7 of 9
    ],
)
def test_learning_rates_by_hand(kind: str, factors: list[float]) -> None:
    train = TrainSpec.model_validate({"lr_scheduler_type": kind, "warmup_ratio": 0.1})
    assert [compute_rate_factor(step, 9, train) for step in (0, 1, 2, 8)] == pytest.approx(factors)


# ---- metrics ----


@given(st.integers(2, 5), st.integers(3, 40), st.integers(0, 1000))
def test_metrics_are_scikit_learns(classes: int, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, predicted = random.integers(0, classes, rows), random.integers(0, classes, rows)
    found = compute_scores(_classified(labels, predicted, classes), CLASSIFIED).metrics
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(
        (precision, recall, f1)
    )


def _classified(labels: np.ndarray, predicted: np.ndarray, classes: int) -> RowResults:
    said = Classified(labels, predicted, np.ones(len(labels)), classes)
    return RowResults(np.zeros(len(labels)), np.ones(len(labels), dtype=int), said)


def test_an_interval_covers_its_metric_as_the_formula_says() -> None:
    labels = np.ones(400, dtype=int)
    predicted = np.array([1] * 320 + [0] * 80)
    low, high = compute_scores(_classified(labels, predicted, 2), CLASSIFIED).intervals["accuracy"]
    half = 1.96 * (0.8 * 0.2 / 400) ** 0.5  # normal approximation of a share
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.006)


LIKELY, CLASSIFIED = LIKELIHOOD_METRICS["generation"], LIKELIHOOD_METRICS["classification"]


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    found = compute_scores(RowResults(np.array([10.0, 1.0]), np.array([10, 1])), LIKELY).metrics
    assert found["loss"] == pytest.approx(1.0)
    skewed = compute_scores(RowResults(np.array([20.0, 1.0]), np.array([10, 1])), LIKELY).metrics
    assert skewed["loss"] == pytest.approx(21 / 11)
    assert skewed["perplexity"] == pytest.approx(np.exp(21 / 11))


def test_the_same_tokens_are_made_once(bert_job: JobMaker) -> None:
    def stamp(data: TokenData) -> float:
        return (data.folder / "meta.json").stat().st_mtime_ns

    first = prepare_tokens(bert_job().job)
    assert stamp(prepare_tokens(bert_job(train__seed=9).job)) == stamp(first)
    assert prepare_tokens(bert_job(model__max_length=16).job).folder != first.folder


def test_long_rows_are_counted_before_training(bert_job: JobMaker) -> None:
    data = prepare_tokens(bert_job(model__max_length=8).job)
    assert any(
        "longer than model.max_length = 8 tokens and were truncated" in warning
        for warning in data.warnings
    )
    assert data.splits["train"].lengths.max() == 8


def test_searched_trials_resolve(bert_job: JobMaker) -> None:
    job = bert_job().job
    assert build_trial_job(job, {"lora.lora_r": 2}).lora.lora_alpha == 4


def test_weights_are_as_readable_as_the_users_other_files(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    """safetensors writes files that their owner alone can read."""
    made = session(bert_job().job)
    made.save_weights(tmp_path / "weights")
    made.close()
    (tmp_path / "own").touch()
    usual = (tmp_path / "own").stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "weights").iterdir()} == {usual}
