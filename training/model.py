"""Loading the base model: once a process, frozen, and handed from trial to trial."""

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
from lorafleet.evaluation.tokenizer import padding_id, quiet_libraries, read_tokenizer
from lorafleet.jobs import files
from lorafleet.jobs.data.hub import check_code, check_fetched, converted_folder, lacks_weights, model_folder, refuse
from lorafleet.jobs.data.local_copy import staged
from lorafleet.jobs.data.verified_files import check_unchanged, seal
from lorafleet.jobs.data.weight_names import weight_shapes
from lorafleet.jobs.errors import AssetError, UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import CLASSIFIER_HEADS as HEADS
from lorafleet.jobs.schema.model_kinds import (
    UNQUANTIZED_MODULES,
    classification_refusal,
    generation_refusal,
    is_causal,
    length_refusal,
)
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

PEFT_HEADS = ("classifier", "score")
"""Those that PEFT trains and saves with an adapter of a classifier by itself."""

_OF_A_MODEL = (OSError, ValueError, ImportError, RuntimeError, TypeError, AttributeError, KeyError, AssertionError)
"""What transformers raises at a folder whose config or weights are not what they should be."""
_LOAD_SEED = 0
_BLOCK = 64
"""Weights under one scale in bitsandbytes' 4-bit formats."""


@dataclass
class Base:
    """A frozen base model on its device. One session at a time has it; a closed session leaves it as it was."""

    model: PreTrainedModel
    device: torch.device
    key: tuple[Any, ...]
    """What it was loaded from: a session for another key needs another base."""
    dtype: torch.dtype = torch.float32
    """Number format of its weights that are not quantised."""
    own_head: bool = False
    """Whether the checkpoint has a classification head for the job's classes, which it was trained with."""
    drawn: tuple[str, ...] = ()
    """Modules beside the head that the checkpoint lacks (a pooler): drawn anew for each trial, as heads are."""
    spent: bool = False
    """Whether a method has written to its weights: no other session may have it."""

    def serves(self, job: JobSpec, labels: int) -> bool:
        """Whether a session of this job may have it."""
        same = self.key == base_key(job, labels) and self.dtype is weight_dtype(job, self.device)
        return same and not self.spent

    @property
    def parameters(self) -> int:
        """Weights, the head's included."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def base_key(job: JobSpec, labels: int) -> tuple[Any, ...]:
    """What two trials must share to share a loaded base."""
    return (job.generates, job.model, labels, job.qlora if job.method == "qlora" else None)


def resolve_device(gpus: int) -> torch.device:
    """The device of this process. Raises UserError, with what is there and what to install, instead of falling back."""
    if not gpus:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    built = torch.version.cuda or "none: a CPU build"
    raise UserError(
        f"this job asks for GPUs, but torch {torch.__version__} (CUDA {built}) reaches none. `nvidia-smi` shows "
        "whether the driver does, `lorafleet doctor` which torch fits it"
    )


def load_tokenizer(name: str, revision: str | None, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer as it comes; `evaluation.tokenizer.chat_format` has it with the job's template."""
    folder = safetensors_folder(name, revision)
    if trust_remote_code:
        check_code(name, revision)
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(name, folder, trust_remote_code=trust_remote_code)
    return tokenizer


def load_base(job: JobSpec, labels: int, device: torch.device, *, sharded: bool = False) -> Base:
    """Read the weights, freeze them, and put them on the device (`sharded`: leave that to the strategy).

    Weights that the checkpoint lacks (a pooler, say) come from a fixed seed, so that every process has the same base.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    spec = job.model
    folder = safetensors_folder(spec.model_name_or_path, spec.revision)
    if spec.trust_remote_code:
        check_code(spec.model_name_or_path, spec.revision)
    _check_kind(job, folder)
    check_formats(job, device)
    options: dict[str, Any] = {
        "dtype": weight_dtype(job, device),
        "trust_remote_code": spec.trust_remote_code,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # of a classifier's head; others are refused below
    }
    if spec.attn_implementation != "auto":
        options["attn_implementation"] = spec.attn_implementation
    if job.task == "classification":
        options["num_labels"] = labels
    if job.method == "qlora":
        options |= {"quantization_config": _quantization(job, device, folder), "device_map": {"": device}}
    loader = AutoModelForSequenceClassification if job.task == "classification" else AutoModelForCausalLM
    torch.manual_seed(_LOAD_SEED)
    try:
        with quiet_libraries():
            model, loading = loader.from_pretrained(folder, **options)
    except (*_OF_A_MODEL, SafetensorError) as error:
        raise AssetError(f"{spec.model_name_or_path} cannot be loaded for {job.task}: {error}") from error
    drawn = _drawn_anew(model, loading, spec.model_name_or_path, classifies=not job.generates)
    _refuse_quantised(model, drawn)
    _settle_padding(job, model)
    model.config.use_cache = False
    if job.method == "qlora" and device.type == "cpu":
        _settle_4bit_on_cpu(model, spec.model_name_or_path)
        _let_go_of_the_file(model)
    model.requires_grad_(False)
    if job.method != "qlora" and not sharded:  # quantised weights are on their device already
        model.to(device)
    own_head = not job.generates and _has_head(folder) and not any(_is_head(path) for path in drawn)
    beside = tuple(path for path in drawn if not _is_head(path))
    return Base(model, device, base_key(job, labels), weight_dtype(job, device), own_head, beside)


def _check_kind(job: JobSpec, folder: Path) -> None:
    """Raise UserError for a model that cannot do the job's task, or whose positions are too few.

    `lorafleet validate` says the same; here it is asked once more, of models that were not on that machine.
    """
    name = job.model.model_name_or_path
    config = json.loads((folder / "config.json").read_text())
    refusal = generation_refusal if job.generates else classification_refusal
    try:
        wrong = refusal(config, name) or length_refusal(config, name, job.model.max_length)
    except (TypeError, ValueError, AttributeError) as error:  # a config is whatever somebody wrote
        raise AssetError(f"{name} has a config.json that cannot be understood: {error}") from error
    if wrong:
        raise UserError(wrong)


def _settle_padding(job: JobSpec, model: PreTrainedModel) -> None:
    """Have a decoder look for the padding that rows get.

    Its classifier reads the class off the last token that is not padding, by the id in its config; with another one, or
    none, it would read padding. An encoder's id stays: RoBERTa counts its positions from it.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is not None and (job.generates or not is_causal(model.config.to_dict())):
        return
    spec = job.model
    tokenizer = load_tokenizer(spec.model_name_or_path, spec.revision, trust_remote_code=spec.trust_remote_code)
    model.config.pad_token_id = config.pad_token_id = padding_id(tokenizer)


def _drawn_anew(model: PreTrainedModel, loading: Mapping[str, Any], name: str, *, classifies: bool) -> tuple[str, ...]:
    """Return the paths of the modules whose weights the checkpoint lacks, or has in another size.

    Raises AssetError where those are not a classifier's head or pooler: the model would be random there.
    """
    mismatched = {one[0] if isinstance(one, tuple) else one for one in loading["mismatched_keys"]}
    lost = set(loading["missing_keys"]) | mismatched
    inside = f"{model.base_model_prefix}."
    paths: dict[str, None] = {}
    for key in sorted(lost):
        path = _lost_as_a_whole(model, key, lost)
        may_be_new = not key.startswith(inside) or "pool" in path
        if not classifies or not may_be_new:
            what = "in another size than its config says" if key in mismatched else "not in its files"
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise AssetError(
                f"model.model_name_or_path is {name}, but {key}{more} of {type(model).__name__} is {what}: it is a "
                "checkpoint of another kind, or not whole, and would be random there"
            )
        paths[path] = None
    return tuple(paths)


def _refuse_quantised(model: PreTrainedModel, drawn: Sequence[str]) -> None:
    """Raise UserError where bitsandbytes has packed what is to be trained."""
    for path in drawn:
        kinds = {type(module).__name__ for module in model.get_submodule(path).modules()}
        if kinds & {"Linear4bit", "Linear8bitLt"}:
            raise UserError(
                f"method is qlora, but the checkpoint has no weights for {path} of {type(model).__name__}, which must "
                "be trained and cannot be quantised; use lora"
            )


def _lost_as_a_whole(model: nn.Module, key: str, lost: set[str]) -> str:
    """Return the path of the outermost module with this weight of which nothing was found."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        names = {f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()}
        if names <= lost:
            return path
    return key


def _is_head(path: str) -> bool:
    return path.partition(".")[0] in HEADS


def _let_go_of_the_file(model: nn.Module) -> None:
    """Copy what was not packed (embeddings, norms) out of the mapped file of weights.

    A view into it keeps the whole file mapped, and its pages, which packing has read, count as this process's memory:
    an INT8 base of 135 M parameters then takes more than one in float32 (980 MiB and not 682).
    """
    for values in (*model.parameters(), *model.buffers()):
        if values.is_floating_point():
            values.data = values.data.clone()


def _has_head(folder: Path) -> bool:
    """Whether a checkpoint has the weights of a classification head."""
    from safetensors import safe_open

    def names(path: Path) -> list[str]:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())

    return any(name.partition(".")[0] in HEADS for path in folder.glob("*.safetensors") for name in names(path))


def name_classes(model: nn.Module, labels: Sequence[str]) -> None:
    """Have a model's configuration say what its outputs mean, wherever it is saved."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def check_class_order(named: Mapping[Any, str], labels: Sequence[str], what: str) -> None:
    """Raises UserError where a trained head's own names are the data's in another order: it would be judged wrongly.

    `named` is an `id2label`. Other names, and the `LABEL_0` of a model that was never told, say nothing of the order.
    """
    own = [str(named[key]) for key in sorted(named, key=int)]
    if [name.casefold() for name in own] != [label.casefold() for label in labels] and (
        sorted(name.casefold() for name in own) == sorted(label.casefold() for label in labels)
    ):
        raise UserError(
            f"{what} has its classes in the order {', '.join(own)}, but the data has them as {', '.join(labels)}: "
            f"set data.labels to the model's order"
        )


def fresh_heads(base: Base, seed: int, *, full: bool = False) -> None:
    """Give the base a new classification head, and what else its checkpoint lacks, drawn from `seed` alone.

    It is in float32, as every adapter is beside which it is trained, or (`full`) in the base's own number format.

    PEFT's `unload()` leaves a trained head in the base and the next `get_peft_model` copies it: without this, every
    trial after the first in a process would start from the one before.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(base.model.config, "initializer_range", 0.02)
    dtype = base.model.dtype if full else torch.float32
    heads = [getattr(base.model, name, None) for name in HEADS]
    for head in (*heads, *(base.model.get_submodule(path) for path in base.drawn)):
        for module in head.modules() if head is not None else ():
            for name, old in list(module.named_parameters(recurse=False)):
                values = torch.zeros(old.shape) if name == "bias" else torch.ones(old.shape)
                if old.dim() > 1:
                    values.normal_(0.0, spread, generator=generator)
                setattr(module, name, nn.Parameter(values.to(device=old.device, dtype=dtype), requires_grad=False))


def safetensors_folder(name: str, revision: str | None) -> Path:
    """The folder with a model's safetensors; a GGUF asset is converted once, under a lock."""
    folder = model_folder(name, revision)
    if not (folder / "model.gguf").is_file():
        refuse(name, folder, lacks_weights(folder))
        check_fetched(name, folder)
        return staged(folder)
    converted = converted_folder(folder)
    with files.locked(converted):
        if not converted.is_dir():
            _convert_gguf(folder, converted)
            seal(converted)
        check_unchanged(converted)
    return staged(converted)


def _convert_gguf(folder: Path, target: Path) -> None:
    """Dequantise a GGUF to float32 safetensors. transformers refuses to save a model that it loaded from GGUF, so its
    values are copied into a model made from a config without the quantisation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_libraries(), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf", trust_remote_code=False)  # nosec B615  # a folder of this machine
        loaded = AutoModelForCausalLM.from_pretrained(  # nosec B615  # a folder of this machine
            folder, gguf_file="model.gguf", dtype=torch.float32, trust_remote_code=False
        )
        dropped = {"quantization_config", "_name_or_path", "transformers_version", "model_type"}
        values = {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
        plain = type(loaded)(type(loaded.config)(**values)).float()
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        out = Path(scratch) / "out"
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
        shutil.copy(folder / "LICENSE", out / "LICENSE")
        out.rename(target)


def _settle_4bit_on_cpu(model: PreTrainedModel, name: str) -> None:
    """Keep bitsandbytes from repacking 4-bit matrices in the first evaluation, on CPUs with AVX512-BF16: the product
    with the repacked form has no backward pass, so all training after it would be without most gradients.

    Raises UserError for matrices that it cannot do on CPU: rows that are no whole blocks.
    """
    for path, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % _BLOCK:
            raise UserError(
                f"method is qlora with 4 bits, but {path} of {name} has {module.in_features} inputs, and on CPU "
                f"bitsandbytes needs a multiple of {_BLOCK}; use qlora.quant_type: int8, or lora"
            )


def _quantization(job: JobSpec, device: torch.device, folder: Path) -> BitsAndBytesConfig:
    """How bitsandbytes packs the frozen matrices; heads, and a pooler that the checkpoint lacks, are trained and stay
    as they are."""
    from transformers import BitsAndBytesConfig

    spec = job.qlora
    kept = list(UNQUANTIZED_MODULES)
    if not any("pooler" in name for name in weight_shapes(folder)):
        kept.append("pooler")
    if spec.quant_type == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # a line a layer and step
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    weights = weight_dtype(job, device)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.use_double_quant,
        bnb_4bit_compute_dtype=weights if spec.compute_dtype == "auto" else getattr(torch, spec.compute_dtype),
        bnb_4bit_quant_storage=torch.uint8 if spec.quant_storage == "auto" else getattr(torch, spec.quant_storage),
        llm_int8_skip_modules=kept,
    )


def weight_dtype(job: JobSpec, device: torch.device) -> torch.dtype:
    """Number format of the weights that are not quantised."""
    if job.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, job.model.dtype)
        return dtype
    frozen_on_gpu = device.type == "cuda" and job.method != "full"
    return torch.bfloat16 if frozen_on_gpu and has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself; torch also emulates it, many times slower."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_formats(job: JobSpec, device: torch.device) -> None:
    """Raise UserError for a number format that the job names and the GPU does not have."""
    if device.type != "cuda" or has_bfloat16(device):
        return
    for field, value, wanted in (
        ("train.mixed_precision", job.train.mixed_precision, "bf16"),
        ("model.dtype", job.model.dtype, "bfloat16"),
    ):
        if value == wanted:
            gpu = torch.cuda.get_device_name(device)
            raise UserError(
                f"{field} is {value}, but {gpu} has no bfloat16: use auto, or fp16 in train.mixed_precision"
            )
