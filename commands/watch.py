"""Following a run: the live view, and its end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from commands.common import Format, console, say
from jobs.errors import ExitCode
from jobs.run import Run

if TYPE_CHECKING:
    from cluster.backend import Backend

_LOOKS_PER_SECOND = 2
_LINES_EVERY_SECONDS = 0.5


def follow(run: Run, backend: Backend, *, quiet: bool, output: Format, known: set[str] | None = None) -> None:
    """Show a run until its driver has ended, then its report. Exits with the driver's code.

    `known` are lines of `news` that were shown before.
    """
    child: Any = getattr(backend, "child", None)
    if not quiet:
        say(f"run {run.id} in {run.path}")
    with _signals_go_to(child):
        if quiet or output is Format.JSON:
            child.wait()
        elif sys.stdout.isatty():
            _live(run, child)
        else:
            _lines(run, child, known or set())
    code = _exit_code(child.returncode)
    show_end(run, code, quiet=quiet, output=output)
    raise typer.Exit(code)


@contextmanager
def _signals_go_to(child: Any) -> Iterator[None]:
    """The driver hears Ctrl-C itself (it is in this terminal's process group); the others are passed on."""

    def forward(number: int, _frame: Any) -> None:
        child.send_signal(number)

    def ignore(number: int, _frame: Any) -> None:
        say("stopping: the running trials save first (once more ends them at once)")

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, ignore),
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward),
        signal.SIGHUP: signal.signal(signal.SIGHUP, forward),
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, forward),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(returned: int) -> int:
    """A driver that was killed by a signal counts as interrupted; its other codes are ours."""
    return ExitCode.INTERRUPTED if returned < 0 else returned


def _live(run: Run, child: Any) -> None:
    from rich.live import Live

    from commands.view import run_view

    with Live(run_view(run), console=console(), refresh_per_second=_LOOKS_PER_SECOND, transient=True) as live:
        while child.poll() is None:
            live.update(run_view(run))
            time.sleep(1 / _LOOKS_PER_SECOND)


def _lines(run: Run, child: Any, seen: set[str]) -> None:
    """What changed, a line a change."""
    from commands.view import news

    while True:
        ended = child.poll() is not None
        for line in news(run, seen):
            typer.echo(line)
        sys.stdout.flush()
        if ended:
            return
        time.sleep(_LINES_EVERY_SECONDS)


def show_end(run: Run, code: int, *, quiet: bool, output: Format) -> None:
    """The report of a run that has ended, or why there is none."""
    status = run.status()
    if code in (ExitCode.OUR_FAULT, ExitCode.USER_INPUT):
        for line in _last_lines(run.path / "logs" / "driver.log"):
            say(line)
        say(f"{run.id} failed; all that its driver said is in {run.path / 'logs' / 'driver.log'}")
        return
    from evaluation.report import build_report, report_json

    report = build_report(run)
    if output is Format.JSON:
        typer.echo(report_json(report))
        return
    if quiet:
        typer.echo(report.recommendation.sentence)
        return
    from evaluation.render import terminal

    screen = console()
    screen.print(terminal(report, screen.width))
    if code in (ExitCode.INTERRUPTED, ExitCode.REQUEUE):
        say(f"\n{run.id} was interrupted; `lorafleet resume {run.id}` goes on")
        return
    typer.echo(f"\nreport   {run.path / 'report' / 'report.html'}")
    if report.recommendation.adapter and (run.path / report.recommendation.adapter).is_dir():
        folder = run.path / report.recommendation.adapter
        typer.echo(f"{folder.name:<8} {folder}")
    if status.get("reason"):
        say(f"{run.id}: {status['reason']}")


def _last_lines(path: Path, count: int = 3) -> list[str]:
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-count:]
    except OSError:
        return []
