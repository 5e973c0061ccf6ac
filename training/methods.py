"""How the base is adapted: a method's adapter is put on, and taken off so that nothing of it stays."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jobs.errors import UserError
from jobs.spec import JobSpec
from training.model import Base, fresh_heads

if TYPE_CHECKING:
    from peft import PeftModel

_TASK_TYPES = {"classification": "SEQ_CLS", "generation": "CAUSAL_LM"}


def attach(job: JobSpec, base: Base) -> PeftModel:
    """The base with a fresh adapter (and head), drawn from the trial's seed alone; only these train.

    Raises UserError when the model has no layers of the names that the job gives.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    fresh_heads(base, job.train.seed)
    torch.manual_seed(job.train.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if job.train.init_adapter:
            return PeftModel.from_pretrained(base.model, job.train.init_adapter, is_trainable=True)
        wanted = job.lora.lora_target_modules
        config = LoraConfig(
            task_type=_TASK_TYPES[job.task],
            r=job.lora.lora_r,
            lora_alpha=job.lora.lora_alpha,
            lora_dropout=job.lora.lora_dropout,
            target_modules=wanted if isinstance(wanted, str) else list(wanted),
            use_rslora=job.lora.use_rslora,
            use_dora=job.lora.use_dora,
        )
        try:
            return get_peft_model(base.model, config)
        except ValueError as error:
            raise UserError(f"lora.lora_target_modules is {wanted!r}, but {error}") from error


def detach(model: PeftModel) -> None:
    """Take the adapter off. The head stays as trained: `attach` draws a new one."""
    model.unload()
    model.eval()


def check_adapter(folder: Path) -> None:
    """Raise UserError unless a folder holds a PEFT adapter in safetensors."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"train.init_adapter is {folder}, but there is no {name} in it")
