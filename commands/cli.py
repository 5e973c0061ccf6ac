"""The `lorafleet` command. Importing it imports neither torch, ray nor transformers: it answers at once."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer
from lorafleet.commands import (
    benchmark,
    chat,
    clean,
    compare,
    data,
    doctor,
    evaluate,
    execute,
    export,
    fetch,
    import_config,
    init,
    list_runs,
    logs,
    measure,
    methods,
    node,
    plan,
    pull,
    rate,
    render,
    report,
    resume,
    schema,
    serve,
    status,
    stop,
    sweep,
    sync,
    validate,
)
from lorafleet.commands.common import say
from lorafleet.jobs.errors import ExitCode, LorafleetError, UserError, disk_full
from lorafleet.jobs.runs.stale_folders import clear_orphans
from lorafleet.jobs.runs.tracebacks import keep
from lorafleet.jobs.text import cut

app = typer.Typer(
    name="lorafleet",
    help="One base model, one data set: which LoRA configuration should I ship?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_START, _RUN, _WATCH, _KEEP = "Begin", "Run", "Watch and decide", "Keep house"
_COMMANDS: tuple[tuple[str, Callable[..., object], str], ...] = (
    ("doctor", doctor.doctor, _START),
    ("init", init.init, _START),
    ("import", import_config.import_config, _START),
    ("fetch", fetch.fetch, _START),
    ("validate", validate.validate, _START),
    ("data", data.data, _START),
    ("render", render.render, _START),
    ("schema", schema.schema, _START),
    ("methods", methods.methods, _START),
    ("plan", plan.plan, _RUN),
    ("train", sweep.train, _RUN),
    ("sweep", sweep.sweep, _RUN),
    ("compare", compare.compare, _RUN),
    ("evaluate", evaluate.evaluate, _RUN),
    ("resume", resume.resume, _RUN),
    ("stop", stop.stop, _RUN),
    ("status", status.status, _WATCH),
    ("logs", logs.logs, _WATCH),
    ("report", report.report, _WATCH),
    ("rate", rate.rate, _WATCH),
    ("export", export.export, _WATCH),
    ("benchmark", benchmark.benchmark, _WATCH),
    ("chat", chat.chat, _WATCH),
    ("serve", serve.serve, _WATCH),
    ("pull", pull.pull, _WATCH),
    ("list", list_runs.list_runs, _KEEP),
    ("clean", clean.clean, _KEEP),
    ("sync", sync.sync, _KEEP),
)
for _name, _function, _panel in _COMMANDS:
    app.command(_name, rich_help_panel=_panel)(_function)
app.command("exec", hidden=True)(execute.execute)
app.command("measure", hidden=True)(measure.measure)
app.add_typer(node.node, hidden=True)


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version and end.", is_eager=True)) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("lorafleet"))
        raise typer.Exit
    with contextlib.suppress(OSError):  # there may be no temporary folder that can be written
        clear_orphans(Path(tempfile.gettempdir()))  # what an earlier command left that was killed, a token among it


def main() -> None:
    """Run a command; a user's mistake is a sentence, ours is a traceback in a file whose path is printed."""
    try:
        app()
    except UserError as error:
        say("\n".join(cut(line) for line in str(error).split("\n")))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        local = sys.modules.get("lorafleet.cluster.local")
        if local is not None:
            local.interrupt_drivers()
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
    except OSError as error:
        full = disk_full(error, Path(error.filename or "/"), "try again")
        if full is not None:
            say(str(full))
            sys.exit(ExitCode.USER_INPUT)
        if error.errno not in _OF_THE_PATH or error.filename is None or _INSIDE in str(error.filename):
            _our_fault(error)
        say(f"{error.filename}: {error.strerror}")
        sys.exit(ExitCode.USER_INPUT)
    except Exception as error:  # the edge of the program
        _our_fault(error)


_OF_THE_PATH = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
)
"""What the user's own path can be wrong by, wherever it is opened."""
_INSIDE = "site-packages"
"""A path with this in it is not one that the user named."""


def _our_fault(error: Exception) -> NoReturn:
    code = error.exit_code if isinstance(error, LorafleetError) else ExitCode.OUR_FAULT
    say(f"{type(error).__name__}: {error}\nThis is a fault of lorafleet; the traceback is in {keep(error)}")
    sys.exit(code)
