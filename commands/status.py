"""`lorafleet status`: print the current state of a run."""

from __future__ import annotations

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Format,
    Output,
    RunName,
    Runs,
    make_console,
    print_json,
    print_message,
)


def status(run: RunName = None, runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """Print one line per trial, and the best trial so far."""
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.followed_run import FollowedRun
    from lorafleet.commands.view import collect_trials, find_best_trial, render_run

    selected_run = find_run(runs, run)
    backend = get_backend(selected_run)
    backend.refresh(selected_run, print_message)
    run_status = backend.status(selected_run)
    if output is Format.JSON:
        trials = collect_trials(FollowedRun(selected_run))
        best = find_best_trial(trials)
        print_json(
            {
                "run": selected_run.id,
                "state": run_status.state,
                # Part of the public JSON output, so the key keeps its name.
                "place": run_status.message,
                "alive": selected_run.is_alive(),
                "phase": selected_run.read_status().phase,
                "reason": selected_run.read_status().reason,
                "best": best.trial_id if best else None,
                "trials": [trial.model_dump() for trial in trials],
                "damaged": selected_run.list_damages(),
            }
        )
        return
    screen = make_console()
    screen.print(render_run(FollowedRun(selected_run)))
    for damage in selected_run.list_damages():
        screen.print(damage, markup=False)
    if run_status.message:
        screen.print(f"{run_status.state}: {run_status.message}", markup=False)
