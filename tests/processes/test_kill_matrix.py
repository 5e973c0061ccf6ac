"""SIGKILL of each part in each phase: the run goes on, and its numbers are those of one that nobody
disturbed.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, lorafleet
from tests.processes.conftest import (
    KILLS,
    Machines,
    begin,
    kill_tree,
    newest,
    planted,
    save,
    wait_for,
)

PHASES = {
    "set-up": ("lorafleet.training.model:load_base", 1),
    "training": ("lorafleet.training.session:TrainingSession._run_optimizer_step", 14),
    "evaluation": ("lorafleet.training.session:evaluate_rows", 2),
    "saving": ("lorafleet.training.checkpoint:save_state", 2),
}
LONG = {"train__max_steps": 24, "train__eval_steps": 8, "lora__lora_dropout": 0.1,
        "train__per_device_train_batch_size": 4}  # fmt: skip
COMPARED = ("loss", "train_loss", "learning_rate", "samples", "epoch")
TOLERANCE = 1e-5

pytestmark = pytest.mark.long


def rows(run: Run) -> list[dict[str, Any]]:
    """What was measured, evaluation by evaluation."""
    (trial,) = run.list_trials()
    steps = [row.step for row in trial.read_metrics()]
    assert steps == sorted(set(steps))
    assert trial.state == "finished"
    return [
        {key: row.to_dict()[key] for key in ("step", *COMPARED)} for row in trial.read_evaluations()
    ]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[dict[str, Any]]]:
    """By number of processes; filled by the first cell that needs it."""
    return {}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("who", ["worker", "driver", "node", "trainer"])
def test_who_is_killed_when(
    bert_job: JobMaker,
    place: Path,
    undisturbed: dict[str, list[dict[str, Any]]],
    request: pytest.FixtureRequest,
    who: str,
    phase: str,
) -> None:
    """`worker` is a process of Ray; `trainer` is a driver that trains itself, and crashes."""
    over = {"resources__num_nodes": 2} if who == "node" else {}
    uses_ray = who in ("node", "worker")
    machines: Machines | None = request.getfixturevalue("machines") if uses_ray else None
    cluster = machines.environment if machines else {}
    loaded = bert_job(**LONG, **over)
    if not undisturbed.get(str(over)):
        done = lorafleet("train", save(loaded, place), *loaded.overrides, cwd=place, **cluster)
        assert done.returncode == ExitCode.OK, done.stdout + done.stderr
        undisturbed[str(over)] = rows(newest(place))
    at, call = PHASES[phase]
    process = begin(
        loaded, place, command="train", **cluster, **planted(place, at, "pause", call=call)
    )
    wait_for((place / "it-happened").exists, 180)
    if who == "driver":
        kill_tree(process)
        done = lorafleet("resume", newest(place).id, cwd=place)
        assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    else:
        if who == "node":
            assert machines is not None
            machines.kill(wait_for(lambda: machines.used(newest(place))))
        elif who == "worker":
            name = "ResourceTrainable"
            next(one for one in psutil.process_iter(["name"]) if name in one.info["name"]).kill()
        else:
            psutil.Process(newest(place).read_status().pid).send_signal(signal.SIGSEGV)
        shown, _ = process.communicate(timeout=400)
        assert process.returncode == ExitCode.OK, (
            shown + (newest(place).path / "logs" / "driver.log").read_text()
        )
    expected, found = undisturbed[str(over)], rows(newest(place))
    assert [row["step"] for row in found] == [8, 16, 24]
    gaps = {
        key: max(abs(a[key] - b[key]) for a, b in zip(expected, found, strict=True))
        for key in COMPARED
    }
    request.config.stash.setdefault(KILLS, []).append(
        f"kill matrix: {who:<6} in {phase:<10} largest difference of the loss {gaps['loss']:.1e}, "
        f"of the training loss {gaps['train_loss']:.1e}"
    )
    assert max(gaps.values()) <= TOLERANCE
