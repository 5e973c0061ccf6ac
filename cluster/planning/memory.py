"""Estimates a training process's memory by component, from a model's config alone. Pure.

Weights are counted as they are stored. A trained number has a gradient and two Adam moments;
those of an adapter are float32. What a block keeps for the backward pass is counted tensor by
tensor from transformers' blocks (the method of Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models, MLSys 2023, section 4): a frozen matrix keeps
nothing, an adapted one its input. benchmarks/memory_model.py compares it with measured peaks
on CPU and with published figures for GPUs.
"""

from __future__ import annotations

from lorafleet.cluster.planning.model_shape import Shape, select_matrices
from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.schema.compatibility import WEIGHT_SHARDING_STRATEGIES
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.defaults import LOGITS_AT_ONCE

GIB = 2**30
_RUNTIME_CPU_GIB = 0.75
RUNTIME_CUDA_GIB = 0.9
"""Memory of a GPU that CUDA's context and libraries take, in GiB."""
_COPIES_OF_SCORES = 3.25
"""Copies of the attention scores if attention is not fused: softmax, a byte mask, the output of
dropout, and a temporary one.
"""
_COPIES_OF_LOGITS = 3
"""Float32 copies of the logits at the peak of a plain cross-entropy: logits, log-softmax, and a
gradient.
"""
_GLIBC_RETAINED_SHARE = 0.6
"""On CPU, the share of a step's temporary memory that glibc keeps. It seldom reuses a freed
block for an aligned block of the same size (sourceware.org bug 14581), and takes new memory
instead. Measured by benchmarks/memory_model.py.
"""


def estimate(
    job: JobSpec, shape: Shape, parameters: int, longest_tokens: int, *, cuda: bool, labels: int = 2
) -> MemoryEstimate:
    """Estimate the memory of one process for one trial in GiB: low, expected and high.

    Scaled-dot-product attention keeps no scores, except for dropout on CPU; the high value
    always includes them. Apart from that, low is 10 % below and high 20 % above the expected
    value. On CPU `allocator` is freed memory that glibc keeps: none of it in low, all of it
    in high. Checkpointing does not reduce it: recomputed tensors are freed again.

    Args:
        longest_tokens: Tokens of the longest row.
        labels: Number of classes of a classifier.
    """
    bytes_each, stored_bytes = _get_compute_bytes(job, cuda=cuda), _get_stored_bytes(job, cuda=cuda)
    # The worst micro-batch has only the longest rows: it decides whether a trial fits.
    length = min(longest_tokens, job.model.max_length)
    if job.method == "prompt_tuning":
        length += job.prompt_tuning.num_virtual_tokens
    tokens = job.train.per_device_train_batch_size * length
    trained_count = (
        parameters if job.method == "full" else count_trained_parameters(job, shape, labels)
    )
    # An adapter and its optimiser state are float32, whatever the base is stored in.
    bytes_per_trained = stored_bytes if job.method == "full" else 4
    shards = _get_shard_counts(job)
    weights = _compute_weight_bytes(job, parameters, shape.matrices, stored_bytes)
    copies = (
        shape.matrices * bytes_each if bytes_each < stored_bytes else 0
    )  # autocast's copies of the matrices in the compute dtype
    scores = shape.heads * length * _COPIES_OF_SCORES * bytes_each
    # torch's fused attention on CPU does not support dropout, so the scores are stored.
    kept_scores = scores if not cuda and shape.attention_dropout else 0
    block = _compute_block_bytes(job, shape, bytes_each) + kept_scores
    activations = tokens * _compute_kept_bytes(job, shape, block, bytes_each)
    logits = _compute_logit_bytes(job, shape, tokens, bytes_each)
    temporary_gib = (tokens * shape.layers * block + logits) / GIB
    # torch's CUDA allocator reuses its blocks; on CPU memory goes back to glibc.
    allocator = {} if cuda else {"allocator": _GLIBC_RETAINED_SHARE * temporary_gib}
    components = {
        "base weights": (
            (weights + copies) / shards["weights"] + _compute_gathered_bytes(job, shape, bytes_each)
        )
        / GIB,
        "adapter": 0.0
        if job.method == "full"
        else trained_count * bytes_per_trained / shards["weights"] / GIB,
        "gradients": trained_count * bytes_per_trained / shards["gradients"] / GIB,
        "optimiser": _compute_moment_bytes(job, trained_count, bytes_per_trained)
        / shards["optimiser"]
        / GIB,
        "activations": activations / GIB,
        "logits": logits / GIB,
        "runtime": RUNTIME_CUDA_GIB if cuda else _RUNTIME_CPU_GIB,
    }
    # Gradients grow while activations are freed, and a block is recomputed after the logits are
    # freed: of each pair only the larger counts.
    overlap = min(components["gradients"], components["activations"] + components["logits"])
    if job.train.gradient_checkpointing:
        overlap += min(tokens * block / GIB, components["logits"])
    total = sum(components.values()) - overlap
    possible_scores = (
        0 if kept_scores else tokens * _compute_kept_bytes(job, shape, scores, 0) / GIB
    )
    return MemoryEstimate(
        components={name: round(gib, 3) for name, gib in (components | allocator).items()},
        low=round(0.9 * total, 2),
        expected=round(total + sum(allocator.values()), 2),
        high=round(1.2 * (total + possible_scores) + (temporary_gib if allocator else 0), 2),
        of="GPU memory" if cuda else "process memory",
    )


def _get_shard_counts(job: JobSpec) -> dict[str, int]:
    """Return over how many processes each part is sharded.

    ZeRO 1 shards the optimiser state, ZeRO 2 also gradients; ZeRO 3 and FSDP shard the
    weights as well.
    """
    strategy, world = job.resources.strategy, job.resources.world_size
    return {
        "weights": world if strategy in WEIGHT_SHARDING_STRATEGIES else 1,
        "gradients": world if strategy in (*WEIGHT_SHARDING_STRATEGIES, "zero2") else 1,
        "optimiser": world if strategy in (*WEIGHT_SHARDING_STRATEGIES, "zero1", "zero2") else 1,
    }


def _compute_gathered_bytes(job: JobSpec, shape: Shape, bytes_each: int) -> float:
    """Return the bytes of temporary whole matrices.

    They are two blocks if weights are sharded, or one dequantised 4-bit matrix in the compute
    dtype.
    """
    if job.resources.strategy in WEIGHT_SHARDING_STRATEGIES and job.resources.world_size > 1:
        block = sum(matrix.size for matrix in shape.block)
        return 2.0 * _compute_weight_bytes(job, block, block, bytes_each)
    if job.method == "qlora" and job.qlora.quant_type != "int8":
        return float(bytes_each * max(matrix.size for matrix in shape.block))
    return 0.0


def _compute_kept_bytes(job: JobSpec, shape: Shape, block: float, bytes_each: int) -> float:
    """Return the bytes per token kept for the backward pass, if one block keeps `block` bytes.

    Args:
        block: Bytes per token that one block keeps.
        bytes_each: Bytes of a number in the compute dtype; 0 to leave out the inputs of the
            blocks.
    """
    if job.train.gradient_checkpointing:  # every block's input, and all of one block
        return shape.layers * shape.hidden * bytes_each + block
    return shape.layers * block


def _compute_block_bytes(job: JobSpec, shape: Shape, bytes_each: int) -> float:
    """Return the bytes per token that one block keeps for the backward pass.

    Attention keeps query, key, value and output. A norm keeps its input; Llama's norm
    computes in float32. GELU keeps its input; GPT-2's is composed of separate operations and
    keeps four tensors; SwiGLU keeps three.
    """
    hidden, inner = shape.hidden, shape.inner
    norm = 2 * hidden * (4 if shape.family == "llama" else bytes_each)
    middle = {"bert": 1, "gpt": 4, "llama": 3}[shape.family] * inner * bytes_each
    residual = hidden * bytes_each if shape.family == "llama" and bytes_each == 2 else 0
    dropout_masks = (
        2 * hidden if shape.dropout else 0
    )  # one byte per element, after attention and after the feed-forward part
    return (
        4 * hidden * bytes_each
        + norm
        + residual
        + middle
        + dropout_masks
        + _compute_input_bytes(job, shape, bytes_each)
    )


def _compute_input_bytes(job: JobSpec, shape: Shape, bytes_each: int) -> float:
    """Return the bytes per token of the matrix inputs that are kept.

    Matrices that read the same tensor share one copy; behind an adapter's dropout each matrix
    keeps its own.
    """
    if job.method == "prompt_tuning":
        return 0.0
    names = "all-linear" if job.method == "full" else job.lora.lora_target_modules
    matrices = select_matrices(shape.block, names)
    if job.uses_lora and job.lora.lora_dropout:
        inputs = float(sum(matrix.fan_in * (bytes_each + 1) for matrix in matrices))
    else:
        widths = {matrix.reads: matrix.fan_in for matrix in matrices if matrix.reads != "attended"}
        inputs = float(sum(widths.values()) * bytes_each)
    ranks = job.lora.lora_r * len(matrices) * bytes_each if job.uses_lora else 0
    return inputs + ranks


def _compute_logit_bytes(job: JobSpec, shape: Shape, tokens: int, bytes_each: int) -> float:
    """Return the bytes of a causal model's logits and of the loss's copies of them.

    Behind a frozen head they are computed in chunks.
    """
    if not job.is_generative:
        return 0.0
    bytes_per_logit = 4 * _COPIES_OF_LOGITS + (2 * bytes_each if bytes_each == 2 else 0)
    if job.train.chunked_loss and job.method != "full":
        return (
            bytes_per_logit * min(tokens * shape.vocabulary, LOGITS_AT_ONCE)
            + 4 * tokens * shape.hidden
        )
    return bytes_per_logit * tokens * shape.vocabulary


def _compute_weight_bytes(job: JobSpec, parameters: int, matrices: int, bytes_each: int) -> float:
    """Return the bytes of the base model's weights.

    A 4-bit block of 64 weights has a scale of 4 bytes, or of 1 byte and a 256th of 4 if it is
    quantised too.
    """
    if job.method != "qlora":
        return parameters * bytes_each
    # Bytes of scales for each weight.
    scale = (1 + 4 / 256 if job.qlora.use_double_quant else 4) / 64
    bytes_per_weight = 1.0 if job.qlora.quant_type == "int8" else 0.5 + scale
    return (parameters - matrices) * bytes_each + matrices * bytes_per_weight


def _compute_moment_bytes(job: JobSpec, trained_count: int, bytes_per_trained: int) -> int:
    """Return the bytes of Adam's two moments.

    DeepSpeed keeps them, and a copy of the trained weights, in float32 whatever the stored
    dtype is.
    """
    if job.resources.strategy.startswith("zero") and bytes_per_trained < 4:
        return trained_count * 12
    return trained_count * (2 if job.train.optim.endswith("8bit") else 2 * bytes_per_trained)


def count_trained_parameters(job: JobSpec, shape: Shape, labels: int) -> int:
    """Return the trained parameters of an adapter or learnt prompt, with a classifier's head.

    Equals what PEFT creates (`tests/unit/cluster/planning/test_memory.py`). Not for `full`, which
    trains all parameters.

    Args:
        shape: Shape of the base.
        labels: Number of classes; unused for generation.
    """
    head = (
        labels * (shape.hidden + (1 if shape.beside else 0)) if job.task == "classification" else 0
    )
    if job.method == "prompt_tuning":
        return head + job.prompt_tuning.num_virtual_tokens * shape.hidden
    lora = job.lora
    return head + shape.count_lora_parameters(
        lora.lora_r, lora.lora_target_modules, dora=lora.use_dora
    )


def compute_checkpoint_bytes(job: JobSpec, trained_count: int, *, cuda: bool) -> int:
    """Return the bytes of one checkpoint: the trained weights and Adam's two moments.

    Args:
        trained_count: Number of trained parameters.
        cuda: The trial runs on a GPU, where weights are in bfloat16 by default.
    """
    bytes_per_trained = _get_stored_bytes(job, cuda=cuda) if job.method == "full" else 4
    return trained_count * bytes_per_trained + _compute_moment_bytes(
        job, trained_count, bytes_per_trained
    )


def _get_stored_bytes(job: JobSpec, *, cuda: bool) -> int:
    """Return the bytes of a stored weight: full training keeps weights in float32 by default."""
    return (
        4
        if job.method == "full" and job.model.dtype == "auto"
        else _get_compute_bytes(job, cuda=cuda)
    )


def _get_compute_bytes(job: JobSpec, *, cuda: bool) -> int:
    """Return the bytes of a number in the compute dtype."""
    if job.model.dtype == "auto":
        return 2 if cuda else 4
    return 4 if job.model.dtype == "float32" else 2
