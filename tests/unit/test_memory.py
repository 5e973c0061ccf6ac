"""What is known of a model's size from its config alone, against the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.memory import trained_parameters
from cluster.shape import shape
from tests.conftest import JobMaker
from tests.unit.test_training import session


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
    how: dict[str, object], model: str, llama_job: JobMaker, bert_job: JobMaker, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    make = bert_job if model == "tiny_bert" else llama_job
    job = make(model__model_name_or_path=str(folder), **how).job
    known = shape(json.loads((folder / "config.json").read_text()))
    assert known is not None
    assert trained_parameters(job, known, 2) == session(job).trainable_parameters


@pytest.mark.parametrize("names", [["query", "value"], ["dense"], ["output.dense"]])
def test_named_layers_are_those_that_peft_finds(names: list[str], tiny_bert: Path, bert_job: JobMaker) -> None:
    job = bert_job(lora__lora_target_modules=names).job
    known = shape(json.loads((tiny_bert / "config.json").read_text()))
    assert known is not None
    assert trained_parameters(job, known, 2) == session(job).trainable_parameters


def test_published_models_have_their_published_matrices() -> None:
    """Llama-2-7B: 32 x (4 x 4096^2 + 3 x 4096 x 11008) weights in matrices; r 8 on q and v is 4,194,304."""
    llama = shape(
        {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "intermediate_size": 11008, "vocab_size": 32000}
    )  # fmt: skip
    assert llama is not None
    assert llama.matrices == 6_476_005_376
    assert llama.lora_parameters(8, ("q_proj", "v_proj")) == 4_194_304
    assert shape({"model_type": "x"}) is None
