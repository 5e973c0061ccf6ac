"""Matrix products by oneDNN are those of MKL, but for rounding, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from lorafleet.training import cpu

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN"
)

# In a process of its own: the kernels stay replaced.
PROGRAM = """
import json, sys
import torch
from lorafleet.training import cpu

cpu.prefers_onednn = lambda: True
cpu.set_up_cpu(2)
torch.manual_seed(0)
gaps, found = {}, {"threads": torch.get_num_threads()}

def compare(name, ours, exact):
    gaps[name] = float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-9))

for m, k, n in ((1, 1, 1), (1, 7, 3), (5, 1, 9), (200, 384, 1536), (33, 64, 8), (64, 8, 64)):
    left, right, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    exact = left.double() @ right.double()
    for name, a, b in (
        ("plain", left, right),
        ("left transposed", left.t().contiguous().t(), right),
        ("right transposed", left, right.t().contiguous().t()),
        ("strided", torch.randn(m, 2 * k)[:, ::2].copy_(left), torch.randn(2 * k, n)[::2].copy_(right)),
        ("offset", torch.cat([left, left])[m:], torch.cat([right, right])[k:]),
    ):
        compare(f"{name} {m}x{k}x{n}", a @ b, exact)
        compare(f"bias, {name} {m}x{k}x{n}", torch.addmm(bias, a, b), exact + bias.double())
    full = torch.randn(m, n)
    compare(f"matrix added {m}x{k}x{n}", torch.addmm(full, left, right), exact + full.double())
    compare(f"row added {m}x{k}x{n}", torch.addmm(full[:1], left, right), exact + full[:1].double())
    scaled = torch.addmm(bias, left, right, beta=0.5, alpha=-2.0)
    compare(f"scaled {m}x{k}x{n}", scaled, 0.5 * bias.double() - 2.0 * exact)

expanded = torch.randn(1, 6).expand(4, 6)
compare("expanded", expanded @ torch.eye(6), expanded.double())

linear = torch.nn.Linear(48, 32)
hidden = torch.randn(6, 9, 48, requires_grad=True)
linear(hidden).square().sum().backward()
grads = [hidden.grad, linear.weight.grad, linear.bias.grad]
exact_linear = torch.nn.Linear(48, 32).double()
exact_linear.load_state_dict(linear.state_dict())
exact_hidden = hidden.detach().double().requires_grad_()
exact_linear(exact_hidden).square().sum().backward()
for name, ours, exact in zip(("input", "weight", "bias"), grads, [exact_hidden.grad, exact_linear.weight.grad, exact_linear.bias.grad]):
    compare(f"gradient of the {name}", ours, exact)

for kind in (torch.float64, torch.bfloat16, torch.int64, torch.complex64):
    left = torch.arange(6).view(2, 3).to(kind)
    product, sums = left @ left.t(), torch.addmm(torch.ones(2).to(kind), left, left.t())
    found[str(kind)] = [str(product.dtype), product.abs().tolist(), sums.abs().tolist()]
found["empty"] = [(torch.zeros(0, 3) @ torch.zeros(3, 2)).shape, (torch.zeros(2, 0) @ torch.zeros(0, 2)).tolist()]
found["empty sum"] = torch.addmm(torch.ones(2), torch.zeros(2, 0), torch.zeros(0, 2)).tolist()
for name, call in (("shapes", lambda: torch.zeros(2, 3) @ torch.zeros(2, 3)), ("kinds", lambda: torch.zeros(2, 3) @ torch.zeros(3, 2).double())):
    try:
        call()
        found[name] = "no error"
    except RuntimeError as error:
        found[name] = str(error)
with torch.autocast("cpu", dtype=torch.bfloat16):
    found["autocast"] = str((torch.ones(2, 3) @ torch.ones(3, 2)).dtype)
found["function"] = torch.func.vmap(lambda row: row @ torch.eye(3))(torch.ones(2, 4, 3)).shape
print(json.dumps({"gaps": gaps, "found": found}))
"""


@pytest.fixture(scope="module")
def results() -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Overriding" not in done.stderr
    return json.loads(done.stdout)


def test_products_are_right(results: Any) -> None:
    assert len(results["gaps"]) > 70
    wrong = {name: gap for name, gap in results["gaps"].items() if gap > 3e-6}
    assert wrong == {}


def test_other_number_formats_are_multiplied_as_before(results: Any) -> None:
    product, sums = [[5.0, 14.0], [14.0, 50.0]], [[6.0, 15.0], [15.0, 51.0]]
    for kind in (torch.float64, torch.bfloat16, torch.int64, torch.complex64):
        assert results["found"][str(kind)] == [str(kind), product, sums]
    assert results["found"]["autocast"] == "torch.bfloat16"


def test_edges_are_those_of_torch(results: Any) -> None:
    found = results["found"]
    assert found["threads"] == 2
    assert found["empty"] == [[0, 2], [[0.0, 0.0], [0.0, 0.0]]]
    assert found["empty sum"] == [[1.0, 1.0], [1.0, 1.0]]
    assert "shapes cannot be multiplied" in found["shapes"]
    assert "same dtype" in found["kinds"]
    assert found["function"] == [2, 4, 3]


@pytest.mark.parametrize(
    ("vendor", "capability", "prefers"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_only_where_mkl_lacks_the_code(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, prefers: bool
) -> None:
    monkeypatch.setattr(cpu, "_read_cpu_info", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu.prefers_onednn.cache_clear()
    try:
        assert cpu.prefers_onednn() is (prefers and torch.backends.mkl.is_available())
    finally:
        cpu.prefers_onednn.cache_clear()
