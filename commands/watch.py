"""Follow a run: the live view while it runs, and the report at its end."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorafleet.commands.common import Format, make_console, print_message, print_text, show_report
from lorafleet.commands.logs import find_driver_log
from lorafleet.commands.show import print_export, read_export
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.run import Run, RunState

if TYPE_CHECKING:
    from lorafleet.cluster.backend import RunBackend, Watch

_POLL_SECONDS = 0.5
"""Seconds between two checks whether the run has ended."""
_READ_SECONDS = 1.0
"""Seconds between two readings of a run, at least."""
_READ_SHARE = 10
"""A run that takes long to read is read for at most one part in so many of the time."""
REPEATED_SIGNAL_SECONDS = 1.0


def follow(
    run: Run,
    backend: RunBackend,
    *,
    quiet: bool,
    output: Format,
    silent: bool = False,
    shown_lines: set[str] | None = None,
) -> None:
    """Show a run until its driver ends, then print its report and exit with the driver's code.

    Args:
        quiet: Print the result only.
        silent: Wait without a live view.
        shown_lines: Lines of `iterate_news` that were printed before.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    watch = backend.watch(run)
    if not quiet:
        print_message(f"run {run.id} in {run.path}")
    try:
        with _forward_signals(watch):
            if quiet or silent or output is Format.JSON:
                code = _wait_for_end(watch)
            elif sys.stdout.isatty():
                try:
                    code = _show_live_view(run, watch)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    # The terminal was closed, and SIGHUP is ignored or has not arrived yet.
                    _discard_output()
                    code = _wait_for_end(watch)
            else:
                code = _print_news(run, watch, shown_lines or set())
    # Only a queued run gets here: with a child, the interrupt is forwarded to its driver.
    except KeyboardInterrupt:
        print_message(
            f"\n{run.id} continues to run: follow it with `lorafleet logs -f {run.id}`, or stop it "
            f"with `lorafleet stop {run.id}`"
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    finally:
        watch.close()
    show_end(run, code, quiet=quiet, output=output, message=backend.status(run).message)
    export_record = read_export(run)
    # A job of Ray or Kubernetes ends successfully even if a target was rejected: only the export's
    # record says so.
    raise typer.Exit(export_record.code if export_record and code == ExitCode.OK else code)


@contextmanager
def _forward_signals(watch: Watch) -> Iterator[None]:
    """Forward signals to a local driver, once each, whoever sends them.

    A closing terminal or a supervisor may signal both the command and its process group. Signals
    within REPEATED_SIGNAL_SECONDS therefore count as one request. Nothing is forwarded to a
    queued run, which Ctrl-C leaves alone.
    """
    last_forwarded = [float("-inf")]

    def forward(number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:
            _discard_output()
        if time.monotonic() - last_forwarded[0] < REPEATED_SIGNAL_SECONDS:
            return
        last_forwarded[0] = time.monotonic()
        watch.send_signal(number)
        if number != signal.SIGUSR1:
            print_message(
                "stopping: waiting for the running trials to save (press Ctrl-C again to stop at "
                "once)"
            )

    if watch.detaches:
        yield
        return
    handled = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if (
        signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    ):  # under nohup SIGHUP is ignored: keep it so
        handled.append(signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _discard_output() -> None:
    """Redirect the output to /dev/null: the terminal is gone, and writing to it would fail."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(devnull, output)


def _wait_for_end(watch: Watch) -> int:
    while (code := watch.poll()) is None:
        time.sleep(_POLL_SECONDS)
    return code


class _Pace:
    """Pace at which a run is read while it is followed: slower if reading takes long.

    A run on a busy shared disk must not be read all the time.
    """

    def __init__(self) -> None:
        self._next = 0.0

    def is_due(self) -> bool:
        """Return whether the run may be read again."""
        return time.monotonic() >= self._next

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure how long the run is read."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next = started + max(_READ_SECONDS, _READ_SHARE * (ended - started))


def _show_live_view(run: Run, watch: Watch) -> int:
    from rich.live import Live

    from lorafleet.commands.followed_run import FollowedRun
    from lorafleet.commands.screen import SafeRenderable
    from lorafleet.commands.view import render_run

    followed, pace = FollowedRun(run), _Pace()
    with Live(
        SafeRenderable(render_run(followed)),
        console=make_console(),
        refresh_per_second=2,
        # The final report takes the place of the live view.
        transient=True,
    ) as live:
        while (code := watch.poll()) is None:
            if pace.is_due():
                with pace.measure():
                    live.update(SafeRenderable(render_run(followed, watch.status.message)))
            time.sleep(_POLL_SECONDS)
    return code


def _print_news(run: Run, watch: Watch, shown_lines: set[str]) -> int:
    """Print changes of a run, one line each, until it ends; return the exit code.

    For output that is not a terminal. The driver is asked before the files are read, so the
    last lines are not missed.
    """
    from lorafleet.commands.followed_run import FollowedRun
    from lorafleet.commands.view import iterate_news

    followed, pace, last_message = FollowedRun(run), _Pace(), ""
    while True:
        code = watch.poll()
        if code is None and watch.status.message not in ("", last_message):
            last_message = watch.status.message
            print_text(last_message)
        if code is not None:
            followed = FollowedRun(run)  # a killed driver has not told what changed last
        if code is not None or pace.is_due():
            with pace.measure():
                for line in iterate_news(followed, shown_lines):
                    print_text(line)
            sys.stdout.flush()
        if code is not None:
            return code
        time.sleep(_POLL_SECONDS)


def show_end(run: Run, code: int, *, quiet: bool, output: Format, message: str = "") -> None:
    """Print the report of a run that has ended, or why there is none.

    Args:
        code: Exit code of the run's driver.
        quiet: Print the result only.
        message: What the backend reports of the end.
    """
    log = find_driver_log(run)
    export_record = read_export(run)
    if export_record:
        print_export(export_record, output)
        return
    # The driver that this command started was refused, because another one has the run.
    if (
        code in (ExitCode.TAKEN, ExitCode.USER_INPUT)
        and run.state is RunState.RUNNING
        and not run.has_lost_driver()
    ):
        print_message(
            f"{run.id} already has a driver and continues: follow it with `lorafleet logs -f "
            f"{run.id}`"
        )
        return
    if _print_failure(run, code, log, message):
        return
    if code not in (
        ExitCode.OK,
        ExitCode.SOME_TRIALS_FAILED,
        ExitCode.REQUEUE,
        ExitCode.INTERRUPTED,
    ):
        print_message(message)
    from lorafleet.evaluation.report.build import build_report

    report = build_report(run)
    if not show_report(report, output, quiet=quiet):
        return
    if code in (ExitCode.INTERRUPTED, ExitCode.REQUEUE):
        reason = (
            "lost its driver, or the driver's Ray cluster"
            if run.has_lost_driver()
            else "was interrupted"
        )
        print_message(f"\n{run.id} {reason}; continue it with `lorafleet resume {run.id}`")
        return
    _print_files(run, report.recommendation.adapter)


def _print_failure(run: Run, code: int, log: Path, message: str) -> bool:
    """Print why there is no report; return False if there can be one."""
    if not run.list_trials() and not (run.path / "report" / "report.json").is_file():
        for line in _read_last_lines(log):
            print_message(line)
        print_message(message)
        if code == ExitCode.OK:  # on a cluster whose record could not be downloaded
            return True
        print_message(
            f"{run.id} ended with exit code {code} before a trial started"
            + (f"; see {log}" if log.is_file() else "")
        )
        return True
    if code in (ExitCode.OUR_FAULT, ExitCode.USER_INPUT):
        if run.has_lost_driver():
            print_message(
                f"{run.id} lost its driver, or the driver's Ray cluster; continue it with "
                f"`lorafleet resume {run.id}` (see {log})"
            )
            return True
        for line in _read_last_lines(log):
            print_message(line)
        print_message(f"{run.id} failed; the driver's full log is {log}")
        return True
    return False


def _print_files(run: Run, adapter: str | None) -> None:
    """Print where the report and the recommended weights are."""
    from lorafleet.cluster.submission import is_remote

    print_text(f"\nreport   {run.path / 'report' / 'report.html'}")
    if adapter and (run.path / adapter).is_dir():
        folder = run.path / adapter
        print_text(f"{folder.name:<8} {folder}")
    elif adapter and is_remote(run):
        print_message(f"`lorafleet pull {run.id}` downloads the adapter")
    reason = run.read_status().reason
    if reason:
        print_message(f"{run.id}: {reason}")


def _read_last_lines(path: Path, count: int = 3) -> list[str]:
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()][
            -count:
        ]
    except OSError:
        return []
