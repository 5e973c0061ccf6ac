"""A mistake is one sentence of a bearable length, in our words, whatever the value is."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from lorafleet.jobs.data.hub import count_parameters, describe_missing_weights, read_model_config
from lorafleet.jobs.errors import AssetError, JobFileError
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.text import escape_line_breaks, shorten_text
from tests.conftest import lorafleet_here
from tests.unit.cluster.planning.test_preflight import HEAD

LONG = "long" * 5000


@pytest.mark.parametrize(
    "line",
    ["train: {optim: "
     f"{LONG}}}", f"{LONG}: 1", f"train: {{{LONG}: 1}}", f"train: {{seed: {'9' * 400}}}",
     "data: {labels: "
     f"[{LONG}]}}", f"linked: {{lora.lora_alpha: {LONG}}}", f"extra: {{a: {{b: [{LONG}]}}}}",
     "task: "
     f"{LONG}", f"environment: {{{LONG}: a}}", f"compare: {{arms: {{{LONG}: {{method: x}}}}}}"],
)  # fmt: skip
def test_a_long_value_is_cut(line: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"{HEAD}{line}\n" if not line.startswith(("data", "task")) else f"name: x\n{line}\n"
    )
    done = lorafleet_here("validate", "job.yaml", "--no-data", cwd=tmp_path)
    assert done.returncode == 2
    for said in done.stderr.splitlines():
        assert len(said) < 1300


@pytest.mark.parametrize("key", ['"a\\nb"', '"a\\rb"', '"\\e[2Jx"', '"tra\\nin"'])
def test_a_line_break_does_not_make_a_second_message(key: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"{HEAD}{key}: 1\n")
    done = lorafleet_here("validate", "job.yaml", "--no-data", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2  # the key, and the data file that is not there
    assert all(map(str.isprintable, lines))


@pytest.mark.parametrize(
    "override",
    ["train.seed=1e400", "train.seed=[[1]]", "train.seed={}", "lora.lora_r=99999999999999999999",
     "train.num_train_epochs=nan",
     "model.max_length='12'", "data.labels=[{}]", "evaluate.batch_size=true", "search.parameters={}", "tracking=[]"],
)  # fmt: skip
def test_no_message_is_pydantics(override: str, tmp_path: Path) -> None:
    try:
        load_text(HEAD, tmp_path / "job.yaml", (override,))
    except JobFileError as error:
        assert "Input should" not in str(error)
        assert "errors.pydantic" not in str(error)
        assert len(str(error).splitlines()) <= 2


def test_cutting_keeps_both_ends() -> None:
    text = f"field is '{'x' * 5000}', but must be y"
    assert shorten_text(text).startswith("field is 'xxx")
    assert shorten_text(text).endswith("but must be y")
    assert len(shorten_text(text)) < 1000
    assert shorten_text("short") == "short"
    assert escape_line_breaks("a\nb\r\nc") == "a\\nb\\r\\nc"


# --- a model's folder with anything in it


STRANGE: dict[str, dict[str, bytes]] = {
    "weight map of a list": {"model.safetensors.index.json": b'{"weight_map": ["a", "b"]}'},
    "weight map of a text": {"model.safetensors.index.json": b'{"weight_map": "x"}'},
    "weight map of "
    "numbers": {"model.safetensors.index.json": b'{"weight_map": {"a": 7, "b": [1], "c": null}}'},
    "weight map "
    "elsewhere": {"model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}'},
    "index of a list": {"model.safetensors.index.json": b"[1]"},
    "deep header": {"model.safetensors": (100_000).to_bytes(8, "little") + b"[" * 100_000},
    "header of a list": {"model.safetensors": (2).to_bytes(8, "little") + b"[]"},
    "header without end": {"model.safetensors": (2**62).to_bytes(8, "little") + b"{}"},
    "empty weights": {"model.safetensors": b""},
    "huge numbers": {"config.json": b'{"model_type": "bert", "hidden_size": 1e308, '
                               b'"num_hidden_layers": 1e308, '
                     b'"vocab_size": 1e308, "max_position_embeddings": 1e308, '
                     b'"intermediate_size": -1}'},
    "texts for "
    "numbers": {"config.json": b'{"model_type": ["bert"], "hidden_size": "x", "vocab_size": {}}'},
    "null config": {"config.json": b"null"},
    "deep config": {"config.json": b'{"a":' * 50_000},
    "odd labels": {"config.json": b'{"model_type": "bert", "id2label": [1], "num_labels": "x", '
                              b'"architectures": 7}'},
    "odd tokenizer": {"tokenizer_config.json": b'{"tokenizer_class": [], "auto_map": 7}'},
    "NUL in names": {"model.safetensors.index.json": b'{"weight_map": {"a": "x\\u0000y"}}'},
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_model_folder_is_a_sentence(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    usual = {"config.json": b'{"model_type": '
                            b'"bert"}', "model.safetensors": (2).to_bytes(8, "little") + b"{}",
             "tokenizer.json": b"{}"}  # fmt: skip
    for name, data in (usual | STRANGE[kind]).items():
        (folder / name).write_bytes(data)
    rows = [{"text": f"a {n}", "label": "ab"[n % 2]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "job.yaml").write_text(
        f"name: x\ntask: classification\nmodel: {{model_name_or_path: {folder}}}\ndata: "
        "{train_file: rows.jsonl}\n"
    )
    for command in ("validate", "plan"):
        done = lorafleet_here(command, "job.yaml", cwd=tmp_path)
        assert "bug in lorafleet" not in done.stdout + done.stderr, done.stderr
        assert done.returncode in (0, 2, 3)
    for look in (lambda: describe_missing_weights(folder), lambda: read_model_config(str(folder), None),
                 lambda: count_parameters(str(folder), None)):  # fmt: skip
        with contextlib.suppress(AssetError):
            look()


@pytest.mark.parametrize(
    "line",
    [
        'extends: "a\\0b"',
        "extends: [1]",
        "extends: {}",
        "kind: [slurm]",
        "kind: {a: b}",
        "locked: [[1]]",
        "locked: {}",
    ],
)
def test_strange_words_of_a_site_are_sentences(line: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        f"name: s\ncpus_per_node: 4\nmemory_gb_per_node: 8\n{line}\n"
    )
    done = lorafleet_here("doctor", "--on", tmp_path / "site.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "bug in lorafleet" not in done.stderr


@pytest.mark.parametrize(
    "field",
    ["data.train_file", "model.model_name_or_path", "train.init_adapter", "data.chat_template"],
)
def test_a_zero_byte_in_a_name_is_a_sentence(field: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(HEAD)
    done = lorafleet_here("validate", "job.yaml", f'{field}="a\\u0000b.jsonl"', cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "bug in lorafleet" not in done.stderr
