"""One model of a run, loaded as it was trained; and its adapter put into the weights of its base."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lorafleet.evaluation.inference.generate import end_tokens
from lorafleet.evaluation.report.model_of_run import Shipped
from lorafleet.evaluation.tokenizer import chat_format
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.data import prepare
from lorafleet.training.methods import detach, load_weights
from lorafleet.training.model import Base, fresh_heads, load_base, name_classes
from torch import nn

CPU = torch.device("cpu")


class Source:
    """What is exported: on the CPU, in float32."""

    def __init__(self, given: Shipped) -> None:
        if given.job.method == "prompt_tuning" and given.weights is not None:
            raise UserError(
                "method is prompt_tuning, but only weights can be merged and exported: a learnt prompt stands before "
                "the text and stays an adapter (method lora, qlora or full)"
            )
        self.given, self.job = given, in_float32(given.job)
        self.data: TokenData = prepare(self.job)
        self.chat = chat_format(self.job)
        self.tokenizer = self.chat.tokenizer
        self.base: Base = load_base(self.job, len(self.data.labels), CPU)
        self.model: Any = self._adapted()

    @property
    def quantised(self) -> bool:
        """Whether the base was packed by bitsandbytes."""
        return self.job.method == "qlora"

    @property
    def ends(self) -> list[int]:
        """Tokens at which an answer is over: the model's own, and the one that its chat template writes."""
        return list(dict.fromkeys([*end_tokens(self.base.model, self.tokenizer), *self.data.ends]))

    @property
    def size_mb(self) -> float:
        """MB of its weights as they are loaded, packed ones as they are packed."""
        return sum(weight.numel() * weight.element_size() for weight in self.base.model.parameters()) / 1e6

    def _adapted(self) -> nn.Module:
        if self.given.weights is not None:
            return load_weights(self.job, self.base, self.given.weights).eval()
        if not self.base.own_head:
            fresh_heads(self.base, self.job.train.seed)
        return self.base.model.eval()

    def merge(self, folder: Path) -> None:
        """Write the model with its adapter in its weights as plain transformers loads it. The source is spent by it.

        A quantised base is unpacked first: what was lost in packing stays
        lost, since the adapter was trained on it, and nothing more is.
        """
        model = self.model
        if self.quantised:
            if self.given.weights is not None:
                detach(self.base, model)
            _unpack(self.base.model)
            model = self._adapted()
        if hasattr(model, "merge_and_unload"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = model.merge_and_unload(safe_merge=True)  # raises ValueError at a weight that is no number
        if self.job.generates and getattr(model, "generation_config", None) is not None:
            # Whoever loads the model (transformers, vLLM) ends answers where its chat template does.
            model.generation_config.eos_token_id = self.ends or None
        _save(model, self.data.labels, folder)
        self.tokenizer.save_pretrained(str(folder))
        self.model = None


def in_float32(job: JobSpec) -> JobSpec:
    """A job whose model computes in float32: what a target is compared with has no rounding of its own."""
    train = job.train.model_copy(update={"mixed_precision": "no"})
    qlora = job.qlora.model_copy(update={"compute_dtype": "float32"})
    model = job.model.model_copy(update={"dtype": "float32"})
    return job.model_copy(update={"train": train, "qlora": qlora, "model": model})


def _unpack(model: nn.Module) -> None:
    """Give every matrix that bitsandbytes packed its values back, as an ordinary layer."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    packed = [(path, module) for path, module in model.named_modules() if type(module).__name__ in _PACKED]
    for path, module in packed:
        weight = dequantize_module_weight(module).data.to(getattr(module, "compute_dtype", None) or model.dtype)
        # transformers turns GPT-2's matrices (Conv1D) before it packs them.
        turned = getattr(module, "source_cls", None) is Conv1D
        kind: Any = Conv1D if turned else nn.Linear
        plain = kind(*weight.shape) if turned else kind(*reversed(weight.shape), bias=module.bias is not None)
        plain.weight = nn.Parameter(weight.T.contiguous() if turned else weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.data.to(weight.dtype), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)


_PACKED = ("Linear4bit", "Linear8bitLt")


def _save(model: Any, labels: Sequence[str], folder: Path) -> None:
    """Write a model whose config says nothing of quantisation, with the names of its classes."""
    config = type(model.config)(
        **{key: value for key, value in model.config.to_dict().items() if key not in _OF_THE_LOADING}
    )
    config.use_cache = True
    with torch.device("meta"):
        plain = type(model)(config)  # for its way of being saved alone: transformers will not write what was packed
    if labels:
        name_classes(plain, labels)
    plain.config.dtype = next(model.parameters()).dtype
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        plain.generation_config = generation
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    plain.save_pretrained(str(folder), state_dict=weights)


_OF_THE_LOADING = {"quantization_config", "_name_or_path", "transformers_version", "model_type", "use_cache"}
