"""Inspect the nodes of a job, before its driver starts.

The scripts of a job call these functions through `lorafleet node`: what each node has,
whether all agree, and which ports are free on all of them. A difference between nodes
is an error here, with the node's name, and not a failure of some trial hours later.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lorafleet.cluster.execution.allocation import read_starts
from lorafleet.cluster.hardware import count_cpus, find_gpus, get_total_memory_gib
from lorafleet.jobs import files
from lorafleet.jobs.data.hub import get_converted_folder
from lorafleet.jobs.data.inputs import resolve_inputs
from lorafleet.jobs.data.local_copy import create_node_copy
from lorafleet.jobs.errors import PlacementRefused, RunError
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.lease import find_newest_attempt, read_attempts
from lorafleet.jobs.runs.records import AttemptRecord, StartRecord
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.stale_folders import remove_orphans
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import format_count

PINNED = ("python", "lorafleet", "torch", "ray", "transformers", "peft")
"""Software whose version must be the same on every node and at every restart."""
_FIRST_PORT, _LAST_PORT = 20_000, 32_700
"""Ports below the range that Linux assigns to clients (32768 and up)."""
_WORKER_PORT_OFFSET = 20
"""Offset of the first worker's port in a block; the ports before it are Ray's own."""


class NodeReport(BaseModel):
    """Report of one node of a job, sent to the head as a line of JSON."""

    model_config = ConfigDict(frozen=True)

    node: str
    """Name of the node."""
    number: int
    """Rank of the node; the lowest is the head."""
    nonce: str
    """Text of the nonce in the run's folder; empty if the node does not see it."""
    # With defaults: another version of lorafleet, which `find_disagreements` names, may not send
    # them.
    address: str = ""
    """IPv4 address; empty if the node has none."""
    problem: str | None = None
    """Reason why the node cannot be used, as a verb phrase; None if it can."""
    driver: str = ""
    """Version of the GPU driver; empty without GPUs."""
    gpus: int = 0
    gpu_memory_gib: float = 0.0
    cpus: int | None = None
    """CPU cores that the job has there; None in reports of earlier versions."""
    memory_gib: float | None = None
    """Memory of the machine; None in reports of earlier versions."""
    busy: list[int] = []
    """Ports that something listens on."""
    versions: dict[str, str] = {}
    """Pinned package -> installed version."""

    def get_version(self, name: str) -> str:
        """Return the version of a package, or `unknown`."""
        return self.versions.get(name, "unknown")


class StatedResources(BaseModel):
    """Resources that the site file states for every node that runs trials."""

    model_config = ConfigDict(frozen=True)

    cpus: int = 0
    memory_gb: float = 0.0
    gpus: int = 0
    gpu_memory_gb: float = 0.0
    """Memory of one GPU; 0 if the site file does not say."""


def inspect_node(
    run: Path, nonce: str, address: str, node: str, number: int, interface: str, scratch: Path
) -> NodeReport:
    """Return this node's report: versions, GPUs, busy ports, and the nonce in the run's folder.

    Folders that killed jobs left in `scratch` are removed.

    Args:
        nonce: Path, in the run's folder, of a file with a random text that the batch script
            wrote a moment ago. A node that does not see the text does not share the folder.
        address: The node's IPv4 address; empty if the script found none.
        number: Rank of the node; the lowest is the head.
        interface: Network interface that the site names, or empty.
    """
    remove_orphans(scratch)
    gpus = find_gpus()
    try:
        nonce_text = (run / nonce).read_text().strip()
    except OSError:
        nonce_text = ""
    problem = None
    if not address:
        problem = (
            f"has no IPv4 address on the interface {interface}"
            if interface
            else "has no IPv4 address except the loopback address"
        )
    return NodeReport(
        node=node,
        number=number,
        address=address,
        problem=problem,
        nonce=nonce_text,
        driver=gpus.driver,
        gpus=gpus.count,
        gpu_memory_gib=round(gpus.memory_gib, 1),
        # Slurm's own number: without a plugin for it, a task may use all cores of the machine.
        cpus=max(count_cpus(), int(os.environ.get("SLURM_CPUS_ON_NODE") or 0)),
        memory_gib=get_total_memory_gib(),
        busy=find_busy_ports(),
        versions=collect_versions(),
    )


def collect_versions() -> dict[str, str]:
    """Return the installed versions of the pinned packages, read without importing them.

    Importing torch and ray would take seconds on every node. A missing package has the
    version `not installed`.
    """
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PINNED[1:]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def inspect_storage(storage: Path) -> dict[str, Any]:
    """Return the installed versions, and whether a storage is writable and its free space.

    Returns:
        Versions by package, `wrong` (a message, or None) and `free_gb`.
    """
    problem = None
    try:
        with tempfile.NamedTemporaryFile(dir=storage):
            pass
    except OSError as error:
        problem = f"{storage} is not writable: {error.strerror}"
    free_gb = shutil.disk_usage(storage).free / 1e9 if storage.is_dir() else 0.0
    return {**collect_versions(), "wrong": problem, "free_gb": round(free_gb, 1)}


def find_busy_ports() -> list[int]:
    """Return the ports of the job range that something listens on, on any address.

    They are read from /proc, which needs no rights.
    """
    ports = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            port = int(columns[1].rpartition(":")[2], 16)
            # State 0A is LISTEN.
            if columns[3] == "0A" and _FIRST_PORT <= port <= _LAST_PORT:
                ports.add(port)
    return sorted(ports)


def find_disagreements(
    reports: list[NodeReport], nonce: str, nodes: int, pinned: dict[str, str], run: str
) -> list[str]:
    """Return a message for every difference between nodes, or from the run's first start. Pure.

    Drivers are compared only between nodes with GPUs, so a head without GPUs is not checked.
    """
    ordered = sorted(reports, key=lambda report: report.number)
    messages = []
    if len(ordered) < nodes:
        answered = ", ".join(report.node for report in ordered) or "none"
        messages.append(
            f"only {len(ordered)} of {nodes} nodes answered ({answered}); see the output of the "
            "other nodes above"
        )
    for report in ordered:
        if report.nonce != nonce:
            messages.append(
                f"{report.node} does not see the current contents of {run}: runs_dir must be a "
                "folder that all nodes share"
            )
        if report.problem:
            messages.append(f"{report.node} {report.problem}")
    # Without all reports from one shared folder, a comparison of versions would be misleading.
    if messages:
        return messages
    messages = _compare_versions(ordered) + _compare_gpus(ordered)
    first = ordered[0]
    missing = [name for name in PINNED if first.get_version(name) == "not installed"]
    if missing:
        messages.append(
            f"{', '.join(missing)} is not installed in the environment that the site's setup lines "
            "create: install it, or correct `setup` in the site file"
        )
    changed = [
        name
        for name, version in pinned.items()
        if name in PINNED and first.get_version(name) != version
    ]
    # A resumed run with other versions would compare trials that different code trained.
    if changed and not messages:
        description = ", ".join(
            f"{name} {first.get_version(name)} instead of {pinned[name]}" for name in changed
        )
        messages.append(
            f"the environment has changed since the run started: {first.node} has "
            f"{description}. Restore the old environment, or start a new run"
        )
    return messages


def find_missing_resources(
    reports: list[NodeReport], stated: StatedResources, *, head_works: bool
) -> list[str]:
    """Return a message for each resource that a node has less of than the site file states. Pure.

    Args:
        reports: Reports of all nodes.
        stated: Resources of a node that runs trials, according to the site file.
        head_works: False if the node with the lowest number is a head of its own, which runs none.
    """
    ordered = sorted(reports, key=lambda report: report.number)
    messages = []
    for report in ordered if head_works else ordered[1:]:
        messages += _compare_with_site(report, stated)
    return messages


def _compare_with_site(report: NodeReport, stated: StatedResources) -> list[str]:
    messages = []
    if report.gpus < stated.gpus:
        gpus = f"only {format_count(report.gpus, 'GPU')}"
        if not report.gpus:
            gpus = "no GPU (nvidia-smi is missing, fails, or lists no visible GPU)"
        messages.append(
            f"{report.node} has {gpus}, but gpus_per_node of the site file is {stated.gpus}"
        )
    # 0: not known, for example of GPUs that share the memory of the machine.
    elif 0 < report.gpu_memory_gib < _TOLERANCE * stated.gpu_memory_gb * _GB_GIB:
        messages.append(
            f"{report.node} has GPUs of {report.gpu_memory_gib / _GB_GIB:.0f} GB, but "
            f"gpu_memory_gb of the site file is {stated.gpu_memory_gb:g}"
        )
    if report.cpus is not None and report.cpus < stated.cpus:
        messages.append(
            f"{report.node} has {format_count(report.cpus, 'CPU core')}, but cpus_per_node of the "
            f"site file is {stated.cpus}"
        )
    memory_gib = _TOLERANCE * stated.memory_gb * _GB_GIB
    if report.memory_gib is not None and report.memory_gib < memory_gib:
        messages.append(
            f"{report.node} has {report.memory_gib / _GB_GIB:.0f} GB of memory, but "
            f"memory_gb_per_node of the site file is {stated.memory_gb:g}"
        )
    advice = "correct the site file, or have the node checked"
    return [f"{message}: {advice}" for message in messages]


_GB_GIB = 1e9 / 2**30
_TOLERANCE = 0.95
"""Share of a stated size that is enough: firmware and drivers reserve some memory."""


def _compare_versions(reports: list[NodeReport]) -> list[str]:
    """Return a message for each package whose version differs from the first node's."""
    first = reports[0]
    return [
        f"{report.node} has {name} {report.get_version(name)}, but {first.node} has "
        f"{first.get_version(name)}: the setup lines of the site file must create the same "
        "environment on every node"
        for report in reports[1:]
        for name in PINNED
        if report.get_version(name) != first.get_version(name)
    ]


def _compare_gpus(reports: list[NodeReport]) -> list[str]:
    """Return a message for each driver and GPU memory that differs between nodes with GPUs."""
    messages = []
    gpu_reports = [report for report in reports if report.gpus]
    for report in gpu_reports[1:]:
        first = gpu_reports[0]
        advice = "request nodes of one kind (constraint in the site file)"
        if report.driver != first.driver:
            messages.append(
                f"{report.node} has driver {report.driver}, but {first.node} has {first.driver}: "
                f"{advice}"
            )
        if report.gpu_memory_gib != first.gpu_memory_gib:
            messages.append(
                f"{report.node} has GPU memory {report.gpu_memory_gib} GiB, but {first.node} has "
                f"{first.gpu_memory_gib} GiB: {advice}"
            )
    return messages


def choose_ports(busy: list[int], cpus: int, job: int) -> tuple[int, int]:
    """Return (first, last) of a block of ports that is free on every node. Pure.

    Jobs with neighbouring numbers start their search at different blocks, so that two jobs
    which start at the same time do not choose the same one.

    Raises:
        PlacementRefused: No block is free.
    """
    # Ray needs one port for each worker process, and starts more processes than CPUs.
    size = -(-(_WORKER_PORT_OFFSET + max(80, 4 * cpus + 40)) // 100) * 100
    blocks = (_LAST_PORT - _FIRST_PORT) // size
    # Ray's own choice of ports collides: random ones fall into the range of its workers (ray#10154,
    # #18053).
    occupied = set(busy)
    for step in range(blocks):
        first = _FIRST_PORT + (job + step) % blocks * size
        if not occupied.intersection(range(first, first + size)):
            return first, first + size - 1
    raise PlacementRefused(
        f"no block of {size} consecutive ports between {_FIRST_PORT} and {_LAST_PORT} is free on "
        "all nodes: end other programs there, or request other nodes"
    )


def count_starts_without_driver(
    history: list[StartRecord], attempts: list[AttemptRecord], submission: str
) -> int:
    """Return how many of a submission's newest starts never reached a driver. Pure.

    The start in progress is counted too.
    """
    starts_with_driver = {(attempt.slurm_job, attempt.slurm_restart) for attempt in attempts}
    count = 0
    for line in reversed([line for line in history if line.event == "began"]):
        if line.submission != submission or (line.job, line.restart) in starts_with_driver:
            break
        count += 1
    return count


def check_starts(run: Path) -> None:
    """Raise PlacementRefused if the job was started too often without reaching its driver.

    The driver counts its own restarts; this covers jobs that Slurm ends while nodes are
    inspected or Ray starts.
    """
    max_restarts = int(os.environ.get("LF_MAX_RESTARTS") or 0)
    history = read_starts(run)
    count = count_starts_without_driver(
        history, read_attempts(run), os.environ.get("LF_SUBMISSION", "")
    )
    if count > max_restarts + 1:
        raise PlacementRefused(
            f"stopped after {format_count(count - 1, 'start')} that Slurm ended before training "
            f"began (requeue.max_restarts is {max_restarts}): set a longer time_limit, or a "
            "smaller requeue.signal_seconds"
        )


def resolve_ray_address(
    run: Path,
    reports: Path,
    nonce: str,
    nodes: int,
    stated: StatedResources,
    job: int,
    *,
    head_works: bool,
) -> str:
    """Return `ADDRESS FIRST_PORT LAST_PORT` of the job's Ray if all nodes agree.

    The first call records the environment of the run.

    Raises:
        PlacementRefused: The nodes disagree, or have less than the site file states; the message
            names the node.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ:  # an array task's attempts are in its own folder
        check_starts(run)
    node_reports = read_reports(reports.read_text(errors="replace"))
    environment_file = run / "environment.json"
    pinned = files.read_json(environment_file)
    problems = find_disagreements(node_reports, nonce, nodes, pinned, str(run))
    problems = problems or find_missing_resources(node_reports, stated, head_works=head_works)
    if problems:
        raise PlacementRefused("; ".join(problems))
    first = min(node_reports, key=lambda report: report.number)
    # Only after all nodes agreed: later starts are compared with this file.
    if not pinned:
        files.write_json(environment_file, {name: first.get_version(name) for name in PINNED})
    busy = sorted({port for report in node_reports for port in report.busy})
    cpus = stated.cpus
    if os.environ.get("LF_WHOLE_NODES"):  # each worker of Ray needs a port
        cpus = max([cpus, *(report.cpus or 0 for report in node_reports)])
    first_port, last_port = choose_ports(busy, cpus, job)
    return f"{first.address} {first_port} {last_port}"


def read_reports(text: str) -> list[NodeReport]:
    """Return the nodes' reports; any other output of a site's programs is ignored.

    Args:
        text: Output of the step that ran on all nodes, in any order.
    """
    reports = []
    for line in text.splitlines():
        with contextlib.suppress(ValidationError):
            reports.append(NodeReport.model_validate_json(line))
    return reports


def stage_models(run: Run, target: Path, say: Callable[[str], None]) -> None:
    """Copy the models that a run's trials load to this node's own disk.

    Models that are already present are not copied.
    """
    job = JobSpec.from_record(run.read_plan().job)
    for model in resolve_inputs(job).models:
        folder = model.path
        # The driver converts a GGUF file, and the converted folder is what is loaded.
        if (folder / "model.gguf").is_file():
            folder = get_converted_folder(folder)
        if folder.is_dir():
            say(f"reading {model.reference} from {create_node_copy(folder, target, say)}")


def mark_failed(run: Run, message: str) -> None:
    """Record in the run's state why its driver never started.

    A run that has ended keeps its state and gets a note instead.

    Args:
        message: What the scripts of the job found.
    """
    writer = Run(
        run.path, attempt=find_newest_attempt(run.path) or None
    )  # rows of older attempts are ignored
    if run.state in (RunState.RUNNING, RunState.PENDING, RunState.STOPPED):
        writer.set_state(RunState.FAILED, reason=message)
    else:
        writer.add_event(NoteEvent(sentence=message))


def request_stop(run: Run) -> None:
    """Write the stop file: the run's driver reads it, saves, and ends.

    Raises:
        RunError: There is no run in the folder.
    """
    if not (run.path / "plan.json").is_file():
        raise RunError(f"there is no run in {run.path}")
    # Not empty, so that another attempt of this submission stops as well; the next submission
    # deletes it.
    files.write_text(run.path / "stop", "asked for by a user\n")


def stop_before_deletion(run: Run, seconds: float, *, drain: bool) -> None:
    """Have a run save while its pods are being deleted; return at once if no driver has it.

    A worker pod (`drain`) announces to Ray that it is being deleted, and its trials save and
    move. The head ends the driver, which has all trials saved first.
    """
    number = find_newest_attempt(run.path)
    ended = run.path / "attempts" / f"{number}.end"
    if not number or ended.exists():
        return
    deadline = time.monotonic() + seconds
    if drain:
        reason = [
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "the pod is being deleted",
        ]
        deadline_options = ["--deadline-remaining-seconds", str(max(1, int(seconds) - 5))]
        with contextlib.suppress(subprocess.TimeoutExpired):  # the head is gone: nothing to notify
            subprocess.run(
                ["ray", "drain-node", *reason, *deadline_options],
                check=False,
                timeout=30,
                stdin=subprocess.DEVNULL,
            )
    elif read_attempts(run.path)[-1].host != os.uname().nodename:
        return  # a driver on another machine has the run now
    elif not (run.path / "stop").exists():  # a user's stop request stays until `resume`
        files.write_text(
            run.path / "stop", ""
        )  # an empty file counts as a signal: the next attempt removes it
    # This runs in the pod's preStop hook: when it returns, the pod's processes are ended.
    while time.monotonic() < deadline and not ended.exists():
        time.sleep(1)
