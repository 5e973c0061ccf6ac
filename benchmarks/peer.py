"""What a user would write today, HF Trainer + PEFT: the other side of every ratio."""

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
    """A split in a given order, as HF Trainer takes it."""

    def __init__(self, split: Split, order: np.ndarray, *, classifies: bool) -> None:
        self.items = [self._item(split, int(row), classifies) for row in order]

    @staticmethod
    def _item(split: Split, row: int, classifies: bool) -> dict[str, Any]:
        span = slice(int(split.starts[row]), int(split.starts[row + 1]))
        ids = split.ids[span].astype(int).tolist()
        if classifies:
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(split.targets[row])}
        labels = np.where(split.learnt[span], ids, IGNORED).tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def trainer_for(job: JobSpec, data: TokenData, order: np.ndarray, steps: int, out: Path, **arguments: Any) -> Any:
    """HF Trainer + PEFT with the job's own values, over rows in `order`, shuffled by nobody."""
    from lorafleet.training.model import load_tokenizer, safetensors_folder
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    classifies = job.task == "classification"
    folder = safetensors_folder(job.model.model_name_or_path, job.model.revision)
    tokenizer = load_tokenizer(job.model.model_name_or_path, job.model.revision, trust_remote_code=False)
    torch.manual_seed(job.train.seed)
    if classifies:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(data.labels))
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

    falls = job.train.lr_scheduler_type == "warmup_stable_decay"
    decay = {"num_decay_steps": math.ceil(job.train.decay_ratio * steps)} if falls else {}
    options = {
        "output_dir": str(out),
        "per_device_train_batch_size": job.train.per_device_train_batch_size,
        "per_device_eval_batch_size": job.train.per_device_eval_batch_size,
        "learning_rate": job.train.learning_rate or 1e-3,
        "lr_scheduler_type": job.train.lr_scheduler_type,
        "lr_scheduler_kwargs": decay,
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
    collator = DataCollatorWithPadding(tokenizer) if classifies else DataCollatorForSeq2Seq(tokenizer, padding=True)
    return InOrder(
        model=model,
        args=TrainingArguments(**(options | arguments)),
        train_dataset=Rows(data.splits["train"], order, classifies=classifies),
        eval_dataset=Rows(data.splits["validation"], np.arange(len(data.splits["validation"])), classifies=classifies),
        data_collator=collator,
        compute_metrics=_accuracy if classifies else None,
    )


def _accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(axis=1) == predictions.label_ids).mean())}


def machine_line() -> str:
    """The conditions of a measurement: cores, load, and a matrix product's speed on one thread."""
    import os
    import time

    torch.set_num_threads(1)
    one = torch.randn(768, 768)
    one @ one
    began = time.process_time()
    for _ in range(20):
        one @ one
    rate = 20 * 2 * 768**3 / (time.process_time() - began) / 1e9
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, GEMM {rate:.0f} GF/CPU-s"
