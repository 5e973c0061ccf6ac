"""Options and output functions that commands share.

Options are `Annotated` types, so that an option has the same name, help and default in
every command. All output passes through `print_text`, `print_json` or a `Screen`, which
neutralise control characters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.jobs.runs import client_log

if TYPE_CHECKING:
    from rich.console import Console

    from lorafleet.cluster.backend import Backend, Cluster
    from lorafleet.jobs.runs.report import Report
    from lorafleet.jobs.runs.run import Run


class Format(StrEnum):
    """Output format of a command."""

    TEXT = "text"
    JSON = "json"


Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Fields to set, such as train.seed=7."),
]
Runs = Annotated[
    Path, typer.Option("--runs", metavar="DIR", envvar="LORAFLEET_RUNS", help="Folder of the runs.")
]
AnyRuns = Annotated[Path, typer.Option("--runs", metavar="DIR", hidden=True)]
"""The --runs option of commands that touch no run. They accept it so that every command takes the
same options.
"""
Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        metavar="N",
        min=1,
        help="Number of nodes to use. Trials run in parallel up to their combined capacity.",
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="SITE",
        help="Cluster to use: the name of a site file, or its path (see docs/).",
    ),
]
RunName = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="Id, name or folder of a run. Default: the newest run."),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run code and paths recorded in a run that was not created here (docs/security.md).",
    ),
]
OneRun = Annotated[
    str, typer.Argument(metavar="RUN", help="Id, name or folder of a run.", show_default=False)
]
Output = Annotated[Format, typer.Option("--format", help="Output format.")]
Chain = Annotated[
    int | None,
    typer.Option(
        "--max-walltime-chain",
        metavar="K",
        min=1,
        help="Submit up to K jobs, each starting when the previous one ends, instead of requeueing "
        "one job.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]

DEFAULT_RUNS = Path("runs")


def get_backend(on: str | None, nodes: int | None, chain: int | None = None) -> Backend:
    """Return the backend of this machine, or of the cluster that `--on` names.

    Args:
        on: Value of `--on`. None: this machine, or the Ray that RAY_ADDRESS names.
        nodes: Value of `--nodes`.
        chain: Value of `--max-walltime-chain`.

    Raises:
        UserError: `chain` is set without `on` (only clusters have time limits), or the site
            cannot be loaded.
    """
    from lorafleet.cluster.backends import create_local_backend
    from lorafleet.jobs.errors import UserError

    if on is not None:
        return load_cluster(on, nodes, chain)
    if chain is not None:
        raise UserError(
            "--max-walltime-chain is for clusters with time limits: use it together with --on SITE"
        )
    from lorafleet.cluster.local_site import detect_site

    return create_local_backend(detect_site(nodes))


def load_cluster(on: str, nodes: int | None, chain: int | None = None) -> Cluster:
    """Return the cluster of a site, and print the site files it was read from.

    The files are named because their set-up lines are code that will run.
    """
    from lorafleet.cluster.backends import create_cluster_backend
    from lorafleet.jobs.loading.site_file import load_site

    loaded = load_site(on)
    # Printed before anything of the site is used.
    print_message(f"site {loaded.site.name} from {', extending '.join(map(str, loaded.files))}")
    loaded.check_nodes(nodes)
    return create_cluster_backend(loaded.apply_chain(chain) if chain else loaded, nodes)


def confirm_trust(run: Run, command: str, *, trust: bool) -> None:
    """Raise RunError for a run that this user's lorafleet did not create, unless `trust` is set.

    With `trust`, print a note on what runs instead.
    """
    from lorafleet.jobs.runs.trust import check_trusted

    note = check_trusted(run.path, command, trust=trust)
    if note is not None:
        print_message(f"note: {note}")


def make_console() -> Console:
    """Return a console for standard output.

    Outside a terminal it has no colours and is 200 columns wide, so that no table is cut.
    """
    from lorafleet.commands.screen import Screen

    return (
        Screen(soft_wrap=False)
        if sys.stdout.isatty()
        else Screen(width=200, no_color=True, highlight=False)
    )


def print_message(text: str) -> None:
    """Print one line to standard error: progress and notes, apart from the data.

    The line is also written to the log of the client.
    """
    # PRINTED keeps --verbose from printing the line a second time.
    logging.getLogger(__name__).info("%s", text, extra=client_log.PRINTED)
    print_text(text, err=True)


def print_text(text: object = "", *, nl: bool = True, err: bool = False) -> None:
    """Print untrusted text safely: names, reasons and model output cannot control the terminal.

    Args:
        nl: End with a line feed.
        err: Print to standard error.
    """
    from lorafleet.jobs.text import make_printable

    typer.echo(make_printable(str(text)), nl=nl, err=err)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """End the block on SIGTERM and SIGHUP as an exception does, so that clean-up runs.

    Partial output is removed. A signal that the process ignores stays ignored, as under
    nohup. For commands that work in their own process, without a driver.
    """

    def raise_exit(number: int, _frame: object) -> None:
        # The exit code that a shell reports for a process that a signal has ended.
        raise SystemExit(128 + number)

    handled = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, raise_exit) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def silence_libraries() -> None:
    """Disable library logging below errors.

    Greetings, deprecations and progress are meant for the libraries' own developers.
    """
    logging.disable(logging.WARNING)


def print_json(value: Any) -> None:
    """Print data for programs as JSON; values that are NaN or infinite become null.

    NaN is not JSON: most parsers would refuse the whole document.
    """
    from lorafleet.jobs.files import replace_non_finite

    typer.echo(
        json.dumps(replace_non_finite(value), indent=2)
    )  # ASCII only, so nothing in it can control a terminal


def show_report(report: Report, output: Format, *, quiet: bool = False) -> bool:
    """Print a report in the requested format.

    Returns:
        True if the full table was printed for a person; the caller may then print more.
    """
    from lorafleet.evaluation.render.forms import render_terminal
    from lorafleet.evaluation.render.write import render_report_json

    if output is Format.JSON:
        typer.echo(render_report_json(report))
        return False
    if quiet:
        for caution in report.cautions:
            print_text(f"! {caution}")
        print_text(report.recommendation.sentence)
        return False
    screen = make_console()
    screen.print(render_terminal(report, screen.width))
    return True


def print_notes(notes: tuple[str, ...]) -> None:
    """Print each note, such as a field that was recognised under another tool's name."""
    for note in notes:
        print_message(f"note: {note}")


@contextlib.contextmanager
def report_option_errors(options: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn problems of a generated job into a UserError that names the command's options.

    The user has no job file to look at.

    Args:
        options: Job field -> the command's option it comes from; the message names that option.
    """
    from lorafleet.jobs.errors import JobFileError, UserError

    try:
        yield
    except JobFileError as error:
        messages = []
        for problem in error.problems:
            # Messages begin with the field and its value, by convention; the option takes the
            # field's place.
            field = next(
                (name for name in options or {} if problem.sentence.startswith(f"{name} is")), ""
            )
            option = (options or {}).get(field, "")
            messages.append(option + problem.sentence.removeprefix(field))
        raise UserError("\n".join(messages)) from None
