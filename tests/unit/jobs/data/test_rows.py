"""The user's rows: read, checked, named by file and line."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.row_lists import RowPacker
from lorafleet.jobs.data.rows import Rows, load_rows
from lorafleet.jobs.data.splits import sample_rows, split_held_out
from lorafleet.jobs.errors import DataError, JobFileError
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.schema.job import JobSpec
from tests.conftest import write_rows

GOOD_LINE = '{"text": "fine", "label": "a"}\n{"text": "bad", "label": "b"}\n'
# name -> (file name, bytes, the sentence)
BAD_DATA: dict[str, tuple[str, bytes, str]] = {
    "not-json": ("x.jsonl", (GOOD_LINE + "{nope}\n").encode(), "x.jsonl:3: not JSON"),
    "a-list-row": ("x.jsonl", b"[1, 2]\n", "x.jsonl:1: a row must be a JSON object"),
    "no-label": ("x.jsonl", b'{"text": "a"}\n', "x.jsonl:1: no column 'label' (the row has: text)"),
    "empty-text": (
        "x.jsonl",
        (GOOD_LINE + '{"text": " ", "label": "a"}').encode(),
        "x.jsonl:3: text is empty",
    ),
    "number-text": (
        "x.jsonl",
        b'{"text": 3, "label": "a"}\n',
        "x.jsonl:1: text is 3, but must be a text",
    ),
    "null-label": (
        "x.jsonl",
        b'{"text": "a", "label": null}\n',
        "x.jsonl:1: label is null, but must be a text or",
    ),
    "float-label": (
        "x.jsonl",
        b'{"text": "a", "label": 0.5}\n',
        "x.jsonl:1: label is 0.5, but must be",
    ),
    "empty-file": ("x.jsonl", b"", "has no rows"),
    "one-class": (
        "x.jsonl",
        b'{"text": "a", "label": "p"}\n' * 9,
        "every training row has the label 'p'",
    ),
    "latin-1": (
        "x.jsonl",
        GOOD_LINE.encode() + b'{"text": "caf\xe9", "label": "a"}\n',
        "x.jsonl:3: not UTF-8 text",
    ),
    "wide-csv": (
        "x.csv",
        b"text,label\na,b\nc,d,e\n",
        "x.csv:3: has more columns than the header (2)",
    ),
    "no-such-column": (
        "x.csv",
        b"sentence,label\na,b\n",
        "no column 'text' (the row has: sentence, label)",
    ),
    "json-not-a-list": ("x.json", b'{"text": "a"}', "must contain a JSON list of rows"),
    "wrong-ending": ("x.xml", b"<a/>", "must end in one of .jsonl, .ndjson, .json, .csv"),
    "not-parquet": ("x.parquet", b"hello", "is not a Parquet file"),
    "open-quote": ("x.csv", b'text,label\na,b\n"never closed,c\nd,e\n', "x.csv:3: not CSV"),
    "wide-tsv": (
        "x.tsv",
        b"text\tlabel\na\tb\tc\n",
        "x.tsv:2: has more columns than the header (2)",
    ),
    "narrow-tsv": ("x.tsv", b"text\tlabel\na\n", "x.tsv:2: label is null"),
    "tsv-header-twice": (
        "x.tsv",
        b"text\ttext\na\tb\n",
        "the column 'text' occurs twice in the header",
    ),
    "not-gzip": ("x.jsonl.gz", GOOD_LINE.encode(), "x.jsonl.gz cannot be read: Not a gzipped file"),
    "cut-gzip": ("x.csv.gz", gzip.compress(b"text,label\na,b\n")[:-9], "x.csv.gz cannot be read"),
    "not-zstd": ("x.jsonl.zst", GOOD_LINE.encode(), "x.jsonl.zst cannot be read"),
    "utf-16-without-mark": (
        "x.csv",
        "text,label\na,b\n".encode("utf-16-le"),
        "if it is UTF-16 text, convert it",
    ),
    "half-of-utf-16": (
        "x.csv",
        "text,label\na,b\n".encode("utf-16")[:-1],
        "starts with a UTF-16 mark, but is not valid UTF-16",
    ),
    "header-twice": (
        "x.csv",
        b"text,label,text\na,b,c\n",
        "the column 'text' occurs twice in the header",
    ),
    "half-a-character": (
        "x.jsonl",
        b'{"text": "\\ud83d", "label": "a"}\n',
        "x.jsonl:1: text contains half a character",
    ),
    "blank-label": ("x.jsonl", b'{"text": "a", "label": "  "}\n', "x.jsonl:1: label is"),
    "deep-json": ("x.jsonl", b"[" * 100_000, "x.jsonl:1: not JSON"),
    "deep-list": ("x.json", b"[" * 100_000, "the JSON cannot be read (RecursionError)"),
    "endless-number": (
        "x.json",
        b"[" + b"1" * 5000 + b"]",
        "the JSON cannot be read (ValueError)",
    ),
    "half-a-label": (
        "x.jsonl",
        b'{"text": "a", "label": "\\ud83d"}\n',
        "x.jsonl:1: label contains half a character",
    ),
}


def job_for(path: Path, task: str = "classification", **data: object) -> JobSpec:
    block = json.dumps({"train_file": str(path), **data}, default=str)
    text = f"name: x\ntask: {task}\nmodel: {{model_name_or_path: asset:minilm-l6}}\ndata: {block}\n"
    return load_text(text, path.parent / "job.yaml").job


def rows_of(path: Path, task: str = "classification", **data: object) -> Rows:
    return load_rows(job_for(path, task, **data))


@pytest.mark.parametrize("name", BAD_DATA)
def test_every_bad_data_file_gets_its_sentence(name: str, tmp_path: Path) -> None:
    file, content, sentence = BAD_DATA[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / file)
    assert sentence in str(caught.value)


def test_ten_bad_rows_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "", "label": "a"}\n' * 25)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 15 more"


def numbered(count: int, labels: str = "ab") -> list[dict[str, str]]:
    return [
        {"text": f"row {index}", "label": labels[index % len(labels)]} for index in range(count)
    ]


def write_records(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows in the format that a path's ending names."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return write_rows(path, rows)
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        comma = "," if suffix == ".csv" else "\t"
        path.write_text(
            "".join(
                comma.join(row) + "\n" for row in [("text", "label"), *(r.values() for r in rows)]
            )
        )
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "json", "parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    rows = numbered(20)
    path = write_records(tmp_path / f"x.{suffix}", rows)
    found = rows_of(path, validation_fraction=0.4)
    everything = [*found.train, *found.validation, *found.test]
    assert sorted(row.text for row in everything) == sorted(row["text"] for row in rows)
    assert found.labels == ("a", "b")


@pytest.mark.parametrize(
    ("sign", "named"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")]
)
def test_another_delimiter_is_found_and_said(sign: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        f"text{sign}label\n"
        + "".join(f'"row {i}{sign} ""x"", y"{sign}{"ab"[i % 2]}\n' for i in range(30))
    )
    rows = rows_of(path)
    everything = [*rows.train, *rows.validation, *rows.test]
    assert {row.text for row in everything} == {f'row {index}{sign} "x", y' for index in range(30)}
    assert f"x.csv: columns are separated by {named}" in rows.warnings


def test_a_comma_in_the_header_decides(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        "text,label,a;b\n" + "".join(f"row; {index},{'ab'[index % 2]},\n" for index in range(30))
    )
    rows = rows_of(path)
    assert {row.text for row in rows.train} <= {f"row; {index}" for index in range(30)}
    assert not any("separated" in warning for warning in rows.warnings)


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    texts = [f"row {index}" for index in range(30)]
    texts[5], texts[9], texts[11], texts[20] = (
        '"It works for me',
        'he said ok"',
        'they called it "good"',
        '"whole"',
    )
    path.write_text(
        "text\tlabel\r\n" + "".join(f"{text}\t{'ab'[i % 2]}\r\n" for i, text in enumerate(texts))
    )
    rows = rows_of(path, validation_fraction=0.4)
    found = sorted([*rows.train, *rows.validation, *rows.test], key=lambda row: row.line)
    assert [row.text for row in found] == texts
    assert [row.line for row in found] == list(range(2, 32))
    assert [row.label for row in found] == ["ab"[index % 2] for index in range(30)]
    quoted = [warning for warning in rows.warnings if "in quotes" in warning]
    assert quoted == [
        "x.tsv: 1 row with a cell in quotes, which count as part of the text in .tsv; name the file .csv if the quotes are only quoting"
    ]


def test_rows_of_several_lines_are_said(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    lines = [f"row {index},{'ab'[index % 2]}\n" for index in range(30)]
    lines[3] = '"two\nlines",b\n'
    path.write_text("text,label\n\n" + "".join(lines))
    said = [warning for warning in rows_of(path).warnings if "x.csv" in warning]
    assert said == [
        "x.csv: 30 rows on 32 lines: cells in quotes may hold several lines (the first such row "
        "ends on line 7)"
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    text = (
        mark
        + "text,label\n"
        + "".join(f"caf\u00e9 {index},{'ab'[index % 2]}\n" for index in range(30))
    )
    path.write_bytes(text.encode(encoding))
    rows = rows_of(path)
    assert {row.text for row in rows.train} <= {f"caf\u00e9 {index}" for index in range(30)}


def test_an_index_column_is_named_as_not_used(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",text,label\n" + "".join(f"{i},row {i},{'ab'[i % 2]}\n" for i in range(30)))
    assert "not used: the column without a name (30 times)" in rows_of(path).warnings


@pytest.mark.parametrize(
    "suffix", ["jsonl.gz", "jsonl.zst", "csv.gz", "tsv.zst", "json.gz", "JSONL.GZ"]
)
def test_compressed_files_give_the_same_rows(suffix: str, tmp_path: Path) -> None:
    plain = tmp_path / f"x.{suffix.rpartition('.')[0]}"
    write_records(plain, numbered(30))
    packed = tmp_path / f"y.{suffix}"
    content = plain.read_bytes()
    if suffix.endswith("zst"):
        packed.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    else:
        packed.write_bytes(gzip.compress(content))
    assert rows_of(packed).train == rows_of(plain).train


def graded(count: int) -> list[dict[str, str]]:
    """Rows that several formats could read: an instruction, a pair and a text."""
    return [
        {
            "instruction": "Grade it.",
            "output": "5",
            "question": f"capital {i}?",
            "answer": f"city {i}",
            "text": f"t {i}",
        }
        | {"prompt": f"p {i}", "completion": f"c {i}"}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("columns", "question", "answer"),
    [
        ({}, "Grade it.", "5"),
        ({"prompt_column": "question", "completion_column": "answer"}, "capital 0?", "city 0"),
        ({"prompt_column": "question", "completion_column": "output"}, "capital 0?", "5"),
        ({"completion_column": "answer"}, "p 0", "city 0"),
        ({"prompt_column": "prompt"}, "p 0", "c 0"),
        ({"text_column": "text"}, "", "t 0"),
        ({"text_column": "answer"}, "", "city 0"),
        ({"format": "instruction"}, "Grade it.", "5"),
        ({"format": "instruction", "prompt_column": "prompt"}, "Grade it.", "5"),
    ],
)
def test_the_columns_that_are_named_are_learnt(
    columns: dict[str, str], question: str, answer: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "x.jsonl", graded(1))
    other = write_rows(tmp_path / "y.jsonl", graded(8))
    row = rows_of(path, "generation", validation_file=other, **columns).train[0]
    learnt = [message.content for message in row.messages] or ["", row.text]
    assert learnt == [question, answer]


@pytest.mark.parametrize(
    ("task", "columns", "sentence"),
    [
        (
            "generation",
            {"text_column": "a", "prompt_column": "b"},
            "data.text_column and data.prompt_column are set, but no row format of generation "
            "reads all of them",
        ),
        (
            "generation",
            {"label_column": "a"},
            "data.label_column is set, but no row format of generation reads it",
        ),
        (
            "generation",
            {"format": "messages", "prompt_column": "a"},
            "data.prompt_column is 'a', but the row format messages does not read it; it reads "
            "data.messages_column",
        ),
        (
            "generation",
            {"format": "instruction", "completion_column": "a"},
            "data.completion_column is 'a', but the row format instruction does not read it",
        ),
        (
            "generation",
            {"messages_column": "a", "text_column": "b"},
            "data.messages_column are set, but no row format",
        ),
        (
            "classification",
            {"prompt_column": "a"},
            "data.prompt_column is 'a', but the row format text_label does not read it; it reads "
            "data.text_column and",
        ),
        (
            "classification",
            {"messages_column": "a"},
            "data.messages_column is 'a', but the row format text_label does not read it",
        ),
    ],
)
def test_columns_that_are_not_read_are_refused(
    task: str, columns: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(JobFileError) as caught:
        job_for(tmp_path / "x.jsonl", task, **columns)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "values", "found"),
    [
        (["negative", "positive"], [0, 1], ["negative", "positive"]),
        (["negative", "positive"], ["0", "1"], ["negative", "positive"]),
        (["negative", "positive"], ["positive", "negative"], ["positive", "negative"]),
        ([0, 1], [0, 1], ["0", "1"]),
        ([1, 0], [0, 1], ["0", "1"]),
        (["2", "x"], ["2", "x"], ["2", "x"]),
    ],
)
def test_classes_that_are_numbers_have_names(
    labels: list[object], values: list[object], found: list[str], tmp_path: Path
) -> None:
    rows = [{"text": f"row {index}", "label": values[index % 2]} for index in range(8)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    read = rows_of(path, labels=labels, validation_file=path)
    assert read.labels == tuple(map(str, labels))
    assert [row.label for row in read.train[:2]] == found


def test_a_number_that_has_no_name_is_refused(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "x.jsonl", [{"text": f"row {index}", "label": index % 3} for index in range(9)]
    )
    with pytest.raises(DataError, match=r"x\.jsonl:3: the label '2' is not one of data.labels"):
        rows_of(path, labels=["negative", "positive"])


def test_what_is_not_given_is_held_back_and_no_row_is_on_two_sides(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", numbered(100) + numbered(100))  # every row stands twice
    found = rows_of(path, validation_fraction=0.2)
    sides = [{row.text for row in rows} for rows in (found.train, found.validation, found.test)]
    assert not sides[0] & sides[1]
    assert not sides[1] & sides[2]
    assert not sides[0] & sides[2]
    assert (len(found.train), len(found.validation), len(found.test)) == (160, 20, 20)
    assert any("more than once" in warning for warning in found.warnings)


def test_without_rows_to_hold_back_the_choice_is_called_optimistic(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", numbered(20))
    validation = write_rows(tmp_path / "v.jsonl", numbered(2))
    found = rows_of(train, validation_file=str(validation))
    assert found.chosen_on_test
    assert found.test == found.validation
    assert any("optimistic" in warning for warning in found.warnings)


def test_rows_of_one_text_are_not_all_held_back(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", numbered(20))
    validation = write_rows(tmp_path / "v.jsonl", [{"text": "the same", "label": "a"}] * 6)
    found = rows_of(train, validation_file=str(validation))
    assert (len(found.validation), found.chosen_on_test) == (6, True)


def test_a_folder_with_splits_is_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write_rows(tmp_path / "mine" / "train.jsonl", numbered(20))
    (tmp_path / "mine" / "test.csv").write_text("text,label\nx,a\ny,b\n")
    head = "name: x\ntask: classification\nmodel: {model_name_or_path: asset:minilm-l6}\n"
    for name in ("mine", "./mine"):
        job = load_text(f"{head}data: {{dataset_name: {name}}}\n", tmp_path / "job.yaml").job
        found = load_rows(job)
        assert (len(found.train) + len(found.validation), len(found.test)) == (20, 2)


def test_leaked_rows_are_reported(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", numbered(20))
    validation = write_rows(tmp_path / "v.jsonl", numbered(5))
    found = rows_of(train, validation_file=str(validation), test_file=str(train))
    assert (
        "5 of 5 validation rows are also among the training rows: results are optimistic"
        in found.warnings
    )


def test_labels_of_validation_must_be_known(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", numbered(20))
    validation = write_rows(tmp_path / "v.jsonl", numbered(6, "xyz"))
    with pytest.raises(DataError, match="labels that no training row has: x, y, z"):
        rows_of(train, validation_file=str(validation))


def test_whole_numbers_are_labels_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 12} for i in range(240)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(path).labels == tuple(map(str, range(12)))


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "p", "completion": "c"}, (("user", "p"), ("assistant", "c"))),
        ({"instruction": "i", "input": "x", "output": "o"}, (("user", "i\n\nx"), ("assistant", "o"))),
        ({"instruction": "i", "input": None, "output": "o"}, (("user", "i"), ("assistant", "o"))),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                       {"role": "assistant", "content": "a"}]}, (("system", "s"), ("user", "u"), ("assistant", "a"))),
    ],
)  # fmt: skip
def test_generation_formats_become_conversations(
    record: dict[str, object], messages: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "x.jsonl", [record] * 10 + [record])
    (tmp_path / "v.jsonl").write_text(path.read_text())
    found = rows_of(path, "generation", validation_file=str(tmp_path / "v.jsonl"))
    assert found.train[0].messages == tuple(Message(role, content) for role, content in messages)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages must be a list"),
        ([{"role": "robot", "content": "x"}], "role is 'robot', but must be one of"),
        (
            [{"role": "user", "content": "x"}],
            "the last of messages must be a non-empty message of the assistant",
        ),
        (
            [{"role": "assistant", "content": "x"}],
            "must have a message before the assistant's answer",
        ),
        (
            [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "x"}],
            "contains half a character",
        ),
        ([{"role": "assistant", "content": 3}], "with a text as content"),
    ],
)
def test_bad_conversations_are_named(messages: object, sentence: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=sentence):
        rows_of(path, "generation")


def test_digits_of_other_scripts_are_words(tmp_path: Path) -> None:
    assert rows_of(write_rows(tmp_path / "x.jsonl", numbered(60, "①②"))).labels == ("①", "②")


def test_line_separators_inside_a_field_are_part_of_it(tmp_path: Path) -> None:
    lines = [f'"a\x85b\u2028{index}",x' if index % 2 else f"c{index},y" for index in range(30)]
    (tmp_path / "x.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    assert (
        sum(
            len(rows)
            for rows in (rows_of(tmp_path / "x.csv").train, rows_of(tmp_path / "x.csv").validation)
        )
        >= 28
    )


def _asked(prompts: list[str], labels: list[str] | None = None) -> list[Row]:
    return [
        Row(text=prompt, label=(labels or ["x"] * len(prompts))[place])
        for place, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_split_of_a_classifier_is_scikit_learns(seed: int, share: float) -> None:
    from sklearn.model_selection import StratifiedShuffleSplit

    random = np.random.default_rng(seed)
    labels = [
        f"class {number}" for number in random.choice(5, size=203, p=[0.5, 0.3, 0.1, 0.06, 0.04])
    ]
    rows = _asked([f"text {place}" for place in range(len(labels))], labels)
    wanted = round(len(rows) * share)
    theirs = StratifiedShuffleSplit(
        1, test_size=wanted, train_size=len(rows) - wanted, random_state=seed
    )
    _, test = next(theirs.split(np.zeros(len(rows)), labels))
    held, left = split_held_out(rows, share, seed, "data.validation_fraction")
    assert {row.text for row in held} == {rows[place].text for place in test}
    assert len(held) + len(left) == len(rows)


@pytest.mark.parametrize("seed", range(4))
def test_the_split_of_texts_is_scikit_learns(seed: int) -> None:
    from sklearn.model_selection import ShuffleSplit

    rows = _asked([f"text {place}" for place in range(91)])
    _, test = next(ShuffleSplit(1, test_size=9, random_state=seed).split(rows))
    held, _ = split_held_out(rows, 0.1, seed, "data.validation_fraction")
    assert {row.text for row in held} == {rows[place].text for place in test}


@pytest.mark.parametrize("seed", range(20))
def test_a_large_group_of_equal_prompts_is_not_the_validation_set(seed: int) -> None:
    rows = _asked([f"text {place}" for place in range(500)] + ["Summarise:"] * 500)
    held, left = split_held_out(rows, 0.1, seed, "data.validation_fraction")
    assert len(held) == 100
    assert not {row.text for row in held} & {row.text for row in left}


def test_prompts_that_repeat_too_often_are_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say it:" if place % 2 else "Sing:", "completion": str(place)}
        for place in range(100)
    ]
    path = write_rows(tmp_path / "x.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"10 of 100 rows\), .* 50 of them have the prompt 'S\w+.*:': name a data.valid",
    ):
        rows_of(path, task="generation")


@pytest.mark.parametrize("most", [3, 10, 37, 100, 400])
def test_fewer_rows_have_the_classes_in_proportion(most: int) -> None:
    labels = ["a"] * 300 + ["b"] * 96 + ["rare"] * 4
    rows = _asked([f"text {place}" for place in range(400)], labels)
    packer = RowPacker()
    for row in rows:
        packer.append(row)
    found = [list(sample_rows(some, most, 7)) for some in (rows, packer.build_rows())]
    assert found[0] == found[1]
    counts = Counter(row.label for row in found[0])
    assert sum(counts.values()) == len(found[0]) == most
    assert set(counts) == {"a", "b", "rare"}
    assert abs(counts["a"] - 0.75 * most) <= 2
    order = [int(row.text.split()[1]) for row in found[0]]
    assert order == sorted(order)
    assert list(sample_rows(rows, most, 8)) != found[0] or most == 400
    assert list(sample_rows(rows, None, 7)) == rows


def test_test_rows_have_the_classes_in_proportion_though_one_is_rare() -> None:
    rows = _asked([f"text {place}" for place in range(101)], ["a"] * 80 + ["b"] * 20 + ["rare"])
    held, left = split_held_out(rows, 0.5, 3, "data.test_fraction", keep_classes=False)
    counts = Counter(row.label for row in held)
    assert (counts["rare"], counts["b"]) == (0, 10)
    assert "rare" in {row.label for row in left}
    singles = _asked([f"text {place}" for place in range(10)], [str(place) for place in range(10)])
    assert len(split_held_out(singles, 0.5, 3, "data.test_fraction", keep_classes=False)[0]) == 5


def test_a_class_of_one_row_stays_in_training() -> None:
    for seed in range(20):
        rows = _asked([f"text {place}" for place in range(21)], ["a"] * 10 + ["b"] * 10 + ["rare"])
        _, left = split_held_out(rows, 0.5, seed, "data.validation_fraction")
        assert "rare" in {row.label for row in left}


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=40),
    st.floats(0.02, 0.9),
    st.integers(0, 1000),
    st.integers(1, 4),
)
def test_what_is_held_back_is_near_the_share(
    sizes: list[int], share: float, seed: int, classes: int
) -> None:
    prompts = [f"p{group}" for group, size in enumerate(sizes) for _ in range(size)]
    labels = [f"c{int(prompt[1:]) % classes}" for prompt in prompts]
    rows = _asked(prompts, labels)
    try:
        held, left = split_held_out(rows, share, seed, "data.validation_fraction")
    except DataError as error:
        assert max(sizes) > 1 or len(rows) < 4
        said = (
            f"{max(sizes)} of them have the prompt"
            if max(sizes) > 1
            else "too few rows to hold back so many"
        )
        assert said in str(error)
        return
    target = max(1, round(len(rows) * share))
    assert target / 2 <= len(held) <= 2 * target
    assert left
    assert not {row.text for row in held} & {row.text for row in left}
    assert {row.label for row in left} == set(labels)


@pytest.mark.parametrize(("classes", "each"), [(150, 10), (100, 2), (50, 3), (10, 40)])
def test_many_classes_have_a_test_set(classes: int, each: int, tmp_path: Path) -> None:
    """Training rows need every class, a validation set of one row a class is halved all the same."""
    rows = [
        {"text": f"row {place}", "label": f"c{place % classes}"} for place in range(classes * each)
    ]
    found = rows_of(write_rows(tmp_path / "x.jsonl", rows))
    assert not found.chosen_on_test
    assert abs(len(found.test) - len(found.validation)) <= 1
    assert {row.label for row in found.train} == {row["label"] for row in rows}


def test_too_few_rows_of_many_classes_are_said_as_what_they_are(tmp_path: Path) -> None:
    rows = [{"text": f"row {place}", "label": f"c{place}"} for place in range(100)]
    with pytest.raises(
        DataError, match=r"too few rows to hold back so many .each of the 100 classes must keep one"
    ):
        rows_of(write_rows(tmp_path / "x.jsonl", rows))
