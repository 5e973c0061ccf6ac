"""Measure what the processes of one trial send each other, and the speed-up of a second process.

    python -m benchmarks.scaling [--steps 20] [--pairs 3]

Bytes: what DDP passes to its all-reduce in one step, counted by a communication hook in every
process of a real Ray Train group of two, for LoRA and for full fine-tuning of the same model.
Speed: real tokens per second of one process against two with half the rows each, one thread per
process, in turn. On a machine with two cores the second process shares the memory bus with the
first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import uuid
from pathlib import Path
from typing import Any

from benchmarks.peer import describe_machine
from lorafleet.cluster.fetch import fetch_job
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.jobs.sites.placement import Placement

ROOT = Path(__file__).parent.parent


def measure_in_group(config: dict[str, Any]) -> None:
    """Run in each process: train every job for some steps. The first process writes the results."""
    import time

    import torch
    from torch import distributed

    from lorafleet.jobs.schema.job import JobSpec
    from lorafleet.jobs.trials.schedule import Schedule
    from lorafleet.training.data import prepare_tokens
    from lorafleet.training.model import load_base
    from lorafleet.training.session import TrainingSession

    torch.set_num_threads(1)
    results = {}
    for name, text in config["jobs"].items():
        job = JobSpec.model_validate_json(text)
        data = prepare_tokens(job)
        base = load_base(job, len(data.labels), torch.device("cpu"))
        rows = job.train.compute_effective_batch_size(job.resources.world_size)
        steps = config["steps"]
        session = TrainingSession.build(
            job, base, data, Schedule(steps + 2, rows, 1, (), (steps + 2,), (1,))
        )
        sent = [0]

        # Without annotations: torch rejects those that are strings.
        def count_bytes(state, bucket, sent=sent):  # type: ignore[no-untyped-def]
            sent[0] += bucket.buffer().nbytes
            tensor = bucket.buffer().div_(distributed.get_world_size())
            return (
                distributed.all_reduce(tensor, async_op=True)
                .get_future()
                .then(lambda done: done.value()[0])
            )

        if job.resources.world_size > 1:
            session.strategy.module.register_comm_hook(None, count_bytes)
        session.advance(2)
        bytes_before, tokens_before, started = sent[0], session.meter.tokens, time.perf_counter()
        session.advance(steps + 2)
        seconds = time.perf_counter() - started
        results[name] = {
            "bytes": (sent[0] - bytes_before) / steps,
            "rate": (session.meter.tokens - tokens_before) / seconds,
            "trained": session.trainable_parameters,
        }
        session.close()
    if job.resources.world_size == 1 or distributed.get_rank() == 0:
        Path(config["out"]).write_text(json.dumps(results))


def run_group_benchmark(
    methods: list[str], workers: int, rows: int, steps: int, scratch: Path
) -> dict[str, dict[str, float]]:
    """Return the results of one group, by method.

    Args:
        rows: Rows per step, over all processes.
    """
    from lorafleet.training.launch import run_group

    jobs = {}
    for method in methods:
        overrides = (
            f"method={method}",
            "train.learning_rate=1e-3",
            f"resources.workers_per_node={workers}",
            "resources.strategy=ddp",
            f"train.per_device_train_batch_size={rows // workers}",
        )
        jobs[method] = load_job(
            ROOT / "examples" / "quickstart.yaml", overrides
        ).job.model_dump_json()
    out = scratch / f"{uuid.uuid4().hex}.json"
    placement = Placement(
        workers=workers, cpus_per_worker=1, gpus_per_worker=0, slots=1, waves=1, limited_by="trials"
    )
    run_group(
        measure_in_group,
        {"jobs": jobs, "steps": steps, "out": str(out)},
        placement,
        scratch,
        out.stem,
        [],
    )
    results: dict[str, dict[str, float]] = json.loads(out.read_text())
    return results


def main() -> None:
    """Run the benchmark and print bytes per step and the efficiency of a second process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    import ray

    fetch_job(load_job(ROOT / "examples" / "quickstart.yaml").job, print)
    print(describe_machine())
    ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        results = run_group_benchmark(["lora", "full"], 2, 16, arguments.steps, scratch)
        print("\nbytes that a process hands to the all-reduce in one step, two processes:")
        for method, result in results.items():
            print(
                f"  {method:<6} {result['bytes'] / 1e6:10.3f} MB for {result['trained']:,.0f} "
                "trained numbers"
            )
        print(f"  full / lora = {results['full']['bytes'] / results['lora']['bytes']:.0f}")
        rates: dict[int, list[float]] = {1: [], 2: []}
        for pair in range(arguments.pairs):
            for workers in (1, 2) if pair % 2 == 0 else (2, 1):
                rates[workers].append(
                    run_group_benchmark(["lora"], workers, 16, arguments.steps, scratch)["lora"][
                        "rate"
                    ]
                )
        single_rate, double_rate = (statistics.median(rates[workers]) for workers in (1, 2))
        print(f"\nreal tokens a second, LoRA, 16 rows a step, median of {arguments.pairs}:")
        print(
            f"  one process {single_rate:8.0f}   two {double_rate:8.0f}   "
            f"{double_rate / single_rate:.2f} times, efficiency {double_rate / single_rate / 2:.2f}"
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
