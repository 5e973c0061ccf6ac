"""How the base is adapted: a method is put on, its trained weights are written and read, and it is taken off again."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lorafleet.evaluation.tokenizer import chat_format
from lorafleet.jobs.data.adapters import ADAPTER_FILES, adapter_refusal
from lorafleet.jobs.data.hub import public_base
from lorafleet.jobs.data.weight_names import is_named
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.compatibility import prompt_hides_label, prompt_too_long
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import CLASSIFIER_HEADS as HEADS
from lorafleet.jobs.schema.model_kinds import learnt_positions, tied_refusal
from lorafleet.training.model import PEFT_HEADS, Base, fresh_heads, safetensors_folder
from torch import nn

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_PROMPT = ("prompt_encoder.default.embedding.weight", "prompt_embeddings")
"""A learnt prompt's name in the model and in PEFT's file."""

Tensors = dict[str, torch.Tensor]
"""Trained values by the name of their parameter in the adapted model."""


def attach(job: JobSpec, base: Base) -> nn.Module:
    """The base with its method put on, drawn from the trial's seed alone; only what the method trains requires grad.

    Raises UserError when the model has no layers of the names that the job gives, or cannot be adapted so.
    """
    fresh_heads(base, job.train.seed, full=job.method == "full")
    if job.train.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(job.train.seed)
    if job.method == "full":
        base.spent = True
        base.model.requires_grad_(True)
        return base.model
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if job.train.init_adapter:
            return _continued(job, base, Path(job.train.init_adapter))
        config = _prompt_config(job, base) if job.method == "prompt_tuning" else _lora_config(job, base)
        base.spent = base.spent or job.changes_base
        try:
            return _with_all_targets(job, get_peft_model(base.model, config))
        except ValueError as error:
            raise UserError(f"lora.lora_target_modules is {job.lora.lora_target_modules!r}, but {error}") from error
        except RuntimeError as error:
            if not job.changes_base:
                raise
            kind = job.lora.init_lora_weights
            raise UserError(
                f"lora.init_lora_weights is {kind}, which does not fit this model's layers: {error}"
            ) from error


def _continued(job: JobSpec, base: Base, folder: Path) -> nn.Module:
    """Return the base with an adapter that is trained on, with the job's dropout."""
    from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise UserError(f"train.init_adapter is {folder}, but there is no {name} in it")
    _refuse_adapter(job, base, folder, "train.init_adapter")
    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:  # which PEFT loads for inference alone
        config.inference_mode = False
        config.prompt_tuning_init = "RANDOM"  # its values are read below; a text would want its tokenizer
        prompted: PeftModel = get_peft_model(base.model, config)
        set_peft_model_state_dict(prompted, load_peft_weights(str(folder), device="cpu"))
        return prompted
    if hasattr(config, "lora_dropout"):
        config.lora_dropout = job.lora.lora_dropout
    adapted: PeftModel = PeftModel.from_pretrained(base.model, str(folder), is_trainable=True, config=config)
    return adapted


def _refuse_adapter(job: JobSpec, base: Base, folder: Path, field: str) -> None:
    """Raise UserError for an adapter that is of another kind, task or size than the job and its base."""
    config = base.model.config
    classes = 0 if job.generates else int(config.num_labels)
    wrong = adapter_refusal(folder, job.method, config.to_dict(), field, generates=job.generates, classes=classes)
    if wrong:
        raise UserError(wrong)


def _with_all_targets(job: JobSpec, model: PeftModel) -> PeftModel:
    """Return the model. Raises UserError for a name in `lora_target_modules` that PEFT found no layer of."""
    names = job.lora.lora_target_modules
    if job.adapts_with_lora and not isinstance(names, str):
        unknown = [name for name in names if not any(is_named(path, (name,)) for path in model.targeted_module_names)]
        if unknown:
            kind = type(model.get_base_model()).__name__
            raise UserError(f"lora.lora_target_modules has {unknown[0]!r}, but {kind} has no such layer")
    return model


def _lora_config(job: JobSpec, base: Base) -> PeftConfig:
    from peft import LoraConfig

    lora = job.lora
    wanted = lora.lora_target_modules
    _refuse_tied(job, base)
    return LoraConfig(
        modules_to_save=_saved_modules(base),
        task_type=_task_type(job),
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init_lora_weights == "default" else lora.init_lora_weights,
    )


def _task_type(job: JobSpec) -> str:
    return "CAUSAL_LM" if job.generates else "SEQ_CLS"


def _prompt_config(job: JobSpec, base: Base) -> PeftConfig:
    from peft import PromptTuningConfig, PromptTuningInit

    spec = job.prompt_tuning
    # Validation says both for kinds of models that it knows; here the model itself is asked.
    most = learnt_positions(base.model.config.to_dict())
    wrong = prompt_too_long(spec.num_virtual_tokens, job.model.max_length, type(base.model).__name__, most)
    if job.task == "classification" and hasattr(base.model, "score"):
        wrong = prompt_hides_label(type(base.model).__name__)
    outside = [path for path in base.drawn if not any(name in path for name in PEFT_HEADS)]
    if outside:
        wrong = (
            f"method is prompt_tuning, but the checkpoint has no weights for {outside[0]} of "
            f"{type(base.model).__name__}, which a learnt prompt does not train or save; use lora or full"
        )
    if wrong:
        raise UserError(wrong)
    text = {}
    if spec.prompt_tuning_init_text:
        text = {
            "prompt_tuning_init": PromptTuningInit.TEXT,
            "prompt_tuning_init_text": spec.prompt_tuning_init_text,
            "tokenizer_name_or_path": str(safetensors_folder(job.model.model_name_or_path, job.model.revision)),
        }
    return PromptTuningConfig(task_type=_task_type(job), num_virtual_tokens=spec.num_virtual_tokens, **text)


def _refuse_tied(job: JobSpec, base: Base) -> None:
    """Raise UserError where an adapter would go on a matrix that is the embedding and the output head at once."""
    names = job.lora.lora_target_modules
    model = base.model
    head = model.get_output_embeddings() if job.generates else None
    if isinstance(names, str) or head is None or head.weight is not model.get_input_embeddings().weight:
        return
    shared = (head, model.get_input_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is one for one in shared)]
    tied = [name for name in names if any(is_named(path, (name,)) for path in paths)]
    if tied:
        raise UserError(tied_refusal(tied, job.model.model_name_or_path))


def _saved_modules(base: Base) -> list[str] | None:
    """Return what is trained whole and saved with the adapter, beside the heads that PEFT saves by itself.

    That is what is drawn anew: a head's inner layer, or a pooler that the checkpoint lacks. Frozen or under an adapter
    it would be random again, and otherwise, wherever the adapter is loaded.
    """
    modules = [path for path, _ in base.model.named_modules()]
    heads = [name for name in HEADS if name not in PEFT_HEADS and hasattr(base.model, name)]
    saved = [*heads, *base.drawn]
    for path in saved:
        if sum(one.endswith(path) for one in modules) > 1:  # PEFT goes by the end of a name
            raise UserError(
                f"the checkpoint has no weights for {path} of {type(base.model).__name__}, and PEFT cannot save them "
                "with an adapter; use method: full, or a checkpoint that was trained as a classifier"
            )
    return saved or None


def detach(base: Base, model: nn.Module) -> None:
    """Take the method off. The head stays as trained: `attach` draws a new one.

    What was written to the base's own weights stays too; such a base is `spent`.
    """
    if hasattr(model, "unload"):
        model.unload()
    elif model is not base.model:
        _unwrap_heads(base)
    model.eval()
    for block in _blocks(base.model):
        block._compiled_call_impl = None
    if checkpoints_gradients(base.model):
        base.model.gradient_checkpointing_disable()
    base.model.requires_grad_(False)


def compile_blocks(model: nn.Module) -> None:
    """Compile each of a model's repeated blocks in place: the code is made once for all of them, for any length."""
    for block in _blocks(model):
        block.compile(dynamic=True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What transformers says must stay in one piece: a model's layers."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in whole]


def checkpoints_gradients(model: nn.Module) -> bool:
    """Whether a layer works its activations out again (transformers' own property for it is about to go)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _unwrap_heads(base: Base) -> None:
    """Take PEFT's wrapper off the head: a learnt prompt has nothing else in the model, and no `unload`."""
    for name in HEADS:
        wrapper = getattr(base.model, name, None)
        if wrapper is not None and hasattr(wrapper, "original_module"):
            setattr(base.model, name, wrapper.original_module)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a method trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def first_values(job: JobSpec, tensors: Tensors) -> Tensors:
    """The adapter as it begins, on the CPU, for methods that took it out of the base; else nothing."""
    if not (job.adapts_with_lora and job.lora.changes_base):
        return {}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if "lora_" in name}


def save_weights(job: JobSpec, model: Any, tensors: Tensors, begun: Tensors, folder: Path) -> None:
    """Write trained values so that plain PEFT (or transformers, for `full`) loads them onto the plain base.

    `tensors` are whole, on any device; `begun` is what `first_values` gave.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if job.method == "full":
            model.save_pretrained(str(folder), state_dict=tensors, max_shard_size="1000GB")
            chat_format(job).tokenizer.save_pretrained(str(folder))
            return
        _save_adapter(job, model, tensors, begun, folder)


def _save_adapter(job: JobSpec, model: PeftModel, tensors: Tensors, begun: Tensors, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(model.peft_config["default"])
    if begun:
        tensors = _as_plain_lora(tensors, begun)
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    if config.is_prompt_learning:  # PEFT would run the prompt's module, which cut-up weights cannot do on one process
        state = {
            _PROMPT[1] if n == _PROMPT[0] else n.replace(".modules_to_save.default", ""): t for n, t in tensors.items()
        }
    else:
        # The embeddings are never trained here; looking for them would ask the hub for the base's config.
        state = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if not state or not all(tensor.numel() for tensor in state.values()):
        raise RuntimeError("the adapter's state is empty: the strategy did not gather it")
    save_file(state, str(folder / ADAPTER_FILES[1]), metadata={"format": "pt"})
    # Not the path that the base was loaded from: others have no such cache folder.
    config.base_model_name_or_path, config.revision = public_base(job.model.model_name_or_path, job.model.revision)
    if getattr(config, "tokenizer_name_or_path", None):
        config.tokenizer_name_or_path = config.base_model_name_or_path
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _as_plain_lora(tensors: Tensors, begun: Tensors) -> Tensors:
    """An adapter on the plain base that does what this one does on the base without its first values.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: twice the rank, the same scale (PEFT's `subtract_mutated_init`).
    """
    plain = dict(tensors)
    for name, first in begun.items():
        now = tensors[name].detach().cpu()
        if ".lora_A." in name:
            plain[name] = torch.cat([now, first])
        elif ".lora_B." in name:
            plain[name] = torch.cat([now, -first], dim=1)
    return plain


def load_weights(job: JobSpec, base: Base, folder: Path) -> nn.Module:
    """The base with what `save_weights` wrote, to be evaluated; `detach` takes it off."""
    if job.method == "full":
        from safetensors.torch import load_file

        base.spent = True
        missing, unknown = base.model.load_state_dict(load_file(str(folder / "model.safetensors")), strict=False)
        base.model.tie_weights()
        lost = set(missing) - set(base.model.all_tied_weights_keys)
        if unknown or lost:
            raise RuntimeError(f"{folder} does not hold this model: {sorted(lost) or unknown}")
        return base.model
    from peft import PeftModel

    _refuse_adapter(job, base, folder, "the adapter")
    fresh_heads(base, job.train.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: PeftModel = PeftModel.from_pretrained(base.model, str(folder))
    return adapted
