"""A merged model -> ONNX: float32, float16 and INT8. B rows, T tokens, P tokens before, L layers."""

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
from lorafleet.deployment.runtime import ONNX_FILE, cache_word, files_mb
from lorafleet.jobs.errors import UserError

OPSET = 18
_MOST_IN_MEMORY_MB = 1800


def export_onnx(merged: Path, out: Path, *, classifies: bool) -> None:
    """One graph of any batch and length; of a decoder with its keys and values in and out, for prompts and steps."""
    require("onnx", "exporting to ONNX")
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    # Fused attention gives other numbers where a whole row is masked, as padding on the left has it; eager does not.
    model = kind.from_pretrained(
        str(merged), attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    ).eval()
    wrapped, inputs, shapes, given, made = _classifier(model) if classifies else _decoder(model)
    out.mkdir(parents=True, exist_ok=True)
    with quiet(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            wrapped.eval(),
            inputs,
            str(out / ONNX_FILE),
            dynamo=True,
            opset_version=OPSET,
            external_data=True,
            input_names=given,
            output_names=made,
            dynamic_shapes=shapes,
            verbose=False,
        )


def _classifier(model: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], list[str], list[str]]:
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            logits_BC: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits_BC

    any_size = torch.export.Dim.DYNAMIC
    ids_BT = torch.full((3, 7), 1, dtype=torch.int64)
    mask_BT = torch.ones_like(ids_BT)
    # Without padding in the example a mask of ones would be taken for granted.
    ids_BT[1, 4:], mask_BT[1, 4:] = model.config.pad_token_id or 0, 0
    both = {0: any_size, 1: any_size}
    return Classifier(), (ids_BT, mask_BT), (both, both), ["input_ids", "attention_mask"], ["logits"]


def _decoder(model: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], list[str], list[str]]:
    import torch
    from transformers import DynamicCache

    layers, heads, size = cache_shape(model.config)
    word = cache_word(model)

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
            found = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{word: cache},
            )
            kept = [cache.layers[layer] for layer in range(layers)]
            return found.logits, [part for layer in kept for part in (layer.keys, layer.values)]

    # Every size is another, and none is 1, or the graph would hold it as fixed.
    rows, new, before = 2, 3, 5
    ids_BT = torch.ones((rows, new), dtype=torch.int64)
    mask_BS = torch.ones((rows, before + new), dtype=torch.int64)
    positions_BT = torch.arange(before, before + new)[None].expand(rows, new).contiguous()
    past = [torch.zeros(rows, heads, before, size) for _ in range(2 * layers)]
    any_size = torch.export.Dim.DYNAMIC
    both = {0: any_size, 1: any_size}
    shapes = (both, both, both, [{0: any_size, 2: any_size}] * (2 * layers))
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    given = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    made = ["logits", *(f"present.{pair}" for pair in pairs)]
    return Decoder(), (ids_BT, mask_BS, positions_BT, past), shapes, given, made


def cache_shape(config: Any) -> tuple[int, int, int]:
    """(layers, heads of a key, numbers of a head). Raises UserError for a model without such a cache."""
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads if heads and getattr(config, "hidden_size", None) else None
    )
    if not (layers and heads and size):
        raise UserError(f"a model of type {config.model_type} has no keys and values that we know how to keep")
    return int(layers), int(heads), int(size)


def to_fp16(source: Path, out: Path) -> None:
    """Weights in half the bytes; what goes in and comes out stays float32.

    Half the disk. On a CPU no speed: ONNX Runtime computes in float32 there, from float16 weights.
    """
    require("onnx", "exporting to ONNX")
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = source / ONNX_FILE
    # A model in memory goes through protobuf, which ends at 2 GB; one on disk is written once more beside itself.
    large = files_mb(source) > _MOST_IN_MEMORY_MB
    with quiet():
        # onnxconverter-common's function of the same name leaves stale types, and ONNX Runtime refuses its models.
        half = convert_float_to_float16(str(path) if large else onnx.load(str(path)), keep_io_types=True)
    _write(half, out)


def to_int8(source: Path, out: Path, scratch: Path) -> None:
    """Weights in INT8 by column, and what goes into them as it comes (dynamic quantisation): the fastest.

    What goes in is rounded by one scale for all of it. In models with a few very large activations, as trained Llamas
    have, little is left of the others; and on a CPU with AVX2 and without VNNI such sums overflow.
    """
    require("onnx", "exporting to ONNX")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _prepared(source, scratch)
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        quantize_dynamic(
            str(prepared),
            str(out / ONNX_FILE),
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=True,
        )


def to_int8_by_blocks(source: Path, out: Path, scratch: Path) -> None:
    """Weights in INT8 by blocks of 32, each with a scale of its own; what goes in is rounded by such blocks too.

    Measured with a tuned SmolLM2-135M on 4 x 160 tokens: perplexity 52.2 becomes 51.8 with 180 MB, where `to_int8`
    gives what is no language (84 where its weights have 7 bits, so that nothing overflows).
    """
    require("onnx", "exporting to ONNX")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    between = scratch / "by-blocks"
    between.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        model = ONNXModel(onnx.load(str(_prepared(source, scratch))))
        model.replace_gemm_with_matmul()
        rounded = MatMulNBitsQuantizer(
            model.model, bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=_ACTIVATIONS_IN_INT8
        )
        rounded.process()
        rounded.model.save_model_to_file(str(between / ONNX_FILE), use_external_data_format=True)
        # The embedding, which is looked up and not multiplied.
        quantize_dynamic(
            str(between / ONNX_FILE),
            str(out / ONNX_FILE),
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Gather"],
            use_external_data_format=True,
        )
    shutil.rmtree(between)


_BLOCK, _ACTIVATIONS_IN_INT8 = 32, 4


def _prepared(source: Path, scratch: Path) -> Path:
    """The graph with its constants folded, made once."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = scratch / "prepared"
    if prepared.exists():
        return prepared / ONNX_FILE
    prepared.mkdir(parents=True)
    with quiet():
        # Folds the transposed embedding of a tied head into a constant: else the largest matrix stays in float32.
        quant_pre_process(
            str(source / ONNX_FILE),
            str(prepared / ONNX_FILE),
            skip_symbolic_shape=True,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            external_data_location=f"{ONNX_FILE}.data",
        )
    return prepared / ONNX_FILE


def _write(model: Any, out: Path) -> None:
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
def quiet() -> Iterator[None]:
    """The exporters print progress and advice; a reader of ours is told what was found instead."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "")]
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
