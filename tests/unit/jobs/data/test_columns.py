"""Large files are read in columns, and mean the same as record by record: rows, lines, labels,
errors, splits.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.jobs.data import columns
from lorafleet.jobs.data.columns import ColumnRows
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.row_lists import PackedRows, RowPacker
from lorafleet.jobs.data.rows import Rows, load_rows
from lorafleet.jobs.data.splits import split_held_out
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.loading.job_file import load_text
from tests.conftest import ROOT
from tests.unit.test_fuzz import STRANGE_TEXTS


@pytest.fixture(autouse=True)
def _small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_MIN_BYTES", 0)


def both_ways(
    folder: Path, name: str, rows: list[Any] | bytes, task: str, more: str = ""
) -> tuple[Any, Any, bool]:
    """What a file is read as in columns and record by record, (rows or the error), and whether
    columns were used.
    """
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        assert not isinstance(rows, bytes)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(
            rows
            if isinstance(rows, bytes)
            else "".join(json.dumps(row) + "\n" for row in rows).encode()
        )
    job = load_text(
        f"name: x\ntask: {task}\nmodel: {{model_name_or_path: asset:minilm-l6}}\n"
        f"data: {{train_file: {path}, {more}}}\n",
        folder / "job.yaml",
        (),
    ).job

    def read() -> Any:
        try:
            return load_rows(job)
        except DataError as error:
            return str(error)

    fast = read()
    used = isinstance(fast, Rows) and isinstance(fast.train, ColumnRows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_MIN_BYTES", 2**60)
        return fast, read(), used


def check_same(fast: Any, slow: Any) -> None:
    if isinstance(slow, str) or isinstance(fast, str):
        assert fast == slow
        return
    for name in ("train", "validation", "test"):
        one, other = list(getattr(fast, name)), list(getattr(slow, name))
        assert one == other
        assert [row.line for row in one] == [row.line for row in other]
    assert (fast.labels, fast.warnings, fast.chosen_on_test, fast.format, fast.sha256) == (
        slow.labels,
        slow.warnings,
        slow.chosen_on_test,
        slow.format,
        slow.sha256,
    )


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"text": f"text {draw.randrange(count * 3)}", "label": draw.choice(["b", "a", "c"])}
        for _ in range(count)
    ]


ODD: dict[str, list[Any] | bytes] = {
    "plain": texts(200),
    "whole numbers": [row | {"label": "abc".index(row["label"])} for row in texts(100)],
    "with more columns": [
        row | {"id": n, "note": None if n % 3 else "x"} for n, row in enumerate(texts(100))
    ],
    "labels with blanks": [row | {"label": f" {row['label']} "} for row in texts(100)],
    "labels like dates": [
        row | {"label": f"2020-01-0{n % 3 + 1}"} for n, row in enumerate(texts(100))
    ],
    "texts like dates": [
        row | {"text": f"2020-01-0{n % 9 + 1}T00:00:00"} for n, row in enumerate(texts(100))
    ],
    "mixed labels": [row | {"label": n % 2 if n % 5 else "a"} for n, row in enumerate(texts(100))],
    "truths": [row | {"label": n % 2 == 0} for n, row in enumerate(texts(100))],
    "a blank line": b"".join(json.dumps(row).encode() + b"\n\n" for row in texts(60)),
    "windows": b"".join(json.dumps(row).encode() + b"\r\n" for row in texts(60)),
    "no end": b"\n".join(json.dumps(row).encode() for row in texts(60)),
    "a mark": b"\xef\xbb\xbf" + b"".join(json.dumps(row).encode() + b"\n" for row in texts(60)),
    "an empty text": [*texts(50), {"text": "", "label": "a"}],
    "a blank text": [*texts(50), {"text": "\u00a0\u2003 \x1c", "label": "a"}],
    "a missing label": [*texts(50), {"text": "x"}],
    "a null": [*texts(50), {"text": None, "label": "a"}],
    "a number": [*texts(50), {"text": 7, "label": "a"}],
    "a list": [*texts(50), [1]],
    "half a character": [*texts(50), {"text": "\ud800", "label": "a"}],
    "no utf-8": b'{"text": "a\xff", "label": "a"}\n' * 3,
    "a key twice": b'{"text": "a", "text": "b", "label": "a"}\n' * 3,
    "no json": b'{"text": "a", "label": "a"}\n{"text": \n',
    "a tower": [*texts(50), {"text": "x", "label": "a", "deep": [[[{"a": [1]}]]]}],
    "a later column": [*texts(3000), {"text": "x", "label": "a", "new": 1}],
    "one class": [row | {"label": "a"} for row in texts(50)],
    "every text twice": texts(30) * 2,
}


@pytest.mark.parametrize("kind", ODD)
def test_classes_are_read_alike(kind: str, tmp_path: Path) -> None:
    fast, slow, used = both_ways(tmp_path, "rows.jsonl", ODD[kind], "classification")
    check_same(fast, slow)
    if kind in (
        "plain",
        "whole numbers",
        "with more columns",
        "labels with blanks",
        "every text twice",
        "no end",
    ):
        assert used


TABLES: dict[str, str] = {
    "plain": "text,label\n" + "".join(f"words {n},{'ab'[n % 2]}\n" for n in range(80)),
    "quoted": "text,label\n" + "".join(f'"words, ""{n}""",{"ab"[n % 2]}\n' for n in range(80)),
    "lines": "text,label,id\n"
    + "".join(f'"words\n{"x" * (n % 3)}\r\n{n}",{"ab"[n % 2]},\n' for n in range(80)),
    "windows": "text,label\r\n" + "".join(f"words {n},{'ab'[n % 2]}\r\n" for n in range(80)),
    "blank lines": "text,label\n" + "".join(f"words {n},{'ab'[n % 2]}\n\n" for n in range(80)),
    "semicolons": "text;label\n" + "".join(f"words, {n};{'ab'[n % 2]}\n" for n in range(80)),
    "a mark": "\ufefftext,label\n" + "".join(f"wörds {n},{'ab'[n % 2]}\n" for n in range(80)),
    "a long row": "text,label\n"
    + "".join(f"words {n},{'ab'[n % 2]}{',' * (n == 40)}\n" for n in range(80)),
    "a short row": "text,label\n"
    + "".join(f"words {n}{',ab'[: 2 * (n != 40)]}\n" for n in range(80)),
    "another column": "text,label,id\n"
    + "".join(f"words {n},{'ab'[n % 2]},{n or ''}\n" for n in range(80)),
    "an empty text": "text,label\n"
    + "".join(f"{'words' if n else ''},{'ab'[n % 2]}\n" for n in range(80)),
    "an open quote": "text,label\n"
    + "".join(f"words {n},{'ab'[n % 2]}\n" for n in range(80))
    + '"x,a\n',
    "twice a column": "text,text\na,b\n",
    "nothing": "",
    "a header": "text,label\n",
}


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_read_alike(kind: str, ending: str, tmp_path: Path) -> None:
    text = TABLES[kind].replace(",", "\t") if ending == "tsv" else TABLES[kind]
    fast, slow, used = both_ways(tmp_path, f"rows.{ending}", text.encode(), "classification")
    check_same(fast, slow)
    if kind in ("plain", "windows", "another column", "a mark") or (
        kind in ("quoted", "lines") and ending == "csv"
    ):
        assert used


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_other_encodings_are_read_alike(encoding: str, ending: str, tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f"wörds {n},{'ab'[n % 2]}\n" for n in range(80))
    if ending == "jsonl":
        text = "".join(
            json.dumps({"text": f"wörds {n}", "label": "ab"[n % 2]}, ensure_ascii=False) + "\n"
            for n in range(80)
        )
    if ending == "tsv":
        text = text.replace(",", "\t")
    fast, slow, _ = both_ways(tmp_path, f"rows.{ending}", text.encode(encoding), "classification")
    check_same(fast, slow)
    assert ("not UTF-8 text" in str(fast)) == (encoding == "latin-1")


def bomb(kind: str, path: Path) -> None:
    """A small Parquet file that holds very much."""
    import pyarrow
    from pyarrow import parquet

    if kind == "rows":
        schema = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.string())])
        block = pyarrow.Table.from_pydict(
            {"text": ["a"] * 1_000_000, "label": ["b"] * 1_000_000}, schema=schema
        )
        with parquet.ParquetWriter(path, schema) as writer:
            for _ in range(30):
                writer.write_table(block)
        return
    numbers = pyarrow.array([0] * 200_000, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["x" * 300_000]))
    table = pyarrow.Table.from_arrays([texts, numbers], names=["text", "label"])
    schema = table.schema if kind == "dictionary" else None
    parquet.write_table(table.replace_schema_metadata(None), path, store_schema=schema is not None)


@pytest.mark.parametrize("kind", ["rows", "dictionary", "plain"])
def test_a_parquet_file_cannot_fill_the_memory(kind: str, tmp_path: Path) -> None:
    bomb(kind, tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").stat().st_size < 2_000_000
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "from pathlib import Path; from lorafleet.jobs.data.data_files import read_records\n"
        "from lorafleet.jobs.errors import DataError\n"
        f"try: print(sum(1 for _ in read_records(Path({str(tmp_path / 'b.parquet')!r}))))\n"
        "except DataError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "unpacks to more than 200 times its size" in done.stdout, done.stderr
    assert int(done.stdout.split()[-1]) < 1_000_000, "kilobytes"


@pytest.mark.parametrize(
    "kind", ["plain", "whole numbers", "with more columns", "truths", "a null", "mixed"]
)
def test_parquet_is_read_alike(kind: str, tmp_path: Path) -> None:
    rows = ODD.get(kind, texts(50))
    assert isinstance(rows, list)
    fast, slow, _ = both_ways(tmp_path, "rows.parquet", rows, "classification")
    check_same(fast, slow)


ANSWERS: dict[str, list[Any]] = {
    "plain": [{"prompt": f"ask {n % 40}", "completion": f"say {n}"} for n in range(120)],
    "with columns": [
        {"prompt": f"a {n}", "completion": "b", "id": n, "source": "x"} for n in range(60)
    ],
    "with a system": [
        {"prompt": f"a {n}", "completion": "b", "system": "be brief"} for n in range(60)
    ],
    "with an empty system": [
        {"prompt": f"a {n}", "completion": "b", "system": None} for n in range(60)
    ],
    "with history": [
        {"prompt": f"a {n}", "completion": "b", "history": [["q", "r"]]} for n in range(60)
    ],
    "with tools": [{"prompt": f"a {n}", "completion": "b", "tools": "[]"} for n in range(60)],
    "with weights": [{"prompt": f"a {n}", "completion": "b", "weight": 1} for n in range(60)],
    "with thinking": [
        {"prompt": f"a {n}", "completion": "b", "enable_thinking": True} for n in range(60)
    ],
    "with zero weights": [{"prompt": f"a {n}", "completion": "b", "weight": 0} for n in range(60)],
    "with images": [{"prompt": f"a {n}", "completion": "b", "image": "x.png"} for n in range(60)],
    "lists as texts": [{"prompt": '[{"role": "user", "content": "a"}]', "completion": "b"}] * 30,
    "brackets": [{"prompt": f"[{n}] what", "completion": "[1, 2]"} for n in range(60)],
    "conversational": [
        {
            "prompt": [{"role": "user", "content": f"a {n}"}],
            "completion": [{"role": "assistant", "content": "b"}],
        }
        for n in range(60)
    ],
    "an empty answer": [{"prompt": f"a {n}", "completion": "b" if n else ""} for n in range(60)],
    "texts alone": [{"text": f"a long text {n}"} for n in range(60)],
    "messages": [
        {"messages": [{"role": "user", "content": f"a {n}"}, {"role": "assistant", "content": "b"}]}
        for n in range(60)
    ],
}


@pytest.mark.parametrize("more", ["", "system_prompt: be kind"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_are_read_alike(kind: str, more: str, tmp_path: Path) -> None:
    fast, slow, used = both_ways(tmp_path, "rows.jsonl", ANSWERS[kind], "generation", more)
    check_same(fast, slow)
    if kind in ("plain", "with columns", "with an empty system", "texts alone"):
        assert used
    if kind in ("messages", "conversational", "with a system"):
        assert isinstance(fast.train, PackedRows)


ANY_ROW = st.fixed_dictionaries(
    {"text": STRANGE_TEXTS | st.text(max_size=6), "label": st.sampled_from("abc")},
    optional={"x": STRANGE_TEXTS, "y": st.integers()},
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_ROW, min_size=4, max_size=12))
def test_any_texts_are_read_alike(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_MIN_BYTES", 0)
        fast, slow, _ = both_ways(
            tmp_path_factory.mktemp("any"), "rows.jsonl", rows, "classification"
        )
    check_same(fast, slow)


def test_a_part_of_columns_is_a_list_of_rows(tmp_path: Path) -> None:
    fast, _, used = both_ways(tmp_path, "rows.jsonl", texts(300), "classification")
    assert used
    rows = fast.train
    listed = list(rows)
    assert (rows[0], rows[-1], rows[3:7], rows[::50]) == (
        listed[0],
        listed[-1],
        listed[3:7],
        listed[::50],
    )
    for share in (0.1, 0.5):
        one, other = split_held_out(rows, share, 3, "x"), split_held_out(listed, share, 3, "x")
        assert [list(part) for part in one] == [list(part) for part in other]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_packed_rows_keep_every_field() -> None:
    """Field by field, those that do not count as a difference too."""
    message = Message("assistant", "é\U0001f600", "thought", "[]", "n", "id", False)
    rows = [
        Row(text="a", label="x", line=7),
        Row(messages=(Message("user", ""), message), tools="[1]", line=2**40, answer="b"),
        Row(messages=(message,), answer=None),
    ]
    packer = RowPacker()
    for row in rows:
        packer.append(row)
    packed = packer.build_rows()
    assert [vars(row) for row in packed] == [vars(row) for row in rows]
    assert [row.question for row in packed] == [row.question for row in rows]
    assert RowPacker().build_rows() == []
