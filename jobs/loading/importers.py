"""Translate configs of axolotl, LLaMA-Factory and TRL to job files. Pure.

Every key of the other tool is translated, lost with a reason, or dropped because it has
no meaning here. Defaults of the other tool that differ from ours are written into the
job. Nothing is ignored silently, so that the user can see whether the job trains what
the config trained.

To support a new key, add it to `_TOOL_FIELDS` if its value can be copied, or write a
converter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafleet.jobs.data.data_files import get_data_suffix
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.aliases import OPTIMIZERS

_COMMON_FIELDS = {
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
    "group_by_length": "train.group_by_length",
    "early_stopping_patience": "train.early_stopping_patience",
}

_TOOL_FIELDS: dict[str, dict[str, str]] = {
    "axolotl": _COMMON_FIELDS
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
        "lora_model_dir": "train.init_adapter",
        "val_set_size": "data.validation_fraction",
        "wandb_project": "tracking.project",
        "wandb_entity": "tracking.entity",
        "default_system_message": "data.system_prompt",
    },
    "llamafactory": _COMMON_FIELDS
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
        "double_quantization": "qlora.use_double_quant",
    },
    "trl": _COMMON_FIELDS
    | {
        "model_name_or_path": "model.model_name_or_path",
        "model_revision": "model.revision",
        "dtype": "model.dtype",
        "torch_dtype": "model.dtype",
        "max_length": "model.max_length",
        "max_seq_length": "model.max_length",
        "dataset_config": "data.dataset_config_name",
        "dataset_text_field": "data.text_column",
        "chat_template": "data.chat_template",
        "chat_template_path": "data.chat_template",
        "lora_r": "lora.lora_r",
        "lora_target_modules": "lora.lora_target_modules",
        "use_dora": "lora.use_dora",
        "use_rslora": "lora.use_rslora",
        "use_bnb_nested_quant": "qlora.use_double_quant",
        "num_train_epochs": "train.num_train_epochs",
        "per_device_train_batch_size": "train.per_device_train_batch_size",
        "per_device_eval_batch_size": "train.per_device_eval_batch_size",
        "optim": "train.optim",
        "lr_scheduler_type": "train.lr_scheduler_type",
        "bnb_4bit_compute_dtype": "qlora.compute_dtype",
    },
}

_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay")
# Keys about files, logging and processes, which lorafleet decides itself and which do not change
# what is trained.
_IGNORED_KEYS = {
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
    "logging_strategy",
    "log_level",
    "dataset_num_proc",
    "dataset_processes",
    "pad_to_sequence_len",
    "gradient_checkpointing_kwargs",
    "do_predict",
    "push_to_hub",
    "hub_strategy",
    "remove_unused_columns",
    "eval_table_size",
    "tokenizer_type",
    "model_type",
    "include_tokens_per_second",
    "load_best_model_at_end",
    "run_name",
    "metric_for_best_model",
    "greater_is_better",
    "eval_sample_packing",
}


@dataclass
class Translation:
    """A job as nested values, with notes for the reader.

    `tree` has the layout of a job file and is not validated yet:
    `commands/import_config.py` loads it, and drops what the loader refuses. The notes
    become comments of the job file.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Keys that could not be translated, each with the reason."""
    dropped: list[str] = field(default_factory=list)
    """Keys that were dropped because they have no meaning in lorafleet."""
    assumed: list[str] = field(default_factory=list)
    """Defaults of the other tool that the job now sets explicitly."""
    otherwise: list[str] = field(default_factory=list)
    """Things that the other tool does differently from lorafleet."""

    def set_field(self, path: str, value: Any) -> None:
        """Set a field, as a float if the field requires one."""
        fields.set_value(self.tree, path, value)


def translate_config(tool: str, config: dict[str, Any], name: str) -> Translation:
    """Translate a config of another tool to a job.

    Args:
        tool: `axolotl`, `llamafactory` or `trl`.
        config: The content of the config file. Values of any type are accepted; those that
            cannot be interpreted are reported in `lost`.
        name: Name of the job.
    """
    translation = Translation()
    translation.set_field("name", name)
    translation.set_field("task", "generation")
    converters = _CONVERTERS[tool]
    config = _normalise_config(config)
    for key, value in config.items():
        if value is None:
            continue
        if key in _IGNORED_KEYS and key not in converters:
            translation.dropped.append(key)
        elif value is False and key not in converters and key not in _TOOL_FIELDS[tool]:
            translation.dropped.append(key)  # a feature that is off needs no counterpart
        elif key in converters or key in _TOOL_FIELDS[tool]:
            try:
                if key in converters:
                    converters[key](value, translation)
                else:
                    _translate_field(_TOOL_FIELDS[tool][key], key, value, translation)
            except (
                TypeError,
                ValueError,
                AttributeError,
            ):  # the value has the wrong type, such as a list instead of a string
                translation.lost.append(f"{key}: {_format_value(key, value)} cannot be interpreted")
        else:
            translation.lost.append(f"{key}: {_format_value(key, value)} has no counterpart")
    if tool == "axolotl" and not config.get("adapter"):
        translation.set_field("method", "full")  # axolotl's default without an adapter
    if tool == "trl" and translation.tree.get("method") != "qlora":
        translation.set_field(
            "method", "lora" if config.get("use_peft") else "full"
        )  # TRL's default without use_peft
    _add_tool_defaults(tool, config, translation)
    return translation


_BOOLEAN_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
"""Words that YAML 1.1 (which these tools read) and the tools' own parsers read as true and
false.
"""
_QUANTISATION_KEYS = ("load_in_4bit", "load_in_8bit", "quantization_bit")
"""Keys that state whether a base is quantised. Keys that state how are processed after them."""


def _normalise_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with words for true and false converted to booleans.

    Values without effect become None, and the keys of `_QUANTISATION_KEYS` come first:
    converters run in the order of the keys, and those of the quantisation's details need to
    know its bits.
    """
    values = {str(key): value for key, value in config.items()}
    for key, value in values.items():
        if isinstance(value, str) and value.lower() in _BOOLEAN_WORDS:
            values[key] = _BOOLEAN_WORDS[value.lower()]
    steps = _parse_number(values.get("max_steps"))
    if steps is not None and steps < 1:
        values["max_steps"] = None  # in Hugging Face this means that the number of epochs counts
    warmup = _parse_number(values.get("warmup_steps"))
    if warmup == 0 and _parse_number(values.get("warmup_ratio")):
        values["warmup_steps"] = None  # there, warmup_steps takes precedence only if it is above 0
    return {
        key: values[key] for key in sorted(values, key=lambda key: key not in _QUANTISATION_KEYS)
    }


def _parse_number(value: Any) -> float | None:
    try:
        return (
            float(value)
            if isinstance(value, int | float | str) and not isinstance(value, bool)
            else None
        )
    except ValueError:
        return None


_DEFAULTS: dict[str, tuple[tuple[tuple[str, ...], str, Any], ...]] = {
    "axolotl": (
        (("num_epochs", "max_steps"), "train.num_train_epochs", 1),
        (("micro_batch_size",), "train.per_device_train_batch_size", 1),
        (("lr_scheduler",), "train.lr_scheduler_type", "cosine"),
        (("warmup_ratio", "warmup_steps"), "train.warmup_ratio", 0.03),
        (("group_by_length",), "train.group_by_length", False),
    ),
    "llamafactory": (
        (("lora_rank",), "lora.lora_r", 8),
        (("learning_rate",), "train.learning_rate", 5e-5),
        (("per_device_train_batch_size",), "train.per_device_train_batch_size", 8),
        (("cutoff_len",), "model.max_length", 2048),
        (("warmup_ratio", "warmup_steps"), "train.warmup_ratio", 0.0),
        (("group_by_length",), "train.group_by_length", False),
        (
            ("gradient_checkpointing", "disable_gradient_checkpointing"),
            "train.gradient_checkpointing",
            True,
        ),
    ),
    "trl": (
        (("learning_rate",), "train.learning_rate", 2e-5),
        (("per_device_train_batch_size",), "train.per_device_train_batch_size", 8),
        (("max_length", "max_seq_length"), "model.max_length", 1024),
        (("dtype", "torch_dtype"), "model.dtype", "float32"),
        (("warmup_ratio", "warmup_steps"), "train.warmup_ratio", 0.0),
        (("gradient_checkpointing",), "train.gradient_checkpointing", True),
        (("group_by_length",), "train.group_by_length", False),
        (("lora_dropout",), "lora.lora_dropout", 0.05),
        (("use_bnb_nested_quant",), "qlora.use_double_quant", False),
    ),
}
"""(keys of the tool, field here, the tool's default), where the default differs from ours."""
_DISPLAY_NAMES = {"axolotl": "axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL"}


def _add_tool_defaults(tool: str, config: dict[str, Any], translation: Translation) -> None:
    """Set the tool's defaults that the config leaves out, and report the differences.

    Only defaults that differ from ours are listed in `_DEFAULTS`. Without them, a config
    that leaves out the learning rate would be trained with ours.

    Args:
        tool: Name of the tool.
        config: The config, as normalised.
        translation: The job so far; fields that it sets are left alone.
    """
    method = translation.tree.get("method", "lora")
    # Not in `_DEFAULTS`, because this default follows from the rank.
    if tool == "llamafactory" and method != "full" and config.get("lora_alpha") is None:
        translation.set_field("lora.lora_alpha", "2*lora_r")
        translation.assumed.append("lora_alpha: twice the rank, LLaMA-Factory's default")
    for keys, path, value in _DEFAULTS[tool]:
        block = path.partition(".")[0]
        is_unused = (block == "lora" and method == "full") or (
            block == "qlora" and method != "qlora"
        )
        if (
            is_unused
            or any(config.get(key) is not None for key in keys)
            or fields.get_value(translation.tree, path) is not None
        ):
            continue
        translation.set_field(path, value)
        translation.assumed.append(
            f"{keys[0]}: {_format_value(keys[0], value)}, {_DISPLAY_NAMES[tool]}'s default"
        )
    _report_differences(tool, config, translation)


def _report_differences(tool: str, config: dict[str, Any], translation: Translation) -> None:
    """Report what the tool does and no field here does."""
    has_no_share = not config.get("val_set_size" if tool == "axolotl" else "val_size")
    if tool != "trl" and has_no_share and "validation_file" not in translation.tree.get("data", {}):
        translation.otherwise.append(
            f"{_DISPLAY_NAMES[tool]} trains on all rows; lorafleet holds 0.1 of them back "
            "(data.validation_fraction)"
        )
    if tool == "axolotl":
        translation.otherwise.append(
            "rows longer than sequence_len: axolotl drops them, lorafleet truncates them"
        )
        if config.get("warmup_ratio") is None and config.get("warmup_steps") is None:
            translation.otherwise.append(
                "warm-up: 3 % of the steps in both, but at most 100 steps in axolotl"
            )
    if tool == "trl" and config.get("use_peft") and not config.get("lora_target_modules"):
        translation.otherwise.append(
            "lora_target_modules: with TRL, PEFT chooses them by the model; in lorafleet the "
            "default is all-linear"
        )
    if (
        tool == "trl"
        and not config.get("assistant_only_loss")
        and config.get("completion_only_loss") is None
    ):
        translation.otherwise.append(
            "conversations: TRL learns every token, lorafleet only the assistant's turns (set "
            "data.assistant_only_loss: false to do as TRL)"
        )


def drop_refused_fields(translation: Translation, refused: list[tuple[str, str]]) -> bool:
    """Drop the fields that lorafleet's own check refuses, and record each message.

    The caller loads the job again until nothing is refused. Model, name and task are never
    dropped: a job without them is none.

    Args:
        translation: The job; changed in place.
        refused: (dotted path, message) of each problem.

    Returns:
        True if a field was dropped.
    """
    dropped = False
    for path, sentence in refused:
        # A metric without its name is none, so the whole block is dropped.
        path = "search.metric" if path == "search.metric.name" else path
        if (
            path
            and path not in ("model.model_name_or_path", "name", "task")
            and fields.remove_value(translation.tree, path)
        ):
            translation.lost.append(sentence)
            dropped = True
    return dropped


_SECRET_WORDS = {"token", "key", "apikey", "secret", "password"}


def _format_value(key: str, value: Any) -> str:
    """Return a value as text, unless its key suggests that it is a secret.

    Notes are printed and written into the job file. Blocks are never shown, because a
    secret may be inside; neither are texts with an @, which may be URLs with a password.
    """
    secret_words = _SECRET_WORDS & set(key.lower().split("_"))
    if secret_words or isinstance(value, dict) or "@" in str(value):
        return "its value (not shown)"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _translate_field(path: str, key: str, value: Any, translation: Translation) -> None:
    """Set a field whose value can be copied, or report why it cannot.

    Args:
        path: Dotted field of the job.
        key: The tool's key, for messages.
        value: The tool's value.
        translation: Receives the result.
    """
    if isinstance(value, str) and fields.is_number(path):
        value = _parse_field_number(value, path)
    if path == "train.lr_scheduler_type" and value not in _SCHEDULES:
        translation.lost.append(f"{key}: {value!r} is not one of {', '.join(_SCHEDULES)}")
    elif path == "train.optim" and OPTIMIZERS.get(value, value) not in OPTIMIZERS.values():
        translation.lost.append(
            f"{key}: {value!r} is not one of {', '.join(sorted(set(OPTIMIZERS.values())))}"
        )
    elif path == "train.optim":
        translation.set_field(path, OPTIMIZERS.get(value, value))
    elif path == "data.validation_fraction" and value == 0:
        return  # reported by _report_differences
    elif path == "data.validation_fraction" and not (
        isinstance(value, int | float) and 0 < value < 1
    ):
        translation.lost.append(
            f"{key}: {value!r} is not a fraction of the rows; set data.validation_file"
        )
    elif path == "lora.lora_target_modules" and value in ("all", "all-linear"):
        translation.set_field(path, "all-linear")
    # PEFT matches a single text as a regular expression against whole paths.
    elif (
        path == "lora.lora_target_modules"
        and isinstance(value, str)
        and set(value) & set("()[]*+?|^$\\")
    ):
        translation.lost.append(
            f"{key}: {value!r} is a pattern, but lorafleet needs names of layers (a name selects "
            "all layers whose path ends with it)"
        )
    else:
        translation.set_field(path, value)


def _parse_field_number(text: str, path: str) -> Any:
    """Convert text to a number if it is one.

    YAML 1.1 readers read `2e-4` as text, but their users mean the number.
    """
    try:
        value = float(text)
    except ValueError:
        return text
    return (
        int(value)
        if fields.get_leaf_fields()[path].annotation in (int, int | None) and value.is_integer()
        else value
    )


def _build_method_converter(key: str) -> Callable[[Any, Translation], None]:
    def take(value: Any, translation: Translation) -> None:
        if value in ("lora", "qlora", "full"):
            if (
                translation.tree.get("method") != "qlora"
            ):  # LoRA on a base quantised by load_in_4bit or load_in_8bit is method qlora
                translation.set_field("method", value)
        else:
            translation.lost.append(f"{key}: {value!r} is not a method of lorafleet; lora is used")

    return take


def _build_quantisation_converter(
    key: str, quant_type: str | None = None
) -> Callable[[Any, Translation], None]:
    """Return a converter for a quantised base.

    Args:
        key: The tool's key, for messages.
        quant_type: Format that the key itself states (`nf4`, `int8`). None: the value is
            the number of bits.
    """

    def take(value: Any, translation: Translation) -> None:
        bits = _parse_number(value)
        kind = (
            {4: "nf4", 8: "int8"}.get(int(bits))
            if quant_type is None and bits is not None
            else quant_type
        )
        if value is False:
            return
        if value is not True and quant_type is not None:
            translation.lost.append(f"{key}: {value!r} is neither true nor false")
            return
        if kind is None:
            translation.lost.append(
                f"{key}: {value!r} is not 4 or 8, the bits that lorafleet can quantise to"
            )
            return
        translation.set_field("method", "qlora")
        translation.set_field("qlora.quant_type", kind)

    return take


def _build_lost_converter(
    reason: str, *, unless: tuple[Any, ...] = (False, "no")
) -> Callable[[str], Callable[[Any, Translation], None]]:
    """Return a function that builds converters which only report a key.

    Args:
        reason: End of the message, after the key and its value.
        unless: Values that are not reported, because lorafleet does the same.
    """

    def build(key: str) -> Callable[[Any, Translation], None]:
        def take(value: Any, translation: Translation) -> None:
            if value not in unless:
                translation.lost.append(f"{key}: {value!r} {reason}")

        return take

    return build


def _translate_warmup_steps(value: Any, translation: Translation) -> None:
    """Translate a number of steps, or a share below 1, which newer Hugging Face accepts.

    A number of steps takes precedence over `warmup_ratio` in these tools, whatever the
    order of the keys.
    """
    steps = _parse_field_number(value, "train.warmup_steps") if isinstance(value, str) else value
    if isinstance(steps, float) and 0 < steps < 1:
        translation.set_field("train.warmup_ratio", steps)
    else:
        translation.set_field(
            "train.warmup_steps",
            int(steps) if isinstance(steps, float) and steps.is_integer() else steps,
        )
        fields.remove_value(translation.tree, "train.warmup_ratio")  # there, steps take precedence


def _translate_warmup_ratio(value: Any, translation: Translation) -> None:
    if fields.get_value(translation.tree, "train.warmup_steps") is None:
        _translate_field("train.warmup_ratio", "warmup_ratio", value, translation)


def _build_packing_converter(key: str) -> Callable[[Any, Translation], None]:
    """Return a converter for packing. Packed examples never see their neighbours here."""

    def take(value: Any, translation: Translation) -> None:
        if value is True:
            translation.set_field("train.packing", True)
            if key == "packing":
                translation.otherwise.append(
                    "packing: in lorafleet, packed examples do not attend to each other"
                )
        elif value is not False:
            translation.lost.append(f"{key}: {value!r} cannot be interpreted")

    return take


def _translate_report_to(value: Any, translation: Translation) -> None:
    names = value if isinstance(value, list) else [value]
    if "wandb" not in names and "all" not in names:
        translation.set_field("tracking.mode", "disabled")


def _build_attention_converter(key: str) -> Callable[[Any, Translation], None]:
    """Return a converter for the attention implementation.

    Implementations that work everywhere are translated. The others depend on the machine and
    are reported.
    """

    def take(value: Any, translation: Translation) -> None:
        if value in ("sdpa", "eager", "flex_attention"):
            translation.set_field("model.attn_implementation", value)
        # The job may run on another machine than the config was written for, so a package that
        # needs a GPU is not carried over.
        elif value not in (False, "auto", "disabled"):
            translation.lost.append(
                f"{key}: {_format_value(key, value)} is replaced by model.attn_implementation: "
                "auto; set flash_attention_2 if you have a GPU and the package flash-attn"
            )

    return take


_build_launcher_converter = _build_lost_converter(
    "is a setting of a launcher; see resources in the job file"
)


def _build_precision_converter(
    key: str, mixed_precision: str
) -> Callable[[Any, Translation], None]:
    def take(value: Any, translation: Translation) -> None:
        if value is True:
            translation.set_field("train.mixed_precision", mixed_precision)
        elif value not in (False, "auto"):
            translation.lost.append(f"{key}: {value!r} cannot be interpreted")

    return take


_AXOLOTL_FORMATS = {
    "alpaca": "instruction",
    "chat_template": "messages",
    "sharegpt": "messages",
    "completion": "text",
}
_AXOLOTL_CONVERSATION_SETTINGS: dict[str, Any] = {
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
}
"""axolotl's settings for conversations, with the values that match how rows are learnt here."""
_AXOLOTL_FIELDS = {
    "name": "data.dataset_config_name",
    "revision": "data.dataset_revision",
    "field": "data.text_column",
}
_MESSAGE_KEYS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})
_ROLES = {
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt"},
    "system": {"system"},
    "tool": {"tool"},
}


def _translate_axolotl_data(value: Any, translation: Translation) -> None:
    """Translate axolotl's `datasets`. Only the first data set is translated.

    Every key of it is either translated, checked to be what lorafleet does anyway, or
    reported.

    Args:
        value: The list of data sets.
        translation: Receives the result.
    """
    datasets = value if isinstance(value, list) and value else [value or {}]
    if len(datasets) > 1:
        translation.lost.append(
            f"datasets: only the first of {len(datasets)} is translated; put all rows into one file"
        )
    first = dict(datasets[0]) if isinstance(datasets[0], dict) else {"path": datasets[0]}
    _set_data_source(_pop_dataset_path(first), translation)
    kind = first.pop("type", None)
    if isinstance(kind, str) and kind in _AXOLOTL_FORMATS:
        translation.set_field("data.format", _AXOLOTL_FORMATS[kind])
    elif kind:
        translation.lost.append(
            f"datasets.type: {kind!r} is not a format of lorafleet; see data.format"
        )
    messages = first.pop("field_messages", None)
    if messages and _AXOLOTL_FORMATS.get(str(kind)) == "messages":
        translation.set_field("data.messages_column", str(messages))
    _translate_message_keys(first, translation)
    for key, expected in _AXOLOTL_CONVERSATION_SETTINGS.items():
        if first.get(key, expected) != expected:
            translation.lost.append(
                f"datasets.{key}: {first[key]!r} has no counterpart; lorafleet behaves as with "
                f"{expected!r}"
            )
        first.pop(key, None)
    for key, path in _AXOLOTL_FIELDS.items():
        if first.get(key):
            translation.set_field(path, str(first.pop(key)))
    for key, setting in first.items():
        if setting is not None and key != "ds_type" and not (key == "split" and setting == "train"):
            translation.lost.append(f"datasets.{key}: {setting!r} has no counterpart")


def _pop_dataset_path(first: dict[str, Any]) -> str:
    """Remove and return the file or hub id of a data set.

    `data_files` names the file if `path` is a loader of `datasets`.

    Args:
        first: The data set's block; `path` and, if used, `data_files` are removed.
    """
    path = str(first.pop("path", ""))
    data_file = first.get("data_files")
    data_file = data_file[0] if isinstance(data_file, list) and len(data_file) == 1 else data_file
    if isinstance(data_file, str) and path in ("json", "csv", "parquet", "text"):
        first.pop("data_files")
        return data_file
    return path


def _translate_message_keys(first: dict[str, Any], translation: Translation) -> None:
    """Remove the names of a message's keys and roles, and report those that are not supported.

    Both common namings (role and content, from and value) are read as they are.
    """
    mapping = first.pop("message_property_mappings", None) or {}
    if not isinstance(mapping, dict):
        translation.lost.append(
            f"datasets.message_property_mappings: {mapping!r} cannot be interpreted"
        )
        mapping = {}
    mapping = dict(mapping)
    for key, name in (("message_field_role", "role"), ("message_field_content", "content")):
        if first.get(key):
            mapping.setdefault(name, first[key])
        first.pop(key, None)
    message_keys = {"role": "role", "content": "content"} | mapping
    if mapping and not any(message_keys == supported for supported in _MESSAGE_KEYS):
        description = ", ".join(
            f"{key_here} is {key_there!r}" for key_here, key_there in mapping.items()
        )
        translation.lost.append(
            f"datasets.message_property_mappings: {description}, but rows must have role and "
            "content, or from and value"
        )
    roles = first.pop("roles", None) or {}
    for role, names in roles.items() if isinstance(roles, dict) else ():
        role_names = {
            str(role_name) for role_name in (names if isinstance(names, list) else [names])
        }
        unknown = sorted(role_names - _ROLES.get(str(role), set()))
        if unknown:
            translation.lost.append(
                f"datasets.roles: {', '.join(map(str, unknown))} is not supported as {role}; "
                "rename it in the rows"
            )


def _translate_test_datasets(value: Any, translation: Translation) -> None:
    datasets = value if isinstance(value, list) else [value]
    path = datasets[0].get("path") if datasets and isinstance(datasets[0], dict) else None
    if len(datasets) > 1:
        translation.lost.append(
            f"test_datasets: only the first of {len(datasets)} is translated; put all rows into "
            "one file"
        )
    if isinstance(path, str) and get_data_suffix(Path(path)):
        translation.set_field("data.validation_file", path)
    else:
        translation.lost.append(
            f"test_datasets: {value!r} is not a data file; name one in data.validation_file"
        )


def _build_prompt_loss_converter(key: str) -> Callable[[Any, Translation], None]:
    """Return a converter for training on the user's text (`train_on_inputs`, `train_on_prompt`)."""

    def take(value: Any, translation: Translation) -> None:
        if value is True:
            translation.set_field("data.assistant_only_loss", False)
        elif value is not False:
            translation.lost.append(f"{key}: {value!r} cannot be interpreted")

    return take


def _translate_mask_history(value: Any, translation: Translation) -> None:
    if isinstance(value, bool):
        translation.set_field("data.train_on_turns", "last" if value else "all")
    else:
        translation.lost.append(f"mask_history: {value!r} cannot be interpreted")


def _translate_enable_thinking(value: Any, translation: Translation) -> None:
    translation.set_field("data.chat_template_kwargs", {"enable_thinking": value})


def _report_axolotl_template(value: Any, translation: Translation) -> None:
    if value not in ("tokenizer_default", "jinja"):
        translation.lost.append(
            f"chat_template: {value!r} is a template of axolotl, but lorafleet uses the "
            "tokenizer's. To use another one, save it to a file and name the file in "
            "data.chat_template"
        )


def _translate_template_text(value: Any, translation: Translation) -> None:
    translation.set_field("data.chat_template", value)


def _set_data_source(name: str, translation: Translation) -> None:
    translation.set_field(
        "data.train_file" if get_data_suffix(Path(name)) else "data.dataset_name", name
    )


def _translate_llamafactory_data(value: Any, translation: Translation) -> None:
    parts = value if isinstance(value, list) else str(value).split(",")
    names = [str(part).strip() for part in parts]
    if len(names) > 1:
        translation.lost.append(
            f"dataset: only {names[0]!r} of {', '.join(names)} is translated; put all rows into "
            "one file"
        )
    _set_data_source(names[0], translation)
    if "data" in translation.tree and "dataset_name" in translation.tree["data"]:
        translation.lost.append(
            f"dataset: {names[0]!r} is a name from dataset_info.json; set data.train_file or "
            "data.dataset_name to its file or hub id"
        )


def _translate_target_modules(value: Any, translation: Translation) -> None:
    if value in ("all", "all-linear"):
        translation.set_field("lora.lora_target_modules", "all-linear")
    else:
        names = value if isinstance(value, list) else str(value).split(",")
        translation.set_field("lora.lora_target_modules", [str(part).strip() for part in names])


def _translate_target_linear(value: Any, translation: Translation) -> None:
    if value is True:
        translation.set_field("lora.lora_target_modules", "all-linear")


def _check_stage(value: Any, translation: Translation) -> None:
    if value != "sft":
        translation.lost.append(
            f"stage: {value!r} is not supported; lorafleet does supervised fine-tuning (sft)"
        )


def _translate_quant_type(value: Any, translation: Translation) -> None:
    """Translate the 4-bit format.

    With 8 bits the key has no effect in the other tool either. Keys of `_QUANTISATION_KEYS`
    are processed before, so the field is set already if the base is quantised.
    """
    if fields.get_value(translation.tree, "qlora.quant_type") in ("nf4", "fp4"):
        translation.set_field("qlora.quant_type", value)


def _translate_pissa(value: Any, translation: Translation) -> None:
    if value is True:
        translation.set_field("lora.init_lora_weights", "pissa")


def _translate_init_weights(value: Any, translation: Translation) -> None:
    if value is not True:
        translation.set_field("lora.init_lora_weights", value)


def _translate_completion_only(value: Any, translation: Translation) -> None:
    """Translate whether prompts are learnt.

    `assistant_only_loss` is the same setting for conversations.
    """
    current = fields.get_value(translation.tree, "data.assistant_only_loss")
    if current is not None and current != value:
        translation.lost.append(
            "completion_only_loss: it contradicts assistant_only_loss, and lorafleet has one field "
            "for both"
        )
        return
    translation.set_field("data.assistant_only_loss", value)


def _translate_assistant_only(value: Any, translation: Translation) -> None:
    """Translate `true`.

    `false` means whole conversations in TRL, but not the prompts of prompt and completion rows.
    """
    if value is False:
        return
    current = fields.get_value(translation.tree, "data.assistant_only_loss")
    if current is not None and current != value:
        translation.lost.append(
            "completion_only_loss: it contradicts assistant_only_loss, and lorafleet has one field "
            "for both"
        )
    translation.set_field("data.assistant_only_loss", value)


def _translate_disabled_checkpointing(value: Any, translation: Translation) -> None:
    translation.set_field("train.gradient_checkpointing", value is not True)


def _translate_eval_dataset(value: Any, translation: Translation) -> None:
    if isinstance(value, str) and get_data_suffix(Path(value)):
        translation.set_field("data.validation_file", value)
    else:
        translation.lost.append(
            f"eval_dataset: {value!r} is not a data file; name one in data.validation_file"
        )


def _build_split_check(key: str, expected: tuple[str, ...]) -> Callable[[Any, Translation], None]:
    def take(value: Any, translation: Translation) -> None:
        if value not in expected:
            translation.lost.append(
                f"{key}: {value!r} has no counterpart; lorafleet uses the splits train, validation "
                "and test"
            )

    return take


def _translate_environment(value: Any, translation: Translation) -> None:
    if isinstance(value, dict):
        translation.set_field("environment", {str(name): str(text) for name, text in value.items()})
    else:
        translation.lost.append("env: it is not a block of variables")


def _translate_trl_data(value: Any, translation: Translation) -> None:
    _set_data_source(str(value), translation)


def _translate_trl_mixture(value: Any, translation: Translation) -> None:
    datasets = value if isinstance(value, list) else [value]
    first = datasets[0] if datasets and isinstance(datasets[0], dict) else {}
    if len(datasets) > 1:
        translation.lost.append(
            f"datasets: only the first of {len(datasets)} is translated; put all rows into one file"
        )
    first = dict(first)
    _set_data_source(_pop_dataset_path(first), translation)
    if first.get("name"):
        translation.set_field("data.dataset_config_name", str(first.pop("name")))
    for key, setting in first.items():
        if setting is not None and not (key == "split" and setting == "train"):
            translation.lost.append(f"datasets.{key}: {setting!r} has no counterpart")


def _ignore_peft(value: Any, translation: Translation) -> None:
    """Do nothing: `translate_config` reads the key. Without it TRL trains every weight."""


_AXOLOTL_CONVERTERS: dict[str, Callable[[Any, Translation], None]] = {
    "adapter": _build_method_converter("adapter"),
    "train_on_inputs": _build_prompt_loss_converter("train_on_inputs"),
    "chat_template": _report_axolotl_template,
    "chat_template_jinja": _translate_template_text,
    "flash_attention": _build_attention_converter("flash_attention"),
    "attn_implementation": _build_attention_converter("attn_implementation"),
    "sdp_attention": _build_lost_converter("is the same as model.attn_implementation: auto")(
        "sdp_attention"
    ),
    "warmup_steps": _translate_warmup_steps,
    "warmup_ratio": _translate_warmup_ratio,
    "peft_init_lora_weights": _translate_init_weights,
    "test_datasets": _translate_test_datasets,
    "special_tokens": _build_lost_converter("cannot be set; lorafleet uses those of the tokenizer")(
        "special_tokens"
    ),
    "datasets": _translate_axolotl_data,
    "lora_target_linear": _translate_target_linear,
    "load_in_4bit": _build_quantisation_converter("load_in_4bit", "nf4"),
    "load_in_8bit": _build_quantisation_converter("load_in_8bit", "int8"),
    "bf16": _build_precision_converter("bf16", "bf16"),
    "fp16": _build_precision_converter("fp16", "fp16"),
    "deepspeed": _build_launcher_converter("deepspeed"),
    "fsdp": _build_launcher_converter("fsdp"),
    "fsdp_config": _build_launcher_converter("fsdp_config"),
    "sample_packing": _build_packing_converter("sample_packing"),
    "trust_remote_code": _build_lost_converter(
        "can only be used with a full commit in model.revision"
    )("trust_remote_code"),
}
_LLAMAFACTORY_CONVERTERS: dict[str, Callable[[Any, Translation], None]] = {
    "finetuning_type": _build_method_converter("finetuning_type"),
    "mask_history": _translate_mask_history,
    "train_on_prompt": _build_prompt_loss_converter("train_on_prompt"),
    "enable_thinking": _translate_enable_thinking,
    "stage": _check_stage,
    "dataset": _translate_llamafactory_data,
    "lora_target": _translate_target_modules,
    "quantization_bit": _build_quantisation_converter("quantization_bit"),
    "bf16": _build_precision_converter("bf16", "bf16"),
    "fp16": _build_precision_converter("fp16", "fp16"),
    "deepspeed": _build_launcher_converter("deepspeed"),
    "packing": _build_packing_converter("packing"),
    "neat_packing": _build_packing_converter("neat_packing"),
    "flash_attn": _build_attention_converter("flash_attn"),
    "warmup_steps": _translate_warmup_steps,
    "warmup_ratio": _translate_warmup_ratio,
    "report_to": _translate_report_to,
    "quantization_method": _build_lost_converter(
        "is not supported; lorafleet quantises with bitsandbytes", unless=("bnb", "bitsandbytes")
    )("quantization_method"),
    "quantization_type": _translate_quant_type,
    "pissa_init": _translate_pissa,
    "disable_gradient_checkpointing": _translate_disabled_checkpointing,
    "eval_dataset": _translate_eval_dataset,
    "trust_remote_code": _build_lost_converter(
        "can only be used with a full commit in model.revision"
    )("trust_remote_code"),
    "template": _build_lost_converter("is not used; lorafleet uses the tokenizer's chat template")(
        "template"
    ),
}
_TRL_CONVERTERS: dict[str, Callable[[Any, Translation], None]] = {
    "dataset_name": _translate_trl_data,
    "datasets": _translate_trl_mixture,
    "dataset_train_split": _build_split_check("dataset_train_split", ("train",)),
    "dataset_test_split": _build_split_check("dataset_test_split", ("test", "validation")),
    "use_peft": _ignore_peft,
    "load_in_4bit": _build_quantisation_converter("load_in_4bit", "nf4"),
    "load_in_8bit": _build_quantisation_converter("load_in_8bit", "int8"),
    "bf16": _build_precision_converter("bf16", "bf16"),
    "fp16": _build_precision_converter("fp16", "fp16"),
    "attn_implementation": _build_attention_converter("attn_implementation"),
    "packing": _build_packing_converter("packing of TRL"),
    "assistant_only_loss": _translate_assistant_only,
    "completion_only_loss": _translate_completion_only,
    "bnb_4bit_quant_type": _translate_quant_type,
    "warmup_steps": _translate_warmup_steps,
    "warmup_ratio": _translate_warmup_ratio,
    "report_to": _translate_report_to,
    "env": _translate_environment,
    "accelerate_config": _build_launcher_converter("accelerate_config"),
    "deepspeed": _build_launcher_converter("deepspeed"),
    "trust_remote_code": _build_lost_converter(
        "can only be used with a full commit in model.revision"
    )("trust_remote_code"),
}
_CONVERTERS = {
    "axolotl": _AXOLOTL_CONVERTERS,
    "llamafactory": _LLAMAFACTORY_CONVERTERS,
    "trl": _TRL_CONVERTERS,
}
