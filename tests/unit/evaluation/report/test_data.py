"""`lorafleet data`: what is said of the rows before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorafleet.commands.data import render_report
from lorafleet.evaluation.report.data import DataReport, build_data_report
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.training.data import prepare_tokens
from tests.conftest import lorafleet_here, write_rows
from tests.unit.jobs.data.chat_families import BY_NAME, model_folder


def chat_row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **more,
    }


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(BY_NAME["qwen3"], tmp_path_factory.mktemp("chat") / "model")


def job_file(
    folder: Path,
    model: Path,
    rows: dict[str, list[Any]],
    max_length: int = 64,
    task: str = "generation",
) -> Path:
    files = {
        f"{name}_file": str(write_rows(folder / f"{name}.jsonl", found))
        for name, found in rows.items()
    }
    text = (
        f"name: look\ntask: {task}\nmodel: {{model_name_or_path: {model}, max_length: "
        f"{max_length}}}\n"
    )
    path = folder / "job.yaml"
    path.write_text(f"{text}data: {json.dumps(files)}\n")
    return path


def report_of(path: Path, **options: Any) -> DataReport:
    return build_data_report(load_text(path.read_text(), path).job, **options)


ROWS = {
    "train": [
        chat_row("country 1?", "city 1"),
        chat_row("country 1?", "city 1"),
        chat_row("country 2?", "city 2<|im_end|>"),
        chat_row("why? " * 60, "city 3"),
        {
            "messages": [
                *chat_row("country 4?", "city 4")["messages"],
                *chat_row("country 5?", "city 5")["messages"],
            ]
        },
        chat_row("country 6?", "<think>\nso\n</think>\n\n", note="x"),
    ],
    "validation": [chat_row("country 1?", "city 1"), chat_row("country 7?", "city 7")],
    "test": [chat_row("country 8?", "city 8")],
}


def test_a_report_counts_what_is_odd(chat_model: Path, tmp_path: Path) -> None:
    path = job_file(tmp_path, chat_model, ROWS)
    report = report_of(path)
    train, validation, test = report.splits
    assert report.format == "messages"
    assert (train.rows, train.examples, validation.rows, test.rows) == (
        6,
        7,
        2,
        1,
    )  # Qwen3: a turn, an example
    assert (train.repeated, validation.also_in_train, test.also_in_train) == (1, 1, 0)
    assert (train.longer, train.cut, train.shortened) == (1, 1, 0)
    assert train.special_tokens == {"<|im_end|>": 1}
    assert train.empty_answers == 1
    assert train.lengths is not None
    assert train.lengths.longest > 64
    assert sum(bucket.examples for bucket in train.histogram) == 7
    assert not report.bad_rows
    assert any("column 'note'" in note for note in report.notes)
    # The numbers are those of what is trained on.
    split = prepare_tokens(load_text(path.read_text(), path).job).splits["train"]
    assert train.tokens == len(split.ids)
    assert train.learnt_tokens == int(np.sum(split.learnt))


def test_bad_rows_are_all_named_and_the_rest_is_looked_at(chat_model: Path, tmp_path: Path) -> None:
    rows = {
        **ROWS,
        "train": [
            *ROWS["train"],
            chat_row("country?", ""),
            {"messages": "x"},
            chat_row("a", "b", tools="["),
        ],
    }
    path = job_file(tmp_path, chat_model, rows)
    report = report_of(path)
    assert [line.partition(": ")[0] for line in report.bad_rows] == [
        f"{tmp_path}/train.jsonl:{n}" for n in (7, 8, 9)
    ]
    assert report.splits[0].rows == 6
    found = lorafleet_here("data", path, cwd=tmp_path)
    assert found.returncode == 2
    assert "3 bad rows" in found.stdout
    assert "train.jsonl:8: messages must be a list of {role, content}" in found.stdout
    as_json = lorafleet_here("data", path, "--format", "json", cwd=tmp_path)
    assert as_json.returncode == 2
    assert DataReport.model_validate_json(as_json.stdout).bad_rows == report.bad_rows


def test_rows_are_shown_as_tokens(chat_model: Path, tmp_path: Path) -> None:
    path = job_file(tmp_path, chat_model, ROWS)
    found = lorafleet_here("data", path, "--show", "5", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    plain = found.stdout.replace("·", "").replace("↵\n", "\n")
    assert "«<think>\n\n</think>\n\ncity 1<|im_end|>»" in plain
    assert "example 2 of 2" in plain
    report = report_of(path, show=5)
    (example,) = report.shown[0].examples
    assert (
        "".join(token.text for token in example if token.learnt)
        == "<think>\n\n</think>\n\ncity 1<|im_end|>"
    )
    assert [row.line for row in report.shown] == [1, 2, 3, 4, 5]
    held_out = report_of(path, show=1, split="test")
    assert "country 8?" in "".join(token.text for token in held_out.shown[0].examples[0])


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_fits_a_terminal(width: int, chat_model: Path, tmp_path: Path) -> None:
    import io

    from rich.console import Console

    screen = Console(width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    report = report_of(job_file(tmp_path, chat_model, ROWS), show=2)
    with screen.capture() as capture:
        screen.print(render_report(report, coloured=True))
    text = capture.get()
    assert "\x1b[1;32m" in text  # what is learnt
    assert "«" not in text


def test_characters_are_shown_whole(chat_model: Path, tmp_path: Path) -> None:
    path = job_file(tmp_path, chat_model, {**ROWS, "train": [chat_row("🌧 雨?", "naïve ☀️")] * 2})
    (example,) = report_of(path, show=1).shown[0].examples
    text = "".join(token.text for token in example)
    assert "🌧 雨?" in text
    assert "naïve ☀️" in text
    assert "\ufffd" not in text


def test_classes_are_counted(
    tiny_bert: Path, opinion_files: dict[str, Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in opinion_files["train"].read_text().splitlines()]
    path = job_file(
        tmp_path,
        tiny_bert,
        {"train": rows, "validation": rows[:8], "test": rows[8:12]},
        8,
        "classification",
    )
    report = report_of(path, show=1)
    train = report.splits[0]
    assert train.classes == {
        "bad": sum(row["label"] == "bad" for row in rows),
        "good": sum(row["label"] == "good" for row in rows),
    }
    assert train.learnt_tokens is None
    assert train.cut == train.longer > 0
    assert report.splits[1].also_in_train == 8
    assert report.shown[0].label in ("good", "bad")
    assert "classes: bad" in lorafleet_here("data", path, cwd=tmp_path).stdout


def test_without_the_model_the_rows_are_looked_at_all_the_same(tmp_path: Path) -> None:
    path = job_file(tmp_path, Path("org/model"), ROWS)
    report = report_of(path)
    assert report.splits[0].rows == 6
    assert report.splits[0].tokens is None
    assert any("tokenization was not checked" in note for note in report.notes)
    assert lorafleet_here("data", path, cwd=tmp_path).returncode == 0


def test_named_templates_and_files_of_templates(tmp_path: Path) -> None:
    """`data.chat_template`: a file, a name, or neither; and variables of the template."""
    from lorafleet.evaluation.tokenizer import load_chat_format
    from lorafleet.jobs.errors import JobFileError, UserError
    from lorafleet.jobs.trials.trial_id import compute_provenance, compute_trial_id

    folder = model_folder(BY_NAME["qwen2.5"], tmp_path / "model")
    named = folder / "additional_chat_templates"
    named.mkdir()
    (named / "short.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}{% if "
        "add_generation_prompt %}[assistant]{% if loud %}Hey: {% endif %}{% endif %}"
    )
    (tmp_path / "plain.txt").write_text("no template")
    path = job_file(tmp_path, folder, ROWS)

    def job(*overrides: str) -> Any:
        return load_text(path.read_text(), path, overrides).job

    own = job("data.chat_template=own.jinja")
    assert own.data.chat_template.startswith("{% for m")
    assert load_chat_format(own).template.source == (tmp_path / "own.jinja").read_text()
    assert (
        load_chat_format(job("data.chat_template=short")).template.source
        == (named / "short.jinja").read_text()
    )
    assert load_chat_format(job()).template.source != load_chat_format(own).template.source
    loud = job("data.chat_template=own.jinja", "data.chat_template_kwargs.loud=true")
    first = prepare_tokens(loud).splits["train"]
    assert "Hey: " in load_chat_format(loud).tokenizer.decode(
        np.asarray(first.ids[: first.starts[1]])
    )
    ids = {
        compute_trial_id(one, compute_provenance(one))
        for one in (job(), own, loud, job("data.train_on_turns=last"))
    }
    assert len(ids) == 4
    with pytest.raises(
        UserError,
        match=r"neither a file nor a template of .*'s tokenizer \(it has default, short\)",
    ):
        load_chat_format(job("data.chat_template=tool_use"))
    for value, sentence in (
        ("missing.jinja", "but there is no such file"),
        ("plain.txt", "but that file is not a Jinja template"),
    ):
        with pytest.raises(JobFileError, match=sentence):
            job(f"data.chat_template={value}")
    with pytest.raises(JobFileError, match="without add_generation_prompt"):
        job("data.chat_template_kwargs.tools=x")


def test_rows_that_are_judged_twice_are_counted_once(chat_model: Path, tmp_path: Path) -> None:
    rows = {
        "train": [chat_row(f"country {n}?", f"city {n}<|im_end|>x") for n in range(5)],
        "validation": ROWS["test"],
    }
    data = prepare_tokens(
        load_text(job_file(tmp_path, chat_model, rows).read_text(), tmp_path / "job.yaml").job
    )
    assert data.chosen_on_test
    assert any(
        note.startswith("in 5 rows an answer contains an end token") for note in data.warnings
    )
    assert data.read_rows("test") == data.read_rows("validation")
    assert np.array_equal(data.splits["test"].ids, data.splits["validation"].ids)


def test_texts_with_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = model_folder(BY_NAME["mistral"], tmp_path / "model")
    rows = {name: [{**row, "meta[/x]": 1} for row in found] for name, found in ROWS.items()}
    rows["train"].append(chat_row("what is [INST] 0 [/INST]?", "city [bold]9"))
    done = lorafleet_here("data", job_file(tmp_path, folder, rows), "--show", "9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "special tokens inside texts" in line)
    assert "[INST] in 1 row" in line
    assert "[/INST] in 1 row" in line
    assert "column 'meta[/x]'" in done.stdout
    assert "city [bold]9" in done.stdout.replace("·", "")


def test_a_variable_that_no_template_uses_is_named(chat_model: Path, tmp_path: Path) -> None:
    path = job_file(tmp_path, chat_model, ROWS)
    done = lorafleet_here(
        "data", path, "data.chat_template_kwargs.enable_thinkng=false", cwd=tmp_path
    )
    assert "has enable_thinkng, which the chat template does not use" in " ".join(
        done.stdout.split()
    )


def test_a_template_that_cannot_be_used_is_said(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "deep.jinja").write_text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    path = job_file(tmp_path, chat_model, ROWS)
    done = lorafleet_here("data", path, "data.chat_template=deep.jinja", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "the chat template cannot be used: the model's chat template refuses this row"
        in " ".join(done.stdout.split())
    )
    assert (
        "train.jsonl:1: the model's chat template refuses this row: maximum recursion depth"
        in done.stdout
    )
