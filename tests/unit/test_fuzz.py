"""Whatever stands in a file or on the command line: it is accepted, or refused in plain sentences,
and soon.

A few examples of each kind in every run of the tests, 2,000 in `make test-all`.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, lorafleet_here, write_rows
from tests.unit.evaluation.report.test_format import steers

STRANGE_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\x00",
        "\x1b[2J",
        "\ud800",
        "\u202e",
        "a" * 5000,
        "{{ 1 / 0 }}",
        "{% for %}",
        "$(touch x)",
        "`id`",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/null/x",
        "~nobody/x",
        "\\",
        "'",
        '"',
        "null",
        "no",
        "1:00:00",
        "1e999",
        "2*lora_r",
        "lora.lora_r",
        "asset:nothing",
        "asset:minilm-l6",
        "org/name",
        "=",
        ".",
        "..",
        "-1",
        "0x10",
        "é" * 300,
        "a\nb: c",
        "!!python/object:os.system",
        "&a [*a]",
        "${HOME}",
        "%s%n",
        "x" * 300 + ".jsonl",
        "con",
        "\N{BOM}x",
    ]
)
STRANGE_NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        10**400,
        1e308,
        -1e308,
        1e-320,
        0.1,
        float("inf"),
        float("nan"),
        True,
        False,
    ]
)
SCALARS = (
    st.none() | STRANGE_TEXTS | STRANGE_NUMBERS | st.text(max_size=20) | st.integers() | st.floats()
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(STRANGE_TEXTS | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def checked(*words: str | Path, cwd: Path, codes: tuple[int, ...] = (0, 2, 3)) -> None:
    """Run a command: no fault of ours, no wall of text, not long, not much memory."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = lorafleet_here(*words, cwd=cwd)
    said = done.stdout + done.stderr
    assert done.returncode in codes, said[-2000:]
    for word in (
        "Traceback",
        "bug in lorafleet",
        "validation error",
        "Input should be",
        "errors.pydantic.dev",
    ):
        assert word not in said, said[-2000:]
    if done.returncode == 2:
        lines = done.stderr.splitlines()
        assert lines
        assert max(map(len, lines)) < 1400, max(lines, key=len)
        assert not any(map(steers, lines))
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a tree."""
    found = [path] if path else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += places(value, (*path, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            found += places(value, (*path, number))
    return found


def changed(data: st.DataObject, tree: Any) -> Any:
    """A tree with values put into other places, added and taken away."""
    tree = json.loads(json.dumps(tree))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(tree)))
        block = tree
        for part in path[:-1]:
            block = block[part]
        what = data.draw(st.sampled_from(["replace", "add", "remove", "nest"]))
        if what == "replace":
            block[path[-1]] = data.draw(TREES)
        elif what == "nest":
            block[path[-1]] = {"x": block[path[-1]]}
        elif what == "remove":
            del block[path[-1]]
        elif isinstance(block, dict):
            block[data.draw(STRANGE_TEXTS | st.sampled_from(["task", "search", "linked", "x"]))] = (
                data.draw(TREES)
            )
        if not places(tree):
            return tree
    return tree


def dumped(tree: Any) -> bytes:
    """YAML of a tree; what YAML has no form for as JSON."""
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return json.dumps(tree).encode()


JUNK = st.sampled_from(
    [b"\xff", b"\x00", b"\t", b"{", b"]", b"&a ", b"*a", b"!!x ", b"- ", b": ", b"'", b"\n  "]
)


def spoilt(data: st.DataObject, raw: bytes) -> bytes:
    """The same with bytes flipped, cut or put in."""
    for _ in range(data.draw(st.integers(0, 2))):
        at, length = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 12))
        junk = st.sampled_from(
            [
                b"\xff",
                b"\x00",
                b"\t",
                b"{",
                b"]",
                b"&a ",
                b"*a",
                b"!!x ",
                b"- ",
                b": ",
                b"'",
                b"\n  ",
            ]
        )
        raw = raw[:at] + data.draw(st.binary(max_size=6) | junk) + raw[at + length :]
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    rows = [
        {"text": f"a {n}", "label": "ab"[n % 2], "prompt": f"p {n}", "completion": f"c {n}"}
        for n in range(12)
    ]
    write_rows(made / "rows.jsonl", rows)
    return made


def job_tree(name: str, folder: Path, model: Path) -> Any:
    tree = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    tree["model"]["model_name_or_path"] = str(model)
    tree["data"] = {"train_file": str(folder / "rows.jsonl")}
    return tree


def _job_files(data: st.DataObject, folder: Path, model: Path) -> None:
    name = data.draw(
        st.sampled_from(
            ["quickstart", "full", "my-data", "qlora", "prompt-tuning", "zero3", "two-nodes"]
        )
    )
    (folder / "job.yaml").write_bytes(
        spoilt(data, dumped(changed(data, job_tree(name, folder, model))))
    )
    checked(data.draw(st.sampled_from(["validate", "plan", "render"])), "job.yaml", cwd=folder)


def _overrides(data: st.DataObject, folder: Path, model: Path) -> None:
    (folder / "fixed.yaml").write_bytes(dumped(job_tree("quickstart", folder, model)))
    from lorafleet.jobs.schema import field_paths as fields

    keys = st.sampled_from(sorted(fields.get_leaf_fields())) | STRANGE_TEXTS | st.text(max_size=12)
    values = TREES.map(json.dumps) | STRANGE_TEXTS | st.text(max_size=12)
    words = data.draw(st.lists(st.tuples(keys, values).map("=".join), min_size=1, max_size=3))
    words = [
        word.encode("utf-8", "replace").decode().replace("\0", "?") for word in words
    ]  # no shell passes others on
    checked("plan", "fixed.yaml", *[word for word in words if not word.startswith("-")], cwd=folder)


def _site_files(data: st.DataObject, folder: Path, model: Path) -> None:
    paths = sorted((ROOT / "examples" / "sites").glob("*.yaml"))
    tree = yaml.safe_load(data.draw(st.sampled_from(paths)).read_text())
    (folder / "site.yaml").write_bytes(spoilt(data, dumped(changed(data, tree))))
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.site_file import load_site

    try:
        load_site(str(folder / "site.yaml"))
    except UserError as error:
        assert "Input should be" not in str(error)
        assert len(str(error)) < 20_000


def _imports(data: st.DataObject, folder: Path, model: Path) -> None:
    tool = data.draw(st.sampled_from(sorted(IMPORTED)))
    (folder / "foreign.yaml").write_bytes(spoilt(data, dumped(changed(data, IMPORTED[tool]))))
    checked("import", "foreign.yaml", "--from", tool, "--output", folder / "made.yaml", cwd=folder)
    (folder / "made.yaml").unlink(missing_ok=True)


IMPORTED: dict[str, Any] = yaml.safe_load("""
axolotl: {base_model: org/name, datasets: [{path: rows.jsonl, type: alpaca}], adapter: lora, lora_r: 8, bf16: auto,
  lora_alpha: 16, lora_target_modules: [q_proj], sequence_len: 128, micro_batch_size: 2, gradient_accumulation_steps: 1,
  num_epochs: 1, learning_rate: 0.0001, val_set_size: 0.1}
llama-factory: {model_name_or_path: org/name, stage: sft, finetuning_type: lora, dataset: rows, template: llama3,
  lora_rank: 8, lora_target: all, cutoff_len: 128, per_device_train_batch_size: 1, learning_rate: 0.0001, bf16: true,
  num_train_epochs: 3.0, lr_scheduler_type: cosine, warmup_ratio: 0.1}
trl: {model_name_or_path: org/name, dataset_name: org/data, use_peft: true, lora_r: 8, lora_alpha: 16, packing: false,
  learning_rate: 0.0001, per_device_train_batch_size: 2, max_length: 128, num_train_epochs: 1}
""")


def _data_files(data: st.DataObject, folder: Path, model: Path) -> None:
    from lorafleet.jobs.data.data_files import DATA_SUFFIXES, read_records
    from lorafleet.jobs.errors import DataError

    rows = data.draw(st.lists(st.dictionaries(STRANGE_TEXTS, TREES, max_size=3), max_size=3))
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = "\n".join(",".join(str(value) for value in row.values()) for row in rows).encode(
        "utf-8", "surrogatepass"
    )
    raw = spoilt(
        data, data.draw(st.sampled_from([lines, table, json.dumps(rows).encode(), b"PAR1"]))
    )
    path = folder / f"fuzz{data.draw(st.sampled_from(DATA_SUFFIXES))}"
    path.write_bytes(raw)
    try:
        for _, record in read_records(path):
            assert isinstance(record, dict | str)
    except DataError as error:
        assert len(str(error)) < 5000
    path.unlink()


def _rows_of_a_job(data: st.DataObject, folder: Path, model: Path) -> None:
    """Rows of all known shapes with strange values in them, as `data` and `validate` read them."""
    from lorafleet.jobs.data.rows import load_rows
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.job_file import load_text

    shapes = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a", "completion": "b"},
        {"text": "a", "label": "x"},
    ]
    shape = data.draw(st.sampled_from(shapes))
    rows = [shape, *(changed(data, shape) for _ in range(3)), shape]
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "classification" if "label" in shape else "generation"
    text = (
        f"name: x\ntask: {task}\nmodel: {{model_name_or_path: {model}}}\ndata: {{train_file: "
        f"{folder}/odd.jsonl}}\n"
    )
    try:
        load_rows(load_text(text, folder / "job.yaml", ()).job)
    except UserError as error:
        assert max(map(len, str(error).splitlines())) < 1400


KINDS = {
    "job files": _job_files,
    "overrides": _overrides,
    "site files": _site_files,
    "imports": _imports,
    "data files": _data_files,
    "rows": _rows_of_a_job,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [12, pytest.param(2000, marks=pytest.mark.long)])
def test_strange_input(kind: str, examples: int, folder: Path, tiny_bert: Path) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        phases=(
            Phase.explicit,
            Phase.reuse,
            Phase.generate,
        ),  # an example is found sooner than it is made small
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    @given(data=st.data())
    def tried(data: st.DataObject) -> None:
        KINDS[kind](data, folder, tiny_bert)

    tried()
