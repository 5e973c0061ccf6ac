"""One node of a job: what it has, whether all agree, and which ports are free on all of them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafleet.cluster.hardware import find_gpus
from lorafleet.jobs import files
from lorafleet.jobs.data.hub import converted_folder, model_folder
from lorafleet.jobs.data.local_copy import stage
from lorafleet.jobs.errors import PlacementRefused, RunError
from lorafleet.jobs.runs.lease import attempts, newest
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.stale_folders import clear_orphans
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import counted
from lorafleet.jobs.trials.trial_id import bases_of

PINNED = ("python", "lorafleet", "torch", "ray", "transformers", "peft")
"""What must be the same on every node and at every restart."""
_FIRST_PORT, _LAST_PORT = 20_000, 32_700
"""Below the ports that Linux gives to clients (32768 and up)."""
_WORKERS_AT = 20
"""The first worker's port in a block; those before are Ray's own."""


def look(run: Path, nonce: str, address: str, node: str, number: int, interface: str, scratch: Path) -> dict[str, Any]:
    """What this node has, and what it reads in the run's folder. What killed jobs left in `scratch` is cleared away."""
    clear_orphans(scratch)
    gpus = find_gpus()
    try:
        seen = (run / nonce).read_text().strip()
    except OSError:
        seen = ""
    wrong = None
    if not address:
        wrong = f"has no address on {interface}" if interface else "has no IPv4 address but loopback's"
    return {
        "node": node,
        "number": number,
        "address": address,
        "wrong": wrong,
        "nonce": seen,
        "driver": gpus.driver,
        "gpus": gpus.count,
        "gpu_memory_gib": round(gpus.memory_gib, 1),
        "busy": busy_ports(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """What is installed here, of what is pinned; read without importing it."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PINNED[1:]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def greet(storage: Path) -> dict[str, Any]:
    """What is installed here, and what a storage is like."""
    wrong = None
    try:
        with tempfile.NamedTemporaryFile(dir=storage):
            pass
    except OSError as error:
        wrong = f"{storage} cannot be written: {error.strerror}"
    free = shutil.disk_usage(storage).free / 1e9 if storage.is_dir() else 0.0
    return {**versions(), "wrong": wrong, "free_gb": round(free, 1)}


def busy_ports() -> list[int]:
    """Ports of our range that something listens on here, on any address; /proc needs no rights for it."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            port = int(fields[1].rpartition(":")[2], 16)
            if fields[3] == "0A" and _FIRST_PORT <= port <= _LAST_PORT:
                found.add(port)
    return sorted(found)


def disagreements(reports: list[dict[str, Any]], nonce: str, nodes: int, pinned: dict[str, str], run: str) -> list[str]:
    """A sentence for every way in which nodes differ, from each other or from the run's beginning. Pure.

    A head without GPUs is not asked about drivers.
    """
    ordered = sorted(reports, key=lambda report: int(report["number"]))
    found = []
    if len(ordered) < nodes:
        answered = ", ".join(report["node"] for report in ordered) or "none"
        found.append(f"only {len(ordered)} of {nodes} nodes answered ({answered}); what the others said is above")
    for report in ordered:
        if report["nonce"] != nonce:
            found.append(
                f"{report['node']} does not see {run} as it is now: runs_dir must be a folder that all nodes share"
            )
        if report["wrong"]:
            found.append(f"{report['node']} {report['wrong']}")
    if found:
        return found
    first = ordered[0]
    for report in ordered[1:]:
        found += [
            f"{report['node']} has {name} {report[name]}, and {first['node']} has {first[name]}: the site's setup "
            "lines must make the same environment on every node"
            for name in PINNED
            if report[name] != first[name]
        ]
    with_gpus = [report for report in ordered if report["gpus"]]
    for report in with_gpus[1:]:
        model = with_gpus[0]
        found += [
            f"{report['node']} has {what} {report[name]}{unit}, and {model['node']} has {model[name]}{unit}: ask for "
            "one kind of node (constraint in the site file)"
            for name, what, unit in (("driver", "driver", ""), ("gpu_memory_gib", "GPU memory", " GiB"))
            if report[name] != model[name]
        ]
    missing = [name for name in PINNED if first[name] == "not installed"]
    if missing:
        found.append(f"{', '.join(missing)} is not installed in the environment that the site's setup lines make")
    changed = [name for name, version in pinned.items() if name in PINNED and first[name] != version]
    if changed and not found:
        what = ", ".join(f"{name} {first[name]} and not {pinned[name]}" for name in changed)
        found.append(
            f"the environment has changed since the run began: {first['node']} has {what}; put it back, or start a new "
            "run"
        )
    return found


def choose_ports(busy: list[int], cpus: int, job: int) -> tuple[int, int]:
    """(first, last) of a block of ports that is free on every node. Pure.

    Jobs with numbers near each other begin to look at different blocks, so that two which start at once do not meet.
    Raises PlacementRefused when there is no free block.
    """
    size = -(-(_WORKERS_AT + max(80, 4 * cpus + 40)) // 100) * 100
    blocks = (_LAST_PORT - _FIRST_PORT) // size
    taken = set(busy)
    for step in range(blocks):
        first = _FIRST_PORT + (job + step) % blocks * size
        if not taken.intersection(range(first, first + size)):
            return first, first + size - 1
    raise PlacementRefused(f"no {size} ports in a row are free on all nodes between {_FIRST_PORT} and {_LAST_PORT}")


def starts_without_driver(history: list[dict[str, Any]], attempts: list[dict[str, Any]], submission: str) -> int:
    """How many of a submission's newest starts never came to a driver, the one that is beginning among them. Pure."""
    driven = {(attempt.get("slurm_job"), attempt.get("slurm_restart")) for attempt in attempts}
    count = 0
    for line in reversed([line for line in history if line["event"] == "began"]):
        if line.get("submission") != submission or (line["job"], line["restart"]) in driven:
            break
        count += 1
    return count


def check_starts(run: Path) -> None:
    """Raise PlacementRefused when the job was started too often and never came to its driver."""
    most = int(os.environ.get("LF_MAX_RESTARTS") or 0)
    history = files.read_jsonl(run / "slurm" / "history.jsonl")
    count = starts_without_driver(history, attempts(run), os.environ.get("LF_SUBMISSION", ""))
    if count > most + 1:
        raise PlacementRefused(
            f"given up after {counted(count - 1, 'start')} that did not come to training before Slurm ended them "
            f"(requeue.max_restarts is {most}): a longer time_limit, or a smaller requeue.signal_seconds"
        )


def agree(run: Path, reports: Path, nonce: str, nodes: int, cpus: int, job: int) -> str:
    """`ADDRESS FIRST_PORT LAST_PORT` of the job's Ray, when all nodes agree; the environment is pinned the first time.

    Raises PlacementRefused with a sentence that names the node.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ:  # the attempts of a task are those of its part
        check_starts(run)
    answers = read_reports(reports.read_text(errors="replace"))
    kept = run / "environment.json"
    pinned = files.read_json(kept)
    wrong = disagreements(answers, nonce, nodes, pinned, str(run))
    if wrong:
        raise PlacementRefused("; ".join(wrong))
    first = min(answers, key=lambda report: int(report["number"]))
    if not pinned:
        files.write_json(kept, {name: first[name] for name in PINNED})
    ports = choose_ports(sorted({port for report in answers for port in report["busy"]}), cpus, job)
    return f"{first['address']} {ports[0]} {ports[1]}"


def read_reports(text: str) -> list[dict[str, Any]]:
    """The nodes' answers; whatever else a site's programs print on the way is passed over."""
    found = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"node", "number", "nonce"} <= set(row):
            found.append(row)
    return found


def stage_models(run: Run, target: Path, say: Callable[[str], None]) -> None:
    """Copy the models that a run's trials load to this node's own disk, where they are not there yet."""
    job = JobSpec.model_validate_json(json.dumps(files.read_json(run.path / "plan.json")["job"]))
    for name, revision in bases_of(job):
        folder = model_folder(name, revision)
        if (folder / "model.gguf").is_file():  # what is loaded is made from it, by the driver
            folder = converted_folder(folder)
        if folder.is_dir():
            say(f"{name} is read from {stage(folder, target, say)}")


def mark_failed(run: Run, sentence: str) -> None:
    """Say in the run's state why its driver never began."""
    writer = Run(run.path, attempt=newest(run.path) or None)  # rows of older attempts are passed over
    if run.state in (RunState.RUNNING, RunState.PENDING, RunState.STOPPED):
        writer.set_state(RunState.FAILED, reason=sentence)
    else:
        writer.event("note", sentence=sentence)


def ask_to_stop(run: Run) -> None:
    """Its driver looks for the file, saves, and ends. Raises RunError where there is no run."""
    if not (run.path / "plan.json").is_file():
        raise RunError(f"there is no run in {run.path}")
    files.write_text(run.path / "stop", "asked for by a user\n")


def leave(run: Run, seconds: float, *, drain: bool) -> None:
    """Have a run saved while its pods are taken away; at once where no driver has it any more.

    A worker tells Ray that it goes, and its trials save and move. The head ends the driver, which has all trials saved.
    """
    number = newest(run.path)
    ended = run.path / "attempts" / f"{number}.end"
    if not number or ended.exists():
        return
    until = time.monotonic() + seconds
    if drain:
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is taken away"]
        left = ["--deadline-remaining-seconds", str(max(1, int(seconds) - 5))]
        with contextlib.suppress(subprocess.TimeoutExpired):  # a head that is gone: there is nobody to tell
            subprocess.run(["ray", "drain-node", *reason, *left], check=False, timeout=30, stdin=subprocess.DEVNULL)
    elif attempts(run.path)[-1].get("machine", [None])[0] != os.uname().nodename:
        return  # a driver elsewhere has the run now
    elif not (run.path / "stop").exists():  # a user's holds until `resume`
        files.write_text(run.path / "stop", "")  # a signal's: the next attempt takes it away
    while time.monotonic() < until and not ended.exists():
        time.sleep(1)
