"""State of a run after an error on the held-out rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.jobs.errors import UserError
from lorafleet.tuning.base_cache import BaseCache
from lorafleet.tuning.held_out import Evaluator, HeldOutEvaluation
from lorafleet.tuning.trial_run import Work
from tests.conftest import JobMaker


@pytest.mark.parametrize(
    ("error", "failure", "has_traceback"),
    [
        (KeyError("head"), "KeyError: 'head' (see report/exam-traceback-base.txt)", True),
        (MemoryError(), "MemoryError (see report/exam-traceback-base.txt)", True),
        (UserError("the classes differ\nbadly"), "UserError: the classes differ", False),
    ],
)
def test_an_error_becomes_a_sentence_and_ours_a_traceback(
    error: Exception,
    failure: str,
    has_traceback: bool,
    bert_job: JobMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    job, folder = bert_job().job, tmp_path / "report"
    work = Work(job, str(tmp_path), "tokens", 0, 1, False)
    evaluator = Evaluator(work, BaseCache(0))
    monkeypatch.setattr(evaluator, "evaluate", fail)
    evaluation = HeldOutEvaluation(
        "base", job, "tokens", None, ("test",), str(folder), "base.json", "p-SPLIT.jsonl"
    )
    assert evaluator.try_evaluate(evaluation, 1).failure == failure
    path = folder / "exam-traceback-base.txt"
    assert path.exists() is has_traceback
    if has_traceback:
        assert path.read_text().startswith("Traceback (most recent call last):")
