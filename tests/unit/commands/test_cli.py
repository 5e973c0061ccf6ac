"""The command line: quick, quiet about its insides, and right about names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lorafleet.cluster.hardware import format_install_hint
from lorafleet.commands.cli import build_app
from lorafleet.jobs.data.hub import describe_missing_files
from lorafleet.jobs.loading.job_file import load_job
from tests.conftest import ROOT, lorafleet, lorafleet_here, opinions, write_rows

HEAVY = ("torch", "ray", "transformers", "peft", "matplotlib", "sklearn", "datasets", "wandb")


def _modules_after(code: str) -> set[str]:
    program = f"import sys; {code}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_the_control_plane_imports_nothing_heavy() -> None:
    assert not _modules_after("import lorafleet.commands.cli") & set(HEAVY)


@pytest.mark.parametrize(
    "command", ["validate", "plan", "status", "report", "list", "sync", "doctor", "render"]
)
def test_no_command_that_reads_imports_torch_or_ray(command: str, tmp_path: Path) -> None:
    job = ROOT / "examples" / "quickstart.yaml"
    words = [command, str(job)] if command in ("validate", "plan", "render") else [command]
    if command == "sync":
        words.append("nothing")
    code = (
        f"import sys; sys.argv = ['lorafleet', *{words!r}]; from lorafleet.commands.cli import "
        "main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.stderr.write('LOADED ' + ' '.join(m for m in ('torch', 'ray', 'transformers') if m in "
        "sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stderr.endswith("LOADED "), done.stderr[-300:]


def _list_commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(build_app())
    return dict(group.commands)


def test_help_lists_every_command(tmp_path: Path) -> None:
    """Each in a line of its own, with the first sentence of its docstring."""
    shown = lorafleet_here("--help", cwd=tmp_path).stdout
    listed = re.findall(r"(?m)^│ ([a-z]+) +[A-Z]", shown)
    commands = _list_commands()
    assert listed == [name for name, command in commands.items() if not command.hidden]
    assert len(listed) >= 28


def test_every_command_takes_verbose() -> None:
    for name, command in _list_commands().items():
        options = {option for param in command.params for option in param.opts}
        assert command.hidden or {"-v", "--verbose"} <= options, name


def test_verbose_prints_what_a_command_does(tmp_path: Path) -> None:
    plain = lorafleet_here("list", cwd=tmp_path)
    verbose = lorafleet_here("list", "-v", cwd=tmp_path)
    assert "lorafleet list_runs, Python" not in plain.stderr
    assert "lorafleet list_runs, Python" in verbose.stderr
    assert plain.stdout == verbose.stdout


def test_schema_is_a_schema(tmp_path: Path) -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads(lorafleet_here("schema", cwd=tmp_path).stdout))


def test_validate_says_yes_and_no_in_json(tmp_path: Path) -> None:
    good = lorafleet_here(
        "validate", ROOT / "examples" / "quickstart.yaml", "--format", "json", cwd=tmp_path
    )
    assert json.loads(good.stdout)["valid"] is True
    bad = lorafleet_here(
        "validate",
        ROOT / "examples" / "quickstart.yaml",
        "train.sed=1",
        "--format",
        "json",
        cwd=tmp_path,
    )
    assert bad.returncode == 2
    assert "did you mean 'seed'" in json.loads(bad.stdout)["problems"][0]["sentence"]


@pytest.mark.parametrize("columns", [("text", "label"), ("review", "sentiment")])
def test_init_writes_a_job_that_loads(columns: tuple[str, str], tmp_path: Path) -> None:
    rows = [dict(zip(columns, row.values(), strict=True)) for row in opinions(60, 4)]
    write_rows(tmp_path / "my data.jsonl", rows)
    done = lorafleet_here(
        "init", "--task", "classification", "--train-file", "my data.jsonl", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert lorafleet_here("validate", "job.yaml", cwd=tmp_path).returncode == 0
    again = lorafleet_here("init", "--train-file", "my data.jsonl", cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)


def test_init_for_summaries(tmp_path: Path) -> None:
    rows = [
        {"id": row, "article": f"{row} " + "long words " * 9, "highlights": f"{row} short"}
        for row in range(40)
    ]
    write_rows(tmp_path / "news.jsonl", rows)
    done = lorafleet_here(
        "init", "--task", "summarization", "--train-file", "news.jsonl", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    job = load_job(tmp_path / "job.yaml").job
    assert (job.task, job.data.prompt_column, job.data.completion_column) == (
        "summarization",
        "article",
        "highlights",
    )
    write_rows(tmp_path / "x.jsonl", [{"article": "a", "bar": "b"}])
    wrong = lorafleet_here(
        "init", "--task", "summarization", "--train-file", "x.jsonl", "-o", "x.yaml", cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert (
        "has the columns article, bar: name the right ones with --prompt-column and --completion-column"
        in wrong.stderr
    )


def test_init_asks_for_the_column_it_cannot_guess(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", [{"foo": "a", "bar": "b"}])
    done = lorafleet_here("init", "--train-file", "x.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "has the columns foo, bar: name the right one with --text-column" in done.stderr


def test_a_job_that_wants_gpus_is_told_why_there_are_none(tmp_path: Path) -> None:
    example = ROOT / "examples" / "quickstart.yaml"
    for wanted in ("resources.device=cuda", "resources.gpus_per_node=1"):
        done = lorafleet_here(
            "plan", example, wanted, cwd=tmp_path, PATH=str(Path(sys.executable).parent)
        )
        assert done.returncode == 2
        assert "this machine has no usable GPU: no NVIDIA driver responds" in done.stderr


def test_the_torch_that_fits_a_driver() -> None:
    assert format_install_hint("580.82.07").endswith("/whl/cu130")
    assert format_install_hint("550.54").endswith("/whl/cu128")
    assert (
        format_install_hint("470.10")
        == "no build of torch 2.9 or newer supports this driver: update it to 525 or newer"
    )


def test_every_command_takes_runs() -> None:
    from typer.main import get_command

    from lorafleet.commands.cli import build_app

    commands = get_command(build_app()).commands  # type: ignore[attr-defined]
    without = [
        name
        for name, made in commands.items()
        if "runs" not in {option.name for option in made.params}
    ]
    assert without == ["exec", "measure", "node"]  # their run is a folder


def test_more_machines_than_there_are(tmp_path: Path) -> None:
    example = ROOT / "examples" / "quickstart.yaml"
    done = lorafleet_here("plan", example, "--nodes", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "--nodes is 2, but this is a single machine" in done.stderr
    assert (
        lorafleet_here(
            "plan", example, "--nodes", "1", "--runs", "elsewhere", cwd=tmp_path
        ).returncode
        == 0
    )


def test_a_model_folder_without_weights_or_tokenizer_is_refused(
    tmp_path: Path, tiny_bert: Path
) -> None:
    """transformers makes up an empty tokenizer, and the model would be trained on unknown tokens
    alone.
    """
    rows = write_rows(tmp_path / "x.jsonl", opinions(60, 4))
    lorafleet("init", "--train-file", rows, "--model", str(tiny_bert), cwd=tmp_path, check=True)
    for lost, said in (
        ("tokenizer*", "has no tokenizer"),
        ("*.safetensors", "has no weights in safetensors"),
    ):
        half = tmp_path / "half"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(tiny_bert, half)
        for path in [*half.glob(lost), *(half.glob("vocab.txt") if "tok" in lost else ())]:
            path.unlink()
        done = lorafleet("sweep", "job.yaml", f"model.model_name_or_path={half}", cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr


def test_a_broken_off_download_is_not_a_whole_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-1.safetensors").write_text("")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (
        describe_missing_files(tmp_path)
        == "no model-2.safetensors, which model.safetensors.index.json refers to"
    )
    (tmp_path / "model-2.safetensors").write_text("")
    assert describe_missing_files(tmp_path) is None


def test_fetch_lists_pins(tmp_path: Path) -> None:
    assets = json.loads(lorafleet_here("fetch", "--list", "--format", "json", cwd=tmp_path).stdout)[
        "assets"
    ]
    assert {asset["name"] for asset in assets} >= {
        "asset:minilm-l6",
        "asset:smollm2-135m-instruct",
        "asset:rotten-tomatoes",
        "asset:aclsum",
    }
    assert all(len(asset["sha256"]) == 64 and asset["licence"] for asset in assets)


def test_fetch_copies_the_examples(tmp_path: Path) -> None:
    lorafleet("fetch", "--examples", cwd=tmp_path, check=True)
    assert (tmp_path / "examples" / "quickstart.yaml").read_text() == (
        ROOT / "examples" / "quickstart.yaml"
    ).read_text()


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    text = (
        (ROOT / "examples" / "quickstart.yaml")
        .read_text()
        .replace("asset:minilm-l6 ", "no-such/model ")
    )
    (tmp_path / "job.yaml").write_text(text)
    done = lorafleet_here("fetch", "job.yaml", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "neither on this machine nor reachable on the hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_an_unreachable_data_set_is_one_sentence(tmp_path: Path, tiny_bert: Path) -> None:
    """The hub's address is one at which nobody listens; what is asked there is not asked again and
    again.
    """
    job = f"name: x\ntask: classification\nmodel: {{model_name_or_path: {tiny_bert}}}\n"
    job += "data: {dataset_name: no-such/data}\n"
    (tmp_path / "job.yaml").write_text(job)
    # In a process of its own: the client reads its settings when it is imported.
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    done = lorafleet("fetch", "job.yaml", cwd=tmp_path, **environment)
    assert done.returncode == 2, done.stderr
    assert "no-such/data, which is neither on this machine nor reachable on the hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Retrying" not in done.stderr


def test_doctor_speaks_json(tmp_path: Path) -> None:
    done = lorafleet_here("doctor", "--format", "json", cwd=tmp_path)
    findings = {
        finding["what"]: finding["verdict"] for finding in json.loads(done.stdout)["findings"]
    }
    assert findings["Python"] == findings["torch"] == "ok"


def test_foreign_packages_of_our_old_names_change_nothing(tmp_path: Path) -> None:
    """In the working directory and on PYTHONPATH: whoever imports one ends."""
    for name in ("jobs", "training", "evaluation", "cluster", "commands", "slurm", "tuning"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise SystemExit('a foreign package was imported')"
        )
    done = lorafleet("doctor", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "a foreign package was imported" not in done.stdout + done.stderr
    assert "transformers" in done.stdout


def test_gpus_that_torch_cannot_reach_are_said_before_anything_starts(
    tmp_path: Path, tiny_bert: Path
) -> None:
    """A machine with GPUs and a CPU build of torch: with an nvidia-smi that answers as theirs does."""
    from lorafleet.cluster.hardware import get_torch_cuda

    if get_torch_cuda() is not None:
        pytest.skip("the installed torch has CUDA")
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\necho 'NVIDIA A100, 81920, 550.54'\necho 'NVIDIA A100, 81920, 550.54'\n"
    )
    fake.chmod(0o755)
    rows = write_rows(tmp_path / "x.jsonl", opinions(60, 4))
    lorafleet("init", "--train-file", rows, cwd=tmp_path, check=True)
    path = f"{fake.parent}:{os.environ['PATH']}"
    tiny = (f"model.model_name_or_path={tiny_bert}", "model.max_length=64")
    done = lorafleet("sweep", "job.yaml", *tiny, cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert "driver 550.54" in done.stderr
    assert "torch is a CPU build: pip install 'torch>=2.9,<2.14' --index-url" in done.stderr
    assert not (tmp_path / "runs").exists()
    doctor = lorafleet("doctor", cwd=tmp_path, PATH=path)
    assert "2 x NVIDIA A100, 80 GiB" in doctor.stdout
