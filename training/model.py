"""Load a base model once per process, freeze it, and share it between trials.

Importing and loading take seconds, attaching an adapter takes hundredths of a second;
so one `Base` serves all trials with the same `build_base_key`. transformers accepts
checkpoints that lack weights and fills them with random values; this module decides
which of them may be new and refuses all others.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafleet.evaluation.tokenizer import get_padding_id, read_tokenizer, silence_libraries
from lorafleet.jobs import files
from lorafleet.jobs.data.hub import (
    check_code,
    check_fetched,
    describe_missing_weights,
    get_converted_folder,
    get_model_folder,
    raise_if_missing,
)
from lorafleet.jobs.data.local_copy import resolve_node_copy
from lorafleet.jobs.data.verified_files import check_unchanged, record_fetched_files
from lorafleet.jobs.data.weight_names import read_weight_shapes
from lorafleet.jobs.errors import AssetError, UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import CLASSIFIER_HEADS as HEADS
from lorafleet.jobs.schema.model_kinds import (
    UNQUANTIZED_MODULES,
    get_classification_refusal,
    get_generation_refusal,
    get_length_refusal,
    is_causal,
)

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

PEFT_HEADS = ("classifier", "score")
"""Names of classification heads that PEFT trains and saves with an adapter by itself."""

_MODEL_LOAD_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
)
"""Exceptions that transformers raises for a folder with an invalid config or weights."""
_LOAD_SEED = 0
_BLOCK_SIZE = 64
"""Number of weights that share one scale in bitsandbytes' 4-bit formats."""


@dataclass
class Base:
    """A frozen base model on its device.

    One session uses it at a time. Closing a session restores it to the state it had before,
    unless it is `spent`.
    """

    model: PreTrainedModel
    device: torch.device
    key: tuple[Any, ...]
    """Identifies what the model was loaded from (see `build_base_key`).

    A session with another key needs another base.
    """
    dtype: torch.dtype = torch.float32
    """Number format of the weights that are not quantised."""
    own_head: bool = False
    """True if the checkpoint contains a trained classification head for the job's classes."""
    drawn: tuple[str, ...] = ()
    """Modules other than the head that the checkpoint lacks (for example a pooler).

    They are initialised again for each trial, like the head.
    """
    spent: bool = False
    """True if a method has written to the base's weights, so that no other session may use it."""

    def can_serve(self, job: JobSpec, labels: int) -> bool:
        """Return whether a session of this job can use this base.

        Args:
            labels: Number of classes of the job's data.
        """
        matches = self.key == build_base_key(job, labels) and self.dtype is resolve_weight_dtype(
            job, self.device
        )
        return matches and not self.spent

    @property
    def parameters(self) -> int:
        """Number of weights, including the head's."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def build_base_key(job: JobSpec, labels: int) -> tuple[Any, ...]:
    """Return the key that two trials must share in order to use the same loaded base."""
    return (job.is_generative, job.model, labels, job.qlora if job.method == "qlora" else None)


def resolve_device(gpus: int) -> torch.device:
    """Return the device of this process.

    Raises:
        UserError: The job asks for GPUs but torch reaches none. There is no fallback to the
            CPU.
    """
    if not gpus:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    cuda_version = torch.version.cuda or "none, a CPU build"
    raise UserError(
        f"this job uses GPUs, but torch {torch.__version__} (CUDA {cuda_version}) finds none. Run "
        "`nvidia-smi` to check the driver, and `lorafleet doctor` to see which torch supports it"
    )


def load_tokenizer(
    name: str, revision: str | None, *, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer, unmodified.

    `evaluation.tokenizer.chat_format` returns it with the job's chat template.
    """
    folder = resolve_safetensors_folder(name, revision)
    if trust_remote_code:
        check_code(name, revision)
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(
        name, folder, trust_remote_code=trust_remote_code
    )
    return tokenizer


def load_base(job: JobSpec, labels: int, device: torch.device, *, sharded: bool = False) -> Base:
    """Load the weights, freeze them, and move them to the device.

    Weights that the checkpoint lacks (for example a pooler) are initialised from a fixed
    seed, so that every process has the same base.

    Args:
        labels: Number of classes; unused for generation.
        sharded: Leave moving the weights to the device to the strategy.

    Raises:
        UserError: The model cannot do the job's task, or the GPU lacks the requested number
            format.
        AssetError: transformers cannot load the checkpoint, or the checkpoint is
            incomplete.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    spec = job.model
    folder = resolve_safetensors_folder(spec.model_name_or_path, spec.revision)
    if spec.trust_remote_code:
        check_code(spec.model_name_or_path, spec.revision)
    _check_model_kind(job, folder)
    check_number_formats(job, device)
    options: dict[str, Any] = {
        "dtype": resolve_weight_dtype(job, device),
        "trust_remote_code": spec.trust_remote_code,
        "use_safetensors": True,
        "output_loading_info": True,
        # Allowed for a classifier's head only; others are refused below.
        "ignore_mismatched_sizes": True,
    }
    if spec.attn_implementation != "auto":
        options["attn_implementation"] = spec.attn_implementation
    if job.task == "classification":
        options["num_labels"] = labels
    if job.method == "qlora":
        options |= {
            "quantization_config": _build_quantization_config(job, device, folder),
            "device_map": {"": device},
        }
    loader = (
        AutoModelForSequenceClassification if job.task == "classification" else AutoModelForCausalLM
    )
    # Every process must draw the same values for weights that the checkpoint lacks.
    torch.manual_seed(_LOAD_SEED)
    try:
        with silence_libraries():
            model, loading_info = loader.from_pretrained(folder, **options)
    except (*_MODEL_LOAD_ERRORS, SafetensorError) as error:
        raise AssetError(
            f"{spec.model_name_or_path} cannot be loaded for {job.task}: {error}"
        ) from error
    uninitialized = _list_uninitialized(
        model, loading_info, spec.model_name_or_path, classifies=not job.is_generative
    )
    # bitsandbytes quantises during loading, before it is known which weights the checkpoint lacks.
    _refuse_quantised(model, uninitialized)
    _set_padding_id(job, model)
    # Training needs no key-value cache. `generate` enables it for its own calls.
    model.config.use_cache = False
    if job.method == "qlora" and device.type == "cpu":
        _prepare_4bit_for_cpu(model, spec.model_name_or_path)
        _copy_unquantized_weights(model)
    model.requires_grad_(False)
    if job.method != "qlora" and not sharded:  # quantised weights are on their device already
        model.to(device)
    own_head = (
        not job.is_generative
        and _has_head(folder)
        and not any(_is_head(path) for path in uninitialized)
    )
    uninitialized_beside_head = tuple(path for path in uninitialized if not _is_head(path))
    return Base(
        model,
        device,
        build_base_key(job, labels),
        resolve_weight_dtype(job, device),
        own_head,
        uninitialized_beside_head,
    )


def _check_model_kind(job: JobSpec, folder: Path) -> None:
    """Raise UserError if the model cannot do the job's task or has too few positions.

    `lorafleet validate` makes the same check. It is repeated here for models that were not
    stored on the machine that validated the job.
    """
    name = job.model.model_name_or_path
    config = json.loads((folder / "config.json").read_text())
    refusal = get_generation_refusal if job.is_generative else get_classification_refusal
    try:
        problem = refusal(config, name) or get_length_refusal(config, name, job.model.max_length)
    except (
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # the config is untrusted input: any value can have any type
        raise AssetError(f"{name} has a config.json that cannot be interpreted: {error}") from error
    if problem:
        raise UserError(problem)


def _set_padding_id(job: JobSpec, model: PreTrainedModel) -> None:
    """Set the padding id in a decoder's config to the one that the rows are padded with.

    A decoder's classifier predicts from the last token that is not padding, which it finds
    by the id in its config. With another id, or none, it would read padding. An encoder's
    id is left unchanged: RoBERTa counts its positions from it.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is not None and (
        job.is_generative or not is_causal(model.config.to_dict())
    ):
        return
    spec = job.model
    tokenizer = load_tokenizer(
        spec.model_name_or_path, spec.revision, trust_remote_code=spec.trust_remote_code
    )
    model.config.pad_token_id = config.pad_token_id = get_padding_id(tokenizer)


def _list_uninitialized(
    model: PreTrainedModel, loading_info: Mapping[str, Any], name: str, *, classifies: bool
) -> tuple[str, ...]:
    """Return the paths of modules whose weights the checkpoint lacks or has in another size.

    Raises AssetError unless they belong to a classifier's head or pooler: any other part of
    the model would stay random.
    """
    mismatched = {
        entry[0] if isinstance(entry, tuple) else entry for entry in loading_info["mismatched_keys"]
    }
    missing = set(loading_info["missing_keys"]) | mismatched
    base_prefix = f"{model.base_model_prefix}."
    paths: dict[str, None] = {}
    for key in sorted(missing):
        path = _find_missing_module(model, key, missing)
        # Heads are outside the base prefix. A pooler may be inside it, and checkpoints of masked
        # language models lack it.
        may_be_new = not key.startswith(base_prefix) or "pool" in path
        if not classifies or not may_be_new:
            reason = (
                "has another size than in its config"
                if key in mismatched
                else "is missing from its files"
            )
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise AssetError(
                f"model.model_name_or_path is {name}, but {key}{others} of {type(model).__name__} "
                f"{reason}, and would have random values: the checkpoint is of another kind, or "
                "incomplete. If a download was interrupted, run `lorafleet fetch JOB.yaml`"
            )
        paths[path] = None
    return tuple(paths)


def _refuse_quantised(model: PreTrainedModel, uninitialized: Sequence[str]) -> None:
    """Raise UserError if bitsandbytes has quantised a module that must be trained."""
    for path in uninitialized:
        kinds = {type(module).__name__ for module in model.get_submodule(path).modules()}
        if kinds & {"Linear4bit", "Linear8bitLt"}:
            raise UserError(
                f"method is qlora, but the checkpoint has no weights for {path} of "
                f"{type(model).__name__}, which must be trained and cannot be quantised; use lora"
            )


def _find_missing_module(model: nn.Module, key: str, missing: set[str]) -> str:
    """Return the path of the outermost module around this weight that lacks all of its weights.

    Returns `key` itself if every surrounding module has some of its weights.
    """
    parts = key.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        names = {f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()}
        if names <= missing:
            return path
    return key


def _is_head(path: str) -> bool:
    """Return whether a module or weight path belongs to a classification head."""
    return path.partition(".")[0] in HEADS


def _copy_unquantized_weights(model: nn.Module) -> None:
    """Copy the unquantised weights (embeddings, norms) out of the memory-mapped weights file.

    A view into the file keeps all of it mapped, and the pages that quantisation has read
    count as this process's memory: an INT8 base of 135 M parameters then takes more memory
    than one in float32 (980 MiB instead of 682 MiB).
    """
    for values in (*model.parameters(), *model.buffers()):
        if values.is_floating_point():
            values.data = values.data.clone()


def _has_head(folder: Path) -> bool:
    """Return whether a checkpoint contains weights of a classification head."""
    from safetensors import safe_open

    def read_names(path: Path) -> list[str]:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())

    return any(
        name.partition(".")[0] in HEADS
        for path in folder.glob("*.safetensors")
        for name in read_names(path)
    )


def name_classes(model: nn.Module, labels: Sequence[str]) -> None:
    """Set the class names in a model's config, so that they are saved with the model.

    Args:
        labels: The class names of the data, in order of their ids.
    """
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def check_class_order(id2label: Mapping[Any, str], labels: Sequence[str], model_name: str) -> None:
    """Raise UserError if a trained head has the data's classes in another order.

    Its predictions would be scored against the wrong classes. Nothing is raised for other
    class names or for the `LABEL_0` of a model without class names, because they do not
    reveal the order.

    Args:
        id2label: The mapping of the model's config.
        labels: The class names of the data, in order.
        model_name: The model or folder, named in the error message.
    """
    model_labels = [str(id2label[key]) for key in sorted(id2label, key=int)]
    if [name.casefold() for name in model_labels] != [label.casefold() for label in labels] and (
        sorted(name.casefold() for name in model_labels)
        == sorted(label.casefold() for label in labels)
    ):
        raise UserError(
            f"{model_name} has its classes in the order {', '.join(model_labels)}, but the data in "
            f"the order {', '.join(labels)}: set data.labels to the model's order"
        )


def reset_heads(base: Base, seed: int, *, full: bool = False) -> None:
    """Replace the base's classification head and other uninitialised modules with new ones.

    Their values depend on `seed` alone. PEFT's `unload()` leaves a trained head in the base
    and the next `get_peft_model` copies it: without this reset, every later trial of a
    process would start from the previous one.

    Args:
        full: Use the base's own number format. Otherwise the modules are in float32, like
            the adapter that they are trained with.
    """
    # A generator of its own: the values must not depend on, or change, the process's random state.
    # It is on the CPU, so all devices get the same values.
    generator = torch.Generator().manual_seed(seed)
    std = getattr(base.model.config, "initializer_range", 0.02)
    dtype = base.model.dtype if full else torch.float32
    heads = [getattr(base.model, name, None) for name in HEADS]
    for head in (*heads, *(base.model.get_submodule(path) for path in base.drawn)):
        for module in head.modules() if head is not None else ():
            for name, parameter in list(module.named_parameters(recurse=False)):
                values = (
                    torch.zeros(parameter.shape) if name == "bias" else torch.ones(parameter.shape)
                )
                if parameter.dim() > 1:
                    values.normal_(0.0, std, generator=generator)
                setattr(
                    module,
                    name,
                    nn.Parameter(
                        values.to(device=parameter.device, dtype=dtype), requires_grad=False
                    ),
                )


def resolve_safetensors_folder(name: str, revision: str | None) -> Path:
    """Return the folder with a model's safetensors.

    A GGUF asset is converted to safetensors once, under a lock. The result is the copy on
    this node's own disk if there is one.

    Args:
        name: A hub name, a local folder, or `asset:NAME`.

    Raises:
        AssetError: The model is not stored on this machine, or its files differ from those
            that were fetched.
    """
    folder = get_model_folder(name, revision)
    if not (folder / "model.gguf").is_file():
        raise_if_missing(name, folder, describe_missing_weights(folder))
        check_fetched(name, folder)
        return resolve_node_copy(folder)
    converted = get_converted_folder(folder)
    # Several trials of one machine start at the same time and need the same conversion.
    with files.hold_lock(converted):
        if not converted.is_dir():
            _convert_gguf(folder, converted)
            record_fetched_files(converted)
        check_unchanged(converted)
    return resolve_node_copy(converted)


def _convert_gguf(folder: Path, target: Path) -> None:
    """Dequantise a GGUF model to float32 safetensors.

    transformers refuses to save a model that it loaded from GGUF, so the values are copied
    into a model that is built from a config without the quantisation.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with silence_libraries(), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file="model.gguf", trust_remote_code=False
        )  # nosec B615  # a folder of this machine
        loaded = AutoModelForCausalLM.from_pretrained(  # nosec B615  # a folder of this machine
            folder, gguf_file="model.gguf", dtype=torch.float32, trust_remote_code=False
        )
        dropped = {"quantization_config", "_name_or_path", "transformers_version", "model_type"}
        values = {
            key: value for key, value in loaded.config.to_dict().items() if key not in dropped
        }
        unquantized = type(loaded)(type(loaded.config)(**values)).float()
        unquantized.load_state_dict(loaded.state_dict())
        unquantized.generation_config = loaded.generation_config
        output_folder = Path(scratch) / "out"
        unquantized.save_pretrained(output_folder)
        tokenizer.save_pretrained(output_folder)
        shutil.copy(folder / "LICENSE", output_folder / "LICENSE")
        # The folder appears complete or not at all: its existence means that the conversion is
        # done.
        output_folder.rename(target)


def _prepare_4bit_for_cpu(model: PreTrainedModel, name: str) -> None:
    """Keep bitsandbytes from repacking 4-bit matrices in the first evaluation on CPUs with BF16.

    On CPUs with AVX512-BF16, the product with the repacked matrix has no backward pass, so
    all later training would lack most gradients.

    Raises UserError for matrices that bitsandbytes cannot process on CPU: the row length is
    not a multiple of the block size.
    """
    for path, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % _BLOCK_SIZE:
            raise UserError(
                f"method is qlora with 4 bits, but {path} of {name} has {module.in_features} "
                f"inputs, and on CPU bitsandbytes supports only multiples of {_BLOCK_SIZE}; use "
                "qlora.quant_type: int8, or lora"
            )


def _build_quantization_config(
    job: JobSpec, device: torch.device, folder: Path
) -> BitsAndBytesConfig:
    """Return the bitsandbytes configuration for the frozen matrices.

    Heads, and a pooler that the checkpoint lacks, are trained and therefore not quantised.
    """
    from transformers import BitsAndBytesConfig

    spec = job.qlora
    skipped_modules = list(UNQUANTIZED_MODULES)
    # A missing pooler is trained, and a quantised matrix cannot be.
    if not any("pooler" in name for name in read_weight_shapes(folder)):
        skipped_modules.append("pooler")
    if spec.quant_type == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        warnings.filterwarnings(
            "ignore", message="MatMul8bitLt: inputs will be cast"
        )  # one line per layer and step
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped_modules)
    weights_dtype = resolve_weight_dtype(job, device)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.use_double_quant,
        bnb_4bit_compute_dtype=weights_dtype
        if spec.compute_dtype == "auto"
        else getattr(torch, spec.compute_dtype),
        bnb_4bit_quant_storage=torch.uint8
        if spec.quant_storage == "auto"
        else getattr(torch, spec.quant_storage),
        llm_int8_skip_modules=skipped_modules,
    )


def resolve_weight_dtype(job: JobSpec, device: torch.device) -> torch.dtype:
    """Return the number format of the weights that are not quantised."""
    if job.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, job.model.dtype)
        return dtype
    # `full` keeps float32 weights: small updates vanish in bfloat16. CPUs without bfloat16
    # instructions are about ten times slower in it.
    frozen_on_gpu = device.type == "cuda" and job.method != "full"
    return torch.bfloat16 if frozen_on_gpu and supports_bfloat16(device) else torch.float32


def supports_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes in bfloat16 natively.

    torch also emulates bfloat16, which is many times slower.
    """
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def describe_missing_bfloat16(job: JobSpec, device: torch.device) -> str | None:
    """Return a warning if `auto` computes in float32 because the GPU lacks bfloat16.

    float16 is never chosen by itself: it needs loss scaling, and a run in it can diverge where
    float32 does not.
    """
    if device.type != "cuda" or supports_bfloat16(device):
        return None
    if job.train.mixed_precision != "auto" or job.model.dtype != "auto":
        return None
    sharded = job.resources.strategy not in ("auto", "ddp")
    advice = (
        "" if sharded else ": train.mixed_precision=fp16 is faster there, and must be asked for"
    )
    gpu = torch.cuda.get_device_name(device)
    return f"{gpu} does not support bfloat16, so the trial computes in float32{advice}"


def check_number_formats(job: JobSpec, device: torch.device) -> None:
    """Raise UserError if the job names a number format that the GPU lacks."""
    if device.type != "cuda" or supports_bfloat16(device):
        return
    for field, value, bfloat16_name in (
        ("train.mixed_precision", job.train.mixed_precision, "bf16"),
        ("model.dtype", job.model.dtype, "bfloat16"),
    ):
        if value == bfloat16_name:
            gpu = torch.cuda.get_device_name(device)
            raise UserError(
                f"{field} is {value}, but {gpu} does not support bfloat16: use auto, or fp16 in "
                "train.mixed_precision"
            )
