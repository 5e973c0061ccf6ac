"""Several trials in one process: what one of them meets costs the others nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafleet.jobs import files
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.records import FailureRecord, MetricsRow
from lorafleet.jobs.runs.run import Run
from lorafleet.training.data import prepare_tokens
from lorafleet.training.packed import session as packed_session
from lorafleet.training.packed.group import PackedGroup
from lorafleet.tuning import pack_host
from lorafleet.tuning.failures import WorkerUnusable
from lorafleet.tuning.pack_host import PackHost, PackSize
from lorafleet.tuning.trial_host import TrialHost
from lorafleet.tuning.trial_run import Work
from tests.conftest import JobMaker

RATES = {"a": 3e-3, "b": 1e-3, "c": 1e-2}
SIZE = PackSize(trials=3, trials_per_pass=3, max_rank=8)
ODD = "b"
"""The trial that something happens to."""


@dataclasses.dataclass
class Outcome:
    rows: list[MetricsRow] = dataclasses.field(default_factory=list)
    failure: FailureRecord | None = None
    is_stopping: bool = False


@pytest.fixture
def work(bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Work]:
    monkeypatch.chdir(tmp_path)  # a host changes into its run's folder
    job = bert_job(train__eval_steps=4, lora__lora_dropout=0.1, retries__hang_minutes=0).job
    run = Run.create(tmp_path / "runs", "packed")
    for index, name in enumerate(RATES):
        run.add_trial(name, index, {})
    threads = torch.get_num_threads()
    yield Work(job, str(run.path), str(prepare_tokens(job).folder), 0, 1, False)
    torch.set_num_threads(threads)


def config(name: str) -> dict[str, Any]:
    return {
        "trial_id": name,
        "assignment": {"train.learning_rate": RATES[name], "lora.lora_r": 8 if name == "a" else 4},
        "threads": 1,
    }


def run_pack(
    work: Work, names: str = "abc", size: PackSize = SIZE, warnings: list[str] | None = None
) -> dict[str, Outcome]:
    host = PackHost(
        TrialHost(work),
        size,
        ([] if warnings is None else warnings).append,
        Path(work.run) / "logs" / "pack-stacks.txt",
    )
    for name in names:
        assert host.can_enter(config(name), alone=False)
        host.enter(config(name), alone=False)
    outcomes = finish(host, names)
    model = host.host.bases.base
    assert model is None or not any(
        "Packed" in type(module).__name__ for module in model.model.modules()
    )
    return outcomes


def finish(host: PackHost, names: str) -> dict[str, Outcome]:
    outcomes = {name: Outcome() for name in names}
    while not host.is_empty:
        for name, report in host.step():
            outcome = outcomes[name]
            assert report.worker is not None
            if report.row is not None:
                outcome.rows.append(report.row)
            outcome.failure, outcome.is_stopping = report.failure, report.stopping
            if report.ends_trial:
                host.leave(name)
    host.close()
    return outcomes


def run_alone(work: Work, name: str) -> Outcome:
    host, outcome = TrialHost(work), Outcome()
    host.set_up(config(name))
    while True:
        report = host.step()
        if report.row is not None:
            outcome.rows.append(report.row)
        outcome.is_stopping = report.stopping
        if report.ends_trial:
            break
    host.close()
    return outcome


def read_adapter(work: Work, name: str) -> dict[str, torch.Tensor]:
    folder = Run(Path(work.run)).get_trial(name).get_weights_folder("lora")
    tensors: dict[str, torch.Tensor] = load_file(str(folder / "adapter_model.safetensors"))
    return tensors


def take_adapters(work: Work) -> dict[str, dict[str, torch.Tensor]]:
    """Adapters of all trials; their folders are empty afterwards."""
    run = Run(Path(work.run))
    adapters = {}
    for name in RATES:
        trial = run.get_trial(name)
        if trial.get_weights_folder("lora").is_dir():
            adapters[name] = read_adapter(work, name)
        for part in ("adapter", "checkpoints", "adapter.old"):
            if (trial.path / part).is_dir():
                (trial.path / part).rename(
                    run.path / f"{part}-{name}-{len(list(run.path.iterdir()))}"
                )
    return adapters


@pytest.fixture
def alone(work: Work) -> dict[str, tuple[Outcome, dict[str, torch.Tensor]]]:
    """Each trial alone."""
    outcomes = {name: run_alone(work, name) for name in RATES}
    adapters = take_adapters(work)
    return {name: (outcomes[name], adapters[name]) for name in RATES}


Alone = dict[str, tuple[Outcome, dict[str, torch.Tensor]]]


def assert_as_alone(work: Work, outcomes: dict[str, Outcome], alone: Alone, names: str) -> None:
    for name in names:
        expected, adapter = alone[name]
        steps = {row.step: row for row in outcomes[name].rows if row.evaluated}
        assert outcomes[name].failure is None
        assert steps.keys() == {row.step for row in expected.rows if row.evaluated}
        for row in expected.rows:
            if row.evaluated:
                assert row.loss is not None
                assert math.isclose(steps[row.step].loss or 0.0, row.loss, rel_tol=1e-4), name
        trained = read_adapter(work, name)
        assert trained.keys() == adapter.keys()
        for key, value in trained.items():
            torch.testing.assert_close(value, adapter[key], rtol=1e-2, atol=2e-4)


def test_each_trial_is_as_it_would_be_alone(work: Work, alone: Alone) -> None:
    outcomes = run_pack(work)
    assert_as_alone(work, outcomes, alone, "abc")
    for name, outcome in outcomes.items():
        assert outcome.rows[-1].pack == SIZE.trials
        expected = alone[name][0].rows[-1]
        last = outcome.rows[-1]
        assert (last.samples, last.tokens, last.epoch, last.trainable_parameters) == (
            expected.samples,
            expected.tokens,
            expected.epoch,
            expected.trainable_parameters,
        )


def test_plain_peft_loads_what_a_pack_has_trained(work: Work) -> None:
    """Adapters of different ranks, cut out of rows of the same length; and their scores."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    outcomes = run_pack(work)
    job = work.job
    tokenizer = AutoTokenizer.from_pretrained(job.model.model_name_or_path)
    rows = files.read_jsonl(Path(str(job.data.validation_file)))
    names = prepare_tokens(job).labels
    inputs = tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=32,
        return_tensors="pt",
    )  # fmt: skip
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    for name, outcome in outcomes.items():
        plain = AutoModelForSequenceClassification.from_pretrained(
            job.model.model_name_or_path, num_labels=len(names)
        )
        folder = Run(Path(work.run)).get_trial(name).get_weights_folder("lora")
        model = PeftModel.from_pretrained(plain, str(folder)).eval()
        assert model.peft_config["default"].r == config(name)["assignment"]["lora.lora_r"]
        with torch.no_grad():
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        right = (logits.argmax(-1) == labels).float().mean().item()
        scores = {row.loss: row.to_dict()["accuracy"] for row in outcome.rows if row.evaluated}
        # The adapter is that of the best evaluation.
        best = [loss for loss, accuracy in scores.items() if accuracy == max(scores.values())]
        assert max(scores.values()) == pytest.approx(right)
        assert loss in [pytest.approx(each, rel=1e-5) for each in best]


@pytest.mark.parametrize("begins_packed", [True, False])
def test_a_trial_goes_on_alone_from_a_packs_checkpoint_and_back(
    work: Work, alone: Alone, begins_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = pack_host.TrialRun._evaluate

    def stop_after(self: Any, session: Any) -> dict[str, Any]:
        row = evaluate(self, session)
        self.stopping = True
        return row

    monkeypatch.setattr(pack_host.TrialRun, "_evaluate", stop_after)
    first = run_pack(work) if begins_packed else {name: run_alone(work, name) for name in RATES}
    assert all(outcome.is_stopping for outcome in first.values())
    assert all(outcome.rows[-1].step < 8 for outcome in first.values() if outcome.rows)
    monkeypatch.setattr(pack_host.TrialRun, "_evaluate", evaluate)
    second = {name: run_alone(work, name) for name in RATES} if begins_packed else run_pack(work)
    whole = {
        name: dataclasses.replace(outcome, rows=first[name].rows + outcome.rows)
        for name, outcome in second.items()
    }
    assert_as_alone(work, whole, alone, "abc")


def poison(name: str) -> Any:
    """Whether a pass of a group contains the slot of a trial."""

    def contains(group: PackedGroup) -> bool:
        return any(
            group.slots[slot].job.train.learning_rate == RATES[name] for slot in group.last_pass
        )

    return contains


def plant(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let an error come in every pass with the odd trial, after its gradients were added."""
    backward, contains = PackedGroup._backward, poison(ODD)

    def fail(self: PackedGroup, *arguments: Any) -> None:
        backward(self, *arguments)
        if contains(self) and self.slots[self.last_pass[0]].step == 2:
            raise error

    monkeypatch.setattr(PackedGroup, "_backward", fail)


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [(torch.OutOfMemoryError("planted"), "oom"), (ValueError("planted"), "code")],
)
def test_an_error_fails_its_trial_alone(
    work: Work,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    failure_class: str,
) -> None:
    plant(monkeypatch, error)
    warnings: list[str] = []
    outcomes = run_pack(work, warnings=warnings)
    failure = outcomes[ODD].failure
    assert failure is not None
    assert failure.failure_class == failure_class
    assert (Path(work.run) / "trials" / ODD / "traceback.txt").is_file()
    assert_as_alone(work, outcomes, alone, "ac")
    assert bool(warnings) == (failure_class == "oom")
    if warnings:
        assert warnings[0].startswith("3 trials did not fit into memory together: at most 1 trial")


def test_a_nan_fails_its_trial_alone(
    work: Work, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, contains = PackedGroup._backward, poison(ODD)

    def fail(self: PackedGroup, *arguments: Any) -> None:
        backward(self, *arguments)
        if contains(self):
            slot = next(
                s for s in self.slots if self.slots[s].job.train.learning_rate == RATES[ODD]
            )
            assert self.buffers is not None
            self.buffers.values_KP[slot, 3] = math.nan

    monkeypatch.setattr(PackedGroup, "_backward", fail)
    outcomes = run_pack(work)
    failure = outcomes[ODD].failure
    assert failure is not None
    assert failure.failure_class == "nan"
    assert_as_alone(work, outcomes, alone, "ac")


def test_an_error_of_a_gpu_ends_the_process(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, RuntimeError("CUDA error: an illegal memory access (planted)"))
    with pytest.raises(WorkerUnusable, match="a GPU or the connection"):
        run_pack(work)


def test_an_error_in_a_common_evaluation_is_looked_for_in_each_trial(
    work: Work, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = packed_session.evaluate_together
    counts: list[int] = []

    def fail(sessions: Any, *arguments: Any) -> None:
        counts.append(len(sessions))
        if len(sessions) > 1:
            raise torch.OutOfMemoryError("planted")
        evaluate(sessions, *arguments)

    monkeypatch.setattr(pack_host, "evaluate_together", fail)
    monkeypatch.setattr(packed_session, "evaluate_together", fail)
    outcomes = run_pack(work)
    assert_as_alone(work, outcomes, alone, "abc")
    assert counts == [3, 1, 1, 1] * 2


def test_trials_that_reach_a_rung_together_are_evaluated_together(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = packed_session.evaluate_together
    counts: list[int] = []

    def count(sessions: Any, *arguments: Any) -> None:
        counts.append(len(sessions))
        evaluate(sessions, *arguments)

    monkeypatch.setattr(pack_host, "evaluate_together", count)
    monkeypatch.setattr(packed_session, "evaluate_together", count)
    run_pack(work)
    assert counts == [3, 3]


def test_a_trial_that_cannot_begin_costs_the_others_nothing(
    work: Work, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafleet.training.packed import group as packed_group

    attach = packed_group.attach

    def fail(job: Any, base: Any) -> Any:
        model = attach(job, base)  # the base is left with an adapter in it
        if job.train.learning_rate == RATES[ODD]:
            raise UserError("planted")
        return model

    monkeypatch.setattr(packed_group, "attach", fail)
    host = PackHost(TrialHost(work), SIZE, [].append, Path(work.run) / "stacks.txt")
    for name in "ab":
        host.enter(config(name), alone=False)
    assert not host.can_enter(config("c"), alone=False)
    outcomes = finish(host, "ab")
    assert outcomes["b"].failure is not None
    assert outcomes["b"].failure.failure_class == "config"
    assert_as_alone(work, outcomes, alone, "a")
    assert host.host.bases.base is None
    assert host.can_enter(config("c"), alone=False)
    host.enter(config("c"), alone=False)
    assert_as_alone(work, finish(host, "c"), alone, "c")


def test_what_is_not_packed_waits_until_it_is_alone(work: Work, alone: Alone) -> None:
    host = PackHost(TrialHost(work), SIZE, [].append, Path(work.run) / "stacks.txt")
    host.enter(config("a"), alone=False)
    assert not host.can_enter(config("b"), alone=True)
    other = config("c")
    other["assignment"] |= {"lora.use_dora": True}
    assert not host.can_enter(other, alone=False)
    assert host.can_enter(config("c"), alone=False)
    assert_as_alone(work, finish(host, "a"), alone, "a")
    host.enter(config("b"), alone=True)
    assert not host.can_enter(config("c"), alone=False)
    outcomes = finish(host, "b")
    assert outcomes["b"].rows[-1].pack is None
    assert_as_alone(work, outcomes, alone, "b")
