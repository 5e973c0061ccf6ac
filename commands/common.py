"""Options and output that commands share."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorafleet.cluster.backend import Backend, Cluster
    from lorafleet.jobs.runs.report import Report
    from lorafleet.jobs.runs.run import Run
    from rich.console import Console


class Format(StrEnum):
    """How a command prints its data."""

    TEXT = "text"
    JSON = "json"


Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to set, such as train.seed=7.")
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", envvar="LORAFLEET_RUNS", help="Folder of the runs.")]
AnyRuns = Annotated[Path, typer.Option("--runs", metavar="DIR", hidden=True)]
"""Of commands that touch no run: they take the option all the same, so that one line of options serves all."""
Nodes = Annotated[
    int | None,
    typer.Option("--nodes", metavar="N", min=1, help="Size of the fleet: as many trials at once as N machines hold."),
]
On = Annotated[
    str | None,
    typer.Option("--on", metavar="SITE", help="A cluster: the name of a site file, or its path (docs/)."),
]
RunName = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run's id, name or folder; the newest if left out.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Act on what a run says that you did not make here (docs/security.md).")
]
OneRun = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, name or folder.", show_default=False)]
Output = Annotated[Format, typer.Option("--format", help="What to print.")]
Chain = Annotated[
    int | None,
    typer.Option(
        "--max-walltime-chain", metavar="K", min=1, help="K jobs at most, each after the one before: no requeueing."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone.")]

DEFAULT_RUNS = Path("runs")


def backend_for(on: str | None, nodes: int | None, chain: int | None = None) -> Backend:
    """This machine, or the cluster that `--on` names."""
    from lorafleet.cluster.backends import backend_here
    from lorafleet.jobs.errors import UserError

    if on is not None:
        return cluster_on(on, nodes, chain)
    if chain is not None:
        raise UserError("--max-walltime-chain is for clusters with time limits: it goes with --on SITE")
    from lorafleet.cluster.hardware import site_here

    return backend_here(site_here(nodes))


def cluster_on(on: str, nodes: int | None, chain: int | None = None) -> Cluster:
    """The cluster of a site. Its files are named: their set-up lines are code."""
    from lorafleet.cluster.backends import backend_on
    from lorafleet.jobs.loading.site_file import load_site

    loaded = load_site(on)
    say(f"site {loaded.site.name} from {', extending '.join(map(str, loaded.files))}")
    loaded.check_nodes(nodes)
    return backend_on(loaded.chained(chain) if chain else loaded, nodes)


def confirm_trust(run: Run, command: str, *, trust: bool) -> None:
    """Raise RunError for a run that this user's lorafleet has not made, but with `--trust`."""
    from lorafleet.jobs.runs.trust import check_trusted

    note = check_trusted(run.path, command, trust=trust)
    if note is not None:
        say(f"note: {note}")


def console() -> Console:
    """Standard output. Not a terminal: no colours, and wide enough that no table is cut."""
    from lorafleet.commands.screen import Screen

    return Screen(soft_wrap=False) if sys.stdout.isatty() else Screen(width=200, no_color=True, highlight=False)


def say(text: str) -> None:
    """One line to standard error: what happens, beside the data."""
    tell(text, err=True)


def tell(text: object = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text of anybody's: names, reasons and what a model wrote cannot steer the terminal."""
    from lorafleet.jobs.text import printable

    typer.echo(printable(str(text)), nl=nl, err=err)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is within as an exception does: what it had begun to write is cleared away."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hush_libraries() -> None:
    """What libraries log below an error is for their own developers: greetings, deprecations, progress."""
    import logging

    logging.disable(logging.WARNING)


def print_json(value: Any) -> None:
    """Data for programs."""
    from lorafleet.jobs.files import finite

    typer.echo(json.dumps(finite(value), indent=2))  # in ASCII: nothing in it steers a terminal


def show_report(report: Report, output: Format, *, quiet: bool = False) -> bool:
    """A report as it was asked for; returns whether a person reads it, who may be told more."""
    from lorafleet.evaluation.render.forms import terminal
    from lorafleet.evaluation.report.search import report_json

    if output is Format.JSON:
        typer.echo(report_json(report))
        return False
    if quiet:
        for caution in report.cautions:
            tell(f"! {caution}")
        tell(report.recommendation.sentence)
        return False
    screen = console()
    screen.print(terminal(report, screen.width))
    return True


def note_aliases(notes: tuple[str, ...]) -> None:
    """What was understood though it is spelt otherwise here."""
    for note in notes:
        say(f"note: {note}")


@contextlib.contextmanager
def options_blamed(options: Mapping[str, str] | None = None) -> Iterator[None]:
    """Give problems of a job that a command makes without its file, which the user does not have.

    `options` says which option of the command a field is from: its name stands in the sentence.
    """
    from lorafleet.jobs.errors import JobFileError, UserError

    try:
        yield
    except JobFileError as error:
        sentences = []
        for problem in error.problems:
            field = next((one for one in options or {} if problem.sentence.startswith(f"{one} is")), "")
            option = (options or {}).get(field, "")
            sentences.append(option + problem.sentence.removeprefix(field))
        raise UserError("\n".join(sentences)) from None
