"""Submit an export or a benchmark as a job of its own on a cluster.

The job runs where the run's weights are: on a cluster with a shared disk or on the
storage of a remote one. It is a run too, with a driver, a log and a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.commands.common import (
    Format,
    confirm_trust,
    load_cluster,
    print_text,
)
from lorafleet.commands.plan import PlanFormat, show_plan

if TYPE_CHECKING:
    from lorafleet.cluster.backend import Cluster
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.export_result import ExportRequest
    from lorafleet.jobs.runs.run import Run


def submit_delivery(
    command: str,
    delivery: ExportRequest,
    runs: Path,
    on: str,
    *,
    output: Format,
    detach: bool,
    wait: bool,
    trust: bool,
    dry_run: bool,
) -> None:
    """Submit an export or a benchmark to the cluster that has the run, and follow it.

    Args:
        command: `export` or `benchmark`.
        delivery: The request; `delivery.run` is the run as the user names it.
        on: Value of `--on`.
        detach: Print the id of the new run and return.
        wait: Show no live view.
        trust: The run may be one that was not created here.
        dry_run: Print the plan, and submit nothing.

    Raises:
        UserError: The site does not have the run, or cannot write to the output folder.
        typer.Exit: With the exit code, unless `detach` is set.
    """
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.watch import follow

    backend = load_cluster(on, 1)
    source = find_run(backend.resolve_runs_dir(runs), delivery.run)
    confirm_trust(source, command, trust=trust)
    _check_output(delivery, backend, on)
    delivery = delivery.model_copy(update={"run": _resolve_run_on_cluster(source, backend, on)})
    loaded = _derive_job(source, command, delivery, backend)
    plan = backend.plan(loaded, command).model_copy(update={"delivery": delivery})
    if dry_run:
        show_plan(backend, plan, runs, PlanFormat(output.value))
        return
    # `delivery` is part of plan.json, which is all that the driver reads.
    run = backend.submit(plan, loaded, backend.resolve_runs_dir(runs))
    if detach:
        print_text(run.id)
        return
    follow(run, backend, quiet=False, output=output, silent=wait)


def _check_output(delivery: ExportRequest, backend: Cluster, on: str) -> None:
    """Raise UserError if the output folder is on this machine and the site cannot see its disks."""
    from lorafleet.jobs.errors import UserError

    if delivery.output and not backend.shares_disk:
        raise UserError(
            f"{delivery.output} is a folder of this machine, which {on} cannot see: leave out "
            "--output (--export); the targets are then written to the run's export folder on the "
            "cluster"
        )


def _resolve_run_on_cluster(source: Run, backend: Cluster, on: str) -> str:
    """Return how the cluster names a run: its id on the cluster's storage, or its path.

    Raises UserError if the site does not have the run.
    """
    from lorafleet.cluster.submission import find_record
    from lorafleet.jobs.errors import UserError

    record = find_record(source)
    is_remote = record is not None and record.is_remote
    if backend.shares_disk:
        if is_remote:
            raise UserError(
                f"{source.id} is stored on another cluster than {on}: name that cluster with --on"
            )
        return str(source.path)  # Slurm nodes see the login node's folders
    if record is None or not is_remote or record.site_name != backend.site_name:
        raise UserError(
            f"{source.id} did not run on {on}, so its models are not on the storage of {on}: name "
            "the site that it ran on with --on"
        )
    return source.id


def _derive_job(source: Run, command: str, delivery: ExportRequest, backend: Cluster) -> LoadedJob:
    """Return the run's job under another name, with the resources of one process.

    TensorRT gets a GPU where there are any. On a remote backend the head node does the work, and
    it has no GPU.
    """
    from lorafleet.evaluation.report.search import load_local_job
    from lorafleet.jobs.loading.job_file import load_derived

    job = load_local_job(source)
    # Only TensorRT needs a GPU.
    on_gpu = "tensorrt" in delivery.targets and backend.shares_disk
    resources = {
        "cpus_per_worker": max(1, delivery.threads),
        "gpus_per_node": "auto" if on_gpu else 0,
        "label_selector": job.resources.label_selector,
    }
    return load_derived(job, command, {"resources": resources})
