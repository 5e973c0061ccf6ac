"""What is written is so."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from lorafleet.jobs.data.data_files import DATA_SUFFIXES
from lorafleet.jobs.data.row_formats import convert_record, detect_row_format
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.schema.job import DataFormat, DataSpec, JobSpec
from tests.conftest import ROOT
from tests.unit.test_packaging import FOLDERS

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_the_reference_of_the_job_file_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def _words_of(annotation: Any) -> set[str]:
    """Every word of every Literal in a type."""
    if get_origin(annotation) is Literal:
        return set(map(str, get_args(annotation)))
    return set().union(*map(_words_of, get_args(annotation)))


def _every_field(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """Name and type of each field of a block, and of the blocks in it."""
    for name, field in model.model_fields.items():
        yield name, field.annotation
        for part in _models_in(field.annotation):
            yield from _every_field(part)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def test_the_reference_has_every_field_with_every_word_that_it_may_be() -> None:
    rows: dict[str, list[str]] = {}
    for line in (ROOT / "docs/job-file.md").read_text().splitlines():
        cells = line.split(" | ")
        if line.startswith("| `"):
            rows.setdefault(cells[0].strip("| `"), []).append(cells[1])
    fields = list(_every_field(JobSpec))
    assert len(fields) > 100
    for name, annotation in fields:
        words = _words_of(annotation)
        assert any(
            all(f"`{word}`" in allowed for word in words) for allowed in rows.get(name, [])
        ), name


def test_the_page_of_data_formats_has_every_format_and_column() -> None:
    page = (ROOT / "docs/data-formats.md").read_text()
    for word in get_args(DataFormat):
        assert f"### `{word}`" in page or word == "auto"
    for name in DataSpec.model_fields:
        elsewhere = (
            name in ("dataset_revision", "dataset_config_name", "system_prompt", "fold")
            or "template" in name
        )
        assert f"data.{name}" in page or elsewhere, name
    for suffix in DATA_SUFFIXES:
        assert f"`.{suffix.split('.')[1]}`" in page, suffix


def test_the_rows_of_the_page_are_what_it_calls_them(tmp_path: Path) -> None:
    page = (ROOT / "docs/data-formats.md").read_text()
    shown = re.findall(r"### `(\w+)`\n.*?```json\n(.*?)\n```", page, re.DOTALL)
    assert [name for name, _ in shown] == [word for word in get_args(DataFormat) if word != "auto"]
    for name, row in shown:
        task = "classification" if name == "text_label" else "generation"
        job = (
            f"name: x\ntask: {task}\nmodel: {{model_name_or_path: asset:minilm-l6}}\ndata: "
            "{train_file: x.jsonl}\n"
        )
        record = json.loads(row)
        loaded = load_text(job, tmp_path / "job.yaml").job
        assert detect_row_format(record, loaded) == name
        assert convert_record(record, name, loaded.data, Counter())


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_job_loads() -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    assert load_text(block[1], Path("job.yaml")).notes == ()
    assert set(yaml.safe_load(block[1])) == set(
        yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())
    ) - {"method"}


def test_every_command_of_the_readme_exists() -> None:
    from lorafleet.commands.cli import build_app

    commands = {command.name for command in build_app().registered_commands}
    blocks = "\n".join(
        re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    )
    used = set(re.findall(r"^lorafleet ([a-z]+)", blocks, re.MULTILINE))
    assert used
    assert used <= commands


def test_the_changelog_begins_with_what_is_next_or_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = re.search(r"(?m)^## (.+)$", (ROOT / "CHANGELOG.md").read_text())
    assert first is not None
    assert first[1] == "Unreleased" or first[1].startswith(version)


def test_docstrings_name_the_arguments_that_there_are() -> None:
    wrong = []
    for path in sorted(ROOT.glob("[a-z]*/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            _, _, section = (ast.get_docstring(node) or "").partition("\nArgs:\n")
            section = re.split(r"\n\S", section)[0]
            named = set(re.findall(r"(?m)^    (\w+):", section))
            arguments = {
                argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)
            }
            wrong += [f"{path}:{node.lineno}: {name}" for name in named - arguments]
    assert wrong == []


def test_messages_that_are_quoted_are_messages() -> None:
    """Each fixed part of a quoted message is made of a few texts of the sources."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = [
        line for block in re.findall(r"```text\n([\s\S]*?)```", page) for line in block.splitlines()
    ]
    assert len(quotes) > 50
    texts = "\1".join(_texts_of_the_sources())
    unknown = []
    for quote in quotes:
        for part in re.split(r"<[^<>]*>", quote):
            piece = part.strip().strip(":'\"").strip()
            if len(re.sub(r"\W", "", piece)) >= 3 and _count_pieces(piece, texts) > 4:
                unknown.append((quote, piece))
    assert unknown == []


def _texts_of_the_sources() -> Iterator[str]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(value.value) if isinstance(value, ast.Constant) else "\0"
                        for value in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def _count_pieces(text: str, texts: str) -> int:
    """Into how many pieces a text falls, each the longest beginning that is in `texts`."""
    count = 0
    while text:
        end = next(end for end in range(len(text), -1, -1) if text[:end] in texts)
        text = text[max(1, end) :]
        count += 1
    return count
