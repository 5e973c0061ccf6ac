"""Submit an export or a benchmark as a job of its own on a cluster, and print an export's
result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.commands.common import (
    Format,
    confirm_trust,
    load_cluster,
    make_console,
    print_json,
    print_message,
    print_text,
)

if TYPE_CHECKING:
    from rich.table import Table

    from lorafleet.cluster.backend import Cluster
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.export_result import ExportRequest, ExportResult, TargetResult
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
) -> None:
    """Submit an export or a benchmark to the cluster that has the run, and follow it.

    Args:
        command: `export` or `benchmark`.
        delivery: The request; `delivery.run` is the run as the user names it.
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
    run = backend.submit(plan, loaded, backend.resolve_runs_dir(runs))
    if detach:
        print_text(run.id)
        return
    follow(run, backend, quiet=False, output=output, silent=wait)


def _check_output(delivery: ExportRequest, backend: Cluster, on: str) -> None:
    """Raise UserError if the output folder is on this machine and the site cannot see its disks."""
    from lorafleet.cluster.remote.backend import RemoteBackend
    from lorafleet.jobs.errors import UserError

    if delivery.output and isinstance(backend, RemoteBackend):
        raise UserError(
            f"{delivery.output} is a folder of this machine, which {on} does not see: leave "
            "--output (--export) out, and "
            "the targets are in the run's own export there"
        )


def _resolve_run_on_cluster(source: Run, backend: Cluster, on: str) -> str:
    """Return how the cluster names a run: its id on the cluster's storage, or its path.

    Raises UserError if the site does not have the run.
    """
    from lorafleet.cluster.backends import SITE_FILE, is_remote
    from lorafleet.cluster.remote.backend import RemoteBackend
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError

    if not isinstance(backend, RemoteBackend):
        if is_remote(source):
            raise UserError(
                f"{source.id} lies on the storage of another cluster than {on}: name that one "
                "with --on"
            )
        return str(source.path)  # Slurm nodes see the login node's folders
    stored = files.read_json(source.path / SITE_FILE).get("site") or {}
    if not is_remote(source) or stored.get("name") != backend.site.name:
        raise UserError(
            f"{source.id} did not run on {on}: what is exported there must lie on its storage"
        )
    return source.id


def _derive_job(source: Run, command: str, delivery: ExportRequest, backend: Cluster) -> LoadedJob:
    """Return the run's job under another name, with the resources of one process.

    TensorRT gets a GPU where there are any. On a remote backend the head node does the work, and
    it has no GPU.
    """
    from lorafleet.cluster.remote.backend import RemoteBackend
    from lorafleet.evaluation.report.search import load_local_job
    from lorafleet.jobs.loading.job_file import load_derived

    job = load_local_job(source)
    on_gpu = "tensorrt" in delivery.targets and not isinstance(backend, RemoteBackend)
    resources = {
        "cpus_per_worker": max(1, delivery.threads),
        "gpus_per_node": "auto" if on_gpu else 0,
        "label_selector": job.resources.label_selector,
    }
    return load_derived(job, command, {"resources": resources})


def read_export(run: Run) -> ExportResult | None:
    """Return the record of an export; None for other runs and for an unfinished export."""
    from lorafleet.jobs.runs.export_result import EXPORTED, ExportResult, read_record

    path = run.path / EXPORTED
    return read_record(path, ExportResult) if path.is_file() else None


def print_export(exported: ExportResult, output: Format) -> None:
    """Print an export's targets as a table or as JSON."""
    if output is Format.JSON:
        targets = {
            result.target: result.model_dump(mode="json", exclude={"target"}) | {"ms": result.ms}
            for result in exported.targets
        }
        print_json(
            {
                "targets": targets,
                "picked": exported.picked,
                "sentence": exported.sentence,
                "output": exported.output,
            }
        )
        return
    make_console().print(_build_table(exported))
    for result in exported.targets:
        reason = (
            result.failure
            or result.unavailable
            or ("; ".join(result.parity.reasons) if result.parity else "")
        )
        if reason:
            print_text(f"{result.target}: {_describe_state(result)}: {reason}")
        for remark in result.parity.remarks if result.parity else []:
            print_text(f"{result.target}: {remark}")
    if exported.sentence:
        print_text(exported.sentence)
    print_message(f"in {exported.output}")


def _describe_state(result: TargetResult) -> str:
    if result.parity is not None:
        return "accepted" if result.accepted else "rejected"
    return "failed" if result.failure else "unavailable"


def _build_table(exported: ExportResult) -> Table:
    from rich import box
    from rich.table import Table

    from lorafleet.evaluation.render.trial_table import format_number

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in (
        "target",
        "",
        "MB",
        "ms",
        "logits within",
        "agreement",
        "metric",
        "before",
        "after",
    ):
        table.add_column(
            title, justify="left" if title in ("target", "") else "right", no_wrap=True
        )
    for result in exported.targets:
        cells = [result.target, _describe_state(result)]
        if result.parity is not None:
            comparison = result.parity.judged
            cells += [
                format_number(result.files_mb, 1),
                format_number(result.ms, 1),
                format_number(comparison.max_logit_difference),
            ]
            cells += [
                f"{comparison.agreement:.3f}",
                comparison.metric,
                format_number(comparison.before),
                format_number(comparison.after),
            ]
        table.add_row(*cells)
    return table
