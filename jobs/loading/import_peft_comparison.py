"""Translate experiments of Hugging Face's PEFT method comparison to arms. Pure.

The comparison trains on MetaMathQA. An experiment is a folder with
`adapter_config.json` (none: full fine-tuning) and `training_params.json`, which
overrides `default_training_params.json`. Several experiments become one comparison, so
everything that its arms share must be equal in all of them. Every number of the
original is in the job or in a remark. Source: github.com/huggingface/peft,
method_comparison/MetaMathQA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafleet.jobs.errors import UserError
from lorafleet.jobs.loading.importers import Translation

DEFAULT_TRAINING_PARAMS: dict[str, Any] = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 51,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "attn_implementation": None,
    "generation_kwargs": {"max_length": 768},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
}
"""The comparison's default_training_params.json, version of 2026."""
_WARMUP_RATIO = 0.1
_ADAMW_LEARNING_RATE, _ADAMW_WEIGHT_DECAY = 1e-3, 0.01
"""Defaults of torch.optim.AdamW."""
_MAX_NAME_CHARS = 40
_DIRECT_FIELDS = {
    "max_seq_length": "model.max_length",
    "batch_size": "train.per_device_train_batch_size",
    "batch_size_eval": "train.per_device_eval_batch_size",
    "eval_steps": "train.eval_steps",
    "compile": "train.torch_compile",
    "use_gc": "train.gradient_checkpointing",
    "grad_norm_clip": "train.max_grad_norm",
}
"""Key of the training parameters -> field of the job."""
_SHARED_KEYS = ("model_id", "max_steps", "seed", "eval_steps", "batch_size_eval")
"""Keys that a comparison sets once, for all arms."""
_DEFAULT_TARGETS = (
    (re.compile(r"llama|mistral|gemma|qwen"), ["q_proj", "v_proj"]),
    (re.compile(r"gpt-?2"), ["c_attn"]),
    (re.compile(r"phi"), ["qkv_proj"]),
)
"""Pattern of the model name -> layers that PEFT adapts if `target_modules` is null."""
_IGNORED_KEYS = frozenset(
    (
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "task_type",
            "peft_type",
        ),
        *("peft_version", "fan_in_fan_out", "megatron_core", "num_attention_heads", "num_layers"),
        *("num_transformer_submodules", "token_dim", "runtime_config"),
    )
)
"""Keys of adapter_config.json that do not affect training or that the base model already
determines.
"""
_LORA_FIELDS = {
    "r": "lora.lora_r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
}


@dataclass(frozen=True)
class Experiment:
    """One experiment of the comparison."""

    name: str
    """Name of its folder."""
    adapter_config: Mapping[str, Any] | None
    """Contents of adapter_config.json; None for full fine-tuning."""
    training_params: Mapping[str, Any]
    """Contents of training_params.json; empty if there is none."""
    defaults: Mapping[str, Any]
    """Contents of default_training_params.json, or `DEFAULT_TRAINING_PARAMS`."""

    @property
    def params(self) -> dict[str, Any]:
        """Return the training parameters, completed with the defaults."""
        return {**self.defaults, **self.training_params}


def translate_experiments(experiments: list[Experiment], name: str) -> Translation:
    """Return a comparison with the untrained base and each experiment as an arm.

    Args:
        experiments: At least one.
        name: Name of the job.

    Raises:
        UserError: An experiment uses an adapter type that cannot be trained here, or the
            experiments differ in something that all arms share, such as the number of
            steps.
    """
    job = Translation()
    job.set_field("name", name)
    job.set_field("task", "generation")
    first = experiments[0].params
    for key in _SHARED_KEYS:
        values = {experiment.name: experiment.params.get(key) for experiment in experiments}
        if len({repr(value) for value in values.values()}) > 1:
            shown = ", ".join(f"{value!r} in {where}" for where, value in values.items())
            raise UserError(
                f"{key} is {shown}, but must be the same for all arms of a comparison: import "
                "these experiments separately"
            )
    job.set_field("model.model_name_or_path", first["model_id"])
    _set_data(job, first)
    arms: dict[str, Any] = {"base": {"method": "base"}}
    for experiment in experiments:
        method, values = _translate_arm(experiment, job)
        arms[_build_arm_name(experiment.name, arms)] = {"method": method, "set": values}
    _move_common_fields([arm["set"] for arm in arms.values() if "set" in arm], job)
    job.set_field("train.seed", first["seed"])
    job.set_field("train.eval_steps", first["eval_steps"])
    job.set_field("train.max_steps", first["max_steps"])
    job.set_field("train.warmup_ratio", _WARMUP_RATIO)
    job.set_field("compare.seeds", 1)
    job.set_field("compare.arms", arms)
    job.assumed.append(
        f"warm-up: {_WARMUP_RATIO:.0%} of the steps, as in the code of the PEFT comparison"
    )
    job.assumed.append(
        "compare.seeds: 1, as in the PEFT comparison; more seeds show how much the results vary"
    )
    job.lost = list(dict.fromkeys(job.lost))
    return job


def _move_common_fields(arms: list[dict[str, Any]], job: Translation) -> None:
    """Move fields that have one value in all arms from the arms to the job.

    Only `model` and `train` fields move. Both `arms` and `job` are changed in place.
    """
    common = {
        path: value for path, value in arms[0].items() if path.startswith(("model.", "train."))
    }
    for values in arms[1:]:
        common = {
            path: value
            for path, value in common.items()
            if path in values and values[path] == value
        }
    for path, value in common.items():
        job.set_field(path, value)
        for values in arms:
            del values[path]


def _set_data(job: Translation, params: Mapping[str, Any]) -> None:
    job.set_field("data.dataset_name", "meta-math/MetaMathQA")
    job.set_field("data.prompt_column", "query")
    job.set_field("data.completion_column", "response")
    template = params.get("query_template")
    if template not in (None, "{query}"):
        job.lost.append(
            f"query_template: {template!r}; lorafleet uses the query itself as the prompt"
        )
    job.otherwise.append(
        "validation and test rows: the PEFT comparison uses GSM8K; lorafleet holds rows back from "
        "MetaMathQA (or name your own files in data.validation_file and data.test_file)"
    )
    job.otherwise.append(
        "metric: the PEFT comparison uses the accuracy of the parsed number; lorafleet uses the "
        "loss (see evaluate.custom_metrics)"
    )


def _translate_arm(experiment: Experiment, job: Translation) -> tuple[str, dict[str, Any]]:
    """Return (method, dotted field -> value) of one arm.

    What has no counterpart is reported in `job`.

    Raises:
        UserError: If the adapter type cannot be trained here.
    """
    values: dict[str, Any] = {}
    method = "full"
    config = experiment.adapter_config
    if config is not None:
        kind = config.get("peft_type")
        if kind == "LORA":
            method = "lora"
            _set_lora_fields(experiment, values, job)
        elif kind == "PROMPT_TUNING":
            method = "prompt_tuning"
            _set_prompt_tuning_fields(experiment, values, job)
        else:
            raise UserError(
                f"{experiment.name}: peft_type is {kind}, but lorafleet can only train LORA and "
                "PROMPT_TUNING (and, without an adapter_config.json, all weights)"
            )
    method = _set_training_fields(experiment, method, values, job)
    return method, values


def _set_lora_fields(experiment: Experiment, values: dict[str, Any], job: Translation) -> None:
    config = dict(experiment.adapter_config or {})
    for key, path in _LORA_FIELDS.items():
        if config.get(key) is not None:
            values[path] = config.pop(key)
    values.setdefault("lora.lora_dropout", 0.0)
    _set_target_modules(experiment, config.pop("target_modules", None), values, job)
    start = config.pop("init_lora_weights", True)
    allowed = ("gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora")
    if start in allowed:
        values["lora.init_lora_weights"] = start
    elif start is not True:
        job.lost.append(
            f"{experiment.name}: init_lora_weights: {start!r} is not one of {', '.join(allowed)}"
        )
    if config.pop("bias", "none") != "none":
        job.lost.append(f"{experiment.name}: bias: lorafleet does not train biases")
    _report_unused(experiment, config, job)


def _set_target_modules(
    experiment: Experiment, targets: Any, values: dict[str, Any], job: Translation
) -> None:
    model = str(experiment.params["model_id"]).lower()
    if targets is None:
        targets = next(
            (names for pattern, names in _DEFAULT_TARGETS if pattern.search(model)), None
        )
        if targets is None:
            job.lost.append(
                f"{experiment.name}: target_modules is null, and PEFT's default for {model} is not "
                "known"
            )
            return
        job.assumed.append(
            f"{experiment.name}: target_modules: {', '.join(targets)}, PEFT's default for this "
            "model"
        )
    values["lora.lora_target_modules"] = targets


def _set_prompt_tuning_fields(
    experiment: Experiment, values: dict[str, Any], job: Translation
) -> None:
    config = dict(experiment.adapter_config or {})
    if config.get("num_virtual_tokens") is not None:
        values["prompt_tuning.num_virtual_tokens"] = config.pop("num_virtual_tokens")
    start, text = (
        config.pop("prompt_tuning_init", "RANDOM"),
        config.pop("prompt_tuning_init_text", None),
    )
    config.pop("tokenizer_name_or_path", None)
    if start == "TEXT" and text:
        values["prompt_tuning.prompt_tuning_init_text"] = text
    elif start != "RANDOM":
        job.lost.append(
            f"{experiment.name}: prompt_tuning_init: {start!r}; lorafleet starts from random values"
        )
    _report_unused(experiment, config, job)


def _report_unused(experiment: Experiment, config: Mapping[str, Any], job: Translation) -> None:
    """Report the keys of an adapter's config that have an effect but no counterpart."""
    for key, value in config.items():
        if key not in _IGNORED_KEYS and value not in (None, False, {}, [], ""):
            job.lost.append(f"{experiment.name}: {key}: {value!r} has no counterpart")


def _set_training_fields(
    experiment: Experiment, method: str, values: dict[str, Any], job: Translation
) -> str:
    """Set the training parameters and return the method, which is qlora for a quantised base."""
    params = experiment.params
    for key, path in _DIRECT_FIELDS.items():
        if key in params and key not in _SHARED_KEYS and params[key] is not None:
            values[path] = params[key]
    values["train.per_device_eval_batch_size"] = params["batch_size_eval"]
    values["train.gradient_accumulation_steps"] = 1
    if values.get("train.max_grad_norm") == 0:
        values.pop("train.max_grad_norm")
        job.lost.append(f"{experiment.name}: grad_norm_clip: 0; lorafleet always clips gradients")
    # The comparison's code has no separate setting for quantisation: the dtype decides.
    method = _set_dtype(experiment, method, values, job)
    _set_optimizer(experiment, values, job)
    schedule = params.get("lr_scheduler")
    # Without a scheduler the learning rate stays constant.
    values["train.lr_scheduler_type"] = schedule or "constant"
    if params.get("attn_implementation"):
        values["model.attn_implementation"] = params["attn_implementation"]
    handled = {*_DIRECT_FIELDS, *_SHARED_KEYS, *DEFAULT_TRAINING_PARAMS, "autocast_adapter_dtype"}
    for key, value in params.items():
        if key not in handled and value not in (None, False):
            job.lost.append(f"{experiment.name}: {key}: {value!r} has no counterpart")
    return method


def _set_dtype(
    experiment: Experiment, method: str, values: dict[str, Any], job: Translation
) -> str:
    """Set the number format, and return the method: qlora for a quantised base.

    Raises:
        UserError: If the base is quantised and the method is not LoRA.
    """
    dtype = experiment.params["dtype"]
    if dtype not in ("int4", "int8"):
        values["model.dtype"] = dtype
        if experiment.params.get("use_amp"):
            values["train.mixed_precision"] = "bf16"
        return method
    if method != "lora":
        raise UserError(
            f"{experiment.name}: dtype is {dtype}, but only LoRA can be trained on a quantised base"
        )
    # BitsAndBytesConfig(load_in_4bit=True) leaves the rest to its defaults: FP4, one quantisation,
    # float32.
    values["qlora.quant_type"] = "fp4" if dtype == "int4" else "int8"
    if dtype == "int4":
        values["qlora.use_double_quant"] = False
        values["qlora.compute_dtype"] = "float32"
    return "qlora"


def _set_optimizer(experiment: Experiment, values: dict[str, Any], job: Translation) -> None:
    # An experiment's optimizer_kwargs replace all default ones: a missing key means torch's own
    # default.
    options = dict(experiment.params["optimizer_kwargs"])
    values["train.learning_rate"] = options.pop("lr", _ADAMW_LEARNING_RATE)
    values["train.weight_decay"] = options.pop("weight_decay", _ADAMW_WEIGHT_DECAY)
    kind = experiment.params.get("optimizer_type", "AdamW")
    if kind == "lora+" and "loraplus_lr_ratio" in options:
        values["lora.loraplus_lr_ratio"] = options.pop("loraplus_lr_ratio")
    elif kind != "AdamW":
        job.lost.append(f"{experiment.name}: optimizer_type: {kind!r}; AdamW is used")
    for key, value in options.items():
        job.lost.append(f"{experiment.name}: optimizer_kwargs.{key}: {value!r} has no counterpart")


def _build_arm_name(name: str, taken: Mapping[str, Any]) -> str:
    """Return a valid name for an arm, different from those in `taken`."""
    short = (
        re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_MAX_NAME_CHARS].strip("-") or "arm"
    )
    unique, number = short, 2
    while unique in taken:
        unique = f"{short[: _MAX_NAME_CHARS - 4].strip('-')}-{number}"
        number += 1
    return unique
