"""What processes of one trial send each other, and what a second process brings.

    python -m benchmarks.scaling [--steps 20] [--pairs 3]

Bytes: what DDP hands to its all-reduce in one step, counted by a communication hook in every process of a real Ray
Train group of two, for LoRA and for full fine-tuning of the same model. Speed: real tokens a second of one process
beside two with half the rows each, one thread a process, in turn; on a machine with two cores the second shares
the memory bus with the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import uuid
from pathlib import Path
from typing import Any

from lorafleet.cluster.fetch import fetch_job
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.jobs.sites.placement import Placement

from benchmarks.peer import machine_line

ROOT = Path(__file__).parent.parent


def in_group(config: dict[str, Any]) -> None:
    """Runs in each process: every job for some steps; the first process writes what it counted."""
    import time

    import torch
    from lorafleet.jobs.schema.job import JobSpec
    from lorafleet.jobs.trials.schedule import Schedule
    from lorafleet.training.data import prepare
    from lorafleet.training.model import load_base
    from lorafleet.training.session import TrainingSession
    from torch import distributed

    torch.set_num_threads(1)
    found = {}
    for name, text in config["jobs"].items():
        job = JobSpec.model_validate_json(text)
        data = prepare(job)
        base = load_base(job, len(data.labels), torch.device("cpu"))
        rows = job.train.effective_batch_size(job.resources.world_size)
        steps = config["steps"]
        session = TrainingSession.build(job, base, data, Schedule(steps + 2, rows, 1, (), (steps + 2,), (1,)))
        sent = [0]

        def count(state, bucket, sent=sent):  # type: ignore[no-untyped-def]  # torch refuses annotations that are texts
            sent[0] += bucket.buffer().nbytes
            tensor = bucket.buffer().div_(distributed.get_world_size())
            return distributed.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])

        if job.resources.world_size > 1:
            session.strategy.module.register_comm_hook(None, count)
        session.advance(2)
        before, tokens, began = sent[0], session.meter.tokens, time.perf_counter()
        session.advance(steps + 2)
        seconds = time.perf_counter() - began
        found[name] = {"bytes": (sent[0] - before) / steps, "rate": (session.meter.tokens - tokens) / seconds,
                       "trained": session.trainable_parameters}  # fmt: skip
        session.close()
    if job.resources.world_size == 1 or distributed.get_rank() == 0:
        Path(config["out"]).write_text(json.dumps(found))


def run(methods: list[str], workers: int, rows: int, steps: int, scratch: Path) -> dict[str, dict[str, float]]:
    """What one group found, by method. `rows` is a step's, over all its processes."""
    from lorafleet.training.launch import run_group

    jobs = {}
    for method in methods:
        words = (f"method={method}", "train.learning_rate=1e-3", f"resources.workers_per_node={workers}",
                 "resources.strategy=ddp", f"train.per_device_train_batch_size={rows // workers}")  # fmt: skip
        jobs[method] = load_job(ROOT / "examples" / "quickstart.yaml", words).job.model_dump_json()
    out = scratch / f"{uuid.uuid4().hex}.json"
    placement = Placement(workers=workers, cpus_per_worker=1, gpus_per_worker=0, slots=1, waves=1, limited_by="trials")
    run_group(in_group, {"jobs": jobs, "steps": steps, "out": str(out)}, placement, scratch, out.stem, [])
    found: dict[str, dict[str, float]] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    import ray

    fetch_job(load_job(ROOT / "examples" / "quickstart.yaml").job, print)
    print(machine_line())
    ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        both = run(["lora", "full"], 2, 16, arguments.steps, scratch)
        print("\nbytes that a process hands to the all-reduce in one step, two processes:")
        for method, side in both.items():
            print(f"  {method:<6} {side['bytes'] / 1e6:10.3f} MB for {side['trained']:,.0f} trained numbers")
        print(f"  full / lora = {both['full']['bytes'] / both['lora']['bytes']:.0f}")
        rates: dict[int, list[float]] = {1: [], 2: []}
        for pair in range(arguments.pairs):
            for workers in (1, 2) if pair % 2 == 0 else (2, 1):
                rates[workers].append(run(["lora"], workers, 16, arguments.steps, scratch)["lora"]["rate"])
        one, two = (statistics.median(rates[workers]) for workers in (1, 2))
        print(f"\nreal tokens a second, LoRA, 16 rows a step, median of {arguments.pairs}:")
        print(f"  one process {one:8.0f}   two {two:8.0f}   {two / one:.2f} times, efficiency {two / one / 2:.2f}")
    ray.shutdown()


if __name__ == "__main__":
    main()
