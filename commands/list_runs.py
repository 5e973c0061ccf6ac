"""`lorafleet list`: list the runs of a folder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Format,
    Output,
    Runs,
    make_console,
    print_json,
    print_message,
)

if TYPE_CHECKING:
    from lorafleet.jobs.runs.run import Run


def list_runs(runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """List every run, newest first.

    The queues and clusters of submitted runs are asked for their states, each once.
    """
    from lorafleet.cluster.run_index import list_all_runs
    from lorafleet.cluster.run_states import read_run_states
    from lorafleet.cluster.submitted_runs import list_submitted_runs
    from lorafleet.jobs.errors import RunError
    from lorafleet.jobs.runs.records import raise_damaged_file

    rows: list[dict[str, object]] = []
    damaged: list[str] = []
    local_runs = list_all_runs(runs, damaged)
    folders = {run.path.absolute() for run in local_runs}
    all_runs = [
        *local_runs,
        *(run for run in list_submitted_runs() if run.path.absolute() not in folders),
    ]
    states = read_run_states(all_runs)
    for run in all_runs:
        try:
            with raise_damaged_file(run.path):
                rows.append(_build_row(run, states.states.get(run.path)))
        except RunError as error:
            damaged.append(str(error))
            rows.append({**dict.fromkeys(_COLUMNS, "-"), "run": run.id, "state": "damaged"})
    for message in [*states.notes, *damaged]:
        print_message(f"note: {message}")
    if output is Format.JSON:
        print_json({"runs": rows})
        return
    from rich.table import Table

    if not rows:
        make_console().print(f"no runs in {runs.absolute()}", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(
            "MB" if name == "mb" else name,
            justify="right" if name in ("trials", "ended", "mb") else "left",
        )
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    make_console().print(table)


_COLUMNS = ("run", "state", "on", "created", "trials", "ended", "mb")


def _build_row(run: Run, live_state: str | None) -> dict[str, object]:
    """Return a run's row of the table. Raises RunError if its files are damaged.

    Args:
        live_state: What its cluster answered. None: the recorded state is shown.
    """
    from lorafleet.cluster.run_index import compute_folder_bytes
    from lorafleet.cluster.submission import find_record

    states = [trial.state for trial in run.list_trials()]
    record = find_record(run)
    state: str = record.last.state if record is not None and record.last else run.state
    if live_state is not None:
        state = live_state
    elif run.has_lost_driver():
        state = "lost its driver"
    return {
        "run": run.id,
        "state": str(state),
        "on": record.site_name if record is not None else "here",
        "created": _format_time(run.created),
        "trials": len(states),
        "ended": sum(state.has_ended for state in states),
        "mb": round(compute_folder_bytes(run.path) / 1e6, 1),
    }


def _format_time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # out of the range of dates
        return "-"
