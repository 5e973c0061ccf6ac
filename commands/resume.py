"""`lorafleet resume`: go on where a run was killed or stopped."""

from __future__ import annotations

from commands.common import DEFAULT_RUNS, Format, OneRun, Output, Quiet, Runs


def resume(run: OneRun, runs: Runs = DEFAULT_RUNS, quiet: Quiet = False, output: Output = Format.TEXT) -> None:
    """Go on with a run that was interrupted, killed or failed."""
    from cluster.backends import backend_for
    from cluster.machine import local_site
    from cluster.store import find_run
    from commands.view import news
    from commands.watch import follow

    found = find_run(runs, run)
    backend = backend_for(local_site())
    known: set[str] = set()
    list(news(found, known))
    backend.resume(found)
    follow(found, backend, quiet=quiet, output=output, known=known)
