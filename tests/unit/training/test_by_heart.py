"""A model that knows its rows by heart scores 1.0, whatever its chat template writes around an
answer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorafleet.evaluation.metrics.scores import compute_scores
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.data import prepare_tokens
from lorafleet.training.evaluation import evaluate_rows
from lorafleet.training.model import load_base
from lorafleet.training.session import TrainingSession
from tests.conftest import write_rows
from tests.unit.jobs.data.chat_families import FAMILIES, Family, model_folder

_STEPS = 120
_ANSWERS = ("it is city 1.", "kind and sunny", "9", "no: weather")


def rows(family: Family) -> list[dict[str, object]]:
    """Four conversations: of one turn and of two, with a system message and without."""
    found = []
    for number, answer in enumerate(_ANSWERS):
        messages = (
            [{"role": "system", "content": "be short"}] if number == 1 and family.system else []
        )
        if number == 2:
            messages += [
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "country"},
            ]
        messages += [
            {"role": "user", "content": f"country {number}?"},
            {"role": "assistant", "content": answer},
        ]
        found.append({"messages": messages})
    return found


_SHORT = (
    *("qwen3", "gpt-oss"),
    *("chatml-base", "no-generation-prompt", "no-end-token"),
)
"""Families whose frames differ most; the others are for `make test-all`."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, id=one.name, marks=[] if one.name in _SHORT else [pytest.mark.long])
        for one in FAMILIES
    ],
)
def test_exact_match_of_a_model_that_knows_its_rows(family: Family, tmp_path: Path) -> None:
    folder = model_folder(family, tmp_path / "model")
    path = write_rows(tmp_path / "rows.jsonl", rows(family))
    kwargs = "{enable_thinking: false}" if family.kwargs else "{}"
    job = load_text(
        f"""
name: heart
task: generation
method: full
model: {{model_name_or_path: "{folder}", max_length: 2048}}
data: {{train_file: "{path}", validation_file: "{path}", test_file: "{path}", chat_template_kwargs: {kwargs}}}
train: {{per_device_train_batch_size: 4, learning_rate: 5e-3, lr_scheduler_type: constant, max_steps: {_STEPS},
         group_by_length: false}}
evaluate: {{metrics: [exact_match], max_new_tokens: 40}}
""",
        tmp_path / "job.yaml",
    ).job
    data = prepare_tokens(job)
    base = load_base(job, 0, torch.device("cpu"))
    session = TrainingSession.build(job, base, data, Schedule(_STEPS, 4, 1, (), (_STEPS,), (1,)))
    session.advance(_STEPS)
    results = evaluate_rows(
        session.strategy.loss, job, data, "test", base.device, metrics=job.text_metrics
    )
    found = compute_scores(results, job.metric_names)
    assert found.metrics["loss"] < 0.1
    assert found.metrics["exact_match"] == 1.0, results.answers
    assert results.answers == _ANSWERS
    session.close()
