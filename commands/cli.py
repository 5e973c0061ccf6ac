"""The `lorafleet` command: all commands, and how errors become messages and exit codes.

Importing this module loads neither torch, ray nor transformers, so the command starts
quickly. An error of the user is one message without a traceback; an error of lorafleet
is written to a file that the message names.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import typer

from lorafleet.commands.common import print_message
from lorafleet.commands.options import expand_options
from lorafleet.jobs.errors import ExitCode, LorafleetError, UserError, make_disk_full_error
from lorafleet.jobs.extras import describe_missing_module
from lorafleet.jobs.runs import client_log
from lorafleet.jobs.runs.stale_folders import remove_orphans
from lorafleet.jobs.runs.tracebacks import save_traceback
from lorafleet.jobs.text import shorten_text

_START, _RUN, _WATCH, _MANAGE = "Get started", "Run", "Watch and decide", "Manage runs"


class _Command(NamedTuple):
    """A command and where its function is. Its module is imported only when it is needed."""

    name: str
    target: str
    """Module below `lorafleet.commands`, and the name of the function or of a typer app in it."""
    panel: str | None = None
    """Heading on the help page. None: the command is hidden."""

    def load(self) -> Any:
        """Return the function or the app."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(f"lorafleet.commands.{module}"), attribute)


_COMMANDS = (  # in the order of the help page
    _Command("doctor", "doctor:doctor", _START),
    _Command("init", "init:init", _START),
    _Command("import", "import_config:import_config", _START),
    _Command("fetch", "fetch:fetch", _START),
    _Command("validate", "validate:validate", _START),
    _Command("data", "data:data", _START),
    _Command("render", "render:render", _START),
    _Command("schema", "schema:schema", _START),
    _Command("methods", "methods:methods", _START),
    _Command("plan", "plan:plan", _RUN),
    _Command("train", "sweep:train", _RUN),
    _Command("sweep", "sweep:sweep", _RUN),
    _Command("compare", "compare:compare", _RUN),
    _Command("evaluate", "evaluate:evaluate", _RUN),
    _Command("resume", "resume:resume", _RUN),
    _Command("stop", "stop:stop", _RUN),
    _Command("status", "status:status", _WATCH),
    _Command("logs", "logs:logs", _WATCH),
    _Command("report", "report:report", _WATCH),
    _Command("rate", "rate:rate", _WATCH),
    _Command("export", "export:export", _WATCH),
    _Command("benchmark", "benchmark:benchmark", _WATCH),
    _Command("chat", "chat:chat", _WATCH),
    _Command("serve", "serve:serve", _WATCH),
    _Command("pull", "pull:pull", _WATCH),
    _Command("list", "list_runs:list_runs", _MANAGE),
    _Command("clean", "clean:clean", _MANAGE),
    _Command("sync", "sync:sync", _MANAGE),
    # lorafleet itself starts these, in drivers and in scripts of jobs.
    _Command("exec", "execute:execute"),
    _Command("measure", "measure:measure"),
    _Command("node", "node:node"),
)


def build_app(names: Collection[str] = ()) -> typer.Typer:
    """Return the command line.

    Args:
        names: The commands that it needs. Empty: all, as for the help page.
    """
    app = typer.Typer(
        name="lorafleet",
        help="One base model, one data set: which LoRA configuration should I ship?",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in _COMMANDS:
        if names and command.name not in names:
            continue
        function = command.load()
        if isinstance(function, typer.Typer):
            app.add_typer(function, hidden=True)
        elif command.panel is None:
            app.command(command.name, hidden=True)(function)
        else:
            app.command(command.name, rich_help_panel=command.panel)(expand_options(function))
    app.callback(invoke_without_command=True)(_apply_global_options)
    return app


def _select_commands(words: Sequence[str]) -> Collection[str]:
    """Return the command that a command line names; empty if it may need any of them."""
    names = {command.name for command in _COMMANDS}
    return {words[0]} & names if words else ()


def _apply_global_options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True
    ),
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("lorafleet"))
        raise typer.Exit
    with contextlib.suppress(OSError):  # the temporary folder may be missing or read-only
        remove_orphans(Path(tempfile.gettempdir()))  # left by killed commands; may hold a token


def main() -> None:
    """Run a command, and close its log at the end.

    The entry point of the console script. Ends the process with one of `ExitCode`.
    """
    try:
        _run_command()
    finally:
        client_log.stop()


def _run_command() -> None:
    """Run a command and turn exceptions into messages and exit codes.

    A user's mistake is printed as a message. The traceback of an internal error is written to a
    file, and its path is printed.
    """
    try:
        build_app(_select_commands(sys.argv[1:]))()
    except UserError as error:
        print_message("\n".join(shorten_text(line) for line in str(error).split("\n")))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        # Not imported here: if no command has loaded it, there is no driver to interrupt.
        local_backend = sys.modules.get("lorafleet.cluster.local")
        if local_backend is not None:
            local_backend.interrupt_drivers()
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has gone, as with `| head`. Python would fail again when it flushes
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
    except ModuleNotFoundError as error:
        message = describe_missing_module(error.name or "")
        if message is None:
            _report_internal_error(error)
        print_message(message)
        sys.exit(ExitCode.USER_INPUT)
    except OSError as error:
        disk_full_error = make_disk_full_error(error, Path(error.filename or "/"), "try again")
        if disk_full_error is not None:
            print_message(str(disk_full_error))
            sys.exit(ExitCode.USER_INPUT)
        # A path of the user that cannot be opened is the user's mistake; any other system error is
        # a bug.
        if (
            error.errno not in _PATH_ERRNOS
            or error.filename is None
            or _PACKAGE_FOLDER in str(error.filename)
        ):
            _report_internal_error(error)
        print_message(f"{error.filename}: {error.strerror}")
        sys.exit(ExitCode.USER_INPUT)
    # The last resort: an internal error is reported, with its traceback in a file.
    except Exception as error:  # noqa: BLE001
        _report_internal_error(error)


_PATH_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    }
)
"""Errors that the user's own path can cause, wherever it is opened."""
_PACKAGE_FOLDER = "site-packages"
"""A path that contains this is part of the installation; the user did not name it."""


def _report_internal_error(error: Exception) -> NoReturn:
    code = error.exit_code if isinstance(error, LorafleetError) else ExitCode.OUR_FAULT
    print_message(
        f"{type(error).__name__}: {error}\nThis is a bug in lorafleet. Please report it with the "
        f"traceback in {save_traceback(error)}"
    )
    sys.exit(code)
