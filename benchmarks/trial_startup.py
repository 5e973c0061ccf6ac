"""Measure the time from a stopped trial to the next first gradient: warm actor, new worker group.

    python -m benchmarks.trial_startup [--trials 8] [--groups 3]

Warm: a real sweep with the quickstart's model, read from its record. Cold: the same trial in a
Ray Train group of one process, from the call to its first gradient, in the same run of this
program.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import uuid
from itertools import pairwise
from pathlib import Path

from benchmarks.peer import describe_machine
from lorafleet.cluster.fetch import fetch_job
from lorafleet.cluster.local_site import detect_local_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.submission import write_run
from lorafleet.jobs.loading.job_file import LoadedJob, load_job
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.trials.sampling import build_trial_job
from lorafleet.tuning.sweep import Sweep

ROOT = Path(__file__).parent.parent
SMALL = (
    "search.scheduler.max_t=64",
    "search.scheduler.grace_period=64",
    "data.max_validation_samples=16",
    "data.max_test_samples=16",
    "tracking.mode=disabled",
    "search.keep=1",
)


def main() -> None:
    """Run the benchmark and print medians, ranges and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--groups", type=int, default=3)
    arguments = parser.parse_args()
    overrides = (*SMALL, f"search.num_samples={arguments.trials}")
    loaded = load_job(ROOT / "examples" / "quickstart.yaml", overrides)
    fetch_job(loaded.job, print)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as scratch:
        run = write_run(make_plan(loaded, detect_local_site(), "sweep"), loaded, Path(scratch))
        Sweep(run).execute()
        warm = measure_warm_gaps(run)
        cold = [measure_cold_start(loaded, run) for _ in range(arguments.groups)]
        os.chdir(ROOT)
    print(
        "warm actor: stop decided -> first gradient of the next trial: median "
        f"{statistics.median(warm):.3f} s ({min(warm):.3f} to {max(warm):.3f}, n={len(warm)})"
    )
    print(
        f"own worker group: call -> first gradient: median {statistics.median(cold):.1f} s "
        f"({min(cold):.1f} to {max(cold):.1f}, n={len(cold)})"
    )
    print(f"ratio: {statistics.median(cold) / statistics.median(warm):.0f}x")


def measure_warm_gaps(run: Run) -> list[float]:
    """Return the seconds from a trial's end to the next first gradient on the same actor."""
    by_actor: dict[str, list[tuple[float, float]]] = {}
    for finished_trial in run.list_trials():
        rows = finished_trial.read_metrics()
        by_actor.setdefault(str(rows[0].host), []).append(
            (rows[0].first_gradient_at or 0.0, finished_trial.read_status().ended or 0.0)
        )
    gaps = []
    for spans in by_actor.values():
        spans.sort()
        gaps += [following[0] - previous[1] for previous, following in pairwise(spans)]
    return gaps


def measure_cold_start(loaded: LoadedJob, run: Run) -> float:
    """Return the seconds from the call to the first gradient of a group of one process."""
    import ray

    from lorafleet.jobs.sites.placement import Placement
    from lorafleet.training.data import prepare_tokens
    from lorafleet.training.launch import run_group
    from lorafleet.tuning.trial_run import Work

    assignment = run.list_trials()[0].read_params().assignment
    job = build_trial_job(loaded.job, assignment).model_copy(update={"search": None})
    name = f"cold-{uuid.uuid4().hex[:6]}"
    run.add_trial(name, 99, {})
    work = Work(job, str(run.path), str(prepare_tokens(job).folder), 0, 1, False)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    time_file = run.path / f"{name}.txt"
    started = time.time()
    placement = Placement(
        workers=1, cpus_per_worker=1, gpus_per_worker=0, slots=1, waves=1, limited_by="trials"
    )
    config = {"work": work, "trial": {"trial_id": name, "assignment": {}}, "marks": str(time_file)}
    run_group(run_first_step, config, placement, run.path / "tune" / "cold", name, [])
    ray.shutdown()
    return float(time_file.read_text()) - started


def run_first_step(config: dict) -> None:  # type: ignore[type-arg]
    """Run in the worker: set up the distributed host and train one step."""
    import torch

    from lorafleet.evaluation.tokens import open_tokens
    from lorafleet.training.model import load_base, resolve_device
    from lorafleet.tuning.trial_run import TrialRun

    work = config["work"]
    os.chdir(work.run)
    torch.set_num_threads(1)
    data = open_tokens(Path(work.tokens))
    run = TrialRun(work, config["trial"], data)
    session = run.open(load_base(run.job, len(data.labels), resolve_device(0)))
    session.advance(1)
    Path(config["marks"]).write_text(str(session.first_gradient_at))


if __name__ == "__main__":
    main()
