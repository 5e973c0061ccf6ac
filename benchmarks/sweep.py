"""The makespan of a sweep against what a user would write today, and where the difference comes from.

    python -m benchmarks.sweep [--shape quickstart|short] [--no-grouped]

Today's way: Ray Tune, a function a trial in a process of its own, HF Trainer + PEFT in it, as many at once, the same
configurations, the same data. Both sides stop each trial at the same step: ours runs first and decides, the other is
told (a scheduler that would decide for itself would compare other amounts of work). A second row has the other side
group by length. Neither side's final evaluation on the test rows is counted.
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

from lorafleet.cluster.fetch import fetch_job
from lorafleet.cluster.hardware import local_site
from lorafleet.cluster.local import write_run
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.jobs.loading.job_file import LoadedJob, load_job
from lorafleet.jobs.runs.run import Run
from lorafleet.tuning.trial_run import Work

from benchmarks.peer import machine_line

ROOT = Path(__file__).parent.parent
SHAPES: dict[str, tuple[str, ...]] = {
    "smoke": ("search.num_samples=2", "search.scheduler.max_t=64", "search.scheduler.grace_period=64",
              "data.max_validation_samples=20", "data.max_test_samples=20"),
    "quickstart": (),
    "short": ("search.num_samples=24", "search.scheduler.max_t=192", "search.scheduler.grace_period=64",
              "data.max_validation_samples=100"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--no-grouped", action="store_true", help="leave out the row against group_by_length")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--grouped", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return peer(Path(arguments.peer), grouped=arguments.grouped)
    loaded = load_job(ROOT / "examples" / "quickstart.yaml", (*SHAPES[arguments.shape], "tracking.mode=disabled"))
    fetch_job(loaded.job, print)
    print(f"{arguments.shape}: {machine_line()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = write_run(make_plan(loaded, local_site(), "sweep"), loaded, Path(scratch))
        mine = ours(run)
        print(f"{'ours':<46} {mine['makespan']:7.1f} s  {_parts(mine)}", flush=True)
        report = json.loads((run.path / "report" / "report.json").read_text())
        tested = [row["test_metrics"]["accuracy"] for row in report["trials"] if row["test_metrics"]]
        print(f"    test accuracy of the trials that were tested: {', '.join(f'{score:.3f}' for score in tested)}")
        for grouped in (False,) if arguments.no_grouped else (False, True):
            other = peer_process(run, loaded, grouped=grouped)
            name = "Tune + HF Trainer, a process a trial" + (", grouped" if grouped else "")
            print(f"{name:<46} {other['makespan']:7.1f} s  {_parts(other)}", flush=True)
            _shares(mine, other)
    return None


def _parts(side: dict[str, float]) -> str:
    keys = ("startup", "training", "evaluation")
    return ", ".join(f"{key} {side[key]:.0f} s" for key in keys) + f" (summed over {side['trials']:.0f} trials)"


def _shares(mine: dict[str, float], other: dict[str, float]) -> None:
    """How much of the difference of summed seconds each part is."""
    saved = {key: other[key] - mine[key] for key in ("startup", "training", "evaluation")}
    whole = sum(saved.values())
    parts = ", ".join(f"{key} {value / whole:.0%}" for key, value in saved.items()) if whole > 0 else "-"
    print(f"    makespan ratio {other['makespan'] / mine['makespan']:.2f}x; of the seconds saved: {parts}", flush=True)


def ours(run: Run) -> dict[str, float]:
    """From the driver's start to the last trial's end."""
    began = time.time()
    code = (
        "import sys; from pathlib import Path; from lorafleet.jobs.runs.run import Run; "
        "from lorafleet.tuning.sweep import Sweep; "
        "sys.exit(Sweep(Run(Path(sys.argv[1]))).execute())"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True, capture_output=True, cwd=ROOT)
    trials = run.trials()
    ended = max(trial.status()["ended"] for trial in trials)
    rows = [trial.metrics()[-1] for trial in trials]
    training, evaluation = sum(r["train_seconds"] for r in rows), sum(r["eval_seconds"] for r in rows)
    slots = json.loads((run.path / "plan.json").read_text())["placement"]["slots"]
    return {"makespan": ended - began, "training": training, "evaluation": evaluation,
            "startup": slots * (ended - began) - training - evaluation, "trials": len(trials)}  # fmt: skip


def peer_process(run: Run, loaded: LoadedJob, *, grouped: bool) -> dict[str, float]:
    """The other side in a process of its own, from its start to its last trial's end."""
    out = run.path / f"peer-{grouped}.json"
    words = ["-m", "benchmarks.sweep", "--peer", str(run.path), *(["--grouped"] if grouped else [])]
    began = time.time()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    found: dict[str, float] = json.loads(out.read_text())
    makespan = found.pop("ended") - began
    slots = json.loads((run.path / "plan.json").read_text())["placement"]["slots"]
    return found | {"makespan": makespan, "startup": slots * makespan - found["training"] - found["evaluation"]}


def peer(folder: Path, *, grouped: bool) -> None:
    """Run by `peer_process`: a Tune function a trial, HF Trainer in it."""
    import ray
    from ray import tune

    run = Run(folder)
    plan = json.loads((folder / "plan.json").read_text())
    facts = json.loads((folder / "facts.json").read_text())
    assert facts
    from lorafleet.jobs.schema.job import JobSpec
    from lorafleet.training.data import prepare

    job = JobSpec.model_validate_json(json.dumps(plan["job"]))
    work = Work(job, str(folder), str(prepare(job).folder), 0, True)
    trials = [
        {"assignment": t.params()["assignment"], "stop_at": t.metrics()[-1]["step"], "total": t.params()["total_steps"],
         "evaluate_at": [row["step"] for row in t.evaluations()]}
        for t in run.trials()
    ]  # fmt: skip
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_TRAIN_V2_ENABLED"] = "0"
    slots = plan["placement"]["slots"]
    ray.init(address="local", num_cpus=slots, include_dashboard=False, log_to_driver=False)
    function = tune.with_resources(tune.with_parameters(peer_trial, work=work, grouped=grouped), {"cpu": 1})
    tuner = tune.Tuner(
        function,
        param_space={"trial": tune.grid_search(trials)},
        run_config=tune.RunConfig(name=f"peer-{grouped}", storage_path=str(folder / "tune"), verbose=0),
    )
    results = tuner.fit()
    ended = time.time()
    rows = [result.metrics for result in results]
    found = {
        "ended": ended,
        "training": sum(row["training"] for row in rows),
        "evaluation": sum(row["evaluation"] for row in rows),
        "trials": len(rows),
    }
    (folder / f"peer-{grouped}.json").write_text(json.dumps(found))


def peer_trial(config: dict, work: Work, grouped: bool) -> None:  # type: ignore[type-arg]
    """One trial as a user would write it."""
    import numpy as np
    import torch
    from lorafleet.evaluation.tokens import open_tokens
    from lorafleet.jobs.trials import sampling as search
    from lorafleet.training.data import BatchPlan
    from ray import tune
    from transformers import TrainerCallback

    from benchmarks.peer import trainer_for

    torch.set_num_threads(1)
    asked = config["trial"]
    job = search.trial(work.job, asked["assignment"])
    data = open_tokens(Path(work.tokens))
    plan = BatchPlan(data.splits["train"].lengths, job.train.effective_batch_size(1), job.train.seed, grouped=False)
    order = np.concatenate([plan.rows(step) for step in range(asked["total"])])
    spent = {"training": 0.0, "evaluation": 0.0}
    clock = {"began": 0.0}

    class Rungs(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            clock["began"] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step in asked["evaluate_at"]:
                spent["training"] += time.perf_counter() - clock["began"]
                control.should_evaluate = True
                clock["began"] = time.perf_counter()
            control.should_training_stop = state.global_step >= asked["stop_at"]

        def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[no-untyped-def]
            spent["evaluation"] += time.perf_counter() - clock["began"]
            tune.report({"accuracy": metrics["eval_accuracy"], **spent})
            clock["began"] = time.perf_counter()

    strategy = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    trainer = trainer_for(job, data, order, asked["total"], Path(work.run) / "peer", **strategy)
    trainer.add_callback(Rungs())
    trainer.train()


if __name__ == "__main__":
    main()
