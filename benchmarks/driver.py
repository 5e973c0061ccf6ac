"""Measure the driver of a large search: results a second, and commands about such a run.

    python -m benchmarks.driver [--trials 1000] [--slots 64]

The trials are simulated (`benchmarks/stub_search.py`): no process is started and nothing is
learnt, so what is measured is the driver. All its records are written, each decision before
it acts. The baseline gets the same results in the same order: Ray Tune's ASHA with the
loggers that Tune uses by default (JSON, CSV and TensorBoard). Those do not flush to the disk,
and nothing of what they write continues a killed search. Ray Tune's own event loop is on
neither side.

Then `list`, `status`, `report` and `plan` of searches of different sizes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.stub_search import StubSearch
from benchmarks.sweep import ROOT
from lorafleet.cluster.local_site import detect_local_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.submission import write_run
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run

_SEARCH = ("search.scheduler.max_t=6400", "search.scheduler.grace_period=640")
_QUICKSTART = ROOT / "examples" / "quickstart.yaml"


def main() -> None:
    """Run the benchmark; with --side, one side of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("lorafleet", "tune"), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "lorafleet":
        return measure_lorafleet(arguments.run, arguments.slots)
    if arguments.side == "tune":
        return measure_tune(arguments.run)
    with tempfile.TemporaryDirectory() as scratch:
        sizes = [arguments.trials // 10, arguments.trials, 4 * arguments.trials]
        for size in sizes:
            for number in range(arguments.rounds if size == arguments.trials else 1):
                run = make_run(Path(scratch) / f"{size}-{number}", size)
                print(f"{size} trials, {arguments.slots} slots", flush=True)
                for side in ("lorafleet", "tune"):
                    _run_side(side, run, arguments.slots)
        for size in sizes:
            measure_commands(Path(scratch) / f"{size}-0", size)
    return None


def _run_side(side: str, run: Run, slots: int) -> None:
    options = ["--side", side, "--run", str(run.path), "--slots", str(slots)]
    subprocess.run([sys.executable, "-m", "benchmarks.driver", *options], cwd=ROOT, check=True)


def make_run(folder: Path, trials: int) -> Run:
    """Return a new run of the quickstart's search with this number of trials."""
    loaded = load_job(
        _QUICKSTART, (*_SEARCH, f"search.num_samples={trials}", "tracking.mode=disabled")
    )
    return write_run(make_plan(loaded, detect_local_site(), "sweep"), loaded, folder)


def measure_lorafleet(path: Path, slots: int) -> None:
    """Run a simulated search and print what its driver took."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the driver's log
    search, before = StubSearch(Run(path), slots), _get_peak_mib()
    search.execute()
    _print_side("lorafleet", search.results, search.search_seconds, search.search_cpu, before)


def measure_tune(path: Path) -> None:
    """Give the results of a finished search to Tune's ASHA and loggers, and print the cost."""
    import ray
    from ray.train._internal.storage import StorageContext
    from ray.tune.experiment import Trial
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback
    from ray.tune.schedulers import ASHAScheduler

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    run = Run(path)
    arrivals = sorted(
        (
            ((row.first_gradient_at or 0.0) + (row.train_seconds or 0.0), trial.id, row)
            for trial in run.list_trials()
            for row in trial.read_metrics()
        ),
        key=lambda arrival: arrival[:2],
    )
    results = [(trial_id, _to_result(row)) for _, trial_id, row in arrivals]
    configs = {trial.id: trial.read_params().assignment for trial in run.list_trials()}
    scheduler = ASHAScheduler(
        time_attr="samples", metric="accuracy", mode="max", max_t=6400, grace_period=640
    )
    loggers = [JsonLoggerCallback(), CSVLoggerCallback(), TBXLoggerCallback()]
    trials: dict[str, Any] = {}
    all_trials: list[Any] = []
    last = {trial_id: number for number, (trial_id, _) in enumerate(results)}
    before, started, cpu = _get_peak_mib(), time.perf_counter(), time.process_time()
    for number, (trial_id, result) in enumerate(results):
        if trial_id not in trials:
            trials[trial_id] = Trial(
                "stub",
                config=configs[trial_id],
                trial_id=trial_id,
                stub=True,
                storage=StorageContext(str(path / "peer"), "search", trial_dir_name=trial_id),
                _setup_default_resource=False,
            )
            trials[trial_id].init_local_path()
            all_trials.append(trials[trial_id])
            scheduler.on_trial_add(None, trials[trial_id])
        trial = trials[trial_id]
        scheduler.on_trial_result(None, trial, result)
        for logger in loggers:
            logger.on_trial_result(number, all_trials, trial, result)
            if last[trial_id] == number:
                logger.on_trial_complete(number, all_trials, trial)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    _print_side("Ray Tune's ASHA and loggers", len(results), seconds, cpu, before)


def _to_result(row: MetricsRow) -> dict[str, Any]:
    """Return a row as a result of Tune."""
    values = {key: value for key, value in row.to_dict().items() if value is not None}
    return values | {"training_iteration": row.step, "timestamp": 0, "config": {}}


def _get_peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _print_side(name: str, results: int, seconds: float, cpu: float, before: float) -> None:
    print(
        f"  {name:<28} {results} results, {results / seconds:7.0f} a second, {seconds:6.2f} s, "
        f"CPU {cpu:6.2f} s ({1000 * cpu / results:.2f} ms a result), "
        f"peak {_get_peak_mib():.0f} MiB ({before:.0f} before)",
        flush=True,
    )


def measure_commands(runs: Path, size: int) -> None:
    """Print how long commands about a finished search take."""
    (run,) = runs.iterdir()
    commands = {
        "list": ["list", "--runs", str(runs)],
        "status": ["status", str(run)],
        "report": ["report", str(run)],
        "plan": ["plan", str(_QUICKSTART), *_SEARCH, f"search.num_samples={size}"],
    }
    print(f"{size} trials: seconds of CPU", flush=True)
    for name, words in commands.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        lorafleet = Path(sys.executable).with_name("lorafleet")
        subprocess.run([lorafleet, *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"  {name:<8} {cpu:6.2f}", flush=True)


if __name__ == "__main__":
    main()
