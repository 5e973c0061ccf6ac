from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cluster.run_index import find_run
from lorafleet.evaluation.metrics.summary import read_results
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs import events
from lorafleet.jobs.runs.records import (
    DamagedFile,
    FailureRecord,
    HeldOutScores,
    MetricsRow,
    Record,
    read_typed,
)
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.metrics import METRICS, ROW_KEYS


def _list_kinds() -> list[type[events.Event]]:
    return [
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, events.Event) and kind is not events.Event
    ]


def _make_value(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType):
        annotation = annotation.__args__[0]
    if annotation is FailureRecord:
        return FailureRecord(failure_class="oom", sentence="out of memory")
    return {str: "text", int: 3, float: 0.5, bool: True}[annotation]


@pytest.mark.parametrize("kind", _list_kinds())
def test_every_kind_is_read_as_it_was_written(kind: type[events.Event], tmp_path: Path) -> None:
    run = Run.create(tmp_path, "r")
    values = {
        name: _make_value(field.annotation)
        for name, field in kind.model_fields.items()
        if name not in ("event", "time", "attempt")
    }
    event = kind(**values)
    run.add_event(event)
    (stored,) = run.read_events(kind)
    assert stored.model_copy(update={"time": None}).model_dump() == event.model_dump() | {
        "schema_version": 1
    }
    assert json.loads((run.path / "events.jsonl").read_text())["event"] == kind(**values).event


def test_an_event_of_a_newer_version_is_kept_and_not_shown(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "r")
    (run.path / "events.jsonl").write_text('{"event": "paused", "why": [1]}\n{}\n')
    first, second = run.read_events(events.Event)
    assert (first.event, first.to_dict()["why"], second.event) == ("paused", [1], "")
    assert run.list_remarks() == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"event": "warning", "trial_id": 3}, "trial_id"),
        ({"event": "retry", "trial_id": "t", "number": 1, "failure": {}}, "failure_class"),
        ({"event": "rung", "trial_id": "t", "rung": "1", "goes_on": True}, "rung"),
    ],
)
def test_a_damaged_event_is_named(line: dict[str, Any], problem: str, tmp_path: Path) -> None:
    run = Run.create(tmp_path, "r")
    (run.path / "events.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DamagedFile, match=rf"events\.jsonl is damaged: .*{problem}"):
        run.list_remarks()


@pytest.mark.parametrize("name", ["status.json", "facts.json", "events.jsonl"])
def test_records_of_a_newer_version_are_refused(name: str, tmp_path: Path) -> None:
    run = Run.create(tmp_path, "r")
    (run.path / name).write_text('{"schema_version": 2, "state": "finished"}\n')
    read = {
        "status.json": run.read_status,
        "facts.json": run.read_metadata,
        "events.jsonl": run.list_remarks,
    }[name]
    with pytest.raises(
        DamagedFile,
        match=rf"{name} has schema_version 2, and this lorafleet reads versions up to 1: use the",
    ):
        read()


def test_a_folder_of_newer_runs_is_not_called_empty(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "r")
    (run.path / "plan.json").write_text("{}")
    (run.path / "status.json").write_text('{"schema_version": 2, "state": "finished"}')
    with pytest.raises(RunError, match=r"no run in .* can be read: .* has schema_version 2"):
        find_run(tmp_path, None)


def test_lines_that_nothing_reads_may_be_damaged(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "r")
    lines = [
        {"event": "retry", "attempt": 1},  # stale: attempt 2 has begun
        {"event": "base_loaded", "actor": 7, "attempt": 2},
        {"event": "note", "attempt": 2},
        {"event": "search", "trials": 4, "attempt": 2},
    ]
    text = json.dumps({"event": "attempt", "number": 2, "attempt": 2})
    text = "\n".join([text, *map(json.dumps, lines)])
    (run.path / "events.jsonl").write_text(text + "\n")
    assert [event.trials for event in run.read_events(events.SearchEvent)] == [4]
    assert [event.sentence for event in run.read_events(events.NoteEvent)] == [""]
    with pytest.raises(DamagedFile, match="actor"):
        run.read_events(events.Event)


def test_no_custom_metric_can_be_called_as_a_field_of_a_row() -> None:
    assert set(MetricsRow.model_fields) <= ROW_KEYS | set(METRICS)


def test_a_metric_is_a_number_or_missing() -> None:
    row = MetricsRow.model_validate({"step": 1, "loss": 0.5, "f1": None, "mine": 3, "odd": "x"})
    assert [row.get_metric(name) for name in ("loss", "f1", "mine", "none")] == [0.5, None, 3, None]
    assert row.get_metrics(["loss", "f1", "none"]) == {"loss": 0.5, "f1": None}
    assert row.get_metric("copy") is None  # the name of a method is not a value
    with pytest.raises(DamagedFile, match="odd of step 1 is 'x', not a number"):
        row.get_metric("odd")


def test_a_record_is_written_as_it_was_read() -> None:
    values = {"step": 3, "intervals": {"f1": [0.1, None]}, "unknown": {"a": [1]}}
    row = MetricsRow.model_validate(values)
    assert row.to_dict() == values
    assert Record.model_validate({"a": 1}).to_dict() == {"a": 1}


def test_scores_of_another_split_are_none(tmp_path: Path) -> None:
    """A model that was evaluated on the validation rows alone has no results on the test rows."""
    predictions = tmp_path / "predictions-test.jsonl"
    predictions.write_text(json.dumps({"row": 0, "predicted": 1, "target": 1, "loss": 0.5}) + "\n")
    for text in ("{}", '{"validation": {"metrics": {}}}', '{"test": null}', '{"test": {}}'):
        (tmp_path / "test.json").write_text(text)
        scores = read_typed(tmp_path / "test.json", HeldOutScores)
        assert read_results(predictions, scores.get_split("test")) is None


def test_an_interval_has_two_ends(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text('{"test": {"intervals": {"f1": [0.1]}}}')
    with pytest.raises(DamagedFile, match=r"base\.json is damaged: test.intervals.f1"):
        read_typed(path, HeldOutScores)
