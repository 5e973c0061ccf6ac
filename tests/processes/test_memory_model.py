"""The memory estimate beside the peak of a real training, each in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.memory_model import CASES, Case, compute_estimated_gib, estimate_case, measure_gib

SHORT = "Llama, QLoRA nf4"
"""What `make test` looks at: the one with the most parts. The rest is for `make test-all`."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name == SHORT else [pytest.mark.long])
        for case in CASES
    ],
)
def test_the_estimate_is_within_a_fifth_of_the_peak(case: Case) -> None:
    memory = estimate_case(case)
    ours, real = (
        compute_estimated_gib(memory, memory_returned=True),
        measure_gib(case, memory_returned=True),
    )
    assert abs(ours / real - 1) < 0.2, (
        f"measured {real:.2f} GiB, estimated {ours:.2f}: {memory.components}"
    )


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_process_as_it_comes_lies_between_low_and_high(case: Case) -> None:
    memory = estimate_case(case)
    real = measure_gib(case, memory_returned=False) + memory.components["runtime"]
    assert memory.low < real < memory.high, f"measured {real:.2f} GiB, {memory}"
