"""Read PEFT adapters on disk: the values that they fix, and reasons to refuse one.

Nothing is imported from PEFT or torch, so that `validate` and `plan` can check an
adapter on any machine. The same checks run again when the adapter is loaded
(`training/methods.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.weight_names import read_weight_shapes
from lorafleet.jobs.schema.model_kinds import (
    EMBEDDING_NAMES,
    HEAD_NAMES,
    get_text_config,
    has_tied_embeddings,
)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""File names of a PEFT adapter: the configuration and the weights."""
PEFT_TYPES = {"lora": "LORA", "qlora": "LORA", "prompt_tuning": "PROMPT_TUNING"}
"""Method -> PEFT's name (`peft_type`) of its adapters."""
_LORA_FIELDS = {
    "lora.lora_r": "r",
    "lora.lora_alpha": "lora_alpha",
    "lora.lora_target_modules": "target_modules",
    "lora.use_rslora": "use_rslora",
    "lora.use_dora": "use_dora",
}
"""Field of the job file -> key of adapter_config.json, for the values that an adapter fixes."""
DROPOUT = "lora.lora_dropout"
"""The one field that an adapter has a value of but that a job may change."""


_LAST_LAYERS = ("classifier.weight", ".score.weight", "classifier.out_proj.weight")
"""Suffixes of the names of a classifier's last-layer weights, which have one row per class."""


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return an adapter's configuration, or None if it is missing or unreadable.

    The content comes from anybody: do not rely on the types of its values.
    """
    try:
        value = json.loads(files.read_regular_text(folder / ADAPTER_FILES[0]))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def get_fixed_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the job-file fields that an adapter fixes, such as its rank, alpha and layers.

    Args:
        config: The content of adapter_config.json.

    Returns:
        Dotted field of the job file -> value. Empty for adapters that are neither LoRA nor
            prompt tuning.
    """
    if config.get("peft_type") == "PROMPT_TUNING":
        return {"prompt_tuning.num_virtual_tokens": config.get("num_virtual_tokens")}
    if config.get("peft_type") != "LORA":
        return {}
    fixed = {
        field: config[key] for field, key in _LORA_FIELDS.items() if config.get(key) is not None
    }
    names = fixed.get("lora.lora_target_modules")
    if isinstance(names, list):
        fixed["lora.lora_target_modules"] = sorted(map(str, names))
    # PEFT reads a single text as a pattern for whole paths. The field of the job is a list, so the
    # pattern is its only entry.
    elif isinstance(names, str) and names != "all-linear":
        fixed["lora.lora_target_modules"] = [names]
    return fixed


_CODE_KEYS = ("megatron_config", "tokenizer_kwargs")
"""Keys that make PEFT import a module by name, or that let a tokenizer load code."""
_TASK_PHRASES = {"CAUSAL_LM": "generates text", "SEQ_CLS": "predicts classes"}


def find_adapter_refusal(
    folder: Path,
    method: str,
    model: dict[str, Any] | None,
    field: str,
    *,
    generates: bool,
    classes: int = 0,
) -> str | None:
    """Return why an adapter cannot be put on a base model, or None if it can.

    Called before a run with what is known on this machine, and again when the adapter is
    loaded. Checks whose inputs are not known are skipped.

    Args:
        folder: Folder of the adapter.
        method: Method of the job.
        model: config.json of the base model; None if it is not known.
        field: Field of the job file that names the adapter; the message begins with it.
        generates: True if the job writes text.
        classes: Number of classes in the job's rows; 0 if it is not known.
    """
    config = read_config(folder)
    if config is None:
        return f"{field} is {folder}, but its {ADAPTER_FILES[0]} cannot be read"
    kind = config.get("peft_type")
    if kind != PEFT_TYPES.get(method):
        return f"{field} is {folder}, which is of type {kind}, but method is {method}"
    code_key = next((key for key in _CODE_KEYS if config.get(key)), None)
    if code_key:
        return (
            f"{field} is {folder}, whose {ADAPTER_FILES[0]} contains {code_key}, which could run "
            "code: remove that key"
        )
    task = config.get("task_type")
    if task in _TASK_PHRASES and task != ("CAUSAL_LM" if generates else "SEQ_CLS"):
        return (
            f"{field} is {folder}, whose adapter {_TASK_PHRASES[task]} ({task}), but the job has "
            "another task"
        )
    # Whole layers beside the LoRA matrices are only visible in the weights: heads of classifiers,
    # and embeddings that were trained or resized.
    for name, shape in read_weight_shapes(folder / ADAPTER_FILES[1]).items():
        if classes and name.endswith(_LAST_LAYERS) and shape[:1] != (classes,):
            return (
                f"{field} is {folder}, whose head has {shape[0]} classes, but the rows have "
                f"{classes}"
            )
        # PEFT writes `base_layer` into the path of a layer that also has LoRA matrices.
        layer_name = name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        if not name.endswith(".weight") or layer_name not in EMBEDDING_NAMES | HEAD_NAMES:
            continue
        vocab_size = get_text_config(model).get("vocab_size") if model else None
        if vocab_size is not None and shape[:1] != (vocab_size,):
            return (
                f"{field} is {folder}, which was trained with embeddings resized to {shape[0]:,} "
                f"tokens, but the base has {vocab_size:,}: resize the base "
                "(resize_token_embeddings), save it with its tokenizer, and name that folder in "
                "model.model_name_or_path"
            )
        if model and has_tied_embeddings(model):
            return (
                f"{field} is {folder}, which contains its own {layer_name}, but the base's "
                "embeddings and output head share one matrix (tie_word_embeddings): merging the "
                f"adapter would change the other layer too. Use an adapter without {layer_name}"
            )
    return None
