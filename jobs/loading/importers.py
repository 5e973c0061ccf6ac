"""Configs of axolotl, LLaMA-Factory and TRL as job files. What is done otherwise is said, key by key. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafleet.jobs.data.data_files import data_suffix
from lorafleet.jobs.loading.aliases import OPTIMIZERS
from lorafleet.jobs.schema import field_paths as fields

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
    "group_by_length": "train.group_by_length",
    "early_stopping_patience": "train.early_stopping_patience",
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
        "double_quantization": "qlora.use_double_quant",
    },
    "trl": _SAME
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
    """A job as nested values, and what a reader must know about it."""

    tree: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Keys that could not be carried over, each with why."""
    dropped: list[str] = field(default_factory=list)
    """Keys that say how, not what: they have no meaning here."""
    assumed: list[str] = field(default_factory=list)
    """What the other tool does where its config says nothing: it is carried over."""
    otherwise: list[str] = field(default_factory=list)
    """What the other tool does, and this one does otherwise."""

    def put(self, path: str, value: Any) -> None:
        """Set a field, a float where the field wants one."""
        fields.put(self.tree, path, value)


def translate(tool: str, config: dict[str, Any], name: str) -> Translation:
    """A config of another tool as a job."""
    made = Translation()
    made.put("name", name)
    made.put("task", "generation")
    special = _SPECIAL[tool]
    config = _plain(config)
    for key, value in config.items():
        if value is None:
            continue
        if key in _MEANS_NOTHING_HERE and key not in special:
            made.dropped.append(key)
        elif value is False and key not in special and key not in _TOOLS[tool]:
            made.dropped.append(key)  # what is not done there is not missed here
        elif key in special or key in _TOOLS[tool]:
            try:
                if key in special:
                    special[key](value, made)
                else:
                    _carry(_TOOLS[tool][key], key, value, made)
            except (TypeError, ValueError, AttributeError):  # a list where a word is, and the like
                made.lost.append(f"{key}: {_shown(key, value)} is not understood")
        else:
            made.lost.append(f"{key}: {_shown(key, value)} has no counterpart")
    if tool == "axolotl" and not config.get("adapter"):
        made.put("method", "full")  # what axolotl does without one
    if tool == "trl" and made.tree.get("method") != "qlora":
        made.put("method", "lora" if config.get("use_peft") else "full")  # what TRL does without it
    _its_defaults(tool, config, made)
    return made


_TRUTHS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
"""What YAML 1.1, which these tools read, and their own parsers take for true and false."""
_FIRST = ("load_in_4bit", "load_in_8bit", "quantization_bit")
"""Keys that say whether a base is quantised: those that say how come after them."""


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with its words for true and false as such, without what says nothing, in an order of our own."""
    said = {str(key): value for key, value in config.items()}
    for key, value in said.items():
        if isinstance(value, str) and value.lower() in _TRUTHS:
            said[key] = _TRUTHS[value.lower()]
    steps = _number(said.get("max_steps"))
    if steps is not None and steps < 1:
        said["max_steps"] = None  # Hugging Face's way to say that epochs count
    warmup = _number(said.get("warmup_steps"))
    if warmup == 0 and _number(said.get("warmup_ratio")):
        said["warmup_steps"] = None  # steps come first there only where there are some
    return {key: said[key] for key in sorted(said, key=lambda key: key not in _FIRST)}


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
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
        (("gradient_checkpointing", "disable_gradient_checkpointing"), "train.gradient_checkpointing", True),
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
"""(keys that say it there, field here, what the tool does without them), where that is not what we do without."""
_CALLED = {"axolotl": "axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL"}


def _its_defaults(tool: str, config: dict[str, Any], made: Translation) -> None:
    """Carry over what the tool does where the config says nothing, and say what is done otherwise here."""
    method = made.tree.get("method", "lora")
    if tool == "llamafactory" and method != "full" and config.get("lora_alpha") is None:
        made.put("lora.lora_alpha", "2*lora_r")
        made.assumed.append("lora_alpha: twice the rank, as LLaMA-Factory has it where it is left out")
    for keys, path, value in _DEFAULTS[tool]:
        block = path.partition(".")[0]
        unused = (block == "lora" and method == "full") or (block == "qlora" and method != "qlora")
        if unused or any(config.get(key) is not None for key in keys) or fields.get(made.tree, path) is not None:
            continue
        made.put(path, value)
        made.assumed.append(f"{keys[0]}: {_shown(keys[0], value)}, {_CALLED[tool]}'s default")
    _said_otherwise(tool, config, made)


def _said_otherwise(tool: str, config: dict[str, Any], made: Translation) -> None:
    """Say what the tool does and no field here does."""
    no_share = not config.get("val_set_size" if tool == "axolotl" else "val_size")
    if tool != "trl" and no_share and "validation_file" not in made.tree.get("data", {}):
        made.otherwise.append(
            f"{_CALLED[tool]} trains on all rows; here 0.1 of them (data.validation_fraction) are held back"
        )
    if tool == "axolotl":
        made.otherwise.append("rows above sequence_len: axolotl drops them, here they are cut")
        if config.get("warmup_ratio") is None and config.get("warmup_steps") is None:
            made.otherwise.append("warm-up: 3 % of the steps in both, but axolotl's are at most 100")
    if tool == "trl" and config.get("use_peft") and not config.get("lora_target_modules"):
        made.otherwise.append("lora_target_modules: PEFT chooses by the model there, here it is all-linear")
    if tool == "trl" and not config.get("assistant_only_loss") and config.get("completion_only_loss") is None:
        made.otherwise.append(
            "conversations: TRL learns every token, here the assistant's turns are learnt "
            "(data.assistant_only_loss: false does as TRL)"
        )


def without_refused(made: Translation, refused: list[tuple[str, str]]) -> bool:
    """Drop the fields that our own check refuses, each with its sentence; whether there was one to drop."""
    dropped = False
    for path, sentence in refused:
        path = "search.metric" if path == "search.metric.name" else path
        if path and path not in ("model.model_name_or_path", "name", "task") and fields.drop(made.tree, path):
            made.lost.append(sentence)
            dropped = True
    return dropped


_SECRET_WORDS = {"token", "key", "apikey", "secret", "password"}


def _shown(key: str, value: Any) -> str:
    """A value in words, unless its key says that it is a secret."""
    secret = _SECRET_WORDS & set(key.lower().split("_"))
    if secret or isinstance(value, dict) or "@" in str(value):
        return "its value (not shown)"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _carry(path: str, key: str, value: Any, made: Translation) -> None:
    if isinstance(value, str) and fields.is_number(path):
        value = _as_number(value, path)
    if path == "train.lr_scheduler_type" and value not in _SCHEDULES:
        made.lost.append(f"{key}: {value!r} is none of {', '.join(_SCHEDULES)}")
    elif path == "train.optim" and OPTIMIZERS.get(value, value) not in OPTIMIZERS.values():
        made.lost.append(f"{key}: {value!r} is none of {', '.join(sorted(set(OPTIMIZERS.values())))}")
    elif path == "train.optim":
        made.put(path, OPTIMIZERS.get(value, value))
    elif path == "data.validation_fraction" and value == 0:
        return  # said with what is done otherwise
    elif path == "data.validation_fraction" and not (isinstance(value, int | float) and 0 < value < 1):
        made.lost.append(f"{key}: {value!r} is not a share of the rows; give data.validation_file")
    elif path == "lora.lora_target_modules" and value in ("all", "all-linear"):
        made.put(path, "all-linear")
    elif path == "lora.lora_target_modules" and isinstance(value, str) and set(value) & set("()[]*+?|^$\\"):
        made.lost.append(f"{key}: {value!r} is a pattern; here layers are named (a name means all that end so)")
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
        bits = _number(value)
        kind = {4: "nf4", 8: "int8"}.get(int(bits)) if quant_type is None and bits is not None else quant_type
        if value is False:
            return
        if value is not True and quant_type is not None:
            made.lost.append(f"{key}: {value!r} is neither true nor false")
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


def _warmup_steps(value: Any, made: Translation) -> None:
    """Carry over a number of steps; newer Hugging Face takes a share below 1 under the same key."""
    steps = _as_number(value, "train.warmup_steps") if isinstance(value, str) else value
    if isinstance(steps, float) and 0 < steps < 1:
        made.put("train.warmup_ratio", steps)
    else:
        made.put("train.warmup_steps", int(steps) if isinstance(steps, float) and steps.is_integer() else steps)
        fields.drop(made.tree, "train.warmup_ratio")  # steps come first there


def _warmup_ratio(value: Any, made: Translation) -> None:
    if fields.get(made.tree, "train.warmup_steps") is None:
        _carry("train.warmup_ratio", "warmup_ratio", value, made)


def _packed(key: str) -> Callable[[Any, Translation], None]:
    """Carry over packing; what is packed here never sees its neighbours."""

    def take(value: Any, made: Translation) -> None:
        if value is True:
            made.put("train.packing", True)
            if key == "packing":
                made.otherwise.append("packing: here examples of one row do not see each other")
        elif value is not False:
            made.lost.append(f"{key}: {value!r} is not understood")

    return take


def _report_to(value: Any, made: Translation) -> None:
    names = value if isinstance(value, list) else [value]
    if "wandb" not in names and "all" not in names:
        made.put("tracking.mode", "disabled")


def _flash(key: str) -> Callable[[Any, Translation], None]:
    """Carry over attention that works everywhere; say the other, which is a matter of the machine."""

    def take(value: Any, made: Translation) -> None:
        if value in ("sdpa", "eager", "flex_attention"):
            made.put("model.attn_implementation", value)
        elif value not in (False, "auto", "disabled"):
            made.lost.append(
                f"{key}: {_shown(key, value)} is left to model.attn_implementation: auto; set flash_attention_2 where "
                "there is a GPU and the package flash-attn"
            )

    return take


_distributed = _lost("is a launcher's setting; see resources in the job file")


def _precision(key: str, ours: str) -> Callable[[Any, Translation], None]:
    def take(value: Any, made: Translation) -> None:
        if value is True:
            made.put("train.mixed_precision", ours)
        elif value not in (False, "auto"):
            made.lost.append(f"{key}: {value!r} is not understood")

    return take


_AXOLOTL_FORMATS = {
    "alpaca": "instruction",
    "chat_template": "messages",
    "sharegpt": "messages",
    "completion": "text",
}
_AXOLOTL_TURNS: dict[str, Any] = {"roles_to_train": ["assistant"], "train_on_eos": "turn"}
"""Settings of axolotl's conversations, as rows are learnt here."""
_AXOLOTL_FIELDS = {"name": "data.dataset_config_name", "revision": "data.dataset_revision", "field": "data.text_column"}
_KEYS_OF_TURNS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})
_ROLES = {"user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"}, "tool": {"tool"}}


def _axolotl_data(value: Any, made: Translation) -> None:
    sets = value if isinstance(value, list) and value else [value or {}]
    if len(sets) > 1:
        made.lost.append(f"datasets: only the first of {len(sets)} is carried over; put the rows into one file")
    first = dict(sets[0]) if isinstance(sets[0], dict) else {"path": sets[0]}
    _source(_path_of(first), made)
    kind = first.pop("type", None)
    if isinstance(kind, str) and kind in _AXOLOTL_FORMATS:
        made.put("data.format", _AXOLOTL_FORMATS[kind])
    elif kind:
        made.lost.append(f"datasets.type: {kind!r} is not a format here; see data.format")
    messages = first.pop("field_messages", None)
    if messages and _AXOLOTL_FORMATS.get(str(kind)) == "messages":
        made.put("data.messages_column", str(messages))
    _keys_of_turns(first, made)
    for key, usual in _AXOLOTL_TURNS.items():
        if first.get(key, usual) != usual:
            made.lost.append(f"datasets.{key}: {first[key]!r} has no counterpart; here it is as with {usual!r} there")
        first.pop(key, None)
    for key, path in _AXOLOTL_FIELDS.items():
        if first.get(key):
            made.put(path, str(first.pop(key)))
    for key, said in first.items():
        if said is not None and key != "ds_type" and not (key == "split" and said == "train"):
            made.lost.append(f"datasets.{key}: {said!r} has no counterpart")


def _path_of(first: dict[str, Any]) -> str:
    """Take the file or hub id of a data set; `data_files` name the file where `path` is a loader of `datasets`."""
    path = str(first.pop("path", ""))
    named = first.get("data_files")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    if isinstance(named, str) and path in ("json", "csv", "parquet", "text"):
        first.pop("data_files")
        return named
    return path


def _keys_of_turns(first: dict[str, Any], made: Translation) -> None:
    """Take what a message's keys and roles are called there: both usual ways are read here as they are."""
    mapping = first.pop("message_property_mappings", None) or {}
    if not isinstance(mapping, dict):
        made.lost.append(f"datasets.message_property_mappings: {mapping!r} is not understood")
        mapping = {}
    mapping = dict(mapping)
    for key, name in (("message_field_role", "role"), ("message_field_content", "content")):
        if first.get(key):
            mapping.setdefault(name, first[key])
        first.pop(key, None)
    named = {"role": "role", "content": "content"} | mapping
    if mapping and not any(named == usual for usual in _KEYS_OF_TURNS):
        said = ", ".join(f"{ours} is {theirs!r}" for ours, theirs in mapping.items())
        made.lost.append(
            f"datasets.message_property_mappings: {said}, but rows must have role and content, or from and value"
        )
    roles = first.pop("roles", None) or {}
    for role, names in roles.items() if isinstance(roles, dict) else ():
        listed = {str(one) for one in (names if isinstance(names, list) else [names])}
        unknown = sorted(listed - _ROLES.get(str(role), set()))
        if unknown:
            made.lost.append(
                f"datasets.roles: {', '.join(map(str, unknown))} as {role} is not read here; rename it in the rows"
            )


def _test_datasets(value: Any, made: Translation) -> None:
    sets = value if isinstance(value, list) else [value]
    path = sets[0].get("path") if sets and isinstance(sets[0], dict) else None
    if len(sets) > 1:
        made.lost.append(f"test_datasets: only the first of {len(sets)} is carried over; put the rows into one file")
    if isinstance(path, str) and data_suffix(Path(path)):
        made.put("data.validation_file", path)
    else:
        made.lost.append(f"test_datasets: {value!r} is no file; name one in data.validation_file")


def _whole_text(key: str) -> Callable[[Any, Translation], None]:
    """Carry over that what the user says is learnt as well (`train_on_inputs`, `train_on_prompt`)."""

    def take(value: Any, made: Translation) -> None:
        if value is True:
            made.put("data.assistant_only_loss", False)
        elif value is not False:
            made.lost.append(f"{key}: {value!r} is not understood")

    return take


def _mask_history(value: Any, made: Translation) -> None:
    if isinstance(value, bool):
        made.put("data.train_on_turns", "last" if value else "all")
    else:
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
    parts = value if isinstance(value, list) else str(value).split(",")
    names = [str(part).strip() for part in parts]
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


def _quant_type(value: Any, made: Translation) -> None:
    """Carry over which 4-bit format; with 8 bits it says nothing there either."""
    if fields.get(made.tree, "qlora.quant_type") in ("nf4", "fp4"):
        made.put("qlora.quant_type", value)


def _pissa(value: Any, made: Translation) -> None:
    if value is True:
        made.put("lora.init_lora_weights", "pissa")


def _init_weights(value: Any, made: Translation) -> None:
    if value is not True:
        made.put("lora.init_lora_weights", value)


def _completion_only(value: Any, made: Translation) -> None:
    """Whether prompts are learnt; `assistant_only_loss` is the same question of conversations."""
    own = fields.get(made.tree, "data.assistant_only_loss")
    if own is not None and own != value:
        made.lost.append("completion_only_loss: assistant_only_loss says otherwise, and here the two are one field")
        return
    made.put("data.assistant_only_loss", value)


def _assistant_only(value: Any, made: Translation) -> None:
    """Carry over `true`; `false` means whole conversations there, and no prompts of prompt and completion."""
    if value is False:
        return
    own = fields.get(made.tree, "data.assistant_only_loss")
    if own is not None and own != value:
        made.lost.append("completion_only_loss: assistant_only_loss says otherwise, and here the two are one field")
    made.put("data.assistant_only_loss", value)


def _no_checkpointing(value: Any, made: Translation) -> None:
    made.put("train.gradient_checkpointing", value is not True)


def _eval_dataset(value: Any, made: Translation) -> None:
    if isinstance(value, str) and data_suffix(Path(value)):
        made.put("data.validation_file", value)
    else:
        made.lost.append(f"eval_dataset: {value!r} is no file; name one in data.validation_file")


def _split_name(key: str, usual: tuple[str, ...]) -> Callable[[Any, Translation], None]:
    def take(value: Any, made: Translation) -> None:
        if value not in usual:
            made.lost.append(f"{key}: {value!r} has no counterpart; a data set's splits are train, validation and test")

    return take


def _environment(value: Any, made: Translation) -> None:
    if isinstance(value, dict):
        made.put("environment", {str(name): str(text) for name, text in value.items()})
    else:
        made.lost.append("env: it is no block of variables")


def _trl_data(value: Any, made: Translation) -> None:
    _source(str(value), made)


def _trl_mixture(value: Any, made: Translation) -> None:
    sets = value if isinstance(value, list) else [value]
    first = sets[0] if sets and isinstance(sets[0], dict) else {}
    if len(sets) > 1:
        made.lost.append(f"datasets: only the first of {len(sets)} is carried over; put the rows into one file")
    first = dict(first)
    _source(_path_of(first), made)
    if first.get("name"):
        made.put("data.dataset_config_name", str(first.pop("name")))
    for key, said in first.items():
        if said is not None and not (key == "split" and said == "train"):
            made.lost.append(f"datasets.{key}: {said!r} has no counterpart")


def _peft(value: Any, made: Translation) -> None:
    """Do nothing: `translate` asks for the key, since without it TRL trains every weight."""


_AXOLOTL: dict[str, Callable[[Any, Translation], None]] = {
    "adapter": _method("adapter"),
    "train_on_inputs": _whole_text("train_on_inputs"),
    "chat_template": _axolotl_template,
    "chat_template_jinja": _template_text,
    "flash_attention": _flash("flash_attention"),
    "attn_implementation": _flash("attn_implementation"),
    "sdp_attention": _lost("is what model.attn_implementation: auto means")("sdp_attention"),
    "warmup_steps": _warmup_steps,
    "warmup_ratio": _warmup_ratio,
    "peft_init_lora_weights": _init_weights,
    "test_datasets": _test_datasets,
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
    "sample_packing": _packed("sample_packing"),
    "trust_remote_code": _lost("needs a model.revision of a full commit here")("trust_remote_code"),
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
    "packing": _packed("packing"),
    "neat_packing": _packed("neat_packing"),
    "flash_attn": _flash("flash_attn"),
    "warmup_steps": _warmup_steps,
    "warmup_ratio": _warmup_ratio,
    "report_to": _report_to,
    "quantization_method": _lost("is not used here; bitsandbytes is", unless=("bnb", "bitsandbytes"))(
        "quantization_method"
    ),
    "quantization_type": _quant_type,
    "pissa_init": _pissa,
    "disable_gradient_checkpointing": _no_checkpointing,
    "eval_dataset": _eval_dataset,
    "trust_remote_code": _lost("needs a model.revision of a full commit here")("trust_remote_code"),
    "template": _lost("is taken from the tokenizer's own chat template")("template"),
}
_TRL: dict[str, Callable[[Any, Translation], None]] = {
    "dataset_name": _trl_data,
    "datasets": _trl_mixture,
    "dataset_train_split": _split_name("dataset_train_split", ("train",)),
    "dataset_test_split": _split_name("dataset_test_split", ("test", "validation")),
    "use_peft": _peft,
    "load_in_4bit": _quantised("load_in_4bit", "nf4"),
    "load_in_8bit": _quantised("load_in_8bit", "int8"),
    "bf16": _precision("bf16", "bf16"),
    "fp16": _precision("fp16", "fp16"),
    "attn_implementation": _flash("attn_implementation"),
    "packing": _packed("packing of TRL"),
    "assistant_only_loss": _assistant_only,
    "completion_only_loss": _completion_only,
    "bnb_4bit_quant_type": _quant_type,
    "warmup_steps": _warmup_steps,
    "warmup_ratio": _warmup_ratio,
    "report_to": _report_to,
    "env": _environment,
    "accelerate_config": _distributed("accelerate_config"),
    "deepspeed": _distributed("deepspeed"),
    "trust_remote_code": _lost("needs a model.revision of a full commit here")("trust_remote_code"),
}
_SPECIAL = {"axolotl": _AXOLOTL, "llamafactory": _LLAMAFACTORY, "trl": _TRL}
