"""The memory estimate beside the peak of a real training, each in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.memory_model import CASES, Case, expected, measured_gib

FAST = 6
"""So many of the cases are run each time, the rest by `make test-all`."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.long] if i >= FAST else []) for i, case in enumerate(CASES)],
)
def test_the_estimate_is_within_a_fifth_of_the_peak(case: Case) -> None:
    memory = expected(case)
    ours, real = memory.expected - memory.components["runtime"], measured_gib(case)
    assert abs(ours / real - 1) < 0.2, f"measured {real:.2f} GiB, estimated {ours:.2f}: {memory.components}"
