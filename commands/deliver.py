"""An export or a benchmark as a job of its own on a cluster, and how an export's end is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.commands.common import Format, cluster_on, confirm_trust, console, print_json, say, tell

if TYPE_CHECKING:
    from lorafleet.cluster.backend import Cluster
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.export_result import Delivery, Exported, Made
    from lorafleet.jobs.runs.run import Run
    from rich.table import Table


def deliver(
    command: str,
    wanted: Delivery,
    runs: Path,
    on: str,
    *,
    output: Format,
    detach: bool,
    wait: bool,
    trust: bool,
) -> None:
    """Submit it where the run lies, and follow it. `wanted.run` is as the user names it."""
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.watch import follow

    backend = cluster_on(on, 1)
    source = find_run(backend.runs_dir(runs), wanted.run)
    confirm_trust(source, command, trust=trust)
    _check_output(wanted, backend, on)
    wanted = wanted.model_copy(update={"run": _as_seen_there(source, backend, on)})
    loaded = _job(source, command, wanted, backend)
    plan = backend.plan(loaded, command).model_copy(update={"delivery": wanted})
    run = backend.submit(plan, loaded, backend.runs_dir(runs))
    if detach:
        tell(run.id)
        return
    follow(run, backend, quiet=False, output=output, silent=wait)


def _check_output(wanted: Delivery, backend: Cluster, on: str) -> None:
    """Raises UserError for a folder of this machine where the site does not see its disks."""
    from lorafleet.cluster.remote.backend import Away
    from lorafleet.jobs.errors import UserError

    if wanted.output and isinstance(backend, Away):
        raise UserError(
            f"{wanted.output} is a folder of this machine, which {on} does not see: leave --output (--export) out, and "
            "the targets are in the run's own export there"
        )


def _as_seen_there(source: Run, backend: Cluster, on: str) -> str:
    """The run's name beside the new one, or its path. Raises UserError where the site does not have it."""
    from lorafleet.cluster.backends import SITE_FILE, lies_elsewhere
    from lorafleet.cluster.remote.backend import Away
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError

    if not isinstance(backend, Away):
        if lies_elsewhere(source):
            raise UserError(f"{source.id} lies on the storage of another cluster than {on}: name that one with --on")
        return str(source.path)  # nodes of a Slurm see the folders of its login node
    stored = files.read_json(source.path / SITE_FILE).get("site") or {}
    if not lies_elsewhere(source) or stored.get("name") != backend.site.name:
        raise UserError(f"{source.id} did not run on {on}: what is exported there must lie on its storage")
    return source.id


def _job(source: Run, command: str, wanted: Delivery, backend: Cluster) -> LoadedJob:
    """The run's job under another name, with what one process needs: for TensorRT a GPU, where there are any.

    Away, the head does the work, and it has none.
    """
    from lorafleet.cluster.remote.backend import Away
    from lorafleet.evaluation.report.search import job_here
    from lorafleet.jobs.loading.job_file import load_derived

    job = job_here(source)
    on_gpu = "tensorrt" in wanted.targets and not isinstance(backend, Away)
    resources = {
        "cpus_per_worker": max(1, wanted.threads),
        "gpus_per_node": "auto" if on_gpu else 0,
        "label_selector": job.resources.label_selector,
    }
    return load_derived(job, command, {"resources": resources})


def exported_of(run: Run) -> Exported | None:
    """What became of an export; None for other runs, and for one that has not come so far."""
    from lorafleet.jobs.runs.export_result import EXPORTED, Exported, read_record

    path = run.path / EXPORTED
    return read_record(path, Exported) if path.is_file() else None


def show_exported(found: Exported, output: Format) -> None:
    """An export's targets as a table, or as data."""
    if output is Format.JSON:
        made = {one.target: one.model_dump(mode="json", exclude={"target"}) | {"ms": one.ms} for one in found.targets}
        print_json({"targets": made, "picked": found.picked, "sentence": found.sentence, "output": found.output})
        return
    console().print(_table(found))
    for one in found.targets:
        why = one.failure or one.unavailable or ("; ".join(one.parity.reasons) if one.parity else "")
        if why:
            tell(f"{one.target}: {_state(one)}: {why}")
        for remark in one.parity.remarks if one.parity else []:
            tell(f"{one.target}: {remark}")
    if found.sentence:
        tell(found.sentence)
    say(f"in {found.output}")


def _state(one: Made) -> str:
    if one.parity is not None:
        return "accepted" if one.accepted else "rejected"
    return "failed" if one.failure else "unavailable"


def _table(found: Exported) -> Table:
    from lorafleet.evaluation.render.trial_table import number
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("target", "", "MB", "ms", "logits within", "agreement", "metric", "before", "after"):
        table.add_column(title, justify="left" if title in ("target", "") else "right", no_wrap=True)
    for one in found.targets:
        cells = [one.target, _state(one)]
        if one.parity is not None:
            judged = one.parity.judged
            cells += [number(one.files_mb, 1), number(one.ms, 1), number(judged.max_logit_difference)]
            cells += [f"{judged.agreement:.3f}", judged.metric, number(judged.before), number(judged.after)]
        table.add_row(*cells)
    return table
