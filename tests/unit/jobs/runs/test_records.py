"""Damaged run folders: a file costs its own row and is named, and no command ends in a fault of
ours.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorafleet.evaluation.report.build import build_report
from lorafleet.jobs.runs.run import Run
from tests.conftest import lorafleet_here
from tests.unit.evaluation.report.test_search import finished  # noqa: F401 - a fixture

DAMAGES: dict[str, bytes | None] = {
    "gone": None,
    "empty": b"",
    "binary": b"\xff\xfe\x00\x01" * 20,
    "cut": b'{"state": "fin',
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "text": b'"x"',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "surrogate": b'{"state": "\\ud800"}',
    "huge number": b'{"index": 1e999, "step": 1e308, "created": 1e308}',
    "huge integer": b'{"index": ' + b"9" * 5000 + b"}",
    "no object": b'{"schema_version": 1}',
    "folder": b"FOLDER",
    "pipe": b"PIPE",
    "loop": b"LOOP",
}
FILES = (
    "status.json",
    "plan.json",
    "facts.json",
    "events.jsonl",
    "resolved.json",
    "job.yaml",
    "report/base.json",
    "trials/aaaa/params.json",
    "trials/aaaa/status.json",
    "trials/aaaa/metrics.jsonl",
    "trials/aaaa/test.json",
    "progress.json",
)
WRONG = [None, True, 7, -1, 1e308, 10**40, "x", "", [], [1], {}, {"a": 1}, [[]], "\ud800"]
COMMANDS = (
    ["list"],
    ["status"],
    ["report"],
    ["logs"],
    ["status", "--format", "json"],
    ["list", "--format", "json"],
    ["report", "--format", "json"],
)


def damage(path: Path, kind: str) -> None:
    if path.is_file() or path.is_symlink():
        path.unlink()
    data = DAMAGES[kind]
    if data == b"FOLDER":
        path.mkdir()
    elif data == b"PIPE":
        os.mkfifo(path)
    elif data == b"LOOP":
        path.symlink_to(path)
    elif data is not None:
        path.write_bytes(data)


def tried(run: Run, commands: Any = COMMANDS) -> dict[str, tuple[int, str]]:
    """(code, what was said) of each command; none may be a fault of ours."""
    found = {}
    for words in commands:
        name = [] if words[0] == "list" else [run.path]
        done = lorafleet_here(*words, *name, "--runs", run.path.parent, cwd=run.path.parent)
        said = done.stdout + done.stderr
        assert "bug in lorafleet" not in said, (words, said)
        assert "Traceback" not in said, (words, said)
        assert done.returncode in (0, 2), (words, said)
        found[" ".join(words)] = (done.returncode, said)
    return found


def read_only(run: Run) -> Run:
    """A copy: its report is shown and not written, which is what takes long."""
    copy = run.path.with_name("copy-000000")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run.path, copy)
    return Run(copy)


EVERY = [(name, kind) for name in FILES for kind in DAMAGES]
SOME = random.Random(0).sample(EVERY, 24)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*pair, marks=() if pair in SOME else pytest.mark.long, id=" ".join(pair))
        for pair in EVERY
    ],
)
def test_a_damaged_file_is_told(name: str, kind: str, finished: Run) -> None:  # noqa: F811
    run = read_only(finished)
    damage(run.path / name, kind)
    found = tried(run, (["list"], ["status"], ["report"]))
    if name.startswith("trials/") and not name.endswith("test.json"):
        assert found["report"][0] == found["list"][0] == found["status"][0] == 0
        assert "bbbb" in found["report"][1]  # the other rows are there


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_values_of_wrong_types_are_told(name: str, finished: Run) -> None:  # noqa: F811
    """Each value of each file, in turn, in the place of each key on the first two levels."""
    run = read_only(finished)
    path = run.path / name
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        pytest.skip(f"{name} holds no JSON here")
    whole = path.read_text()
    lines = path.suffix == ".jsonl"
    tree = json.loads(whole.splitlines()[-1] if lines else whole)
    keys = [(key,) for key in tree]
    keys += [
        (key, inner) for key, block in tree.items() if isinstance(block, dict) for inner in block
    ]
    draw = random.Random(name)
    for key in keys:
        value = draw.choice(WRONG)
        changed = json.loads(json.dumps(tree))
        block = changed
        for part in key[:-1]:
            block = block[part]
        block[key[-1]] = value
        path.write_text((whole if lines else "") + json.dumps(changed) + "\n")
        tried(run, (["list"], ["status"], ["report"]))


@pytest.mark.parametrize("examples", [10, pytest.param(2000, marks=pytest.mark.long)])
def test_any_damage_is_told(examples: int, finished: Run) -> None:  # noqa: F811
    """Bytes flipped, cut and put in anywhere, in any file, and seen by any command."""

    @settings(
        max_examples=examples, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
    )
    @given(data=st.data())
    def damaged_and_tried(data: st.DataObject) -> None:
        run = read_only(finished)
        paths = sorted(
            path for path in run.path.rglob("*") if path.is_file() and path.name != ".reserve"
        )
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(paths))
            raw = path.read_bytes()
            at, length = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 20))
            path.write_bytes(
                raw[:at] + data.draw(st.binary(max_size=8) | JUNK) + raw[at + length :]
            )
        tried(run, [data.draw(st.sampled_from(COMMANDS))])

    damaged_and_tried()


JUNK = st.sampled_from([b"null", b"[]", b"{}", b"1e999", b'"', b"\n", b"-"])


def test_a_trial_that_is_gone_is_named(finished: Run) -> None:  # noqa: F811
    shutil.rmtree(finished.get_trial("bbbb").path)
    report = build_report(finished)
    assert "trial bbbb was created, but its folder is missing" in report.warnings
    (finished.get_trial("cccc").path / "params.json").unlink()
    (finished.get_trial("dddd").path / "metrics.jsonl").write_text('{"step": "x"}\n')
    warnings = build_report(finished).warnings
    assert any("trials/cccc/params.json is missing" in sentence for sentence in warnings)
    assert any(
        "trials/dddd/metrics.jsonl is damaged: step is 'x'" in sentence for sentence in warnings
    )
    assert [row.trial_id for row in build_report(finished).trials] == ["aaaa"]
