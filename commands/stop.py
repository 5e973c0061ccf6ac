"""`lorafleet stop`: ask a run to save and stop."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, OneRun, Runs, Trust, print_text


def stop(run: OneRun, runs: Runs = DEFAULT_RUNS, trust: Trust = False) -> None:
    """Ask a running run to save its trials and stop.

    `lorafleet resume` continues it.
    """
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run

    selected_run = find_run(runs, run)
    print_text(get_backend(selected_run, trust=trust).cancel(selected_run))
