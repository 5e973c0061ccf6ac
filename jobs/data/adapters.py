"""What a PEFT adapter on disk says of itself: what it fixes for whoever continues it, and what stands against that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.weight_names import weight_shapes
from lorafleet.jobs.schema.model_kinds import EMBEDDING_NAMES, HEAD_NAMES, has_tied_embeddings, text_config

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT keeps an adapter in."""
PEFT_TYPES = {"lora": "LORA", "qlora": "LORA", "prompt_tuning": "PROMPT_TUNING"}
"""Method -> PEFT's name of its adapters."""
_LORA_FIELDS = {
    "lora.lora_r": "r",
    "lora.lora_alpha": "lora_alpha",
    "lora.lora_target_modules": "target_modules",
    "lora.use_rslora": "use_rslora",
    "lora.use_dora": "use_dora",
}
"""Field here -> key of adapter_config.json, of what an adapter fixes."""
DROPOUT = "lora.lora_dropout"
"""The field that an adapter has a value of, but that may be changed."""


_LAST_LAYERS = ("classifier.weight", ".score.weight", "classifier.out_proj.weight")
"""How the weights of a classifier's last layer end: one row for each class."""


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return an adapter's configuration; None where there is none that can be read."""
    try:
        value = json.loads(files.read_plain_text(folder / ADAPTER_FILES[0]))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fixed_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return what an adapter fixes, by the field here: its rank, its alpha, its layers."""
    if config.get("peft_type") == "PROMPT_TUNING":
        return {"prompt_tuning.num_virtual_tokens": config.get("num_virtual_tokens")}
    if config.get("peft_type") != "LORA":
        return {}
    fixed = {field: config[key] for field, key in _LORA_FIELDS.items() if config.get(key) is not None}
    names = fixed.get("lora.lora_target_modules")
    if isinstance(names, list):
        fixed["lora.lora_target_modules"] = sorted(map(str, names))
    elif isinstance(names, str) and names != "all-linear":
        fixed["lora.lora_target_modules"] = [names]
    return fixed


_IMPORTS = ("megatron_config", "tokenizer_kwargs")
"""Keys with which PEFT imports a module by name, or lets a tokenizer bring code."""
_TASKS = {"CAUSAL_LM": "writes text", "SEQ_CLS": "names classes"}


def adapter_refusal(
    folder: Path, method: str, model: dict[str, Any] | None, field: str, *, generates: bool, classes: int = 0
) -> str | None:
    """Say why an adapter cannot be put on a base with the config `model`; None where nothing is against it.

    `generates`: whether the job writes text. `classes`: how many it tells apart; 0 where that is not known.
    """
    config = read_config(folder)
    if config is None:
        return f"{field} is {folder}, but its {ADAPTER_FILES[0]} cannot be read"
    kind = config.get("peft_type")
    if kind != PEFT_TYPES.get(method):
        return f"{field} is {folder}, which is of type {kind}, but method is {method}"
    code = next((key for key in _IMPORTS if config.get(key)), None)
    if code:
        return f"{field} is {folder}, whose {ADAPTER_FILES[0]} has {code}, which names code to run"
    task = config.get("task_type")
    if task in _TASKS and task != ("CAUSAL_LM" if generates else "SEQ_CLS"):
        return f"{field} is {folder}, which {_TASKS[task]} ({task}), and the job's task is another"
    for name, shape in weight_shapes(folder / ADAPTER_FILES[1]).items():
        if classes and name.endswith(_LAST_LAYERS) and shape[:1] != (classes,):
            return f"{field} is {folder}, whose head tells {shape[0]} classes apart, but the rows have {classes}"
        table = name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        if not name.endswith(".weight") or table not in EMBEDDING_NAMES | HEAD_NAMES:
            continue
        vocabulary = text_config(model).get("vocab_size") if model else None
        if vocabulary is not None and shape[:1] != (vocabulary,):
            return (
                f"{field} is {folder}, which was trained with the embeddings resized to {shape[0]:,} tokens, but the "
                f"base has {vocabulary:,}: resize the base (resize_token_embeddings), save it with its tokenizer, and "
                "name that folder in model.model_name_or_path"
            )
        if model and has_tied_embeddings(model):
            return (
                f"{field} is {folder}, which brings a whole {table} of its own, but the base's embeddings and output "
                "head are one matrix (tie_word_embeddings): merged, it would say something else"
            )
    return None
