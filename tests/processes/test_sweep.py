"""The main path, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import WarningEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import ASSETS, ROOT, JobMaker, lorafleet, opinions, read_step, write_rows
from tests.processes.conftest import (
    RANDOM,
    accuracy_of,
    base_loads,
    begin,
    check_cuts,
    interrupt,
    kill_tree,
    newest,
    sweep,
    wait_for,
)

LONGER = RANDOM.replace("max_t: 144", "max_t: 2880")
"""Trials that last longer than the time by which one actor may be up before the other."""


def test_a_random_sweep_ends_in_a_decision(bert_job: JobMaker, place: Path) -> None:
    run, done = sweep(bert_job(LONGER), place)
    assert done.returncode == ExitCode.OK, (
        done.stdout + done.stderr + (run.path / "logs" / "driver.log").read_text()
    )
    assert base_loads(run) == 2  # two slots, two actors, and each loaded the base once
    assert check_cuts(run) >= 8
    data = json.loads(lorafleet("report", "--format", "json", cwd=place).stdout)
    assert len(data["trials"]) == 8
    assert {row["state"] for row in data["trials"]} <= {"finished", "stopped"}
    chosen = next(
        row for row in data["trials"] if row["trial_id"] == data["recommendation"]["trial_id"]
    )
    trial = run.get_trial(data["recommendation"]["trial_id"])
    assert chosen["test_metrics"]["accuracy"] == accuracy_of(trial.get_predictions_file("test"))
    for split, metrics in (("validation", "metrics"), ("test", "test_metrics")):
        expected = accuracy_of(run.get_base_predictions_file(split))
        assert data["base"][metrics]["accuracy"] == expected
    adapter = run.path / data["recommendation"]["adapter"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {
        p.name for p in adapter.iterdir()
    }
    _run_code_of_card(adapter)
    assert len(_kept(run)) == 3
    assert not list(run.path.glob("trials/*/checkpoints"))
    _every_file_has_a_schema_version(run.path)
    _each_trial_is_in_wandb(run.path, [row["trial_id"] for row in data["trials"]])
    assert list(run.path.glob(f"wandb/wandb/offline-run-*-{run.id}-report"))
    logged = lorafleet("logs", "tiny", chosen["trial_id"], cwd=place).stdout
    assert "accuracy=" in logged


def _run_code_of_card(weights: Path) -> None:
    """Run the code of a model card in a process that has nothing of lorafleet."""
    assert (weights / "tokenizer.json").is_file()
    code = (weights / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(weights),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=weights,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.replace("'", '"'))[0] in ("bad", "good")


def _every_file_has_a_schema_version(folder: Path) -> None:
    for path in [
        *folder.glob("*.json"),
        *folder.glob("trials/*/*.json"),
        *folder.glob("report/*.json"),
    ]:
        assert json.loads(path.read_text())["schema_version"] == 1, path
    for path in [*folder.glob("*.jsonl"), *folder.glob("trials/*/*.jsonl")]:
        assert all(row["schema_version"] == 1 for row in files.read_jsonl(path)), path


def _each_trial_is_in_wandb(folder: Path, trials: list[str]) -> None:
    """Read back with W&B's own reader."""
    wandb = Path(sys.executable).with_name("wandb")
    for trial in trials:
        found = list(folder.glob(f"wandb/wandb/offline-run-*-{folder.name}-{trial}"))
        assert len(found) == 1, f"{trial} has {len(found)} W&B folders"
        shown = subprocess.run(
            [wandb, "leet", "inspect", "--summary", found[0]], capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        assert "eval/accuracy" in shown.stdout
        assert "train/loss" in shown.stdout
        assert "weights/step" in shown.stdout
        assert "base_model" in shown.stdout


def test_a_trial_that_diverges_costs_only_itself(bert_job: JobMaker, place: Path) -> None:
    search = """
search:
  method: grid
  max_concurrent_trials: 1
  scheduler: {type: none, max_t: 32}
  parameters: {lora.lora_alpha: {values: [1e+38, 8.0]}}
"""
    run, done = sweep(bert_job(search, lora__lora_alpha=8), place)
    assert done.returncode == ExitCode.SOME_TRIALS_FAILED
    states = {
        trial.read_params().assignment["lora.lora_alpha"]: trial.read_status()
        for trial in run.list_trials()
    }
    assert states[1e38].state == "failed"
    assert states[1e38].failure.failure_class == "nan"
    assert states[8.0].state == "finished"
    assert base_loads(run) == 1  # the actor outlived the failure
    assert "failed: nan" in done.stdout


@pytest.mark.long
def test_tpe_keeps_every_slot_warm(bert_job: JobMaker, place: Path) -> None:
    search = LONGER.replace("num_samples: 8", "num_samples: 14\n  method: tpe")
    run, done = sweep(bert_job(search), place)
    assert done.returncode == ExitCode.OK, (
        done.stdout + done.stderr + (run.path / "logs" / "driver.log").read_text()
    )
    assert len(run.list_trials()) == 14
    assert base_loads(run) == 2
    check_cuts(run)


def test_a_grid_of_language_models(llama_job: JobMaker, place: Path) -> None:
    search = """
search:
  method: grid
  max_concurrent_trials: 2
  scheduler: {max_t: 72}
  parameters: {lora.lora_r: {values: [2, 4]}, train.learning_rate: {values: [1e-3, 1e-2]}}
"""
    run, done = sweep(llama_job(search), place, "--format", "json")
    assert done.returncode == ExitCode.OK, done.stderr
    assert base_loads(run) <= 2  # these trials are over before a second actor is up
    data = json.loads(done.stdout)
    assert data["metric"] == "loss"
    assert all(row["metrics"]["perplexity"] > 1 for row in data["trials"])


@pytest.mark.long
def test_methods_are_searched_like_any_other_field(bert_job: JobMaker, place: Path) -> None:
    """One warm actor: what writes to the base costs a new one, what does not shares it."""
    search = """
search:
  method: grid
  max_concurrent_trials: 1
  scheduler: {type: none, max_t: 64}
  parameters: {lora.lora_r: {values: [2, 4]}, method: {values: [lora, prompt_tuning, full, qlora]}}
"""
    run, done = sweep(bert_job(search), place, "--format", "json")
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    data = json.loads(done.stdout)
    tried = [(row["params"]["method"], row["params"]["lora.lora_r"]) for row in data["trials"]]
    # A rank changes nothing of a prompt or of full fine-tuning: these are tried once.
    assert sorted(method for method, _ in tried) == [
        "full",
        "lora",
        "lora",
        "prompt_tuning",
        "qlora",
        "qlora",
    ]
    assert all(row["test_metrics"] for row in data["trials"] if row["trial_id"] in _kept(run))
    assert base_loads(run) == 4  # lora (a prompt uses it too), full, after full, qlora
    whole = next(row["trial_id"] for row in data["trials"] if row["params"]["method"] == "full")
    assert (run.get_trial(whole).path / "model" / "model.safetensors").is_file()


def _kept(run: Run) -> list[str]:
    return [trial.id for trial in run.list_trials() if trial.weights.is_dir()]


def test_a_killed_sweep_goes_on_where_it_was(bert_job: JobMaker, place: Path) -> None:
    slow = RANDOM.replace("max_t: 144", "max_t: 1440").replace("num_samples: 8", "num_samples: 6")
    process = begin(bert_job(slow, train__checkpoint_minutes=0.01), place)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)

    def ended() -> list[Path]:
        return [trial.path for trial in run.list_trials() if trial.state.has_ended]

    wait_for(ended)
    kill_tree(process)
    before = {path: (path / "metrics.jsonl").read_bytes() for path in ended()}
    assert len(before) < 6
    assert not run.is_alive()
    status = json.loads(lorafleet("status", "--format", "json", cwd=place).stdout)
    assert (status["state"], status["alive"]) == ("failed", False)
    assert "its driver died" in status["place"]
    done = lorafleet("resume", run.id, cwd=place)
    assert done.returncode == ExitCode.OK, (
        done.stdout + done.stderr + (run.path / "logs" / "driver.log").read_text()
    )
    assert {path: (path / "metrics.jsonl").read_bytes() for path in before} == before
    assert len(run.list_trials()) == 6
    assert all(trial.state.has_ended for trial in run.list_trials())
    for trial in run.list_trials():
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(set(steps))  # nothing was reported twice
    check_cuts(run)
    data = json.loads((run.path / "report" / "report.json").read_text())
    assert data["recommendation"]["trial_id"]
    _each_trial_is_in_wandb(run.path, [trial.id for trial in run.list_trials()])


def test_ctrl_c_saves_and_resume_finishes(bert_job: JobMaker, place: Path) -> None:
    slow = RANDOM.replace("max_t: 144", "max_t: 4320").replace("num_samples: 8", "num_samples: 3")
    process = begin(bert_job(slow), place)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)
    wait_for(lambda: any(read_step(trial) > 3 for trial in run.list_trials()))
    interrupt(process)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, shown
    assert run.state == "stopped"
    waiting = [trial for trial in run.list_trials() if not trial.state.has_ended]
    assert waiting
    hurt = next(trial for trial in waiting if trial.checkpoint.is_dir())
    os.truncate(hurt.checkpoint / "trained.safetensors", 100)
    assert "lorafleet resume" in shown
    done = lorafleet("resume", "tiny", "--quiet", cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert re.search(r"^(Ship |Do not ship)", done.stdout, re.MULTILINE), done.stdout
    check_cuts(run)
    assert [event.trial_id for event in run.read_events(WarningEvent)] == [hurt.id]
    assert (
        f"{hurt.id}: the newest checkpoint is damaged"
        in (run.path / "report" / "report.md").read_text()
    )


def test_stop_saves_and_a_killed_worker_is_started_again(bert_job: JobMaker, place: Path) -> None:
    endless = RANDOM.replace("max_t: 144", "max_t: 1000000").replace("type: asha", "type: none")
    slow = endless.replace("num_samples: 8", "num_samples: 2")
    process = begin(bert_job(slow, train__checkpoint_minutes=0.01, train__eval_steps=100), place)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)
    wait_for(
        lambda: (
            base_loads(run) == 2 and all(trial.checkpoint.is_dir() for trial in run.list_trials())
        )
    )
    victim = next(
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "ResourceTrainable" in p.name()
    )
    victim.kill()
    wait_for(lambda: base_loads(run) == 3)  # a new actor took the trial over
    assert not [trial for trial in run.list_trials() if trial.state == "failed"]
    assert lorafleet("stop", run.id, cwd=place).returncode == ExitCode.OK
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, (
        shown + (run.path / "logs" / "driver.log").read_text()
    )
    assert run.state == "stopped"
    assert {str(trial.state) for trial in run.list_trials()} == {"pending"}
    for trial in run.list_trials():
        assert trial.checkpoint.is_dir()
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(
            set(steps)
        )  # it went on from its checkpoint, and reported nothing twice


@pytest.mark.long
def test_a_spent_budget_ends_in_a_whole_report(bert_job: JobMaker, place: Path) -> None:
    slow = RANDOM.replace("max_t: 144", "max_t: 100000").replace("type: asha", "type: none")
    run, done = sweep(bert_job(slow, search__budget={"wall_hours": 30 / 3600}), place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    reasons = {trial.read_status().reason for trial in run.list_trials()}
    assert any(reason and "hours of wall-clock time is spent" in reason for reason in reasons)
    assert (run.path / "report" / "report.html").is_file()


@pytest.mark.long
def test_two_workers_are_one_with_twice_the_accumulation(bert_job: JobMaker, place: Path) -> None:
    together, done = sweep(
        bert_job(train__per_device_train_batch_size=4, resources__workers_per_node=2),
        place,
        command="train",
    )
    assert done.returncode == ExitCode.OK, (
        done.stdout + done.stderr + (together.path / "logs" / "driver.log").read_text()
    )
    alone, done = sweep(
        bert_job(train__per_device_train_batch_size=4, train__gradient_accumulation_steps=2),
        place,
        command="train",
    )
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert (
        together.list_trials()[0].id == alone.list_trials()[0].id
    )  # the same training by another name
    last = [run.list_trials()[0].read_metrics()[-1] for run in (together, alone)]
    assert last[0].step == last[1].step == 8
    for name in ("train_loss", "loss"):
        assert last[0].get_metric(name) == pytest.approx(last[1].get_metric(name), rel=1e-4)
    assert last[0].tokens == last[1].tokens


def test_the_quickstarts_shape_with_its_real_model_and_data(place: Path) -> None:
    """A smaller examples/quickstart.yaml.

    Its assets come from the user's cache, or the package index.
    """
    small = ("search.num_samples=3", "search.scheduler.max_t=192", "search.scheduler.grace_period=64",
             "data.max_validation_samples=64", "data.max_test_samples=64")  # fmt: skip
    done = lorafleet(
        "sweep", ROOT / "examples" / "quickstart.yaml", *small, cwd=place, LORAFLEET_CACHE=ASSETS
    )
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    report = json.loads((newest(place).path / "report" / "report.json").read_text())
    assert report["rows_count"] == {"train": 3000, "validation": 64, "test": 64}
    assert report["facts"]["labels"] == ["fresh", "rotten"]
    films = [_films(Path(ASSETS), split) for split in ("train", "validation", "test")]
    assert not films[0] & films[1]
    assert not films[0] & films[2]
    assert not films[1] & films[2]
    for words in (("resume", "quickstart"), ("logs", "quickstart"), ("stop", "quickstart")):
        done = lorafleet(*words, cwd=place)
        assert done.returncode == (ExitCode.USER_INPUT if words[0] == "stop" else ExitCode.OK), (
            done.stderr
        )


def test_the_readmes_commands_do_what_it_says(place: Path) -> None:
    """Every `lorafleet` line of the README, in its order, in one folder with a data file of the
    user's own.
    """
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    lines = [
        line.split("#")[0].split()
        for block in blocks
        for line in block.splitlines()
        if line.startswith("lorafleet")
    ]
    # Those for a cluster are run on one, in tests/slurm/test_pages.py.
    # Those of a run that is not there: each in the tests of its command.
    elsewhere = {"--on", "--site", "quickstart"}
    own = [
        line
        for line in lines
        if not elsewhere & set(line) and not any("RUN" in word for word in line)
    ]
    assert len(own) >= 8
    write_rows(place / "my.jsonl", opinions(120, 5))
    for line in own:
        done = lorafleet(*line[1:], cwd=place, LORAFLEET_CACHE=ASSETS)
        assert done.returncode == ExitCode.OK, f"{line}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    data = json.loads(lorafleet("report", "--format", "json", cwd=place).stdout)
    assert len(data["trials"]) == 10


def _films(cache: Path, split: str) -> set[str]:
    path = next(cache.glob("assets/rotten-tomatoes-*")) / f"{split}.jsonl"
    return {json.loads(line)["film"] for line in path.read_text().split("\n") if line}
