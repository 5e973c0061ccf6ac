"""The baseline of every comparison: the HF Trainer + PEFT code that a user would write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorafleet.evaluation.tokens import Split, TokenData
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.data import IGNORED


class Rows(torch.utils.data.Dataset):
    """A split in a given order, as a data set for HF Trainer."""

    def __init__(self, split: Split, order: np.ndarray, *, classifies: bool) -> None:
        self.items = [self._make_item(split, int(row), classifies) for row in order]

    @staticmethod
    def _make_item(split: Split, row: int, classifies: bool) -> dict[str, Any]:
        span = slice(int(split.starts[row]), int(split.starts[row + 1]))
        ids = split.ids[span].astype(int).tolist()
        if classifies:
            return {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": int(split.targets[row]),
            }
        labels = np.where(split.learnt[span], ids, IGNORED).tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def make_trainer(
    job: JobSpec, data: TokenData, order: np.ndarray, steps: int, out: Path, **arguments: Any
) -> Any:
    """Return HF Trainer + PEFT with the job's own values, over the training rows in `order`.

    The rows are not shuffled again, unless `arguments` sets `train_sampling_strategy` to
    group_by_length.

    Args:
        steps: Optimiser steps.
        out: Output folder of the trainer.
        arguments: Further TrainingArguments, which win over the job's.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from lorafleet.training.model import load_tokenizer, resolve_safetensors_folder

    classifies = job.task == "classification"
    folder = resolve_safetensors_folder(job.model.model_name_or_path, job.model.revision)
    tokenizer = load_tokenizer(
        job.model.model_name_or_path, job.model.revision, trust_remote_code=False
    )
    torch.manual_seed(job.train.seed)
    if classifies:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(data.labels)
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    targets = job.lora.lora_target_modules
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
            r=job.lora.lora_r,
            lora_alpha=job.lora.lora_alpha,
            lora_dropout=job.lora.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        ),
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            if self.args.train_sampling_strategy == "group_by_length":
                return super()._get_train_sampler(*_)
            return torch.utils.data.SequentialSampler(self.train_dataset)

    decays = job.train.lr_scheduler_type == "warmup_stable_decay"
    scheduler_options = (
        {"num_decay_steps": math.ceil(job.train.decay_ratio * steps)} if decays else {}
    )
    options = {
        "output_dir": str(out),
        "per_device_train_batch_size": job.train.per_device_train_batch_size,
        "per_device_eval_batch_size": job.train.per_device_eval_batch_size,
        "learning_rate": job.train.learning_rate or 1e-3,
        "lr_scheduler_type": job.train.lr_scheduler_type,
        "lr_scheduler_kwargs": scheduler_options,
        "warmup_steps": max(1, round(job.train.warmup_ratio * steps)),
        "max_steps": steps,
        "weight_decay": job.train.weight_decay,
        "max_grad_norm": job.train.max_grad_norm,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": job.train.seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    collator = (
        DataCollatorWithPadding(tokenizer)
        if classifies
        else DataCollatorForSeq2Seq(tokenizer, padding=True)
    )
    return InOrder(
        model=model,
        args=TrainingArguments(**(options | arguments)),
        train_dataset=Rows(data.splits["train"], order, classifies=classifies),
        eval_dataset=Rows(
            data.splits["validation"],
            np.arange(len(data.splits["validation"])),
            classifies=classifies,
        ),
        data_collator=collator,
        compute_metrics=_compute_accuracy if classifies else None,
    )


def _compute_accuracy(predictions: Any) -> dict[str, float]:
    return {
        "accuracy": float((predictions.predictions.argmax(axis=1) == predictions.label_ids).mean())
    }


def describe_machine() -> str:
    """Return a measurement's conditions: cores, load, and matrix product speed on one thread."""
    import os
    import time

    torch.set_num_threads(1)
    matrix = torch.randn(768, 768)
    matrix @ matrix
    started = time.process_time()
    for _ in range(20):
        matrix @ matrix
    rate = 20 * 2 * 768**3 / (time.process_time() - started) / 1e9
    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, GEMM "
        f"{rate:.0f} GF/CPU-s"
    )
