"""`lorafleet status`: where a run is now."""

from __future__ import annotations

from commands.common import DEFAULT_RUNS, Format, Output, RunName, Runs, console, print_json


def status(run: RunName = None, runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """A line a trial, and the best so far."""
    from cluster.store import find_run
    from commands.view import best_line, run_view, trial_lines

    found = find_run(runs, run)
    if output is Format.JSON:
        lines = trial_lines(found)
        best = best_line(lines)
        print_json(
            {
                "run": found.id,
                "state": found.state,
                "alive": found.alive(),
                "phase": found.status().get("phase"),
                "reason": found.status().get("reason"),
                "best": best["trial_id"] if best else None,
                "trials": lines,
            }
        )
        return
    screen = console()
    screen.print(run_view(found))
    if found.gone():
        screen.print(f"its driver is gone: `lorafleet resume {found.id}` goes on", markup=False)
    elif found.status().get("reason"):
        screen.print(str(found.status()["reason"]), markup=False)
