"""Load the model of a run as it was trained, and merge its adapter into its base.

The loaded model is the source that every target is compared with. It computes in
float32 on the CPU, so that differences are those of the target.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafleet.evaluation.inference.generate import get_end_tokens
from lorafleet.evaluation.report.model_of_run import SelectedModel
from lorafleet.evaluation.tokenizer import load_chat_format
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.data.rows import forget_rows
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.data import prepare_tokens
from lorafleet.training.methods import detach, load_weights
from lorafleet.training.model import Base, load_base, name_classes, reset_heads

CPU = torch.device("cpu")


class Source:
    """The model to export, loaded on the CPU in float32.

    `merge` consumes it: afterwards only the merged model on disk is valid, so everything
    that needs the source (outputs, answers, the score of the base) must be recorded before.

    Raises UserError if the model is a learnt prompt, which has no weights to merge.
    """

    def __init__(self, selected: SelectedModel) -> None:
        if selected.job.method == "prompt_tuning" and selected.weights is not None:
            raise UserError(
                "method is prompt_tuning, but only adapters in weights can be merged and exported: "
                "a learnt prompt precedes the text and stays an adapter. Train with method lora, "
                "qlora or full"
            )
        self.given, self.job = selected, convert_to_float32(selected.job)
        self.data: TokenData = prepare_tokens(self.job)
        forget_rows()
        self.chat = load_chat_format(self.job)
        self.tokenizer = self.chat.tokenizer
        self.base: Base = load_base(self.job, len(self.data.labels), CPU)
        self.model: Any = self._load_adapted()

    @property
    def is_quantised(self) -> bool:
        """Return whether the base was quantised by bitsandbytes."""
        return self.job.method == "qlora"

    @property
    def ends(self) -> list[int]:
        """Return the token ids that end an answer: the model's and the chat template's."""
        return list(
            dict.fromkeys([*get_end_tokens(self.base.model, self.tokenizer), *self.data.ends])
        )

    @property
    def size_mb(self) -> float:
        """Return the size of the loaded weights in MB. Quantised weights count as stored."""
        return (
            sum(weight.numel() * weight.element_size() for weight in self.base.model.parameters())
            / 1e6
        )

    def _load_adapted(self) -> nn.Module:
        """Return the base with its trained weights, or the base as it is if nothing was trained."""
        if self.given.weights is not None:
            return load_weights(self.job, self.base, self.given.weights).eval()
        # An untrained classifier has no head of its own. The seed of the job makes the one that the
        # run evaluated as its base.
        if not self.base.own_head:
            reset_heads(self.base, self.job.train.seed)
        return self.base.model.eval()

    def merge(self, folder: Path) -> None:
        """Merge the adapter and save the model for plain transformers.

        This consumes the source. A quantised base is dequantised first. The precision lost by
        quantisation stays lost, since the adapter was trained on the quantised values; merging
        loses nothing more.

        Args:
            folder: Folder for the model and the tokenizer.

        Raises:
            ValueError: A merged weight is NaN or infinite.
        """
        model = self.model
        if self.is_quantised:
            if self.given.weights is not None:
                # PEFT merges into a quantised layer by quantising again, which would lose precision
                # a second time. The adapter is loaded anew on the plain layers.
                detach(self.base, model)
            _dequantise(self.base.model)
            model = self._load_adapted()
        if hasattr(model, "merge_and_unload"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = model.merge_and_unload(
                    safe_merge=True
                )  # ValueError if a weight is not finite
        if self.job.is_generative and getattr(model, "generation_config", None) is not None:
            # transformers and vLLM then end answers where the chat template does.
            model.generation_config.eos_token_id = self.ends or None
        _save(model, self.data.labels, folder)
        self.tokenizer.save_pretrained(str(folder))
        self.model = None


def convert_to_float32(job: JobSpec) -> JobSpec:
    """Return the job with its model computing in float32.

    The source of a comparison must not add rounding errors of its own. Weights that are
    stored quantised stay so.
    """
    train = job.train.model_copy(update={"mixed_precision": "no"})
    qlora = job.qlora.model_copy(update={"compute_dtype": "float32"})
    model = job.model.model_copy(update={"dtype": "float32"})
    return job.model_copy(update={"train": train, "qlora": qlora, "model": model})


def _dequantise(model: nn.Module) -> None:
    """Replace every layer that bitsandbytes quantised by an ordinary layer with the same values."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    quantised = [
        (path, module)
        for path, module in model.named_modules()
        if type(module).__name__ in _QUANTISED_LAYERS
    ]
    for path, module in quantised:
        weight = dequantize_module_weight(module).data.to(
            getattr(module, "compute_dtype", None) or model.dtype
        )
        # transformers transposes GPT-2's matrices (Conv1D) before it quantises them.
        is_transposed = getattr(module, "source_cls", None) is Conv1D
        layer_class: Any = Conv1D if is_transposed else nn.Linear
        plain = (
            layer_class(*weight.shape)
            if is_transposed
            else layer_class(*reversed(weight.shape), bias=module.bias is not None)
        )
        plain.weight = nn.Parameter(
            weight.T.contiguous() if is_transposed else weight, requires_grad=False
        )
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.data.to(weight.dtype), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)


_QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt")


def _save(model: Any, labels: Sequence[str], folder: Path) -> None:
    """Save a model with its class names and without quantisation settings in its configuration."""
    config = type(model.config)(
        **{key: value for key, value in model.config.to_dict().items() if key not in _LOADING_KEYS}
    )
    config.use_cache = True
    # On the meta device the second model takes no memory; the weights are passed to
    # `save_pretrained`.
    with torch.device("meta"):
        plain = type(model)(config)  # transformers cannot save a quantised model
    if labels:
        name_classes(plain, labels)
    plain.config.dtype = next(model.parameters()).dtype
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        plain.generation_config = generation
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    plain.save_pretrained(str(folder), state_dict=weights)


_LOADING_KEYS = {
    "quantization_config",
    "_name_or_path",
    "transformers_version",
    "model_type",
    "use_cache",
}
