"""Convert a merged model to ONNX: float32, float16 and INT8.

The graph comes from torch's dynamo exporter and has the input and output names of
Optimum (`past_key_values.N.key`, `present.N.key`), so that other runners for ONNX
models know them. A graph is two files, `model.onnx` and its weights in
`model.onnx.data`; both must be moved together.

Optimum's own exporter is not used: optimum-onnx 0.1.0 needs transformers 4, and
`transformers.exporters` stores the weights of prompts and single steps twice.

Shapes: B rows, T tokens, P tokens before, L layers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafleet.deployment.extras import require
from lorafleet.deployment.runtime import ONNX_FILE, compute_files_mb, get_cache_argument
from lorafleet.jobs.errors import UserError

OPSET = 18
_MAX_IN_MEMORY_MB = 1800


def export_onnx(merged: Path, out: Path, *, classifies: bool) -> None:
    """Export a merged model as one ONNX graph for any batch size and length.

    The graph of a decoder has keys and values as inputs and outputs, so that it serves
    prompts and single steps.

    Args:
        merged: Folder of the merged model.
        out: Folder for the graph. It is created if it does not exist.
        classifies: True for a classifier, False for a causal model.

    Raises:
        MissingExtra: The packages for ONNX are not installed.
    """
    require("onnx", "exporting to ONNX")
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model_class = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    # Fused attention gives different results for fully masked rows, which left padding produces.
    # Eager attention does not.
    model = model_class.from_pretrained(
        str(merged), attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    ).eval()
    wrapped, inputs, dynamic_shapes, input_names, output_names = (
        _wrap_classifier(model) if classifies else _wrap_decoder(model)
    )
    out.mkdir(parents=True, exist_ok=True)
    with suppress_output(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            # A new module is in training mode, although the model inside it is not.
            wrapped.eval(),
            inputs,
            str(out / ONNX_FILE),
            dynamo=True,
            opset_version=OPSET,
            external_data=True,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )


def _wrap_classifier(
    model: Any,
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], list[str], list[str]]:
    """Wrap a classifier for the exporter.

    Returns (module, example inputs, dynamic shapes, input names, output names).
    """
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            logits_BC: torch.Tensor = self.model(
                input_ids=input_ids, attention_mask=attention_mask
            ).logits
            return logits_BC

    any_size = torch.export.Dim.DYNAMIC
    ids_BT = torch.full((3, 7), 1, dtype=torch.int64)
    mask_BT = torch.ones_like(ids_BT)
    # Without padding in the example, the exporter would treat the mask as constant ones.
    ids_BT[1, 4:], mask_BT[1, 4:] = model.config.pad_token_id or 0, 0
    batch_and_length = {0: any_size, 1: any_size}
    return (
        Classifier(),
        (ids_BT, mask_BT),
        (batch_and_length, batch_and_length),
        ["input_ids", "attention_mask"],
        ["logits"],
    )


def _wrap_decoder(model: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], list[str], list[str]]:
    """Wrap a decoder for the exporter.

    Returns (module, example inputs, dynamic shapes, input names, output names).
    """
    import torch
    from transformers import DynamicCache

    layers, heads, head_size = get_cache_shape(model.config)
    cache_argument = get_cache_argument(model)

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[torch.Tensor],
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            cache = DynamicCache(config=self.model.config)
            for layer in range(layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{cache_argument: cache},
            )
            layer_caches = [cache.layers[layer] for layer in range(layers)]
            return output.logits, [
                part for layer in layer_caches for part in (layer.keys, layer.values)
            ]

    # All sizes differ and none is 1: otherwise the exporter would treat them as fixed or equal.
    rows, new_tokens, past_tokens = 2, 3, 5
    ids_BT = torch.ones((rows, new_tokens), dtype=torch.int64)
    mask_BS = torch.ones((rows, past_tokens + new_tokens), dtype=torch.int64)
    positions_BT = (
        torch.arange(past_tokens, past_tokens + new_tokens)[None]
        .expand(rows, new_tokens)
        .contiguous()
    )
    past = [torch.zeros(rows, heads, past_tokens, head_size) for _ in range(2 * layers)]
    any_size = torch.export.Dim.DYNAMIC
    batch_and_length = {0: any_size, 1: any_size}
    shapes = (
        batch_and_length,
        batch_and_length,
        batch_and_length,
        [{0: any_size, 2: any_size}] * (2 * layers),
    )
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    input_names = [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{pair}" for pair in pairs),
    ]
    output_names = ["logits", *(f"present.{pair}" for pair in pairs)]
    return Decoder(), (ids_BT, mask_BS, positions_BT, past), shapes, input_names, output_names


def get_cache_shape(config: Any) -> tuple[int, int, int]:
    """Return (layers, key heads, head size) of a model's cache.

    With grouped-query attention, a model has fewer key heads than attention heads.

    Args:
        config: Configuration of a causal model, whose names differ between kinds of models.

    Raises:
        UserError: The model has no cache of keys and values.
    """
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(
        config, "num_attention_heads", None
    )
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
        if heads and getattr(config, "hidden_size", None)
        else None
    )
    if not (layers and heads and head_size):
        raise UserError(
            f"lorafleet cannot store the keys and values of a model of type {config.model_type}"
        )
    return int(layers), int(heads), int(head_size)


def to_fp16(source: Path, out: Path) -> None:
    """Convert the weights to float16; inputs and outputs stay float32.

    This halves the size on disk. It brings no speed on a CPU, where ONNX Runtime computes
    in float32 and needs more memory for the converted weights.

    Args:
        source: Folder of the float32 graph.
        out: Folder for the converted graph.
    """
    require("onnx", "exporting to ONNX")
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = source / ONNX_FILE
    # A model in memory is limited to 2 GB by protobuf. For one on disk the converter writes a
    # second copy next to it.
    is_large = compute_files_mb(source) > _MAX_IN_MEMORY_MB
    with suppress_output():
        # onnxconverter-common has a function of the same name, but ONNX Runtime rejects its models
        # for stale types.
        half_model = convert_float_to_float16(
            str(path) if is_large else onnx.load(str(path)), keep_io_types=True
        )
    _save_model(half_model, out)


def to_int8(source: Path, out: Path, scratch: Path) -> None:
    """Quantise to INT8 dynamically: weights by column, activations at run time.

    This is the fastest variant. Activations are rounded with one scale per tensor. In
    models with a few very large activations, such as trained Llama models, this leaves
    little precision for the others. On CPUs with AVX2 but without VNNI, the INT8 sums can
    also overflow.

    Args:
        source: Folder of the float32 graph.
        out: Folder for the quantised graph.
        scratch: Folder for intermediate graphs.
    """
    require("onnx", "exporting to ONNX")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _preprocess(source, scratch)
    out.mkdir(parents=True, exist_ok=True)
    with suppress_output():
        quantize_dynamic(
            str(prepared),
            str(out / ONNX_FILE),
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=True,
        )


def to_int8_by_blocks(source: Path, out: Path, scratch: Path) -> None:
    """Quantise weights and activations to INT8 in blocks of 32, each with its own scale.

    Measured with a tuned SmolLM2-135M on 4 x 160 tokens: perplexity goes from 52.2 to 51.8
    at 180 MB, where the output of `to_int8` is unusable (perplexity 84 with 7-bit weights,
    which avoid overflow).

    Args:
        source: Folder of the float32 graph.
        out: Folder for the quantised graph.
        scratch: Folder for intermediate graphs.
    """
    require("onnx", "exporting to ONNX")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    intermediate = scratch / "by-blocks"
    intermediate.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    with suppress_output():
        model = ONNXModel(onnx.load(str(_preprocess(source, scratch))))
        model.replace_gemm_with_matmul()
        quantizer = MatMulNBitsQuantizer(
            model.model,
            bits=8,
            block_size=_BLOCK_SIZE,
            is_symmetric=True,
            accuracy_level=_ACCURACY_LEVEL_INT8,
        )
        quantizer.process()
        quantizer.model.save_model_to_file(
            str(intermediate / ONNX_FILE), use_external_data_format=True
        )
        # The embedding is a lookup (Gather), which the block quantizer does not cover.
        quantize_dynamic(
            str(intermediate / ONNX_FILE),
            str(out / ONNX_FILE),
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Gather"],
            use_external_data_format=True,
        )
    shutil.rmtree(intermediate)


_BLOCK_SIZE, _ACCURACY_LEVEL_INT8 = 32, 4


def _preprocess(source: Path, scratch: Path) -> Path:
    """Return the graph with its constants folded. It is built once per export."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = scratch / "prepared"
    if prepared.exists():
        return prepared / ONNX_FILE
    prepared.mkdir(parents=True)
    with suppress_output():
        # Folds the transposed embedding of a tied head into a constant: otherwise the largest
        # matrix stays in float32.
        quant_pre_process(
            str(source / ONNX_FILE),
            str(prepared / ONNX_FILE),
            skip_symbolic_shape=True,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            external_data_location=f"{ONNX_FILE}.data",
        )
    return prepared / ONNX_FILE


def _save_model(model: Any, out: Path) -> None:
    """Save an ONNX model with its weights in a separate file."""
    import onnx

    out.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model,
        str(out / ONNX_FILE),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{ONNX_FILE}.data",
    )


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress the progress and advice that exporters print.

    The caller reports the result instead. Exceptions pass through; only what is printed or
    logged below errors is lost.
    """
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "")
    ]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            try:
                yield
            finally:
                for logger, level in zip(loggers, levels, strict=True):
                    logger.setLevel(level)
