"""`lorafleet stop`: ask a run to save and end."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, OneRun, Runs, Trust, tell


def stop(run: OneRun, runs: Runs = DEFAULT_RUNS, trust: Trust = False) -> None:
    """Ask a running run to save its trials and end; `resume` goes on with it."""
    from lorafleet.cluster.backends import backend_of
    from lorafleet.cluster.run_index import find_run

    found = find_run(runs, run)
    tell(backend_of(found, trust=trust).cancel(found))
