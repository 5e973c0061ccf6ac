"""Configs of axolotl and LLaMA-Factory as job files. What could not be carried over is said, key by key. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import fields
from jobs.aliases import OPTIMIZERS
from jobs.data_files import data_suffix

_SAME = {
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "learning_rate": "train.learning_rate",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "max_steps": "train.max_steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
    "eval_steps": "train.eval_steps",
    "seed": "train.seed",
}

_TOOLS: dict[str, dict[str, str]] = {
    "axolotl": _SAME
    | {
        "base_model": "model.model_name_or_path",
        "revision_of_model": "model.revision",
        "sequence_len": "model.max_length",
        "lora_r": "lora.lora_r",
        "lora_target_modules": "lora.lora_target_modules",
        "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
        "num_epochs": "train.num_train_epochs",
        "optimizer": "train.optim",
        "micro_batch_size": "train.per_device_train_batch_size",
        "eval_batch_size": "train.per_device_eval_batch_size",
        "lr_scheduler": "train.lr_scheduler_type",
        "group_by_length": "train.group_by_length",
        "lora_model_dir": "train.init_adapter",
        "val_set_size": "data.validation_fraction",
        "wandb_project": "tracking.project",
        "wandb_entity": "tracking.entity",
        "default_system_message": "data.system_prompt",
    },
    "llamafactory": _SAME
    | {
        "model_name_or_path": "model.model_name_or_path",
        "model_revision": "model.revision",
        "cutoff_len": "model.max_length",
        "lora_rank": "lora.lora_r",
        "use_dora": "lora.use_dora",
        "use_rslora": "lora.use_rslora",
        "num_train_epochs": "train.num_train_epochs",
        "per_device_train_batch_size": "train.per_device_train_batch_size",
        "per_device_eval_batch_size": "train.per_device_eval_batch_size",
        "optim": "train.optim",
        "lr_scheduler_type": "train.lr_scheduler_type",
        "adapter_name_or_path": "train.init_adapter",
        "max_samples": "data.max_train_samples",
        "val_size": "data.validation_fraction",
        "default_system": "data.system_prompt",
    },
}
TOOLS = tuple(_TOOLS)

_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay")
_MEANS_NOTHING_HERE = {
    "output_dir",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "overwrite_output_dir",
    "plot_loss",
    "report_to",
    "wandb_watch",
    "wandb_name",
    "wandb_log_model",
    "wandb_run_id",
    "do_train",
    "do_eval",
    "strict",
    "overwrite_cache",
    "preprocessing_num_workers",
    "dataloader_num_workers",
    "dataset_prepared_path",
    "saves_per_epoch",
    "evals_per_epoch",
    "eval_strategy",
    "evaluation_strategy",
    "logging_dir",
    "hub_model_id",
    "plugins",
    "debug",
    "local_rank",
    "resume_from_checkpoint",
    "ddp_timeout",
    "save_only_model",
}


@dataclass
class Translation:
    """A job as nested values, and what a reader must know about it."""

    tree: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Keys that could not be carried over, each with why."""
    dropped: list[str] = field(default_factory=list)
    """Keys that say how, not what: they have no meaning here."""
    assumed: list[str] = field(default_factory=list)
    """What the other tool does where its config says nothing, and we would do otherwise."""

    def put(self, path: str, value: Any) -> None:
        """Set a field, a float where the field wants one."""
        fields.put(self.tree, path, value)


def translate(tool: str, config: dict[str, Any], name: str) -> Translation:
    """A config of another tool as a job."""
    made = Translation()
    made.put("name", name)
    made.put("task", "generation")
    special = _AXOLOTL if tool == "axolotl" else _LLAMAFACTORY
    for key, value in config.items():
        if value is None or key in _MEANS_NOTHING_HERE:
            if value is not None:
                made.dropped.append(key)
        elif value is False and key not in special and key not in _TOOLS[tool]:
            made.dropped.append(key)  # what is not done there is not missed here
        elif key in special:
            special[key](value, made)
        elif key in _TOOLS[tool]:
            _carry(_TOOLS[tool][key], key, value, made)
        else:
            made.lost.append(f"{key}: {_shown(key, value)} has no counterpart")
    if tool == "axolotl" and not config.get("adapter"):
        made.put("method", "full")  # what axolotl does without one
    if tool == "llamafactory":
        _its_defaults(config, made)
    return made


_LLAMAFACTORY_DEFAULTS: tuple[tuple[str, str, float], ...] = (
    ("lora_rank", "lora.lora_r", 8),
    ("learning_rate", "train.learning_rate", 5e-5),
    ("per_device_train_batch_size", "train.per_device_train_batch_size", 8),
    ("cutoff_len", "model.max_length", 2048),
    ("warmup_ratio", "train.warmup_ratio", 0.0),
)


def _its_defaults(config: dict[str, Any], made: Translation) -> None:
    """LLaMA-Factory's defaults that differ from ours, where the config leaves them to it."""
    if made.tree.get("method", "lora") != "full" and "lora_alpha" not in config:
        made.put("lora.lora_alpha", "2*lora_r")
        made.assumed.append("lora_alpha: twice the rank, as LLaMA-Factory has it where it is left out")
    for key, path, value in _LLAMAFACTORY_DEFAULTS:
        if key not in config and (key != "lora_rank" or made.tree.get("method", "lora") != "full"):
            made.put(path, value)
            made.assumed.append(f"{key}: {value:g}, LLaMA-Factory's default")


def without_refused(made: Translation, refused: list[tuple[str, str]]) -> bool:
    """Drop the fields that our own check refuses, each with its sentence; whether there was one to drop."""
    dropped = False
    for path, sentence in refused:
        block, _, leaf = path.rpartition(".")
        holder = fields.get(made.tree, block) if block else made.tree
        if isinstance(holder, dict) and leaf in holder and path not in ("model.model_name_or_path", "name", "task"):
            del holder[leaf]
            made.lost.append(sentence)
            dropped = True
    return dropped


def _shown(key: str, value: Any) -> str:
    """A value in words, unless its key says that it is a secret."""
    secret = any(word in key.lower() for word in ("token", "key", "secret", "password"))
    if secret:
        return "its value (not shown)"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _carry(path: str, key: str, value: Any, made: Translation) -> None:
    if isinstance(value, str) and fields.is_number(path):
        value = _as_number(value, path)
    elif isinstance(value, str) and value in ("true", "True", "false", "False"):
        value = value in ("true", "True")
    if path == "train.lr_scheduler_type" and value not in _SCHEDULES:
        made.lost.append(f"{key}: {value!r} is none of {', '.join(_SCHEDULES)}")
    elif path == "train.optim" and OPTIMIZERS.get(value, value) not in OPTIMIZERS.values():
        made.lost.append(f"{key}: {value!r} is none of {', '.join(sorted(set(OPTIMIZERS.values())))}")
    elif path == "train.optim":
        made.put(path, OPTIMIZERS.get(value, value))
    elif path == "data.validation_fraction" and not (isinstance(value, int | float) and 0 < value < 1):
        made.lost.append(f"{key}: {value!r} is not a share of the rows; give data.validation_file")
    elif path == "lora.lora_target_modules" and value in ("all", "all-linear"):
        made.put(path, "all-linear")
    else:
        made.put(path, value)


def _as_number(text: str, path: str) -> Any:
    """YAML 1.1 readers take `2e-4` for a text; their users mean the number."""
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if fields.leaves()[path].annotation in (int, int | None) and value.is_integer() else value


def _method(key: str) -> Callable[[Any, Translation], None]:
    def take(value: Any, made: Translation) -> None:
        if value in ("lora", "qlora", "full"):
            if made.tree.get("method") != "qlora":  # LoRA on a base that load_in_4bit or _8bit quantises is our qlora
                made.put("method", value)
        else:
            made.lost.append(f"{key}: {value!r} is not a method here; lora is used")

    return take


def _quantised(key: str, quant_type: str | None = None) -> Callable[[Any, Translation], None]:
    """A quantised base: `quant_type` where the key itself says how, else by the number of bits."""

    def take(value: Any, made: Translation) -> None:
        kind = {4: "nf4", 8: "int8"}.get(value) if quant_type is None else quant_type
        if value is False:
            return
        if kind is None:
            made.lost.append(f"{key}: {value!r} is not 4 or 8, which a base is quantised to here")
            return
        made.put("method", "qlora")
        made.put("qlora.quant_type", kind)

    return take


def _lost(
    reason: str, *, unless: tuple[Any, ...] = (False, "no")
) -> Callable[[str], Callable[[Any, Translation], None]]:
    def named(key: str) -> Callable[[Any, Translation], None]:
        def take(value: Any, made: Translation) -> None:
            if value not in unless:
                made.lost.append(f"{key}: {value!r} {reason}")

        return take

    return named


_distributed = _lost("is a launcher's setting; see resources in the job file")
_packing = _lost("is not done here; rows are batched by length instead (train.group_by_length)")


def _precision(key: str, ours: str) -> Callable[[Any, Translation], None]:
    def take(value: Any, made: Translation) -> None:
        if value is True:
            made.put("train.mixed_precision", ours)
        elif value not in (False, "auto"):
            made.lost.append(f"{key}: {value!r} is not understood")

    return take


def _axolotl_data(value: Any, made: Translation) -> None:
    sets = value if isinstance(value, list) and value else [value or {}]
    if len(sets) > 1:
        made.lost.append(f"datasets: only the first of {len(sets)} is carried over; put the rows into one file")
    first = sets[0] if isinstance(sets[0], dict) else {"path": sets[0]}
    _source(str(first.get("path", "")), made)
    kinds = {"alpaca": "instruction", "chat_template": "messages", "sharegpt": "messages", "completion": "text"}
    kind = str(first.get("type", ""))
    if kind in kinds:
        made.put("data.format", kinds[kind])
    elif kind:
        made.lost.append(f"datasets.type: {kind!r} is not a format here; see data.format")
    if first.get("field_messages"):
        made.put("data.messages_column", str(first["field_messages"]))
    for key, usual in _AXOLOTL_TURNS.items():
        if first.get(key, usual) not in (usual, {"role": "role", "content": "content"}):
            made.lost.append(f"datasets.{key}: {first[key]!r} has no counterpart; here it is as with {usual!r} there")
    for key in first:
        if key not in ("path", "type", "ds_type", "field_messages", *_AXOLOTL_TURNS):
            made.lost.append(f"datasets.{key}: {first[key]!r} has no counterpart")


_AXOLOTL_TURNS: dict[str, Any] = {
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "message_property_mappings": {"role": "from", "content": "value"},
}
"""Settings of axolotl's conversations, as rows are read and learnt here."""


def _whole_text(key: str) -> Callable[[Any, Translation], None]:
    """Carry over that what the user says is learnt as well (`train_on_inputs`, `train_on_prompt`)."""

    def take(value: Any, made: Translation) -> None:
        if value is True:
            made.put("data.assistant_only_loss", False)
        elif value is not False:
            made.lost.append(f"{key}: {value!r} is not understood")

    return take


def _mask_history(value: Any, made: Translation) -> None:
    if value is True:
        made.put("data.train_on_turns", "last")
    elif value is not False:
        made.lost.append(f"mask_history: {value!r} is not understood")


def _enable_thinking(value: Any, made: Translation) -> None:
    made.put("data.chat_template_kwargs", {"enable_thinking": value})


def _axolotl_template(value: Any, made: Translation) -> None:
    if value not in ("tokenizer_default", "jinja"):
        made.lost.append(
            f"chat_template: {value!r} is one of axolotl's own templates, and here the tokenizer's is used; another "
            "goes into a file that data.chat_template names"
        )


def _template_text(value: Any, made: Translation) -> None:
    made.put("data.chat_template", value)


def _source(name: str, made: Translation) -> None:
    made.put("data.train_file" if data_suffix(Path(name)) else "data.dataset_name", name)


def _llamafactory_data(value: Any, made: Translation) -> None:
    names = [part.strip() for part in str(value).split(",")]
    if len(names) > 1:
        made.lost.append(
            f"dataset: only {names[0]!r} of {', '.join(names)} is carried over; put the rows into one file"
        )
    _source(names[0], made)
    if "data" in made.tree and "dataset_name" in made.tree["data"]:
        made.lost.append(
            f"dataset: {names[0]!r} is a name of dataset_info.json there; put its file or hub id into data"
        )


def _target(value: Any, made: Translation) -> None:
    if value in ("all", "all-linear"):
        made.put("lora.lora_target_modules", "all-linear")
    else:
        names = value if isinstance(value, list) else str(value).split(",")
        made.put("lora.lora_target_modules", [str(part).strip() for part in names])


def _target_linear(value: Any, made: Translation) -> None:
    if value is True:
        made.put("lora.lora_target_modules", "all-linear")


def _stage(value: Any, made: Translation) -> None:
    if value != "sft":
        made.lost.append(f"stage: {value!r} is another kind of training; here it is supervised fine-tuning (sft)")


def _attention(value: Any, made: Translation) -> None:
    if value is True:
        made.put("model.attn_implementation", "flash_attention_2")


_AXOLOTL: dict[str, Callable[[Any, Translation], None]] = {
    "adapter": _method("adapter"),
    "train_on_inputs": _whole_text("train_on_inputs"),
    "chat_template": _axolotl_template,
    "chat_template_jinja": _template_text,
    "flash_attention": _attention,
    "special_tokens": _lost("is not set here: the tokenizer's own are used")("special_tokens"),
    "datasets": _axolotl_data,
    "lora_target_linear": _target_linear,
    "load_in_4bit": _quantised("load_in_4bit", "nf4"),
    "load_in_8bit": _quantised("load_in_8bit", "int8"),
    "bf16": _precision("bf16", "bf16"),
    "fp16": _precision("fp16", "fp16"),
    "deepspeed": _distributed("deepspeed"),
    "fsdp": _distributed("fsdp"),
    "fsdp_config": _distributed("fsdp_config"),
    "sample_packing": _packing("sample_packing"),
    "trust_remote_code": _lost("needs a model.revision of a full commit here")("trust_remote_code"),
    "pad_to_sequence_len": _packing("pad_to_sequence_len"),
}
_LLAMAFACTORY: dict[str, Callable[[Any, Translation], None]] = {
    "finetuning_type": _method("finetuning_type"),
    "mask_history": _mask_history,
    "train_on_prompt": _whole_text("train_on_prompt"),
    "enable_thinking": _enable_thinking,
    "stage": _stage,
    "dataset": _llamafactory_data,
    "lora_target": _target,
    "quantization_bit": _quantised("quantization_bit"),
    "bf16": _precision("bf16", "bf16"),
    "fp16": _precision("fp16", "fp16"),
    "deepspeed": _distributed("deepspeed"),
    "packing": _packing("packing"),
    "trust_remote_code": _lost("needs a model.revision of a full commit here")("trust_remote_code"),
    "template": _lost("is taken from the tokenizer's own chat template")("template"),
}
