"""Memory of one training process by component, from a model's config alone. Pure.

The formulas: weights are parameters x bytes; an adapter of rank r on a matrix [out, in] has r*(in+out) parameters, each
with a gradient and two Adam moments; activations kept for the backward pass are about
34*hidden + 5*heads*length bytes a token and layer at 2 bytes a number (Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models, MLSys 2023, equation 2), doubled for float32; logits are batch x length x
vocabulary x 4 bytes, twice (causal LMs).
"""

from __future__ import annotations

from cluster.shape import Shape
from jobs.defaults import LOGITS_AT_ONCE
from jobs.plan import MemoryEstimate
from jobs.spec import JobSpec

GIB = 2**30
_RUNTIME_CPU_GIB = 0.75
_RUNTIME_CUDA_GIB = 0.9


def estimate(
    job: JobSpec, shape: Shape, parameters: int, longest_tokens: int, *, cuda: bool, labels: int = 2
) -> MemoryEstimate:
    """GiB of one process for one trial, low, expected and high, when the longest row has `longest_tokens`.

    Scaled-dot-product attention keeps no scores, so the expected value leaves out their term; the high one has it.
    """
    bytes_each = _bytes_each(job, cuda=cuda)
    length = min(longest_tokens, job.model.max_length)
    tokens = job.train.per_device_train_batch_size * length
    trained = parameters if job.method == "full" else trained_parameters(job, shape, labels)
    activations = tokens * shape.layers * 34 * shape.hidden * bytes_each / 2
    scores = tokens * shape.layers * 5 * shape.heads * length * bytes_each / 2
    logits = _logit_bytes(job, shape, tokens)
    components = {
        "base weights": _weight_bytes(job, parameters, shape.matrices, bytes_each) / GIB,
        "trained weights, gradients, optimiser": trained * _training_bytes(job, bytes_each) / GIB,
        "activations": activations / GIB,
        "logits": logits / GIB,
        "runtime": _RUNTIME_CUDA_GIB if cuda else _RUNTIME_CPU_GIB,
    }
    expected = sum(components.values())
    moving = components["activations"] + components["logits"]
    return MemoryEstimate(
        components={name: round(gib, 3) for name, gib in components.items()},
        low=round(expected - 0.6 * moving, 2),
        expected=round(expected, 2),
        high=round(1.2 * (expected + scores / GIB), 2),
        of="GPU memory" if cuda else "process memory",
    )


def _logit_bytes(job: JobSpec, shape: Shape, tokens: int) -> float:
    """Of a causal model's logits and their gradient; behind a frozen head they are held in chunks."""
    if job.task != "generation":
        return 0.0
    if job.train.chunked_loss and job.method != "full":
        return 2 * 4 * min(tokens * shape.vocabulary, LOGITS_AT_ONCE) + 4 * tokens * shape.hidden
    return 2 * 4 * tokens * shape.vocabulary


def _weight_bytes(job: JobSpec, parameters: int, matrices: int, bytes_each: int) -> float:
    """Of the base: 4-bit blocks of 64 have a scale of 4 bytes, or of 1 and a 256th of 4 when it is quantised too."""
    if job.method != "qlora":
        return parameters * bytes_each
    scale = (1 + 4 / 256 if job.qlora.use_double_quant else 4) / 64
    each = 1.0 if job.qlora.quant_type == "int8" else 0.5 + scale
    return (parameters - matrices) * bytes_each + matrices * each


def _training_bytes(job: JobSpec, bytes_each: int) -> int:
    """Of a trained weight: an adapter's own value, its gradient and two moments in float32; the last two of a base's
    weight in its own format, which is in `base weights` already."""
    number = bytes_each if job.method == "full" else 4
    moments = 2 if job.train.optim.endswith("8bit") else 2 * number
    return moments + number * (1 if job.method == "full" else 2)


def trained_parameters(job: JobSpec, shape: Shape, labels: int) -> int:
    """Trained numbers of an adapter or learnt prompt, with the head of a classifier."""
    head = labels * (shape.hidden + (1 if shape.beside else 0)) if job.task == "classification" else 0
    if job.method == "prompt_tuning":
        return head + job.prompt_tuning.num_virtual_tokens * shape.hidden
    lora = job.lora
    return head + shape.lora_parameters(lora.lora_r, lora.lora_target_modules, dora=lora.use_dora)


def _bytes_each(job: JobSpec, *, cuda: bool) -> int:
    if job.model.dtype == "auto":
        return 2 if cuda else 4
    return 4 if job.model.dtype == "float32" else 2
