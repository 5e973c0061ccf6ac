"""The model card: what it says of the weights, and that its code answers as lorafleet does."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorafleet.evaluation.inference.generate import generate_answers
from lorafleet.evaluation.render.inference_files import save_inference_files
from lorafleet.evaluation.render.loading_code import build_loading_code
from lorafleet.evaluation.render.manifest import Manifest, PromptMetadata, WeightsMetadata
from lorafleet.evaluation.render.model_card import (
    build_loading_metadata,
    describe_weights,
    render_card,
)
from lorafleet.evaluation.tokenizer import load_chat_format
from lorafleet.evaluation.tokens import make_row_encoder
from lorafleet.jobs import files
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.hub import resolve_public_base
from lorafleet.jobs.data.row_formats import Row as DataRow
from lorafleet.jobs.data.weight_names import read_weight_dtypes
from lorafleet.jobs.runs.report import Recommendation, Report, Row
from lorafleet.jobs.runs.run import Trial
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.precision import describe_number_formats, parse_weights_format
from lorafleet.training.data import prepare_tokens
from lorafleet.training.methods import load_weights
from tests.conftest import JobMaker
from tests.unit.training.test_methods import METHODS, fresh
from tests.unit.training.test_session import finish, session

ROW = Row(trial_id="aaaa", state="finished", number_formats="weights float32; arithmetic float32")


def manifest_of(
    job: JobSpec, prompt: PromptMetadata, formats: str = "weights float32; arithmetic float32"
) -> Manifest:
    base, revision = resolve_public_base(job.model.model_name_or_path, job.model.revision)
    return Manifest(
        trial_id="aaaa",
        base_model=base,
        base_model_revision=revision,
        base_model_in_job=job.model.model_name_or_path,
        labels=list(prepare_tokens(job).labels),
        weights=WeightsMetadata(
            step=4,
            samples=32,
            trained_steps=8,
            trained_samples=64,
            trainable_parameters=10,
            number_formats=formats,
            dtypes=["float32"],
            lora_r=4,
            stored_lora_r=8,
        ),
        rows={"train": 3},
        data_sha256={"train": "ab"},
        prompt=prompt,
        resolved=job.model_dump(mode="json"),
        validation={"loss": 1.0},
    )


def small_report() -> Report:
    recommendation = Recommendation(
        sentence="Ship it.", rule="best", trial_id="aaaa", adapter="trials/aaaa/adapter"
    )
    return Report(
        run="r",
        state="finished",
        task="classification",
        metrics=["loss"],
        metric="loss",
        goal="minimize",
        model="m",
        data="data.jsonl",
        base=Row(trial_id="base", state="finished"),
        trials=[],
        recommendation=recommendation,
    )


def run_code(
    lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, Any]]:
    """Run the card's code in the folder of the weights; return what it prints, and its variables."""
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(compile("\n".join(lines), "README.md", "exec"), variables)
    return printed.getvalue().strip(), variables


def trained(job: JobSpec, folder: Path) -> list[str]:
    """Train briefly, save the weights as a run does, and return the card's code for them."""
    made = session(job)
    finish(made)
    folder.parent.mkdir()
    made.save_weights(folder)
    prompt = save_inference_files(job, folder)
    weights = describe_weights(Trial(folder.parent), ROW, {})
    manifest = manifest_of(job, prompt).model_copy(update={"weights": weights})
    facts = build_loading_metadata(manifest, job.task)
    assert facts is not None
    return build_loading_code(facts)


@pytest.mark.parametrize("name", ["lora", "pissa", "nf4", "int8", "prompt_tuning", "full"])
def test_the_code_classifies_as_lorafleet_does(
    name: str, bert_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bert_job(**{"train__max_steps": 30, **METHODS[name]}).job
    folder = tmp_path / "aaaa" / ("model" if job.method == "full" else "adapter")
    code = trained(job, folder)
    data = prepare_tokens(job)
    model = load_weights(job, fresh(job), folder).eval()
    tokenizer = load_chat_format(job).tokenizer
    texts = [row.text for row in data.read_rows("validation")[:6]]
    with torch.inference_mode():
        expected_logits = torch.cat(
            [model(**tokenizer([text], return_tensors="pt")).logits for text in texts]
        )
    asked = [line.replace('["a text"]', repr(texts)) for line in code]
    assert asked != code
    # On CPUs with bf16 instructions bitsandbytes answers from weights in bfloat16, outside of
    # lorafleet.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    printed, variables = run_code(asked, folder, monkeypatch)
    assert torch.allclose(variables["logits"], expected_logits, atol=1e-5)
    assert printed == repr([data.labels[index] for index in expected_logits.argmax(-1)])


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token }} {% endfor %}{% if "
    "add_generation_prompt %}<assistant> {{ mood }} {% endif %}"
)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("lora", {}),
        (
            "lora",
            {"data__chat_template_kwargs": {"mood": "good"}, "data__system_prompt": "be brief"},
        ),
        ("nf4", {}),
        ("prompt_tuning", {}),
        ("full", {"data__system_prompt": "be brief"}),
    ],
)
def test_the_code_answers_as_lorafleet_does(
    name: str,
    data: dict[str, Any],
    llama_job: JobMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides: dict[str, Any] = {
        "train__max_steps": 20,
        "evaluate__max_new_tokens": 8,
        **METHODS[name],
        **data,
    }
    if "data__chat_template_kwargs" in data:
        (tmp_path / "template.jinja").write_text(TEMPLATE)
        overrides["data__chat_template"] = str(tmp_path / "template.jinja")
    job = llama_job(**overrides).job
    folder = tmp_path / "aaaa" / ("model" if job.method == "full" else "adapter")
    code = trained(job, folder)
    question = prepare_tokens(job).read_rows("validation")[0].messages[-2].content
    answer, variables = run_code(
        [line.replace("'a question'", repr(question)) for line in code], folder, monkeypatch
    )
    prompt, expected = prompt_and_answer(job, folder, question)
    assert variables["inputs"]["input_ids"][0].tolist() == prompt
    assert answer == expected


def prompt_and_answer(job: JobSpec, folder: Path, question: str) -> tuple[list[int], str]:
    """Return the token ids that lorafleet asks with, and the answer that it gets."""
    data, chat = prepare_tokens(job), load_chat_format(job)
    system = [data.system] if data.system else []
    row = DataRow(messages=(*system, Message("user", question), Message("assistant", "?")))
    prompt = make_row_encoder(job, chat).encode_prompt(row, job.model.max_length)
    model = load_weights(job, fresh(job), folder).eval()
    written = generate_answers(
        model, chat.tokenizer, [prompt], job.evaluate, 1, ends=data.ends, frame=data.frame
    )
    return prompt, written[0]


def test_the_card_describes_the_saved_weights(bert_job: JobMaker) -> None:
    job = bert_job().job
    prompt = PromptMetadata(tokenizer=True)
    report = small_report()
    card = render_card(manifest_of(job, prompt), report)
    assert "base_model:" not in card.split("---")[1], "the hub takes no path there"
    assert "Saved at step 4 of 8 (32 training rows seen)" in card
    assert "rank: 4 as trained, stored as an equivalent adapter of rank 8" in card
    assert "PeftModel.from_pretrained(model, FOLDER)" in card
    hub = manifest_of(job, prompt).model_copy(
        update={"base_model": "org/model", "base_model_revision": "abc"}
    )
    assert 'base_model: "org/model"' in render_card(hub, report)
    assert "revision='abc'" in render_card(hub, report)
    old = manifest_of(job, PromptMetadata())
    assert "## How to load it" not in render_card(old, report)


def test_a_label_cannot_end_the_code_block(bert_job: JobMaker) -> None:
    report = small_report()
    manifest = manifest_of(bert_job().job, PromptMetadata(tokenizer=True)).model_copy(
        update={"labels": ["```\n# evil", "good"]}
    )
    card = render_card(manifest, report)
    assert "````python" in card
    assert "\n# evil" not in card


def test_facts_of_weights_are_of_the_best_evaluation(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "aaaa")
    trial.weights.mkdir(parents=True)
    save_file(
        {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2)},
        str(trial.weights / "x.safetensors"),
    )
    files.write_json(trial.weights / "adapter_config.json", {"peft_type": "LORA", "r": 16})
    for step in (4, 8):
        files.append_jsonl(
            trial.path / "metrics.jsonl", {"step": step, "samples": 8 * step, "evaluated": True}
        )
    row = Row(trial_id="aaaa", state="finished", step=8, samples=64, weights_step=4)
    facts = describe_weights(trial, row, {"lora": {"lora_r": 8}})
    assert (facts.step, facts.samples, facts.trained_steps) == (4, 32, 8)
    assert facts.dtypes == ["bfloat16", "float32"]
    assert (facts.lora_r, facts.stored_lora_r) == (8, 16)
    assert read_weight_dtypes(tmp_path) == []


def test_others_can_resolve_the_base() -> None:
    assert resolve_public_base("asset:minilm-l6", None) == (
        "sentence-transformers/all-MiniLM-L6-v2",
        None,
    )
    assert resolve_public_base("org/model", "v1") == ("org/model", "v1")
    assert resolve_public_base("/data/model", None) == ("/data/model", None)


def test_an_adapter_names_no_cache_folder(bert_job: JobMaker, tmp_path: Path) -> None:
    job = bert_job(**METHODS["prompt_text"]).job
    made = session(job)
    made.save_weights(tmp_path / "weights")
    config = files.read_json(tmp_path / "weights" / "adapter_config.json")
    assert (
        config["base_model_name_or_path"]
        == config["tokenizer_name_or_path"]
        == job.model.model_name_or_path
    )


@pytest.mark.parametrize("arithmetic", [None, "bfloat16"])
def test_the_format_of_the_weights_is_read_back(arithmetic: str | None, bert_job: JobMaker) -> None:
    for method in ("lora", "qlora"):
        job = bert_job(method=method).job
        assert (
            parse_weights_format(describe_number_formats(job, "bfloat16", arithmetic)) == "bfloat16"
        )
    assert parse_weights_format("unknown") is None
