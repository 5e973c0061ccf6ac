"""People rate blind: on a page in a real browser and in the terminal, and nothing they have clicked
is ever lost.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorafleet.cluster.local_site import detect_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.evaluation.render.forms import render_html, render_markdown
from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.human_rating import (
    CRITERIA,
    Notebook,
    build_sheet,
    compute_alpha,
    get_ratings_folder,
    load_ratings,
    validate_rater,
)
from lorafleet.evaluation.report.rating_sheet import build_run_sheet
from lorafleet.jobs import files
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.errors import RunError, UserError
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from tests.conftest import JobMaker

ROWS = [{"prompt": f"is it <b>row {row}</b>?", "reference": "good"} for row in range(6)]


@pytest.fixture
def answered(tmp_path: Path, llama_job: JobMaker) -> Run:
    """A run whose base and trial have answered five of six held-out rows."""
    loaded = llama_job()
    run = Run.create(tmp_path / "runs", "tiny-lm")
    files.write_json(
        run.path / "plan.json",
        make_plan(loaded, detect_site(None), "train").model_dump(mode="json"),
    )
    files.write_json(run.path / "facts.json", {"chosen_on_test": False})
    files.write_jsonl(run.get_rows_file("test"), ROWS)
    trial = run.add_trial("aaaa", 0, {})
    trial.add_rows(
        MetricsRow.model_validate(
            {
                "step": 1,
                "samples": 4,
                "loss": 1.0,
                "evaluated": True,
                "train_seconds": 1.0,
                "eval_seconds": 0.0,
            }
        )
    )
    trial.set_state(TrialState.FINISHED)
    trial.weights.mkdir()
    for record, path, word in (
        (run.path / "report" / "base.json", run.get_base_predictions_file("test"), "plain"),
        (trial.path / "test.json", trial.get_predictions_file("test"), "tuned"),
    ):
        files.write_json(record, {"test": {"metrics": {"loss": 1.0}, "intervals": {}}})
        rows = [
            {"row": row, "loss": 1.0, "tokens": 2, "answer": f"{word} {row}" if row < 5 else None}
            for row in range(6)
        ]
        files.write_jsonl(path, rows)
    run.set_state(RunState.RUNNING)
    run.set_state(RunState.FINISHED)
    return run


# ---- arithmetic ----


def test_alpha_is_krippendorffs() -> None:
    """The worked example of Krippendorff (2011): four observers, twelve units, interval data:
    0.849.
    """
    _ = np.nan
    values = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
            [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
        ]
    )
    assert compute_alpha(values) == pytest.approx(0.849, abs=5e-4)
    assert compute_alpha(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])) == 1.0
    assert compute_alpha(np.array([[1.0, _], [_, 2.0]])) is None  # no unit has two ratings
    assert (
        compute_alpha(np.array([[2.0, 2.0], [2.0, 2.0]])) is None
    )  # and where all gave the same, nothing was told apart


# ---- the sheet ----


def test_a_sheet_says_nothing_of_whose_an_answer_is() -> None:
    answers = {"base": [f"a{row}" for row in range(40)], "lora": [f"b{row}" for row in range(40)]}
    rows = [{"prompt": "p", "reference": "r"}] * 40
    items = build_sheet(rows, answers, "ann", 40)
    assert build_sheet(rows, answers, "ann", 40) == items  # the same after a restart
    assert [item.row for item in items] != sorted(item.row for item in items)
    firsts = [item.arms[0] for item in items]
    assert 8 < firsts.count("base") < 32  # as often first as second
    other = build_sheet(rows, answers, "ben", 40)
    assert [item.arms for item in other] != [item.arms for item in items]
    few = [{item.row for item in build_sheet(rows, answers, name, 7)} for name in ("ann", "ben")]
    assert few[0] == few[1]  # what two have rated can be compared
    assert "base" not in json.dumps([item.to_dict() for item in items])


def test_what_is_rated_is_kept_and_taken_back(answered: Run) -> None:
    path = get_ratings_folder(answered) / "ann.jsonl"
    items = build_run_sheet(answered, "ann", 20)
    assert len(items) == 5  # the sixth was not answered
    book = Notebook.open(path, items)
    row = items[0].row
    book.rate(row, "A", "fluency", 4)
    book.rate(row, "A", "fluency", 2)
    book.add_note(row, "short")
    again = Notebook.open(path, items)
    assert again.to_dict()["scores"] == {f"{row}/A/fluency": 2}
    again.undo()
    assert again.to_dict()["scores"] == {f"{row}/A/fluency": 4}
    again.undo()
    again.undo()
    assert Notebook.open(path, items).scores == {}
    assert Notebook.open(path, items).notes == {row: "short"}
    for wrong in (
        (99, "A", "fluency", 1),
        (row, "C", "fluency", 1),
        (row, "A", "beauty", 1),
        (row, "A", "fluency", 6),
    ):
        with pytest.raises(UserError):
            book.rate(*wrong)


def test_whose_the_answers_were_is_told_at_the_end() -> None:
    rows, answers = (
        [{"prompt": "p", "reference": "r"}] * 2,
        {"base": ["x", "y"], "lora": ["v", "w"]},
    )
    book = Notebook(Path("/dev/null"), build_sheet(rows, answers, "ann", 2))
    for place, item in enumerate(book.items):
        for arm in item.arms:
            for criterion in CRITERIA:
                assert book.compute_means() == []
                book.scores[item.row, arm, criterion] = (4 if arm == "lora" else 1) + place
    assert book.compute_means() == [
        {"arm": "base", "rows": 2, "means": dict.fromkeys(CRITERIA, 1.5)},
        {"arm": "lora", "rows": 2, "means": dict.fromkeys(CRITERIA, 4.5)},
    ]


def test_the_turns_of_a_conversation_have_their_speakers() -> None:
    asked = (
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "", tool_calls="[1]"),
    )
    shown = Row(
        messages=(*asked, Message("user", "and?"), Message("assistant", "yes"))
    ).to_display_record()
    assert [(turn["role"], turn["text"]) for turn in shown["turns"]] == [
        ("system", "be brief"), ("user", "hi"), ("assistant", "[1]"), ("user", "and?"),
    ]  # fmt: skip
    assert "turns" not in Row(text="a text", label="x").to_display_record()
    (item,) = build_sheet([shown], {"a": ["b"], "c": ["d"]}, "ann", 1)
    assert item.to_dict()["turns"][1] == {"role": "user", "text": "hi"}


def test_many_arms_and_odd_notes(answered: Run) -> None:
    rows, answers = (
        [{"prompt": "p", "reference": "r"}] * 2,
        {f"arm{number}": ["x", "y"] for number in range(30)},
    )
    items = build_sheet(rows, answers, "ann", 2)
    slots = [answer["slot"] for answer in items[0].to_dict()["answers"]]
    assert (len(slots), slots[0], slots[26], slots[29]) == (30, "A", "AA", "AD")
    path = get_ratings_folder(answered) / "ann.jsonl"
    book = Notebook.open(path, items)
    book.rate(items[0].row, "AD", "fluency", 3)
    book.add_note(items[0].row, "half a smile \ud83d")
    assert book.missing == 2 * 30 * 3 - 1
    json.dumps(Notebook.open(path, items).to_dict(), ensure_ascii=False).encode()
    fewer = Notebook.open(path, [item for item in items if item.row != items[0].row])
    assert fewer.missing == 30 * 3  # what is not on this sheet does not count
    assert fewer.undo() is None  # nor is it taken back unseen
    assert len(fewer.scores) == 1


def test_two_raters_go_into_the_report(answered: Run) -> None:
    for name, shift in (("ann", 0), ("ben", 1)):
        items = build_run_sheet(answered, name, 3)
        book = Notebook.open(get_ratings_folder(answered) / f"{name}.jsonl", items)
        for item in items:
            for slot, arm in zip("AB", item.arms, strict=True):
                for criterion in CRITERIA:
                    book.rate(item.row, slot, criterion, (4 if arm == "aaaa" else 1) + shift)
    found = load_ratings(answered)
    assert found is not None
    means = {(one.arm, one.criterion): one.mean for one in found.judgements}
    assert means["aaaa", "fluency"] == 4.5
    assert means["base", "coherence"] == 1.5
    assert found.judgements[0].interval is None  # of three rows
    assert found.judgements[0].alpha == pytest.approx(
        compute_alpha(np.array([[4.0, 1.0] * 3, [5.0, 2.0] * 3]))
    )
    report = build_report(answered)
    assert report.ratings == found
    assert "4.50 (3)" in render_html(report)
    assert "Krippendorff" in render_markdown(report)


def test_names_and_runs_that_cannot_be_rated(answered: Run) -> None:
    for name in ("../x", "", "a b", "x" * 65):
        with pytest.raises(UserError, match="--rater"):
            validate_rater(name)
    shutil.rmtree(answered.get_trial("aaaa").path)
    with pytest.raises(RunError, match="has answers of 1 models"):
        build_run_sheet(answered, "ann", 3)


# ---- the terminal ----


def test_rating_in_the_terminal(answered: Run) -> None:
    command = [
        str(Path(sys.executable).with_name("lorafleet")),
        "rate",
        "tiny-lm",
        "--terminal",
        "--rater",
        "ann",
    ]
    words = ["5", "4", "x", "u", "3", "n odd", "q"]
    done = subprocess.run(
        command, cwd=answered.path.parent.parent, input="\n".join(words) + "\n", text=True, capture_output=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert "'x' is not valid; enter one of: 0-5" in done.stderr
    assert "2 ratings of ann" in done.stderr
    book = Notebook.open(
        get_ratings_folder(answered) / "ann.jsonl", build_run_sheet(answered, "ann", 20)
    )
    assert list(book.scores.values()) == [5, 3]
    assert list(book.notes.values()) == ["odd"]
    # Undoing at a row's beginning goes back to the row before.
    first = len(book.items[0].texts) * len(CRITERIA)
    words = ["4"] * (first - 2) + ["u", "1", "u", "u", "2", "0", "q"]
    done = subprocess.run(
        command, cwd=answered.path.parent.parent, input="\n".join(words) + "\n", text=True, capture_output=True,
        timeout=120, check=True,
    )  # fmt: skip
    book = Notebook.open(
        get_ratings_folder(answered) / "ann.jsonl", build_run_sheet(answered, "ann", 20)
    )
    assert {key[0] for key in book.scores} == {book.items[0].row}
    assert sorted(book.scores.values())[:3] == [0, 2, 3]
    assert len(book.scores) == first
