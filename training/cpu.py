"""Prepare a process for training on the CPU: its threads, and the library of its products.

MKL, with which torch multiplies float32 matrices, has no AVX-512 code for
AMD's processors. oneDNN, which torch contains as well, has: it multiplies the matrices of a
training step about twice as fast there (`benchmarks/matmul.py`). torch offers no setting for
it, so the kernels of its two matrix products are replaced. Their results differ from MKL's
by rounding only.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch

_KEPT_PRODUCTS = 128
"""Shapes of products whose code oneDNN keeps. Each takes about 0.2 MiB; oneDNN would keep 1,024."""
_LIBRARY: list[Any] = []
"""The registration of the kernels, which lasts as long as the object."""


def set_up_cpu(threads: int) -> None:
    """Set the number of threads of this process, and replace its matrix products if others are
    faster on this machine.

    Every process that trains or evaluates calls it before its first product, so that all
    hosts of a trial compute the same numbers.
    """
    torch.set_num_threads(max(1, threads))
    if _LIBRARY or not prefers_onednn():
        return
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KEPT_PRODUCTS))
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # torch warns that a kernel is replaced, which is the purpose.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl("mm", _multiply, "CPU", allow_override=True)
        library.impl("addmm", _multiply_and_add, "CPU", allow_override=True)
    _LIBRARY.append(library)


@functools.cache
def prefers_onednn() -> bool:
    """Return whether oneDNN multiplies faster than MKL on this machine.

    The answer depends on the processor alone and not on a measurement: a resumed trial must
    compute the same numbers.
    """
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _read_cpu_info()
    )


def _read_cpu_info() -> str:
    """Return Linux's description of the processors; empty on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right, as `torch.mm`."""
    if _suits_onednn(left, right):
        return _multiply_with_onednn(left, right.t(), None)
    # The replaced kernel cannot be called any more, but the one that writes to a given tensor can.
    out = left.new_empty(left.shape[0], right.shape[1])
    product: torch.Tensor = torch.ops.aten.mm.out(left, right, out=out)
    return product


def _multiply_and_add(
    addend: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """Return beta * addend + alpha * left @ right, as `torch.addmm`."""
    is_bias = addend.dim() == 1 and addend.shape[0] == right.shape[1] and beta == alpha == 1
    if is_bias and addend.dtype is torch.float32 and _suits_onednn(left, right):
        return _multiply_with_onednn(left, right.t(), addend)
    out = left.new_empty(left.shape[0], right.shape[1])
    total: torch.Tensor = torch.ops.aten.addmm.out(
        addend, left, right, beta=beta, alpha=alpha, out=out
    )
    return total


def _suits_onednn(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether oneDNN can multiply the two: float32 matrices that fit and are not empty."""
    return (
        left.dim() == right.dim() == 2
        and left.shape[1] == right.shape[0]
        and left.dtype is torch.float32
        and right.dtype is torch.float32
        and left.numel() > 0
        and right.numel() > 0
    )


def _multiply_with_onednn(
    left: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return left @ weight.T + bias. Either matrix may be a transposed view."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, weight, bias, "none", [], "")
    return product
