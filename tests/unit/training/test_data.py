"""Packed rows, early stopping and warm-up in steps."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.evaluation.tokens import Split, pack_examples, pack_split
from lorafleet.jobs.errors import JobFileError, UserError
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.job import TrainSpec
from lorafleet.jobs.trials.trial_id import Provenance, compute_trial_id
from lorafleet.training.data import make_packed_batch, prepare_tokens
from lorafleet.training.model import load_base
from lorafleet.training.optim import compute_rate_factor
from lorafleet.training.session import TrainingSession
from lorafleet.tuning.trial_report import TrialReport
from lorafleet.tuning.trial_run import TrialRun, Work
from tests.conftest import JobMaker, write_rows
from tests.unit.tiny_models import save_tiny
from tests.unit.training.test_session import CPU, finish, session


def _best_fit_decreasing(lengths: list[int], most: int) -> list[int]:
    """How full each row is, by trying every row for each example."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + length <= most]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return sorted(rows)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(64, 200))
def test_rows_are_packed_by_best_fit(lengths: list[int], most: int) -> None:
    rows = pack_examples(np.array(lengths), most)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[example] for example in row) for row in rows) == _best_fit_decreasing(
        lengths, most
    )


def test_a_packed_row_is_its_examples(llama_job: JobMaker) -> None:
    split = prepare_tokens(llama_job().job).splits["train"]
    laid = pack_split(split, 48)
    rows = pack_examples(split.lengths, 48)
    assert len(laid) == len(rows) < len(split)
    for number, examples in enumerate(rows):
        one = [
            slice(int(split.starts[example]), int(split.starts[example + 1]))
            for example in examples
        ]
        batch = make_packed_batch(laid, np.array([number]), 0, CPU)
        ids = [int(token) for part in one for token in split.ids[part]]
        learnt = [bool(said) for part in one for said in split.learnt[part]]
        labels = [token if said else -100 for token, said in zip(ids, learnt, strict=True)]
        assert (batch.ids_BT[0].tolist(), batch.labels[0].tolist()) == (ids, labels)
        assert batch.positions_BT is not None
        assert batch.positions_BT[0].tolist() == [
            place for part in one for place in range(part.stop - part.start)
        ]
    batch = make_packed_batch(laid, np.arange(3), 0, CPU)
    assert batch.targets == int(laid.target_counts[:3].sum())
    assert batch.ids_BT.numel() == int(laid.lengths[:3].sum())


def _alone(made: TrainingSession, split: Split) -> float:
    """Mean loss of all learnt tokens, each example by itself in plain transformers."""
    total, count = 0.0, 0
    for begin, end in itertools.pairwise(split.starts.tolist()):
        ids = torch.tensor(split.ids[begin:end].astype(np.int64)).unsqueeze(0)
        labels = ids.clone()
        labels[0, ~torch.tensor(split.learnt[begin:end])] = -100
        learnt = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            total += float(made.base.model(input_ids=ids, labels=labels).loss) * learnt
        count += learnt
    return total / count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("free", [False, True])
def test_packing_changes_neither_loss_nor_gradient(
    model: str, attention: str, free: bool, llama_job: JobMaker, request: pytest.FixtureRequest
) -> None:
    """One step over all rows, packed and not: each example alone is what both add up."""
    own = {
        "model__model_name_or_path": str(request.getfixturevalue(model)),
        "model__attn_implementation": attention,
        "lora__lora_dropout": 0.0,
        "train__max_steps": 1,
        "train__group_by_length": False,  # so that the first step has each row once
        "train__learning_rate": 1e-2,
    }
    job = llama_job(**own, train__per_device_train_batch_size=96).job
    plain = session(job)
    rows = prepare_tokens(job).count_training_rows(llama_job(**own, train__packing=True).job)
    assert rows < 60
    together = session(
        llama_job(
            **own,
            train__packing=True,
            train__per_device_train_batch_size=rows,
            train__padding_free=free,
        ).job
    )
    expected = _alone(plain, prepare_tokens(job).splits["train"])
    (loss, values), (packed_loss, packed_values) = finish(plain), finish(together)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert packed_loss == pytest.approx(expected, rel=1e-5)
    assert together.meter.tokens == plain.meter.tokens
    for name, value in values.items():
        assert torch.allclose(packed_values[name], value, atol=1e-4), name


@pytest.mark.parametrize(
    "kind", ["qwen3_next", "bloom", "mpt", "opt", "openai-gpt", "xglm", "biogpt"]
)
@pytest.mark.parametrize("field", ["packing", "padding_free"])
def test_a_model_that_does_not_keep_examples_apart_is_refused(
    kind: str, field: str, llama_job: JobMaker, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", kind, "AutoModelForCausalLM")
    job = llama_job(model__model_name_or_path=str(folder), **{f"train__{field}": True}).job
    with pytest.raises(
        UserError, match=rf"train\.{field} is true, but \w+ cannot keep packed examples separate"
    ):
        session(job)


@pytest.mark.parametrize("kind", ["qwen3_next", "opt", "rwkv", "jamba"])
@pytest.mark.parametrize(
    "own", [{}, {"train__mixed_precision": "bf16"}, {"model__dtype": "bfloat16"}]
)
def test_nothing_hides_that_a_model_does_not_keep_examples_apart(
    kind: str, own: dict[str, str], llama_job: JobMaker, tmp_path: Path
) -> None:
    """Neither one row that is the longest of all, nor 16 bits, in which much looks alike."""
    rows = [
        {"prompt": f"is it {'very ' * (number % 4)}good", "completion": "yes"}
        for number in range(40)
    ]
    rows.append({"prompt": "is it good or bad " * 6, "completion": "no"})
    folder = save_tiny(tmp_path / "model", kind, "AutoModelForCausalLM")
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    named = {"model__model_name_or_path": str(folder), "data__train_file": file}
    with pytest.raises(UserError, match="cannot keep packed examples separate"):
        session(llama_job(**named, **own, train__packing=True).job)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "lfm2", "gpt_neo"])
@pytest.mark.parametrize(
    "own", [{}, {"train__mixed_precision": "bf16"}, {"model__dtype": "bfloat16"}]
)
def test_a_model_that_keeps_them_apart_is_packed(
    kind: str, own: dict[str, str], llama_job: JobMaker, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", kind, "AutoModelForCausalLM")
    session(llama_job(model__model_name_or_path=str(folder), **own, train__packing=True).job)


def test_what_does_not_go_with_packing(bert_job: JobMaker, llama_job: JobMaker) -> None:
    with pytest.raises(
        JobFileError, match=r"train\.packing is true, but must be false for classification"
    ):
        bert_job(train__packing=True)
    with pytest.raises(JobFileError, match=r"train\.packing is true, but .* prompt_tuning"):
        llama_job(train__packing=True, method="prompt_tuning")
    with pytest.raises(JobFileError, match=r"train\.packing.* cannot be searched"):
        llama_job("search: {method: grid, parameters: {train.packing: {values: [true, false]}}}")


def _run_to_its_end(run: Run, work: Work, *, again_after: int | None = None) -> list[TrialReport]:
    """Every report of a trial; it begins anew from its checkpoint after so many."""
    trial = run.add_trial("0123456789", 0, {})
    data = prepare_tokens(work.job)
    reports: list[TrialReport] = []
    current = TrialRun(work, {"trial_id": trial.id, "assignment": {}}, data)
    current.open(load_base(work.job, len(data.labels), CPU))
    while not reports or not reports[-1].done:
        if again_after == len(reports):
            current.close()
            current = TrialRun(work, {"trial_id": trial.id, "assignment": {}}, data)
            current.open(load_base(work.job, len(data.labels), CPU))
            reports += [current.advance()]  # what the driver may not have heard comes again
            again_after = None
        reports.append(current.advance())
    current.close()
    return reports


def _get_last_step(reports: list[TrialReport]) -> int:
    assert reports[-1].row is not None
    return reports[-1].row.step


@pytest.mark.parametrize("again_after", [None, 2])
def test_a_trial_ends_when_nothing_gets_better(
    bert_job: JobMaker, tmp_path: Path, again_after: int | None
) -> None:
    still = {"train__learning_rate": 1e-9, "train__eval_steps": 1, "train__max_steps": 30}
    job = bert_job(**still, train__early_stopping_patience=3).job
    run = Run.create(tmp_path / "runs", "patient")
    work = Work(job, str(run.path), str(prepare_tokens(job).folder), 0, 1, False)
    reports = _run_to_its_end(run, work, again_after=again_after)
    assert _get_last_step(reports) == 4  # the first is the best, and three are no better
    assert (
        reports[-1].warning
        == "stopped early after step 4: accuracy did not improve in 3 evaluations"
    )
    assert run.get_trial("0123456789").weights.is_dir()


def test_a_trial_that_gets_better_goes_on(bert_job: JobMaker, tmp_path: Path) -> None:
    job = bert_job(train__eval_steps=2, train__early_stopping_patience=1, train__max_steps=4).job
    run = Run.create(tmp_path / "runs", "patient")
    work = Work(job, str(run.path), str(prepare_tokens(job).folder), 0, 1, False)
    losses = _run_to_its_end(run, work)
    assert _get_last_step(losses) == 4 or "stopped early" in str(losses[-1].warning)


def test_warm_up_in_steps() -> None:
    train = TrainSpec.model_validate({"warmup_steps": 3})
    assert [compute_rate_factor(step, 11, train) for step in (0, 1, 2, 3, 7)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 0.5]
    )
    none = TrainSpec.model_validate({"warmup_steps": 0})
    assert compute_rate_factor(0, 10, none) == 1.0


def test_warm_up_is_said_once(bert_job: JobMaker) -> None:
    with pytest.raises(JobFileError, match="both warmup_steps and warmup_ratio"):
        bert_job(train__warmup_steps=3, train__warmup_ratio=0.1)


def test_fields_that_are_not_set_leave_a_trials_id(bert_job: JobMaker) -> None:
    facts = Provenance(
        {"train": "a", "validation": "b"},
        {str(bert_job().job.model.model_name_or_path): "c"},
        {"lora": 1e-3},
    )
    ids = {
        name: compute_trial_id(bert_job(**{f"train__{name}": value} if name else {}).job, facts)
        for name, value in {"": None, "warmup_steps": 0, "early_stopping_patience": 2}.items()
    }
    assert len(set(ids.values())) == 3
    assert compute_trial_id(bert_job(train__packing=False).job, facts) == ids[""]
