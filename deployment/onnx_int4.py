"""A merged model -> ONNX with weights in INT4, by the builder of onnxruntime-genai. It runs in ONNX Runtime alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lorafleet.deployment.availability import Unavailable
from lorafleet.jobs import files

_ALGORITHM = "algo_config=k_quant_mixed"
"""The matrices that suffer most stay in INT8 (llama.cpp's choice of them). Measured with SmolLM2-135M on 4 texts of 200
tokens: perplexity 39.6 becomes 45.1 with 117 MB; with all of them in INT4 it becomes 52.0 with 90 MB."""

_NOT_IMPLEMENTED = 95
_BUILDER = f"""
import runpy, sys
try:
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
except NotImplementedError:
    sys.exit({_NOT_IMPLEMENTED})
"""


def to_int4(merged: Path, out: Path, scratch: Path, *, classifies: bool) -> None:
    """Weights in INT4 by blocks of 32, those that matter most in INT8; activations in INT8 for each product.

    Raises Unavailable for a classifier and for a kind of model that the builder does not know.
    """
    kind = files.read_json(merged / "config.json").get("model_type")
    if classifies:
        raise Unavailable("onnxruntime-genai builds INT4 models that write text, and this one names classes")
    # In a process of its own: it prints, and it changes settings of the libraries that it shares.
    command = [sys.executable, "-c", _BUILDER, "-i", str(merged), "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(scratch / "builder-cache")]
    command += ["--extra_options", "hf_token=false", _ALGORITHM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == _NOT_IMPLEMENTED:
        raise Unavailable(f"onnxruntime-genai has no INT4 builder for models of type {kind}")
    if done.returncode:
        said = done.stderr.strip() or f"it ended with code {done.returncode}"
        raise RuntimeError(f"the builder of onnxruntime-genai failed: {said.splitlines()[-1]}\n\n{said}")
