"""The memory estimate beside the peak of a real training, each in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.memory_model import CASES, Case, expected, measured_gib

SHORT = {"BERT, LoRA r 8 on query and value", "Llama, full", "Llama, QLoRA nf4"}
"""An encoder, a decoder, a quantised one: what `make test` looks at."""
"""So many of the cases are run each time, the rest by `make test-all`."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.name in SHORT else [pytest.mark.long]) for case in CASES],
)
def test_the_estimate_is_within_a_fifth_of_the_peak(case: Case) -> None:
    memory = expected(case)
    ours, real = memory.expected - memory.components["runtime"], measured_gib(case)
    assert abs(ours / real - 1) < 0.2, f"measured {real:.2f} GiB, estimated {ours:.2f}: {memory.components}"
