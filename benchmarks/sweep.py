"""Compare the makespan of a sweep with the code that a user would write, part by part.

    python -m benchmarks.sweep [--shape quickstart|short] [--no-grouped]

The baseline: Ray Tune with one function per trial, each in its own process with HF Trainer +
PEFT, the same number of trials in parallel, the same configurations and the same data. Both sides
stop each trial at the same step: ours runs first and decides, and the baseline gets the decisions
(a scheduler of its own would make the amounts of work differ). A second row lets the baseline
group by length. The final evaluation on the test rows is not counted on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peer import describe_machine
from lorafleet.cluster.fetch import fetch_job
from lorafleet.cluster.local_site import detect_local_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.submission import write_run
from lorafleet.jobs.loading.job_file import LoadedJob, load_job
from lorafleet.jobs.runs.run import Run
from lorafleet.tuning.trial_run import Work

ROOT = Path(__file__).parent.parent
SHAPES: dict[str, tuple[str, ...]] = {
    "smoke": (
        "search.num_samples=2",
        "search.scheduler.max_t=64",
        "search.scheduler.grace_period=64",
        "data.max_validation_samples=20",
        "data.max_test_samples=20",
    ),
    "quickstart": (),
    "short": (
        "search.num_samples=24",
        "search.scheduler.max_t=192",
        "search.scheduler.grace_period=64",
        "data.max_validation_samples=100",
    ),
}


def main() -> None:
    """Run the benchmark; with --peer, run the baseline only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument(
        "--no-grouped", action="store_true", help="leave out the row against group_by_length"
    )
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--grouped", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return run_peer(Path(arguments.peer), grouped=arguments.grouped)
    loaded = load_job(
        ROOT / "examples" / "quickstart.yaml", (*SHAPES[arguments.shape], "tracking.mode=disabled")
    )
    fetch_job(loaded.job, print)
    print(f"{arguments.shape}: {describe_machine()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = write_run(make_plan(loaded, detect_local_site(), "sweep"), loaded, Path(scratch))
        lorafleet_side = measure_lorafleet(run)
        print(
            f"{'ours':<46} {lorafleet_side['makespan']:7.1f} s  {_format_parts(lorafleet_side)}",
            flush=True,
        )
        report = json.loads((run.path / "report" / "report.json").read_text())
        test_scores = [
            row["test_metrics"]["accuracy"] for row in report["trials"] if row["test_metrics"]
        ]
        print(
            "    test accuracy of the trials that were tested: "
            f"{', '.join(f'{score:.3f}' for score in test_scores)}"
        )
        for grouped in (False,) if arguments.no_grouped else (False, True):
            peer_side = measure_peer(run, loaded, grouped=grouped)
            name = "Tune + HF Trainer, a process a trial" + (", grouped" if grouped else "")
            print(
                f"{name:<46} {peer_side['makespan']:7.1f} s  {_format_parts(peer_side)}", flush=True
            )
            _print_shares(lorafleet_side, peer_side)
    return None


def _format_parts(side: dict[str, float]) -> str:
    keys = ("startup", "training", "evaluation")
    return (
        ", ".join(f"{key} {side[key]:.0f} s" for key in keys)
        + f" (summed over {side['trials']:.0f} trials)"
    )


def _print_shares(lorafleet_side: dict[str, float], peer_side: dict[str, float]) -> None:
    """Print the makespan ratio, and each part's share of the summed seconds that are saved."""
    saved = {
        key: peer_side[key] - lorafleet_side[key] for key in ("startup", "training", "evaluation")
    }
    total = sum(saved.values())
    share_text = (
        ", ".join(f"{key} {value / total:.0%}" for key, value in saved.items())
        if total > 0
        else "-"
    )
    print(
        f"    makespan ratio {peer_side['makespan'] / lorafleet_side['makespan']:.2f}x; of the "
        f"seconds saved: {share_text}",
        flush=True,
    )


def measure_lorafleet(run: Run) -> dict[str, float]:
    """Return our makespan in seconds and its parts.

    It lasts from the driver's start to the last trial's end.
    """
    started = time.time()
    code = (
        "import sys; from pathlib import Path; from lorafleet.jobs.runs.run import Run; from "
        "lorafleet.tuning.sweep import Sweep; sys.exit(Sweep(Run(Path(sys.argv[1]))).execute())"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(run.path)], check=True, capture_output=True, cwd=ROOT
    )
    trials = run.list_trials()
    finished = max(trial.read_status().ended or 0.0 for trial in trials)
    rows = [trial.read_metrics()[-1] for trial in trials]
    training, evaluation = (
        sum(row.train_seconds or 0.0 for row in rows),
        sum(row.eval_seconds or 0.0 for row in rows),
    )
    slots = json.loads((run.path / "plan.json").read_text())["placement"]["slots"]
    return {
        "makespan": finished - started,
        "training": training,
        "evaluation": evaluation,
        "startup": slots * (finished - started) - training - evaluation,
        "trials": len(trials),
    }


def measure_peer(run: Run, loaded: LoadedJob, *, grouped: bool) -> dict[str, float]:
    """Return the baseline's seconds: makespan and its parts.

    The baseline runs in its own process, measured from its start to its last trial's end.
    """
    out = run.path / f"peer-{grouped}.json"
    arguments = [
        "-m",
        "benchmarks.sweep",
        "--peer",
        str(run.path),
        *(["--grouped"] if grouped else []),
    ]
    started = time.time()
    process = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if process.returncode:
        raise SystemExit(process.stdout[-2000:] + process.stderr[-4000:])
    results: dict[str, float] = json.loads(out.read_text())
    makespan = results.pop("ended") - started
    slots = json.loads((run.path / "plan.json").read_text())["placement"]["slots"]
    return results | {
        "makespan": makespan,
        "startup": slots * makespan - results["training"] - results["evaluation"],
    }


def run_peer(folder: Path, *, grouped: bool) -> None:
    """Run the baseline: one Tune function per trial, with HF Trainer in it.

    Called by `measure_peer`.
    """
    import ray
    from ray import tune

    run = Run(folder)
    plan = json.loads((folder / "plan.json").read_text())
    facts = json.loads((folder / "facts.json").read_text())
    assert facts
    from lorafleet.jobs.schema.job import JobSpec
    from lorafleet.training.data import prepare_tokens

    job = JobSpec.from_record(plan["job"])
    work = Work(job, str(folder), str(prepare_tokens(job).folder), 0, 1, True)
    trials = [
        {
            "assignment": t.read_params().assignment,
            "stop_at": t.read_metrics()[-1].step,
            "total": t.read_params().total_steps,
            "evaluate_at": [row.step for row in t.read_evaluations()],
        }
        for t in run.list_trials()
    ]
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_TRAIN_V2_ENABLED"] = "0"
    slots = plan["placement"]["slots"]
    ray.init(address="local", num_cpus=slots, include_dashboard=False, log_to_driver=False)
    function = tune.with_resources(
        tune.with_parameters(run_peer_trial, work=work, grouped=grouped), {"cpu": 1}
    )
    tuner = tune.Tuner(
        function,
        param_space={"trial": tune.grid_search(trials)},
        run_config=tune.RunConfig(
            name=f"peer-{grouped}", storage_path=str(folder / "tune"), verbose=0
        ),
    )
    results = tuner.fit()
    finished = time.time()
    rows = [result.metrics for result in results]
    summary = {
        "ended": finished,
        "training": sum(row["training"] for row in rows),
        "evaluation": sum(row["evaluation"] for row in rows),
        "trials": len(rows),
    }
    (folder / f"peer-{grouped}.json").write_text(json.dumps(summary))


def run_peer_trial(config: dict, work: Work, grouped: bool) -> None:  # type: ignore[type-arg]
    """Train one trial as a user would write it."""
    import numpy as np
    import torch
    from ray import tune
    from transformers import TrainerCallback

    from benchmarks.peer import make_trainer
    from lorafleet.evaluation.tokens import open_tokens
    from lorafleet.jobs.trials import sampling as search
    from lorafleet.training.data import BatchPlan

    torch.set_num_threads(1)
    trial_config = config["trial"]
    job = search.build_trial_job(work.job, trial_config["assignment"])
    data = open_tokens(Path(work.tokens))
    plan = BatchPlan(
        data.splits["train"].lengths,
        job.train.compute_effective_batch_size(1),
        job.train.seed,
        grouped=False,
    )
    order = np.concatenate([plan.select_rows(step) for step in range(trial_config["total"])])
    seconds = {"training": 0.0, "evaluation": 0.0}
    clock = {"began": 0.0}

    class Rungs(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            clock["began"] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step in trial_config["evaluate_at"]:
                seconds["training"] += time.perf_counter() - clock["began"]
                control.should_evaluate = True
                clock["began"] = time.perf_counter()
            control.should_training_stop = state.global_step >= trial_config["stop_at"]

        def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[no-untyped-def]
            seconds["evaluation"] += time.perf_counter() - clock["began"]
            tune.report({"accuracy": metrics["eval_accuracy"], **seconds})
            clock["began"] = time.perf_counter()

    strategy = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    trainer = make_trainer(
        job, data, order, trial_config["total"], Path(work.run) / "peer", **strategy
    )
    trainer.add_callback(Rungs())
    trainer.train()


if __name__ == "__main__":
    main()
