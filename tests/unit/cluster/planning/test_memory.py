"""What is known of a model's size from its config alone, against the real thing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.memory_model import LLAMA, list_published
from lorafleet.cluster.planning.memory import count_trained_parameters, estimate
from lorafleet.cluster.planning.model_shape import parse_shape
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.commands.plan import render_plan
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.sites.base import LocalSite
from tests.conftest import JobMaker
from tests.unit.training.test_session import session


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama", "tiny_gpt2", "tiny_gpt_neo"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lora__lora_r": 7},
        {"lora__use_dora": True},
        {"method": "prompt_tuning", "prompt_tuning__num_virtual_tokens": 9},
        {"method": "qlora"},
    ],
)
def test_trained_parameters_are_counted_before_anything_is_loaded(
    how: dict[str, object],
    model: str,
    llama_job: JobMaker,
    bert_job: JobMaker,
    request: pytest.FixtureRequest,
) -> None:
    folder: Path = request.getfixturevalue(model)
    make = bert_job if model == "tiny_bert" else llama_job
    job = make(model__model_name_or_path=str(folder), **how).job
    known = parse_shape(json.loads((folder / "config.json").read_text()))
    assert known is not None
    assert count_trained_parameters(job, known, 2) == session(job).trainable_parameters


@pytest.mark.parametrize("names", [["query", "value"], ["dense"], ["output.dense"]])
def test_named_layers_are_those_that_peft_finds(
    names: list[str], tiny_bert: Path, bert_job: JobMaker
) -> None:
    job = bert_job(lora__lora_target_modules=names).job
    known = parse_shape(json.loads((tiny_bert / "config.json").read_text()))
    assert known is not None
    assert count_trained_parameters(job, known, 2) == session(job).trainable_parameters


def test_published_models_have_their_published_matrices() -> None:
    """Llama-2-7B: 32 x (4 x 4096^2 + 3 x 4096 x 11008) weights in matrices; r 8 on q and v is
    4,194,304.
    """
    llama = parse_shape(
        {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "intermediate_size": 11008, "vocab_size": 32000}
    )  # fmt: skip
    assert llama is not None
    assert llama.matrices == 6_476_005_376
    assert llama.count_lora_parameters(8, ("q_proj", "v_proj")) == 4_194_304
    assert parse_shape({"model_type": "x"}) is None
    assert parse_shape(LLAMA | {"model_type": "mixtral"}) is None  # experts: not these matrices


def test_published_figures_of_gpus_are_met() -> None:
    """benchmarks/memory_model.py prints each with its source; Q-LoRA there is GPTQ in float16,
    another kind of base.
    """
    figures = list_published()
    assert len(figures) >= 20
    for figure in figures:
        allowed = 0.35 if "qlora" in figure.name and "Qwen" in figure.name else 0.2
        assert abs(figure.error) < allowed, figure


def test_parts_are_shared_out_as_the_strategy_says(llama_job: JobMaker) -> None:
    known = parse_shape(LLAMA)
    assert known is not None

    def parts(strategy: str, **more: object) -> dict[str, float]:
        job = llama_job(
            resources={"workers_per_node": 4, "strategy": strategy}, method="full", **more
        ).job
        return estimate(job, known, known.parameters, 100, cuda=True).components

    ddp, zero1, zero2, zero3, fsdp = (
        parts(name) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    )
    assert ddp["optimiser"] == pytest.approx(4 * zero1["optimiser"], rel=0.02)
    assert ddp["gradients"] == zero1["gradients"] == pytest.approx(4 * zero2["gradients"], rel=0.05)
    assert zero2["base weights"] == ddp["base weights"]
    assert zero3 == fsdp
    assert zero3["base weights"] < ddp["base weights"]


def test_what_is_trained_whole_is_kept_in_float32_on_gpus(llama_job: JobMaker) -> None:
    """16 bytes a weight and autocast's copies; in bfloat16 8, and under DeepSpeed 2 + 2 + 12."""
    known = parse_shape(LLAMA)
    assert known is not None
    gib = known.parameters / 2**30

    def parts(**how: object) -> dict[str, float]:
        job = llama_job(method="full", **how).job
        return estimate(job, known, known.parameters, 100, cuda=True).components

    whole, half = parts(), parts(model__dtype="bfloat16")
    cut = parts(model__dtype="bfloat16", resources={"workers_per_node": 2, "strategy": "zero1"})
    assert whole["base weights"] == pytest.approx(4 * gib + 2 * known.matrices / 2**30, abs=1e-3)
    assert (whole["gradients"], whole["optimiser"]) == pytest.approx((4 * gib, 8 * gib), abs=1e-3)
    assert (half["gradients"], half["optimiser"]) == pytest.approx((2 * gib, 4 * gib), abs=1e-3)
    assert cut["optimiser"] == pytest.approx(12 * gib / 2, abs=1e-3)


def test_on_cpu_what_glibc_keeps_of_freed_memory_is_a_part(llama_job: JobMaker) -> None:
    """Gradient checkpointing lessens what a step keeps, and not what it frees."""
    known = parse_shape(LLAMA)
    assert known is not None

    def of(*, cuda: bool, **train: object) -> MemoryEstimate:
        job = llama_job(**{f"train__{name}": value for name, value in train.items()}).job
        return estimate(job, known, known.parameters, 100, cuda=cuda)

    plain, frugal = of(cuda=False), of(cuda=False, gradient_checkpointing=True)
    kept = plain.components["allocator"]
    assert kept == pytest.approx(
        0.6 * (plain.components["activations"] + plain.components["logits"]), abs=2e-3
    )
    assert plain.low == pytest.approx(0.9 * (plain.expected - kept), abs=0.01)
    assert plain.high > plain.expected + kept / 2
    assert frugal.components["activations"] < plain.components["activations"]
    assert frugal.components["allocator"] == kept
    assert "allocator" not in of(cuda=True).components


def test_what_does_not_fit_is_marked(llama_job: JobMaker, tmp_path: Path) -> None:
    """A model whose config alone is here."""
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(
        json.dumps(LLAMA | {"hidden_size": 8192, "num_hidden_layers": 80})
    )
    job = llama_job().job
    big = job.model_copy(
        update={"model": job.model.model_copy(update={"model_name_or_path": str(tmp_path / "big")})}
    )
    site = LocalSite(cpus=8, memory_gib=900, gpus=1, gpu_memory_gib=24)
    for resolved, fits in ((job, True), (big, False)):
        made = make_plan(LoadedJob(resolved, Path("job.yaml"), ""), site, "train")
        assert made.trials[0].memory is not None
        assert (made.trials[0].memory.expected < made.gpu_memory_gib) is fits
        screen = Console(width=160, file=io.StringIO())
        screen.print(render_plan(made, screen.width))
        shown = screen.file.getvalue()  # type: ignore[attr-defined]
        assert ("does not fit" in shown) is not fits
        assert " 0.00" not in shown  # a part that is nothing is not named
        assert (
            any("1 of 1 trials are expected to need up to" in note for note in made.notes)
            is not fits
        )
        assert "MB for the trials that run in parallel, saved at least every 10 minutes" in shown


LLAMA_3B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192,
    "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
"""The config of Llama-3.2-3B, as far as it counts."""


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ({"lora__lora_r": 32, "lora__lora_target_modules": ["q_proj", "v_proj"]}, 9_175_040),
        ({"lora__lora_r": 64, "lora__lora_target_modules": ["q_proj", "v_proj"]}, 18_350_080),
        (
            {
                "lora__lora_r": 32,
                "lora__lora_target_modules": ["q_proj", "v_proj"],
                "lora__use_dora": True,
            },
            9_289_728,
        ),
        (
            {
                "lora__lora_r": 10,
                "lora__lora_target_modules": ["gate_proj", "up_proj", "down_proj"],
            },
            9_461_760,
        ),
        (
            {
                "method": "prompt_tuning",
                "prompt_tuning__num_virtual_tokens": 200,
                "model__max_length": 768,
            },
            614_400,
        ),
        ({"method": "full"}, 3_212_749_824),
    ],
    ids=["LoRA r32", "LoRA r64", "DoRA r32", "LoRA r10 on the MLP", "prompt tuning", "full"],
)
def test_counts_are_those_of_pefts_method_comparison(
    how: dict[str, object], count: int, llama_job: JobMaker
) -> None:
    """Source: huggingface/peft, method_comparison/MetaMathQA/results, `num_trainable_params`."""
    known = parse_shape(LLAMA_3B)
    assert known is not None
    job = llama_job(**how).job
    assert (
        known.parameters if job.method == "full" else count_trained_parameters(job, known, 0)
    ) == count
