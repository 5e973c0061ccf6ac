"""Convert a merged model to ONNX with INT4 weights, using the builder of onnxruntime-genai.

The result runs in ONNX Runtime without onnxruntime-genai.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lorafleet.deployment.extras import Unavailable
from lorafleet.jobs import files

_ALGORITHM = "algo_config=k_quant_mixed"
"""Quantisation algorithm: the matrices that lose most accuracy stay in INT8 (llama.cpp's
selection). Measured with SmolLM2-135M on 4 texts of 200 tokens: perplexity rises from
39.6 to 45.1 at 117 MB. With all matrices in INT4 it rises to 52.0 at 90 MB.
"""

_NOT_IMPLEMENTED = 95
_BUILDER = f"""
import runpy, sys
try:
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
except NotImplementedError:
    sys.exit({_NOT_IMPLEMENTED})
"""


def to_int4(merged: Path, out: Path, scratch: Path, *, classifies: bool) -> None:
    """Convert a merged model to ONNX with weights in INT4, in blocks of 32.

    The most sensitive weights stay in INT8. Activations are rounded to INT8 for each
    product.

    Raises:
        Unavailable: The model is a classifier, or the builder does not support its type.
        RuntimeError: The builder failed.
    """
    model_type = files.read_json(merged / "config.json").get("model_type")
    if classifies:
        raise Unavailable(
            "onnxruntime-genai builds INT4 models only for text generation, but this model is a "
            "classifier"
        )
    # Run in a separate process: the builder prints, and it changes settings of shared libraries.
    command = [sys.executable, "-c", _BUILDER, "-i", str(merged), "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(scratch / "builder-cache")]
    command += ["--extra_options", "hf_token=false", _ALGORITHM]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode == _NOT_IMPLEMENTED:
        raise Unavailable(f"onnxruntime-genai has no INT4 builder for models of type {model_type}")
    if process.returncode:
        output = process.stderr.strip() or f"it ended with exit code {process.returncode}"
        raise RuntimeError(
            f"the builder of onnxruntime-genai failed: {output.splitlines()[-1]}\n\n{output}"
        )
