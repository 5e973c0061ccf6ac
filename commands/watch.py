"""Following a run: the live view, and its end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from lorafleet.commands.common import Format, console, say, show_report, tell
from lorafleet.commands.deliver import exported_of, show_exported
from lorafleet.commands.logs import driver_log
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.run import Run, RunState

if TYPE_CHECKING:
    from lorafleet.cluster.backend import RunBackend, Watch

_LOOK_EVERY_SECONDS = 0.5
SAME_WISH_SECONDS = 1.0


def follow(
    run: Run, backend: RunBackend, *, quiet: bool, output: Format, silent: bool = False, known: set[str] | None = None
) -> None:
    """Show a run until its driver has ended, then its report. Exits with the driver's code.

    `silent` waits without a view; `known` are lines of `news` that were shown before.
    """
    watch = backend.watch(run)
    if not quiet:
        say(f"run {run.id} in {run.path}")
    try:
        with _signals_go_to(watch):
            if quiet or silent or output is Format.JSON:
                code = _wait(watch)
            elif sys.stdout.isatty():
                code = _live(run, backend, watch)
            else:
                code = _lines(run, backend, watch, known or set())
    except KeyboardInterrupt:
        say(f"\n{run.id} goes on: `lorafleet logs -f {run.id}` follows it, `lorafleet stop {run.id}` ends it")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    finally:
        watch.close()
    show_end(run, code, quiet=quiet, output=output, sentence=backend.look(run).sentence)
    exported = exported_of(run)
    raise typer.Exit(exported.code if exported and code == ExitCode.OK else code)


@contextmanager
def _signals_go_to(watch: Watch) -> Iterator[None]:
    """Pass signals on to a driver here: whoever sends them, and to whom, it is told once, by this process.

    A terminal that closes, or a supervisor, may send one signal to the command and to its group: that is one wish.
    """
    told = [float("-inf")]

    def forward(number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:  # the terminal is gone: to write to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for output in (1, 2):
                os.dup2(nowhere, output)
        if time.monotonic() - told[0] < SAME_WISH_SECONDS:
            return
        told[0] = time.monotonic()
        watch.send_signal(number)
        if number != signal.SIGUSR1:
            say("stopping: the running trials save first (once more ends them at once)")

    if watch.detaches:
        yield
        return
    heard = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's wish is respected
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(watch: Watch) -> int:
    while (code := watch.poll()) is None:
        time.sleep(_LOOK_EVERY_SECONDS)
    return code


def _live(run: Run, backend: RunBackend, watch: Watch) -> int:
    from lorafleet.commands.screen import Harmless
    from lorafleet.commands.view import run_view
    from rich.live import Live

    with Live(Harmless(run_view(run)), console=console(), refresh_per_second=2, transient=True) as live:
        while (code := watch.poll()) is None:
            live.update(Harmless(run_view(run, watch.seen.sentence)))
            time.sleep(_LOOK_EVERY_SECONDS)
    return code


def _lines(run: Run, backend: RunBackend, watch: Watch, known: set[str]) -> int:
    """What changed, a line a change."""
    from lorafleet.commands.view import news

    place = ""
    while True:
        code = watch.poll()
        if code is None and watch.seen.sentence not in ("", place):
            place = watch.seen.sentence
            tell(place)
        for line in news(run, known):
            tell(line)
        sys.stdout.flush()
        if code is not None:
            return code
        time.sleep(_LOOK_EVERY_SECONDS)


def show_end(run: Run, code: int, *, quiet: bool, output: Format, sentence: str = "") -> None:
    """The report of a run that has ended, or why there is none."""
    status = run.status()
    log = driver_log(run)
    exported = exported_of(run)
    if exported:
        show_exported(exported, output)
        return
    if code in (ExitCode.TAKEN, ExitCode.USER_INPUT) and run.state is RunState.RUNNING and not run.gone():
        say(f"{run.id} has another driver, and goes on with it: `lorafleet logs -f {run.id}` follows")
        return
    if not run.trials() and not (run.path / "report" / "report.json").is_file():
        for line in _last_lines(log):
            say(line)
        say(sentence)
        if code == ExitCode.OK:  # on a cluster, and its record could not be brought here
            return
        say(f"{run.id} ended with code {code} before a trial began" + (f"; {log} has more" if log.is_file() else ""))
        return
    if code in (ExitCode.OUR_FAULT, ExitCode.USER_INPUT):
        if run.gone():
            say(f"{run.id} lost its driver, or the Ray under it; `lorafleet resume {run.id}` goes on ({log} has more)")
            return
        for line in _last_lines(log):
            say(line)
        say(f"{run.id} failed; all that its driver said is in {log}")
        return
    if code not in (ExitCode.OK, ExitCode.SOME_TRIALS_FAILED, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
        say(sentence)
    from lorafleet.cluster.backends import lies_elsewhere
    from lorafleet.evaluation.report.search import build_report

    report = build_report(run)
    if not show_report(report, output, quiet=quiet):
        return
    if code in (ExitCode.INTERRUPTED, ExitCode.REQUEUE):
        what = "lost its driver, or the Ray under it" if run.gone() else "was interrupted"
        say(f"\n{run.id} {what}; `lorafleet resume {run.id}` goes on")
        return
    tell(f"\nreport   {run.path / 'report' / 'report.html'}")
    if report.recommendation.adapter and (run.path / report.recommendation.adapter).is_dir():
        folder = run.path / report.recommendation.adapter
        tell(f"{folder.name:<8} {folder}")
    elif report.recommendation.adapter and lies_elsewhere(run):
        say(f"`lorafleet pull {run.id}` brings the adapter")
    if status.get("reason"):
        say(f"{run.id}: {status['reason']}")


def _last_lines(path: Path, count: int = 3) -> list[str]:
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-count:]
    except OSError:
        return []
