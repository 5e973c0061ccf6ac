"""`lorafleet status`: where a run is now."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, Format, Output, RunName, Runs, console, print_json, say


def status(run: RunName = None, runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """A line a trial, and the best so far."""
    from lorafleet.cluster.backends import backend_of
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.view import best_line, run_view, trial_lines

    found = find_run(runs, run)
    backend = backend_of(found)
    backend.refresh(found, say)
    seen = backend.look(found)
    if output is Format.JSON:
        lines = trial_lines(found)
        best = best_line(lines)
        print_json(
            {
                "run": found.id,
                "state": seen.state,
                "place": seen.sentence,
                "alive": found.alive(),
                "phase": found.status().get("phase"),
                "reason": found.status().get("reason"),
                "best": best["trial_id"] if best else None,
                "trials": lines,
                "damaged": found.damages(),
            }
        )
        return
    screen = console()
    screen.print(run_view(found))
    for sentence in found.damages():
        screen.print(sentence, markup=False)
    if seen.sentence:
        screen.print(f"{seen.state}: {seen.sentence}", markup=False)
