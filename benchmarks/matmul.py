"""Benchmark the matrix products of a training step: torch's default against lorafleet's choice.

    python -m benchmarks.matmul [--rounds 9]

The shapes are those of MiniLM (hidden size 384) and SmolLM2 (576), forward and backward, and of
LoRA matrices of rank 8. Each side runs in a process of its own with one thread, because the choice
holds for a whole process; the sides take turns, and the table has medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

SHAPES = {
    "MiniLM attention": (200, 384, 384),
    "MiniLM feed-forward": (200, 384, 1536),
    "SmolLM2 attention": (1200, 576, 576),
    "SmolLM2 feed-forward": (1200, 576, 1536),
    "LoRA down, r 8": (1200, 576, 8),
    "LoRA up, r 8": (1200, 8, 576),
    "768 x 768": (768, 768, 768),
}
KINDS = ("forward", "input gradient", "weight gradient")


def measure(*, chosen: bool) -> dict[str, float]:
    """Return 10^9 operations per CPU-second of each product, in this process."""
    import torch

    from lorafleet.training.cpu import set_up_cpu

    torch.set_num_threads(1)
    if chosen:
        set_up_cpu(1)
    rates = {}
    for name, (rows, inputs, outputs) in SHAPES.items():
        hidden, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        gradient = torch.randn(rows, outputs)
        operands = {
            "forward": (hidden, weight.t()),
            "input gradient": (gradient, weight),
            "weight gradient": (gradient.t(), hidden),
        }
        operations = 2 * rows * inputs * outputs
        repeats = max(20, int(4e9 / operations))
        for kind, (left, right) in operands.items():
            left @ right
            started = time.process_time()
            for _ in range(repeats):
                left @ right
            seconds = time.process_time() - started
            rates[f"{name}, {kind}"] = repeats * operations / seconds / 1e9
    return rates


def main() -> None:
    """Measure both sides in turn, and print their medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", choices=["default", "chosen"], help="measure one side only")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(chosen=options.side == "chosen")))
        return
    from benchmarks.peer import describe_machine
    from lorafleet.training.cpu import prefers_onednn

    print(describe_machine())
    print(f"lorafleet's choice here: {'oneDNN' if prefers_onednn() else 'the default'}")
    rates: dict[str, dict[str, list[float]]] = {"default": {}, "chosen": {}}
    for number in range(options.rounds):
        for side in ("default", "chosen") if number % 2 == 0 else ("chosen", "default"):
            command = [sys.executable, "-m", "benchmarks.matmul", "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for name, rate in json.loads(done.stdout.splitlines()[-1]).items():
                rates[side].setdefault(name, []).append(rate)
    print(f"\n{'product (rows x inputs x outputs)':56} {'default':>8} {'chosen':>8} {'ratio':>6}")
    for name, values in rates["default"].items():
        default, chosen = statistics.median(values), statistics.median(rates["chosen"][name])
        shape = " x ".join(str(size) for size in SHAPES[name.rpartition(", ")[0]])
        print(f"{f'{name} ({shape})':56} {default:8.0f} {chosen:8.0f} {chosen / default:6.2f}")


if __name__ == "__main__":
    main()
