"""Attach a training method to the base, save and load its weights, and detach it again.

Everything that differs between lora, qlora, prompt_tuning and full is in this module. A
warm process attaches one trial after another to the same base, so a method must leave
the base unchanged or mark it as `spent`. Saved weights must load in plain PEFT or
transformers, without lorafleet.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafleet.evaluation.tokenizer import load_chat_format
from lorafleet.jobs.data.adapters import ADAPTER_FILES, find_adapter_refusal
from lorafleet.jobs.data.hub import resolve_public_base
from lorafleet.jobs.data.weight_names import is_named
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.compatibility import check_prompt_length, describe_hidden_label
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import CLASSIFIER_HEADS as HEADS
from lorafleet.jobs.schema.model_kinds import describe_tied_targets, get_max_positions
from lorafleet.training.model import PEFT_HEADS, Base, reset_heads, resolve_safetensors_folder

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_PROMPT = ("prompt_encoder.default.embedding.weight", "prompt_embeddings")
"""Name of a learnt prompt in the model, and in PEFT's file."""

Tensors = dict[str, torch.Tensor]
"""Trained values by the name of their parameter in the adapted model."""


def attach(job: JobSpec, base: Base) -> nn.Module:
    """Return the base with the job's method attached.

    New values depend on the trial's seed alone. Only the parameters that the method trains
    require gradients.

    Raises:
        UserError: The model has no layers with the names that the job lists, or does not
            support the method.
    """
    reset_heads(base, job.train.seed, full=job.method == "full")
    if job.train.gradient_checkpointing:
        # The reentrant kind needs an input that requires gradients, which a frozen embedding's
        # output does not.
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    # After `reset_heads` and directly before PEFT draws its values: they depend on nothing that ran
    # in this process before.
    torch.manual_seed(job.train.seed)
    if job.method == "full":
        base.spent = True
        base.model.requires_grad_(True)
        return base.model
    from peft import get_peft_model

    # PEFT warns about GPT-2's transposed layers and about deprecated properties of transformers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if job.train.init_adapter:
            return _attach_existing(job, base, Path(job.train.init_adapter))
        config = (
            _build_prompt_config(job, base)
            if job.method == "prompt_tuning"
            else _build_lora_config(job, base)
        )
        # Set before PEFT runs: if PiSSA fails halfway, the base is changed too.
        base.spent = base.spent or job.has_modified_base
        try:
            return _check_targets(job, get_peft_model(base.model, config))
        except ValueError as error:
            raise UserError(
                f"lora.lora_target_modules is {job.lora.lora_target_modules!r}, but {error}"
            ) from error
        # OLoRA fails with a shape error on transposed layers (GPT-2's Conv1D). Other errors are not
        # the user's.
        except RuntimeError as error:
            if not job.has_modified_base:
                raise
            kind = job.lora.init_lora_weights
            raise UserError(
                f"lora.init_lora_weights is {kind}, which does not work with this model's layers: "
                f"{error}"
            ) from error


def _attach_existing(job: JobSpec, base: Base, folder: Path) -> nn.Module:
    """Return the base with the adapter in `folder` attached for further training.

    The job's dropout is used. Raises UserError if the adapter is incomplete or does not fit
    the job.
    """
    from peft import (
        PeftConfig,
        PeftModel,
        get_peft_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )

    for name in ADAPTER_FILES:
        # PEFT would ask the model hub for a file that the folder lacks.
        if not (folder / name).is_file():
            raise UserError(f"train.init_adapter is {folder}, but that folder has no {name}")
    _refuse_adapter(job, base, folder, "train.init_adapter")
    config = PeftConfig.from_pretrained(str(folder))
    # `PeftModel.from_pretrained` loads a learnt prompt for inference only, even with is_trainable.
    if config.is_prompt_learning:
        config.inference_mode = False
        config.prompt_tuning_init = (
            "RANDOM"  # its values are loaded below; an initial text would need the tokenizer
        )
        prompted: PeftModel = get_peft_model(base.model, config)
        set_peft_model_state_dict(prompted, load_peft_weights(str(folder), device="cpu"))
        return prompted
    if hasattr(config, "lora_dropout"):
        config.lora_dropout = job.lora.lora_dropout
    adapted: PeftModel = PeftModel.from_pretrained(
        base.model, str(folder), is_trainable=True, config=config
    )
    return adapted


def _refuse_adapter(job: JobSpec, base: Base, folder: Path, field: str) -> None:
    """Raise UserError if an adapter's kind, task or size does not fit the job and its base."""
    config = base.model.config
    classes = 0 if job.is_generative else int(config.num_labels)
    problem = find_adapter_refusal(
        folder, job.method, config.to_dict(), field, generates=job.is_generative, classes=classes
    )
    if problem:
        raise UserError(problem)


def _check_targets(job: JobSpec, model: PeftModel) -> PeftModel:
    """Return the model after checking that every name in `lora_target_modules` matched a layer.

    PEFT itself fails only if no name matches; a misspelt one among others would be ignored.

    Raises:
        UserError: PEFT found no layer for a name.
    """
    names = job.lora.lora_target_modules
    if job.uses_lora and not isinstance(names, str):
        unknown = [
            name
            for name in names
            if not any(is_named(path, (name,)) for path in model.targeted_module_names)
        ]
        if unknown:
            kind = type(model.get_base_model()).__name__
            raise UserError(
                f"lora.lora_target_modules has {unknown[0]!r}, but {kind} has no such layer"
            )
    return model


def _build_lora_config(job: JobSpec, base: Base) -> PeftConfig:
    """Return PEFT's LoRA configuration for the job.

    Raises:
        UserError: The adapter would modify tied embeddings, or the checkpoint lacks weights
            that PEFT cannot save.
    """
    from peft import LoraConfig

    lora = job.lora
    targets = lora.lora_target_modules
    _refuse_tied(job, base)
    return LoraConfig(
        modules_to_save=_list_saved_modules(base),
        task_type=_get_task_type(job),
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init_lora_weights == "default" else lora.init_lora_weights,
    )


def _get_task_type(job: JobSpec) -> str:
    """Return PEFT's name of the job's task."""
    return "CAUSAL_LM" if job.is_generative else "SEQ_CLS"


def _build_prompt_config(job: JobSpec, base: Base) -> PeftConfig:
    """Return PEFT's prompt tuning configuration for the job.

    Raises UserError if the model does not support prompt tuning with the job's settings.
    """
    from peft import PromptTuningConfig, PromptTuningInit

    spec = job.prompt_tuning
    # Validation checks both for the model types that it knows; here the loaded model is checked.
    max_positions = get_max_positions(base.model.config.to_dict())
    problem = check_prompt_length(
        spec.num_virtual_tokens, job.model.max_length, type(base.model).__name__, max_positions
    )
    if job.task == "classification" and hasattr(base.model, "score"):
        problem = describe_hidden_label(type(base.model).__name__)
    outside = [path for path in base.drawn if not any(name in path for name in PEFT_HEADS)]
    if outside:
        problem = (
            f"method is prompt_tuning, but the checkpoint has no weights for {outside[0]} of "
            f"{type(base.model).__name__}, which prompt tuning neither trains nor saves; use lora "
            "or full"
        )
    if problem:
        raise UserError(problem)
    text_options = {}
    if spec.prompt_tuning_init_text:
        text_options = {
            "prompt_tuning_init": PromptTuningInit.TEXT,
            "prompt_tuning_init_text": spec.prompt_tuning_init_text,
            "tokenizer_name_or_path": str(
                resolve_safetensors_folder(job.model.model_name_or_path, job.model.revision)
            ),
        }
    return PromptTuningConfig(
        task_type=_get_task_type(job), num_virtual_tokens=spec.num_virtual_tokens, **text_options
    )


def _refuse_tied(job: JobSpec, base: Base) -> None:
    """Raise UserError if an adapter would modify a matrix that is both embedding and head."""
    names = job.lora.lora_target_modules
    model = base.model
    head = model.get_output_embeddings() if job.is_generative else None
    if (
        isinstance(names, str)
        or head is None
        or head.weight is not model.get_input_embeddings().weight
    ):
        return
    shared = (head, model.get_input_embeddings())
    paths = [
        path
        for path, module in model.named_modules()
        if any(module is tied_module for tied_module in shared)
    ]
    tied = [name for name in names if any(is_named(path, (name,)) for path in paths)]
    if tied:
        raise UserError(describe_tied_targets(tied, job.model.model_name_or_path))


def _list_saved_modules(base: Base) -> list[str] | None:
    """Return the modules to train and save in full, besides the heads that PEFT saves by itself.

    These are newly initialised: a head's inner layer, or a pooler that the checkpoint
    lacks. If they were frozen or adapted, they would be random again, with other values,
    wherever the adapter is loaded.
    """
    modules = [path for path, _ in base.model.named_modules()]
    heads = [name for name in HEADS if name not in PEFT_HEADS and hasattr(base.model, name)]
    saved = [*heads, *base.drawn]
    for path in saved:
        if (
            sum(module_path.endswith(path) for module_path in modules) > 1
        ):  # PEFT matches modules by the end of their name
            raise UserError(
                f"the checkpoint has no weights for {path} of {type(base.model).__name__}, and "
                "PEFT cannot save them with an adapter; use method: full, or a checkpoint that was "
                "trained as a classifier"
            )
    return saved or None


def detach(base: Base, model: nn.Module) -> None:
    """Detach the method from the base.

    The head keeps its trained values; `attach` resets it. Changes to the base's own weights
    stay as well: such a base is `spent`.
    """
    if hasattr(model, "unload"):
        model.unload()
    elif model is not base.model:
        _unwrap_heads(base)
    model.eval()
    for block in _find_blocks(base.model):
        # `block.compile()` has no counterpart. The next trial of this process may not want compiled
        # blocks.
        block._compiled_call_impl = None
    if uses_gradient_checkpointing(base.model):
        base.model.gradient_checkpointing_disable()
    base.model.requires_grad_(False)


def compile_blocks(model: nn.Module) -> None:
    """Compile each of a model's repeated blocks in place.

    The code is compiled once for all blocks and works for any length.
    """
    for block in _find_blocks(model):
        # Batches have many lengths. With static shapes, each new length would compile again.
        block.compile(dynamic=True)


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return a model's layers: the modules that transformers marks as not to be split."""
    class_names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in class_names]


def uses_gradient_checkpointing(model: nn.Module) -> bool:
    """Return whether any layer recomputes its activations.

    transformers' own property for this is deprecated.
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _unwrap_heads(base: Base) -> None:
    """Remove PEFT's wrapper from the heads.

    A learnt prompt changes nothing else in the model and has no `unload`.
    """
    for name in HEADS:
        wrapper = getattr(base.model, name, None)
        if wrapper is not None and hasattr(wrapper, "original_module"):
            setattr(base.model, name, wrapper.original_module)


def get_trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the method trains, by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def copy_initial_values(job: JobSpec, tensors: Tensors) -> Tensors:
    """Return the adapter's initial values on the CPU, for methods that change the base.

    Such methods subtract these values from the base. The result is empty for all other
    methods.
    """
    if not (job.uses_lora and job.lora.has_modified_base):
        return {}
    return {
        name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if "lora_" in name
    }


def save_weights(
    job: JobSpec, model: Any, tensors: Tensors, initial: Tensors, folder: Path
) -> None:
    """Write trained values so that plain PEFT can load them onto the plain base.

    For `full`, transformers can load them.

    Args:
        tensors: Complete trained values, on any device.
        initial: The result of `copy_initial_values`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if job.method == "full":
            # One file, whose name `load_weights` and the export know.
            model.save_pretrained(str(folder), state_dict=tensors, max_shard_size="1000GB")
            load_chat_format(job).tokenizer.save_pretrained(str(folder))
            return
        _save_adapter(job, model, tensors, initial, folder)


def _save_adapter(
    job: JobSpec, model: PeftModel, tensors: Tensors, initial: Tensors, folder: Path
) -> None:
    """Write an adapter and its configuration in PEFT's format."""
    from peft import get_peft_model_state_dict

    config = copy_adapter_config(model)
    if initial:
        tensors = _to_plain_lora(tensors, initial)
        config.init_lora_weights = True
        # Keeps the scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    # PEFT would run the prompt's module, which does not work with sharded weights on one process.
    if config.is_prompt_learning:
        state = {
            _PROMPT[1]
            if key == _PROMPT[0]
            else key.replace(".modules_to_save.default", ""): tensor_value
            for key, tensor_value in tensors.items()
        }
    else:
        # The embeddings are never trained here; looking for them would ask the hub for the base's
        # config.
        state = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    write_adapter(job, config, state, folder)


def copy_adapter_config(model: Any) -> PeftConfig:
    """Return a copy of PEFT's configuration of a model's adapter."""
    return copy.deepcopy(model.peft_config["default"])


def save_lora_tensors(job: JobSpec, config: PeftConfig, tensors: Tensors, folder: Path) -> None:
    """Write a LoRA adapter whose model does not exist any more, as `save_weights` does.

    Args:
        config: PEFT's configuration of the adapter (`copy_adapter_config`).
        tensors: Trained values by the name of their parameter in the adapted model.
    """
    state = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): value
        for name, value in tensors.items()
    }
    write_adapter(job, copy.deepcopy(config), state, folder)


def write_adapter(job: JobSpec, config: PeftConfig, state: Tensors, folder: Path) -> None:
    """Write an adapter's tensors, by the names of PEFT's file, and its configuration.

    Args:
        config: It is changed.
    """
    from safetensors.torch import save_file

    # Adapters saved under ZeRO-3 without gathering are empty files (DeepSpeed#3620), found only
    # when they are loaded.
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if not state or not all(tensor.numel() for tensor in state.values()):
        raise RuntimeError("the state of the adapter is empty: the strategy did not gather it")
    save_file(state, str(folder / ADAPTER_FILES[1]), metadata={"format": "pt"})
    # Record the public name, not the local path: the cache folder does not exist on other machines.
    config.base_model_name_or_path, config.revision = resolve_public_base(
        job.model.model_name_or_path, job.model.revision
    )
    if getattr(config, "tokenizer_name_or_path", None):
        config.tokenizer_name_or_path = config.base_model_name_or_path
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _to_plain_lora(tensors: Tensors, initial: Tensors) -> Tensors:
    """Return an adapter for the plain base that is equivalent to this one on the changed base.

    The changed base lacks the adapter's initial values: W - s B0 A0 + s B A = W + s [B,
    -B0] [A; A0]. The result has twice the rank and the same scale (PEFT's
    `subtract_mutated_init`).
    """
    plain = dict(tensors)
    for name, initial_value in initial.items():
        current_value = tensors[name].detach().cpu()
        if ".lora_A." in name:
            plain[name] = torch.cat([current_value, initial_value])
        elif ".lora_B." in name:
            plain[name] = torch.cat([current_value, -initial_value], dim=1)
    return plain


def load_weights(job: JobSpec, base: Base, folder: Path) -> nn.Module:
    """Return the base with the weights that `save_weights` wrote, for evaluation.

    `detach` removes an adapter again; a base with full weights is `spent`.

    Raises:
        UserError: The adapter does not fit the job and its base.
        RuntimeError: The full weights are of another model.
    """
    if job.method == "full":
        from safetensors.torch import load_file

        base.spent = True
        missing, unknown = base.model.load_state_dict(
            load_file(str(folder / "model.safetensors")), strict=False
        )
        # The file stores tied matrices once.
        base.model.tie_weights()
        missing_untied = set(missing) - set(base.model.all_tied_weights_keys)
        if unknown or missing_untied:
            raise RuntimeError(
                f"{folder} does not contain the weights of this model: "
                f"{sorted(missing_untied) or unknown}"
            )
        return base.model
    from peft import PeftModel

    # `detach` leaves the trained head of an earlier trial in the base. It must not be part of this
    # evaluation.
    _refuse_adapter(job, base, folder, "the adapter")
    reset_heads(base, job.train.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: PeftModel = PeftModel.from_pretrained(base.model, str(folder))
    return adapted
