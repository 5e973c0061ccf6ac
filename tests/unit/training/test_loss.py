"""Losses of training beside TRL's SFTTrainer with `assistant_only_loss`: the same rows, the same
numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.data import prepare_tokens
from lorafleet.training.model import load_base
from lorafleet.training.session import TrainingSession
from tests.conftest import write_rows
from tests.unit.jobs.data.chat_families import BY_NAME, CHATML, Family, learnt_spans, model_folder

_STEPS = 5
_MARKED = CHATML.replace(
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor "
    "%}",
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% "
    "generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + "
    "'<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}",
)
_WITH_MARKERS = (
    Family("chatml", _MARKED, "<|im_end|>", after="<|im_end|>"),
    Family("llama3", "llama3_training", "<|eot_id|>", after="<|eot_id|>", bos="<|begin_of_text|>"),
    Family("cohere2", "cohere2_training", "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>"),
)
"""Templates whose own markers begin behind the generation prompt."""


def rows(turns: int) -> list[dict[str, Any]]:
    """Conversations of one to `turns` exchanges, some with a system message."""
    found = []
    for number in range(8):
        messages = [{"role": "system", "content": "be kind"}] if number % 2 else []
        for turn in range(1 + number % turns):
            messages.append(
                {"role": "user", "content": f"what is the capital of country {number}{turn}?"}
            )
            messages.append(
                {"role": "assistant", "content": f"it is city {number} {'sunny ' * turn}indeed."}
            )
        found.append({"messages": messages})
    return found


def our_job(folder: Path, data: list[dict[str, Any]]) -> Any:
    path = write_rows(folder / "rows.jsonl", data)
    text = f"""
name: losses
task: generation
method: full
model: {{model_name_or_path: "{folder}", max_length: 2048}}
data: {{train_file: "{path}", validation_file: "{path}", test_file: "{path}"}}
train: {{per_device_train_batch_size: {len(data)}, learning_rate: 1e-3, max_steps: {_STEPS},
         lr_scheduler_type: constant, max_grad_norm: 1.0, group_by_length: false}}
"""
    return load_text(text, folder / "job.yaml").job


def our_losses(job: Any) -> list[float]:
    import torch

    data = prepare_tokens(job)
    base = load_base(job, 0, torch.device("cpu"))
    batch = job.train.per_device_train_batch_size
    session = TrainingSession.build(
        job, base, data, Schedule(_STEPS, batch, 1, (), (_STEPS,), (1,))
    )
    losses = []
    for step in range(1, _STEPS + 1):
        session.reset_loss()
        losses.append(session.advance(step)["train_loss"])
    session.close()
    return losses


def their_trainer(folder: Path, data: list[dict[str, Any]], tmp_path: Path) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"), assistant_only_loss=True, max_length=None, max_steps=_STEPS,
        per_device_train_batch_size=len(data), learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=1.0,
        logging_steps=1, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        weight_decay=0.0, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(
        model, settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )


@pytest.mark.parametrize(
    "family",
    [*_WITH_MARKERS[:2], *(pytest.param(one, marks=pytest.mark.long) for one in _WITH_MARKERS[2:])],
    ids=str,
)
def test_losses_are_trls_where_the_template_has_markers(family: Family, tmp_path: Path) -> None:
    data = rows(turns=3)
    folder = model_folder(family, tmp_path / "model")
    trainer = their_trainer(folder, data, tmp_path)
    check_losses(trainer, our_losses(our_job(folder, data)))


def check_losses(trainer: Any, ours: list[float]) -> None:
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == len(ours) == _STEPS
    assert ours[0] > ours[-1]
    assert ours == pytest.approx(theirs, rel=1e-5)


_NEWLINES = (
    *(BY_NAME[name] for name in ("qwen2.5", "qwen3", "glm4.5")),
    Family(
        "gemma3",
        "gemma3_training",
        "<eos>",
        after="<end_of_turn>",
        bos="<bos>",
        ends=("<end_of_turn>",),
    ),
)
"""Models that TRL trains on templates of its own, which learn newlines around a turn as well."""


@pytest.mark.parametrize(
    "family",
    [*_NEWLINES[:2], *(pytest.param(one, marks=pytest.mark.long) for one in _NEWLINES[2:])],
    ids=str,
)
def test_losses_are_trls_less_its_newlines(family: Family, tmp_path: Path) -> None:
    data = rows(turns=3 if family.together else 1)
    folder = model_folder(family, tmp_path / "model")
    trainer, job = their_trainer(folder, data, tmp_path), our_job(folder, data)
    split, tokenizer = prepare_tokens(job).splits["train"], family.tokenizer()
    labels = []
    for number, entry in enumerate(trainer.train_dataset):
        ids, theirs = entry["input_ids"], [label != -100 for label in entry["labels"]]
        span = slice(int(split.starts[number]), int(split.starts[number + 1]))
        ours = [
            tokenizer.decode(one)
            for one in learnt_spans(np.asarray(split.ids[span]).tolist(), split.learnt[span])
        ]
        assert [tokenizer.decode(one).strip("\n") for one in learnt_spans(ids, theirs)] == [
            one.strip("\n") for one in ours
        ]
        learnt = [*split.learnt[span], *[False] * (len(ids) - (span.stop - span.start))]
        assert ids[: span.stop - span.start] == np.asarray(split.ids[span]).tolist()
        extra = [
            token for token, one, other in zip(ids, learnt, theirs, strict=True) if one != other
        ]
        assert {tokenizer.decode([token]).strip("\n") for token in extra} <= {""}
        labels.append([token if one else -100 for token, one in zip(ids, learnt, strict=True)])
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels").add_column(
        "labels", labels
    )
    check_losses(trainer, our_losses(job))
