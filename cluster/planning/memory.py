"""Memory of one training process by component, from a model's config alone. Pure.

Weights are counted as they are stored. A trained number has a gradient and two moments of Adam; an adapter's are
float32. What a block keeps for the backward pass is counted tensor by tensor from what transformers' blocks do (the
method of Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, MLSys 2023, section 4): a
frozen matrix keeps nothing, an adapted one its input. benchmarks/memory_model.py holds it against measured peaks on CPU
and published figures of GPUs.
"""

from __future__ import annotations

from lorafleet.cluster.planning.model_shape import Shape, named
from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.schema.compatibility import CUT_WEIGHTS
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.defaults import LOGITS_AT_ONCE

GIB = 2**30
_RUNTIME_CPU_GIB = 0.75
_RUNTIME_CUDA_GIB = 0.9
_COPIES_OF_SCORES = 3.25
"""Of attention's scores where it is not fused: softmax, a mask of bytes, what dropout leaves, and one that goes."""
_COPIES_OF_LOGITS = 3
"""In float32, at the worst moment of a plain cross-entropy: logits, their log-softmax, and a gradient."""
_KEPT_BY_GLIBC = 0.6
"""On CPU, as a share of what comes and goes in a step: glibc seldom finds room for an aligned block where one as large
was freed (sourceware.org bug 14581), and takes more instead. benchmarks/memory_model.py measures it."""


def estimate(
    job: JobSpec, shape: Shape, parameters: int, longest_tokens: int, *, cuda: bool, labels: int = 2
) -> MemoryEstimate:
    """GiB of one process for one trial, low, expected and high, when the longest row has `longest_tokens`.

    Scaled-dot-product attention keeps no scores, but for dropout on CPU; the high value has them always. Beside that,
    low and high are 10 % below and 20 % above. On CPU `allocator` is what glibc keeps of freed memory: none in low, all
    in high. Checkpointing does not lessen it: what is worked out again is freed again.
    """
    bytes_each, stored = _bytes_each(job, cuda=cuda), _stored_bytes(job, cuda=cuda)
    length = min(longest_tokens, job.model.max_length)
    if job.method == "prompt_tuning":
        length += job.prompt_tuning.num_virtual_tokens
    tokens = job.train.per_device_train_batch_size * length
    trained = parameters if job.method == "full" else trained_parameters(job, shape, labels)
    number = stored if job.method == "full" else 4
    cut = _cut(job)
    weights = _weight_bytes(job, parameters, shape.matrices, stored)
    copies = shape.matrices * bytes_each if bytes_each < stored else 0  # autocast's, of what it multiplies with
    scores = shape.heads * length * _COPIES_OF_SCORES * bytes_each
    kept = scores if not cuda and shape.attention_dropout else 0
    block = _block_bytes(job, shape, bytes_each) + kept
    activations = tokens * _kept_bytes(job, shape, block, bytes_each)
    logits = _logit_bytes(job, shape, tokens, bytes_each)
    passing = (tokens * shape.layers * block + logits) / GIB
    freed = {} if cuda else {"allocator": _KEPT_BY_GLIBC * passing}
    components = {
        "base weights": ((weights + copies) / cut["weights"] + _gathered_bytes(job, shape, bytes_each)) / GIB,
        "adapter": 0.0 if job.method == "full" else trained * number / cut["weights"] / GIB,
        "gradients": trained * number / cut["gradients"] / GIB,
        "optimiser": _moment_bytes(job, trained, number) / cut["optimiser"] / GIB,
        "activations": activations / GIB,
        "logits": logits / GIB,
        "runtime": _RUNTIME_CUDA_GIB if cuda else _RUNTIME_CPU_GIB,
    }
    # Gradients come up while activations go, and a block is worked out again when the logits have gone: of each pair
    # the larger decides.
    lesser = min(components["gradients"], components["activations"] + components["logits"])
    if job.train.gradient_checkpointing:
        lesser += min(tokens * block / GIB, components["logits"])
    taken = sum(components.values()) - lesser
    unseen = 0 if kept else tokens * _kept_bytes(job, shape, scores, 0) / GIB
    return MemoryEstimate(
        components={name: round(gib, 3) for name, gib in (components | freed).items()},
        low=round(0.9 * taken, 2),
        expected=round(taken + sum(freed.values()), 2),
        high=round(1.2 * (taken + unseen) + (passing if freed else 0), 2),
        of="GPU memory" if cuda else "process memory",
    )


def _cut(job: JobSpec) -> dict[str, int]:
    """Over how many processes each part is shared out."""
    strategy, world = job.resources.strategy, job.resources.world_size
    return {
        "weights": world if strategy in CUT_WEIGHTS else 1,
        "gradients": world if strategy in (*CUT_WEIGHTS, "zero2") else 1,
        "optimiser": world if strategy in (*CUT_WEIGHTS, "zero1", "zero2") else 1,
    }


def _gathered_bytes(job: JobSpec, shape: Shape, bytes_each: int) -> float:
    """Of whole matrices that come and go: two blocks where weights are cut up, one 4-bit matrix in the compute type."""
    if job.resources.strategy in CUT_WEIGHTS and job.resources.world_size > 1:
        block = sum(matrix.size for matrix in shape.block)
        return 2.0 * _weight_bytes(job, block, block, bytes_each)
    if job.method == "qlora" and job.qlora.quant_type != "int8":
        return float(bytes_each * max(matrix.size for matrix in shape.block))
    return 0.0


def _kept_bytes(job: JobSpec, shape: Shape, block: float, bytes_each: int) -> float:
    """Kept for the backward pass, a token, when one block keeps `block` bytes."""
    if job.train.gradient_checkpointing:  # every block's input, and all of one block
        return shape.layers * shape.hidden * bytes_each + block
    return shape.layers * block


def _block_bytes(job: JobSpec, shape: Shape, bytes_each: int) -> float:
    """Kept by one block for the backward pass, a token.

    Attention keeps query, key, value and output. A norm keeps its input; Llama's works in float32. GELU keeps its
    input; GPT-2's is written out and keeps four tensors; SwiGLU keeps three.
    """
    hidden, inner = shape.hidden, shape.inner
    norm = 2 * hidden * (4 if shape.family == "llama" else bytes_each)
    middle = {"bert": 1, "gpt": 4, "llama": 3}[shape.family] * inner * bytes_each
    residual = hidden * bytes_each if shape.family == "llama" and bytes_each == 2 else 0
    own_dropout = 2 * hidden if shape.dropout else 0  # a byte a number, after attention and after the inner part
    return 4 * hidden * bytes_each + norm + residual + middle + own_dropout + _read_bytes(job, shape, bytes_each)


def _read_bytes(job: JobSpec, shape: Shape, bytes_each: int) -> float:
    """Of the inputs that matrices keep: one for all that read the same, or one each behind an adapter's dropout."""
    if job.method == "prompt_tuning":
        return 0.0
    names = "all-linear" if job.method == "full" else job.lora.lora_target_modules
    matrices = named(shape.block, names)
    if job.adapts_with_lora and job.lora.lora_dropout:
        inputs = float(sum(matrix.fan_in * (bytes_each + 1) for matrix in matrices))
    else:
        widths = {matrix.reads: matrix.fan_in for matrix in matrices if matrix.reads != "attended"}
        inputs = float(sum(widths.values()) * bytes_each)
    ranks = job.lora.lora_r * len(matrices) * bytes_each if job.adapts_with_lora else 0
    return inputs + ranks


def _logit_bytes(job: JobSpec, shape: Shape, tokens: int, bytes_each: int) -> float:
    """Of a causal model's logits and what a loss makes of them; behind a frozen head they are held in chunks."""
    if not job.generates:
        return 0.0
    each = 4 * _COPIES_OF_LOGITS + (2 * bytes_each if bytes_each == 2 else 0)
    if job.train.chunked_loss and job.method != "full":
        return each * min(tokens * shape.vocabulary, LOGITS_AT_ONCE) + 4 * tokens * shape.hidden
    return each * tokens * shape.vocabulary


def _weight_bytes(job: JobSpec, parameters: int, matrices: int, bytes_each: int) -> float:
    """Of the base: 4-bit blocks of 64 have a scale of 4 bytes, or of 1 and a 256th of 4 when it is quantised too."""
    if job.method != "qlora":
        return parameters * bytes_each
    scale = (1 + 4 / 256 if job.qlora.use_double_quant else 4) / 64
    each = 1.0 if job.qlora.quant_type == "int8" else 0.5 + scale
    return (parameters - matrices) * bytes_each + matrices * each


def _moment_bytes(job: JobSpec, trained: int, number: int) -> int:
    """Of Adam's two moments; DeepSpeed has them, and a copy of what it trains, in float32 whatever is stored."""
    if job.resources.strategy.startswith("zero") and number < 4:
        return trained * 12
    return trained * (2 if job.train.optim.endswith("8bit") else 2 * number)


def trained_parameters(job: JobSpec, shape: Shape, labels: int) -> int:
    """Trained numbers of an adapter or learnt prompt, with the head of a classifier."""
    head = labels * (shape.hidden + (1 if shape.beside else 0)) if job.task == "classification" else 0
    if job.method == "prompt_tuning":
        return head + job.prompt_tuning.num_virtual_tokens * shape.hidden
    lora = job.lora
    return head + shape.lora_parameters(lora.lora_r, lora.lora_target_modules, dora=lora.use_dora)


def checkpoint_bytes(job: JobSpec, trained: int, *, cuda: bool) -> int:
    """Of one checkpoint: what is trained, and Adam's two moments."""
    number = _stored_bytes(job, cuda=cuda) if job.method == "full" else 4
    return trained * number + _moment_bytes(job, trained, number)


def _stored_bytes(job: JobSpec, *, cuda: bool) -> int:
    """Of a weight: what is trained whole is kept in float32."""
    return 4 if job.method == "full" and job.model.dtype == "auto" else _bytes_each(job, cuda=cuda)


def _bytes_each(job: JobSpec, *, cuda: bool) -> int:
    """Of a number in the arithmetic."""
    if job.model.dtype == "auto":
        return 2 if cuda else 4
    return 4 if job.model.dtype == "float32" else 2
