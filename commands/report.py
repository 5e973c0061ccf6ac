"""`lorafleet report`: the table and the decision, any time."""

from __future__ import annotations

from commands.common import DEFAULT_RUNS, Format, Output, RunName, Runs, say, show_report, tell


def report(run: RunName = None, runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """The table of every configuration, and which one to ship."""
    from cluster.backends import backend_of
    from cluster.store import find_run
    from commands.deliver import exported_of, show_exported
    from evaluation.report import write_report

    found = find_run(runs, run)
    backend_of(found).refresh(found, say)
    exported = exported_of(found)
    if exported:
        show_exported(exported, output)
        return
    if show_report(write_report(found), output):
        tell(f"\nreport   {found.path / 'report' / 'report.html'}")
