"""`lorafleet report`: the table and the decision, any time."""

from __future__ import annotations

from commands.common import DEFAULT_RUNS, Format, Output, RunName, Runs, say, show_report, tell


def report(run: RunName = None, runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """The table of every configuration, and which one to ship."""
    from cluster.backends import backend_of
    from cluster.store import find_run
    from commands.deliver import exported_of, show_exported
    from evaluation.report import build_report, write_report
    from jobs.trust import distrust

    found = find_run(runs, run)
    backend_of(found).refresh(found, say)
    exported = exported_of(found)
    if exported:
        show_exported(exported, output)
        return
    stranger = distrust(found.path)
    report_of_it = build_report(found) if stranger else write_report(found)
    if stranger:
        say(f"note: {stranger}; its report is shown, and nothing is written there")
    if show_report(report_of_it, output) and not stranger:
        tell(f"\nreport   {found.path / 'report' / 'report.html'}")
