"""Every supported method under every strategy, in real Ray Train worker groups of two processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.types import METHODS, STRATEGIES
from lorafleet.jobs.sites.placement import Placement
from lorafleet.training.data import prepare_tokens
from lorafleet.training.evaluation import evaluate_rows
from lorafleet.training.launch import run_group
from tests.conftest import JobMaker
from tests.unit.training.test_methods import logits, read_plainly

VARIANTS: dict[str, dict[str, object]] = {
    "lora": {},
    "dora": {"lora__use_dora": True},
    "pissa": {"lora__init_lora_weights": "pissa", "train__learning_rate": 3e-3},
    "loraplus": {"lora__loraplus_lr_ratio": 4, "train__learning_rate": 2e-3},
    "nf4": {"method": "qlora"},
    "int8": {"method": "qlora", "qlora__quant_type": "int8"},
    "prompt_tuning": {"method": "prompt_tuning", "train__learning_rate": 0.1},
    "full": {"method": "full", "train__learning_rate": 3e-3},
}
FURTHER = ("fsdp", "zero1", "zero2")
"""zero3 cuts up weights as fsdp does, with the engine of the other two; the short run has it and
ddp.
"""
NOT_SUPPORTED = {("fsdp", "int8"), ("zero3", "int8")}


def in_group(config: dict[str, Any]) -> None:
    """Runs in each worker: all jobs in turn; the first process writes what came out."""
    import torch
    from torch import distributed

    from lorafleet.jobs.schema.compatibility import WEIGHT_SHARDING_STRATEGIES
    from lorafleet.jobs.schema.job import JobSpec
    from lorafleet.jobs.trials.schedule import build_schedule
    from lorafleet.training.data import prepare_tokens
    from lorafleet.training.model import load_base
    from lorafleet.training.session import TrainingSession

    torch.set_num_threads(1)
    found = {}
    for name, text in config["jobs"].items():
        job = JobSpec.model_validate_json(text)
        data = prepare_tokens(job)
        cut = job.resources.strategy in WEIGHT_SHARDING_STRATEGIES
        folder = Path(config["out"]) / name

        def begin(job: JobSpec = job, data: Any = data, cut: bool = cut) -> TrainingSession:
            labels = len(data.labels) if job.task == "classification" else 0
            base = load_base(job, labels, torch.device("cpu"), sharded=cut)
            return TrainingSession.build(
                job, base, data, build_schedule(job, len(data.splits["train"]), searching=False)
            )

        made = begin()
        made.reset_loss()
        made.advance(3)
        made.save(folder / "checkpoint")
        row = made.advance(made.schedule.total_steps)
        made.save_weights(folder / "weights")
        loss = made.evaluate().metrics["loss"]
        made.close()
        resumed = begin()
        resumed.load(folder / "checkpoint")
        # As after a stop that met an evaluation: what it sets up must serve training too.
        resumed.evaluate()
        resumed.advance(resumed.schedule.total_steps)
        found[name] = {
            "train": row["train_loss"],
            "loss": loss,
            "resumed": resumed.evaluate().metrics["loss"],
        }
        found[name]["trained"] = resumed.trainable_parameters
        resumed.close()
    if distributed.get_rank() == 0:
        (Path(config["out"]) / "found.json").write_text(json.dumps(found))


def alone(job: JobSpec) -> dict[str, float]:
    """One process with twice the accumulation."""
    from tests.unit.training.test_session import session

    train = job.train.model_copy(
        update={"gradient_accumulation_steps": 2 * job.train.gradient_accumulation_steps}
    )
    resources = job.resources.model_copy(update={"workers_per_node": 1, "strategy": "auto"})
    made = session(job.model_copy(update={"train": train, "resources": resources}))
    before = made.evaluate("train").metrics["loss"]
    made.reset_loss()
    row = made.advance(made.schedule.total_steps)
    assert made.evaluate("train").metrics["loss"] < before
    return {
        "train": row["train_loss"],
        "loss": made.evaluate().metrics["loss"],
        "trained": made.trainable_parameters,
    }


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in FURTHER else [])
        for name in STRATEGIES
    ],
)
def test_two_processes_train_what_one_does(
    strategy: str, llama_job: JobMaker, bert_job: JobMaker, tmp_path: Path, ray_alone: None
) -> None:
    if strategy.startswith("zero") and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("DeepSpeed needs a C++ compiler, and this machine has no g++")
    wanted = [name for name in VARIANTS if (strategy, name) not in NOT_SUPPORTED]
    jobs = {}
    for task, make in (("generation", llama_job), ("classification", bert_job)):
        for name in wanted if task == "generation" else ("lora", "prompt_tuning", "full"):
            rate = (
                {}
                if task == "generation"
                else {"train__learning_rate": 0.03 if name == "prompt_tuning" else 2e-3}
            )
            size = {"train__per_device_train_batch_size": 4, "train__max_steps": 8}
            spread = {"resources__workers_per_node": 2, "resources__strategy": strategy}
            jobs[f"{task}-{name}"] = make(**size | spread | VARIANTS[name] | rate).job
    assert {job.method for job in jobs.values()} == set(METHODS)
    for job in jobs.values():
        prepare_tokens(job)
    texts = {name: job.model_dump_json() for name, job in jobs.items()}
    placement = Placement(
        workers=2, cpus_per_worker=1, gpus_per_worker=0, slots=1, waves=1, limited_by="test"
    )
    run_group(
        in_group, {"jobs": texts, "out": str(tmp_path)}, placement, tmp_path / "ray", strategy, []
    )
    found = json.loads((tmp_path / "found.json").read_text())
    for name, job in jobs.items():
        expected = alone(job)
        assert found[name]["train"] == pytest.approx(expected["train"], rel=1e-4), name
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        assert found[name]["resumed"] == pytest.approx(found[name]["loss"], rel=1e-5), name
        assert found[name]["trained"] == expected["trained"], name
        read = read_plainly(job, tmp_path / name / "weights")
        assert torch.isfinite(logits(read, job)).all()
        assert _loss(read, job) == pytest.approx(found[name]["loss"], rel=1e-4), name


def _loss(model: torch.nn.Module, job: JobSpec) -> float:
    """The validation loss of weights as plain PEFT or transformers loads them."""
    results = evaluate_rows(model, job, prepare_tokens(job), "validation", torch.device("cpu"))
    return float(results.loss_R.sum() / results.targets_R.sum())


@pytest.fixture
def ray_alone() -> Any:
    """A Ray of this test's own, whose workers can import what the test is written with."""
    import cloudpickle
    import ray

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # Ray Train frees its workers only while the dashboard's state API is up.
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=True,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()
