"""`lorafleet list`: the runs of a folder."""

from __future__ import annotations

import time

from commands.common import DEFAULT_RUNS, Format, Output, Runs, console, print_json


def list_runs(runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """Every run, newest first."""
    from cluster.backends import SITE_FILE
    from cluster.registry import submitted
    from cluster.store import all_runs, folder_bytes
    from jobs import files

    rows = []
    found = all_runs(runs)
    folders = {run.path.absolute() for run in found}
    for run in [*found, *(run for run in submitted() if run.path.absolute() not in folders)]:
        states = [trial.state for trial in run.trials()]
        place = files.read_json(run.path / SITE_FILE)
        told = place.get("last", {}).get("state") or str(run.state)
        state = "lost its driver" if run.gone() else told
        rows.append(
            {
                "run": run.id,
                "state": state,
                "on": place.get("site", {}).get("name", "here"),
                "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created)),
                "trials": len(states),
                "ended": sum(found.ended for found in states),
                "mb": round(folder_bytes(run.path) / 1e6, 1),
            }
        )
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
