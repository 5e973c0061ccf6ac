"""An exported model answers as it was judged: the same prompt, the same end, the same rule for what
is an answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafleet.deployment import export as exporting
from lorafleet.deployment.answers import generate_pieces
from lorafleet.deployment.chat_template import render_conversation
from lorafleet.deployment.export import export
from lorafleet.deployment.runtime import open_artefact, read_artefact
from lorafleet.evaluation.report.model_of_run import select_model
from lorafleet.jobs.loading.job_file import LoadedJob, load_text
from lorafleet.jobs.runs.run import Run
from tests.conftest import lorafleet, write_rows
from tests.export.test_targets import quiet, trained
from tests.unit.jobs.data.chat_families import BY_NAME, Family, model_folder

ANSWERS = ("it is city 1.", "kind and sunny", "9", "no: weather")


def rows(systems: tuple[str, ...]) -> list[dict[str, Any]]:
    """Questions with answers; the n-th has the n-th of some system messages (none where it is
    empty).
    """
    found = []
    for number, answer in enumerate(ANSWERS):
        system = systems[number % len(systems)]
        first = [{"role": "system", "content": system}] if system else []
        asked = {"role": "user", "content": f"country {number}?"}
        found.append({"messages": [*first, asked, {"role": "assistant", "content": answer}]})
    return found


def chat_run(
    family: Family, data: list[dict[str, Any]], tmp_path: Path, template_kwargs: str = "{}"
) -> Run:
    """A run whose adapter knows all rows by heart."""
    folder = model_folder(
        family, tmp_path / "model", hidden=128
    )  # smaller heads that share keys, ONNX Runtime has wrong
    path = write_rows(tmp_path / "rows.jsonl", data)
    text = f"""
name: heart
task: generation
method: full
model: {{model_name_or_path: "{folder}", max_length: 1024}}
data: {{train_file: "{path}", validation_file: "{path}", test_file: "{path}", chat_template_kwargs: {template_kwargs}}}
train: {{per_device_train_batch_size: 4, learning_rate: 3e-3, lr_scheduler_type: constant, max_steps: 100,
         group_by_length: false}}
"""
    loaded: LoadedJob = load_text(text, tmp_path / "job.yaml")
    return trained(loaded, tmp_path)


def run_py(folder: Path, *prompts: str) -> list[str]:
    """The answers that the script beside a model prints."""
    done = subprocess.run(
        [sys.executable, "run.py", *prompts], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


QUESTIONS = tuple(f"country {number}?" for number in range(len(ANSWERS)))


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        *(
            pytest.param(one, marks=pytest.mark.long)
            for one in ("gpt-oss", "deepseek-v3", "glm4.5", "no-end-token")
        ),
    ],
)
def test_every_way_to_ask_answers_as_training_says(name: str, tmp_path: Path) -> None:
    """Without a system message: run.py, chat, serve, and plain transformers on the merged model."""
    run = chat_run(BY_NAME[name], rows(("",)), tmp_path)
    out = tmp_path / "out"
    merged, onnx = export(select_model(run), ["merged", "onnx"], out, quiet)
    for made in (merged, onnx):
        assert made.parity is not None
        assert made.accepted, made.parity.reasons
        judged = made.parity.judged
        assert (judged.called_rows, judged.called_prompts, judged.called_answers) == (4, 1.0, 1.0)
    assert run_py(out / "onnx", *QUESTIONS) == list(ANSWERS)
    asked = lorafleet("chat", out / "merged", "-p", QUESTIONS[1], cwd=tmp_path)
    assert asked.stdout == f"{ANSWERS[1]}\n"
    loaded = open_artefact(out / "onnx", 1)
    about = loaded.artefact
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        text = render_conversation(
            out / "onnx", [{"role": "user", "content": question}], about.chat_template_kwargs
        )
        ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == loaded.encode_prompt(question)
        grown = [piece.text for piece in generate_pieces(loaded, ids, 40, None)]
        assert "".join(grown) == answer
        assert _by_transformers(out / "merged", question).rstrip().endswith(answer)
    card = (out / "onnx" / "README.md").read_text()
    assert "| answers to them that equal the source's | | 1.000 |" in card


def _by_transformers(folder: Path, question: str) -> str:
    """What a user of the merged model gets who knows nothing of lorafleet: the text up to the end
    of the turn.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=60, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    return str(tokenizer.decode(written, skip_special_tokens=True))


@pytest.mark.long
def test_one_system_message_of_all_rows_stands_before_every_prompt(tmp_path: Path) -> None:
    run = chat_run(BY_NAME["qwen2.5"], rows(("be kind",)), tmp_path)
    (made,) = export(select_model(run), ["onnx"], tmp_path / "out", quiet)
    assert made.accepted
    assert made.parity is not None
    assert (made.parity.judged.called_rows, made.parity.judged.called_prompts) == (4, 1.0)
    about = read_artefact(tmp_path / "out" / "onnx")
    assert about.system == "be kind"
    assert "be kind" in about.before
    assert run_py(tmp_path / "out" / "onnx", *QUESTIONS) == list(ANSWERS)


def test_system_messages_of_some_rows_stand_before_no_prompt(tmp_path: Path) -> None:
    """Then the others are asked in their own frame, and it is said that a prompt alone cannot ask
    them.
    """
    run = chat_run(BY_NAME["qwen2.5"], rows(("be kind", "")), tmp_path)
    (made,) = export(select_model(run), ["onnx"], tmp_path / "out", quiet)
    assert made.parity is not None
    assert made.accepted, made.parity.reasons
    about = read_artefact(tmp_path / "out" / "onnx")
    assert about.system == ""
    assert "be kind" not in about.before
    remarks = " ".join(made.parity.remarks)
    assert "do not all have the same system message" in remarks
    assert "2 held-out rows cannot be sent as a single prompt" in remarks
    # Rows without one are asked as they were trained; Qwen2.5's template adds its own.
    assert (made.parity.judged.called_rows, made.parity.judged.called_prompts) == (2, 1.0)
    answers = run_py(tmp_path / "out" / "onnx", QUESTIONS[1], QUESTIONS[3])
    assert answers == [ANSWERS[1], ANSWERS[3]]
    with_system = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    loaded = open_artefact(tmp_path / "out" / "onnx", 1)
    ids = loaded.tokenizer.encode(
        render_conversation(tmp_path / "out" / "onnx", with_system), add_special_tokens=False
    ).ids
    assert "".join(piece.text for piece in generate_pieces(loaded, ids, 40, None)) == ANSWERS[0]


def test_a_runner_that_frames_prompts_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = chat_run(BY_NAME["qwen2.5"], rows(("",)), tmp_path)
    right = exporting.build_artefact

    def wrong(source: Any) -> Any:
        found = right(source)
        return found.model_copy(update={"before": f"{found.before}Well, "})

    monkeypatch.setattr(exporting, "build_artefact", wrong)
    (made,) = export(select_model(run), ["onnx"], tmp_path / "out", quiet)
    assert not made.accepted
    assert made.parity is not None
    assert made.parity.judged.called_prompts == 0.0
    assert any(
        "0.000 of the user prompts are formatted as in training" in why
        for why in made.parity.reasons
    )


@pytest.mark.long
def test_variables_of_the_template_go_with_the_model(tmp_path: Path) -> None:
    run = chat_run(BY_NAME["qwen3"], rows(("",)), tmp_path, "{enable_thinking: false}")
    (made,) = export(select_model(run), ["onnx"], tmp_path / "out", quiet)
    assert made.accepted
    about = json.loads((tmp_path / "out" / "onnx" / "artefact.json").read_text())
    assert about["chat_template_kwargs"] == {"enable_thinking": False}
    assert about["after"].endswith("<think>\n\n</think>\n\n")
    assert run_py(tmp_path / "out" / "onnx", *QUESTIONS) == list(ANSWERS)
