"""Every method on real models: it learns, plain PEFT or transformers reads what it wrote, and
nothing of it stays.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from lorafleet.jobs.errors import JobFileError, UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.trial_id import Provenance, compute_trial_id
from lorafleet.training.data import make_batch, prepare_tokens
from lorafleet.training.methods import get_trained_parameters
from lorafleet.training.model import Base, load_base
from lorafleet.training.optim import build_optimizer, set_rate
from tests.conftest import JobMaker
from tests.unit.training.test_session import CPU, checksum, equal, finish, session

METHODS = {
    "lora": {},
    "dora": {"lora__use_dora": True},
    "rslora": {"lora__use_rslora": True},
    "gaussian": {"lora__init_lora_weights": "gaussian"},
    "loraplus": {"lora__loraplus_lr_ratio": 16, "train__learning_rate": 3e-3},
    "pissa": {"lora__init_lora_weights": "pissa", "train__learning_rate": 3e-3},
    "pissa_niter_4": {"lora__init_lora_weights": "pissa_niter_4", "train__learning_rate": 3e-3},
    "pissa_rslora": {
        "lora__init_lora_weights": "pissa",
        "lora__use_rslora": True,
        "train__learning_rate": 3e-3,
    },
    "olora": {"lora__init_lora_weights": "olora", "train__learning_rate": 3e-3},
    "nf4": {"method": "qlora"},
    "fp4": {"method": "qlora", "qlora__quant_type": "fp4", "qlora__use_double_quant": False},
    "int8": {"method": "qlora", "qlora__quant_type": "int8"},
    "prompt_tuning": {"method": "prompt_tuning", "train__learning_rate": 0.1},
    "prompt_text": {
        "method": "prompt_tuning",
        "prompt_tuning__prompt_tuning_init_text": "is it good or bad",
        "train__learning_rate": 0.1,
    },
    "full": {"method": "full", "train__learning_rate": 3e-3},
}
FURTHER = {"rslora", "pissa_niter_4", "pissa_rslora", "olora", "fp4", "prompt_text"}
"""Near kin of others: left to the long run."""
EACH_METHOD = [
    pytest.param(name, marks=[pytest.mark.long] if name in FURTHER else []) for name in METHODS
]
WRITES_TO_BASE = {"pissa", "pissa_niter_4", "pissa_rslora", "olora", "full"}


def fresh(job: JobSpec) -> Base:
    data = prepare_tokens(job)
    return load_base(job, len(data.labels) if job.task == "classification" else 0, CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process has mapped")
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_packed_base_lets_go_of_its_file(quant_type: str, llama_job: JobMaker) -> None:
    job = llama_job(method="qlora", qlora__quant_type=quant_type).job
    base = load_base(job, 0, CPU)
    gc.collect()
    mapped = Path("/proc/self/maps").read_text()
    assert f"{job.model.model_name_or_path}/model.safetensors" not in mapped
    assert base.model.get_input_embeddings().weight.is_floating_point()  # what would have held it


def logits(model: torch.nn.Module, job: JobSpec) -> torch.Tensor:
    """Of eight validation rows."""
    data = prepare_tokens(job)
    rows = data.splits["validation"].lengths.argsort()[:8]
    batch = make_batch(
        data.splits["validation"], rows, data.pad_id, CPU, classifies=job.task == "classification"
    )
    with torch.inference_mode():
        return model.eval()(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits


def read_plainly(job: JobSpec, folder: Path) -> torch.nn.Module:
    """What a user would do with PEFT or transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if job.method == "full":
        kind = (
            AutoModelForSequenceClassification
            if job.task == "classification"
            else AutoModelForCausalLM
        )
        return kind.from_pretrained(folder)
    return PeftModel.from_pretrained(fresh(job).model, str(folder))


@pytest.mark.parametrize("name", EACH_METHOD)
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_a_method_learns_and_plain_peft_reads_it(
    name: str, task: str, bert_job: JobMaker, llama_job: JobMaker, tmp_path: Path
) -> None:
    make = bert_job if task == "classification" else llama_job
    job = make(**{"train__max_steps": 40, **METHODS[name]}).job
    made = session(job)
    before = made.evaluate("train").metrics["loss"]
    finish(made)
    assert made.evaluate("train").metrics["loss"] < before
    made.save_weights(tmp_path / "weights")
    expected = logits(made.model, job)
    assert torch.allclose(logits(read_plainly(job, tmp_path / "weights"), job), expected, atol=2e-5)


@pytest.mark.parametrize(
    "model", ["tiny_gpt2", pytest.param("tiny_gpt_neo", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "nf4", "int8", "prompt_tuning", "full"])
def test_older_decoders(
    name: str, model: str, llama_job: JobMaker, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(model))
    job = llama_job(model__model_name_or_path=folder, train__max_steps=20, **METHODS[name]).job
    made = session(job)
    before = made.evaluate("train").metrics["loss"]
    finish(made)
    assert made.evaluate("train").metrics["loss"] < before
    made.save_weights(tmp_path / "weights")
    assert torch.allclose(
        logits(read_plainly(job, tmp_path / "weights"), job), logits(made.model, job), atol=2e-5
    )


def test_all_linear_reaches_every_matrix_but_the_head(
    bert_job: JobMaker, llama_job: JobMaker, tiny_gpt2: Path, tiny_gpt_neo: Path
) -> None:
    def adapted(job: JobSpec) -> int:
        return sum("lora_A" in name for name in session(job).strategy.trained)

    assert adapted(bert_job().job) == 2 * 6 + 1  # q, k, v, o, up, down; the pooler
    assert adapted(llama_job().job) == 2 * 7
    assert (
        adapted(llama_job(model__model_name_or_path=str(tiny_gpt2)).job) == 2 * 4
    )  # c_attn, c_proj, c_fc, c_proj
    assert adapted(llama_job(model__model_name_or_path=str(tiny_gpt_neo)).job) == 2 * 6


@pytest.mark.parametrize("name", EACH_METHOD)
def test_first_or_last_on_a_warm_base_a_trial_is_the_same(name: str, bert_job: JobMaker) -> None:
    job = bert_job(**METHODS[name]).job
    base = fresh(job)
    before = checksum(base.model)
    first = session(job, base)
    alone = finish(first)
    first.close()
    assert base.spent == (name in WRITES_TO_BASE)
    if base.spent:
        return
    assert checksum(base.model) == before
    session(bert_job(**METHODS[name] | {"train__seed": 7}).job, base).close()
    loss, values = finish(session(job, base))
    assert loss == alone[0]
    assert equal(values, alone[1])


@pytest.mark.parametrize("name", EACH_METHOD)
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_an_evaluation_does_not_change_the_training(
    name: str, task: str, bert_job: JobMaker, llama_job: JobMaker
) -> None:
    job = (bert_job if task == "classification" else llama_job)(**METHODS[name]).job
    looked_at = session(job)
    looked_at.evaluate()
    loss, values = finish(looked_at)
    alone = finish(session(job))
    assert loss == alone[0]
    assert equal(values, alone[1])


@pytest.mark.parametrize("name", ["lora", "prompt_tuning"])
def test_methods_follow_each_other_on_one_base(name: str, bert_job: JobMaker) -> None:
    """`method` can be swept: what one leaves behind must not reach the next."""
    job = bert_job(**METHODS[name]).job
    base = fresh(job)
    for other in ("prompt_tuning", "lora", "dora"):
        made = session(bert_job(**METHODS[other]).job, base)
        finish(made)
        made.close()
    loss, values = finish(session(job, base))
    alone = finish(session(job))
    assert loss == alone[0]
    assert equal(values, alone[1])


@pytest.mark.parametrize("name", ["dora", "pissa", "nf4", "prompt_text", "full"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit"])
def test_a_resumed_trial_ends_where_an_unbroken_one_does(
    name: str, optim: str, bert_job: JobMaker, tmp_path: Path
) -> None:
    job = bert_job(train__optim=optim, **METHODS[name]).job
    unbroken = finish(session(job))
    broken = session(job)
    broken.advance(3)
    broken.save(tmp_path / "last")
    resumed = session(job)
    resumed.load(tmp_path / "last")
    values = finish(resumed)[1]
    assert resumed.step == 8
    assert all(
        torch.allclose(values[key], unbroken[1][key], rtol=1e-5, atol=1e-7) for key in values
    )


def test_the_b_matrices_of_loraplus_have_their_own_rate(bert_job: JobMaker) -> None:
    job = bert_job(lora__loraplus_lr_ratio=16).job
    made = session(job)
    optimizer = build_optimizer(get_trained_parameters(made.model), job, 1e-3)
    set_rate(optimizer, 2e-3)
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {3.2e-2}
    assert {rate for name, rate in rates.items() if ".lora_B." not in name} == {2e-3}


def test_four_bits_are_a_fraction_of_the_memory(llama_job: JobMaker) -> None:
    def stored(job: JobSpec) -> int:
        layers = fresh(job).model.model.layers
        return sum(
            p.numel() * p.element_size() for n, p in layers.named_parameters() if "proj" in n
        )

    plain = stored(llama_job().job)
    assert stored(llama_job(method="qlora").job) == plain / 8
    assert stored(llama_job(method="qlora", qlora__quant_type="int8").job) == plain / 4


def test_a_decoder_classifier_cannot_be_prompt_tuned(tiny_llama: Path, bert_job: JobMaker) -> None:
    job = bert_job(model__model_name_or_path=str(tiny_llama), method="prompt_tuning").job
    with pytest.raises(UserError, match="last token"):
        session(job)


def test_an_adapter_of_another_kind_is_refused(bert_job: JobMaker, tmp_path: Path) -> None:
    made = session(bert_job().job)
    made.save_weights(tmp_path / "adapter")
    with pytest.raises(UserError, match="which is of type LORA"):
        session(bert_job(method="prompt_tuning", train__init_adapter=str(tmp_path / "adapter")).job)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"method": "qlora", "lora__init_lora_weights": "pissa"},
            "must be default or gaussian with qlora",
        ),
        ({"method": "full", "train__init_adapter": "x"}, "method full has none"),
        (
            {"lora__init_lora_weights": "olora", "train__init_adapter": "x"},
            "both set the adapter's initial weights",
        ),
        (
            {"method": "prompt_tuning", "prompt_tuning__num_virtual_tokens": 32},
            "must be below model.max_length",
        ),
    ],
)
def test_methods_that_contradict_the_job(
    overrides: dict[str, object], sentence: str, bert_job: JobMaker
) -> None:
    with pytest.raises(JobFileError, match=sentence):
        bert_job(**overrides)


def test_only_the_methods_own_blocks_are_in_a_trials_id(bert_job: JobMaker) -> None:
    facts = Provenance(
        {"train": "aa"},
        {bert_job().job.model.model_name_or_path: "bb"},
        {"lora": 1e-3, "full": 5e-5},
    )

    def name(**overrides: object) -> str:
        return compute_trial_id(bert_job(**overrides).job, facts)

    assert name(method="full") == name(method="full", lora__lora_r=8) != name()
    assert name() == name(prompt_tuning__num_virtual_tokens=5) == name(qlora__quant_type="int8")
    assert name(lora__init_lora_weights="pissa") != name()


@pytest.mark.parametrize("method", ["lora", "qlora", "prompt_tuning", "full"])
def test_on_bfloat16_weights_what_is_trained_has_one_number_format(
    method: str, bert_job: JobMaker, tmp_path: Path
) -> None:
    """FSDP2 and ZeRO take trained weights of one format only: float32 beside the base, its own in
    full fine-tuning.
    """
    job = bert_job(method=method, model__dtype="bfloat16").job
    made = session(job)
    expected = torch.bfloat16 if method == "full" else torch.float32
    assert {parameter.dtype for parameter in made.strategy.trained.values()} == {expected}
    finish(made)
    made.save_weights(tmp_path / "weights")
    assert made.evaluate().metrics["loss"] < 10
