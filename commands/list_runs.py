"""`lorafleet list`: the runs of a folder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lorafleet.commands.common import DEFAULT_RUNS, Format, Output, Runs, console, print_json, say

if TYPE_CHECKING:
    from lorafleet.jobs.runs.run import Run


def list_runs(runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """Every run, newest first."""
    from lorafleet.cluster.run_index import all_runs
    from lorafleet.cluster.submitted_runs import submitted
    from lorafleet.jobs.errors import RunError
    from lorafleet.jobs.runs.records import damaged_where_wrong

    rows: list[dict[str, object]] = []
    damaged: list[str] = []
    found = all_runs(runs, damaged)
    folders = {run.path.absolute() for run in found}
    for run in [*found, *(run for run in submitted() if run.path.absolute() not in folders)]:
        try:
            with damaged_where_wrong(run.path):
                rows.append(_row(run))
        except RunError as error:
            damaged.append(str(error))
            rows.append({**dict.fromkeys(_COLUMNS, "-"), "run": run.id, "state": "damaged"})
    for sentence in damaged:
        say(f"note: {sentence}")
    if output is Format.JSON:
        print_json({"runs": rows})
        return
    from rich.table import Table

    if not rows:
        console().print(f"no runs in {runs.absolute()}", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(
            "MB" if name == "mb" else name, justify="right" if name in ("trials", "ended", "mb") else "left"
        )
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console().print(table)


_COLUMNS = ("run", "state", "on", "created", "trials", "ended", "mb")


def _row(run: Run) -> dict[str, object]:
    """Return what is known of a run. Raises RunError for one whose files are damaged."""
    from lorafleet.cluster.backends import SITE_FILE
    from lorafleet.cluster.run_index import folder_bytes
    from lorafleet.jobs import files

    states = [trial.state for trial in run.trials()]
    place = files.read_json(run.path / SITE_FILE)
    told = place.get("last", {}).get("state") or str(run.state)
    return {
        "run": run.id,
        "state": "lost its driver" if run.gone() else told,
        "on": place.get("site", {}).get("name", "here"),
        "created": _when(run.created),
        "trials": len(states),
        "ended": sum(found.ended for found in states),
        "mb": round(folder_bytes(run.path) / 1e6, 1),
    }


def _when(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # no time of this world
        return "-"
