"""Options that several commands share, as one object, and the options of every command.

Typer reads a command's signature. `expand_options` builds that signature, so that
commands can take `LaunchOptions` instead of eight parameters.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any

import typer

from lorafleet.commands.common import DEFAULT_RUNS, Chain, Format, Nodes, On, Output, Quiet, Runs
from lorafleet.jobs.runs import client_log

Wait = Annotated[
    bool, typer.Option("--wait", help="Show no live view, and exit with the run's exit code.")
]
Detach = Annotated[
    bool,
    typer.Option("--detach", "-d", help="Return immediately; the run continues in the background."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan, and start or submit nothing.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print what the command does, request by request."),
]


def refuse_dry_run(dry_run: bool) -> None:
    """Raise UserError if a command that has no plan on this machine gets --dry-run."""
    from lorafleet.jobs.errors import UserError

    if dry_run:
        raise UserError(
            "--dry-run prints what would be submitted to a site: use it with --on, or leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options of the commands that start a run: its site, its nodes and its output.

    Each field becomes an option of the command.
    """

    runs: Runs = DEFAULT_RUNS
    on: On = None
    nodes: Nodes = None
    chain: Chain = None
    quiet: Quiet = False
    output: Output = Format.TEXT
    detach: Detach = False
    wait: Wait = False
    dry_run: DryRun = False


def expand_options(command: Callable[..., object]) -> Callable[..., object]:
    """Return a command as typer takes it.

    An argument whose type is a dataclass becomes one option for each of its fields. Every command
    gets --verbose, and logs from its start.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and is_dataclass(kind):
            groups[parameter.name] = kind
            field_hints = typing.get_type_hints(kind, include_extras=True)
            parameters += [
                _make_option(field.name, field_hints[field.name], field.default)
                for field in fields(kind)
            ]
        else:
            parameters.append(_make_option(parameter.name, kind, parameter.default))
    parameters.append(_make_option("verbose", Verbose, False))

    @functools.wraps(command)
    def run_command(*, verbose: bool = False, **values: Any) -> object:
        client_log.start(verbose=verbose)
        logging.getLogger(__name__).info(
            "lorafleet %s, Python %s", command.__name__, sys.version.split()[0]
        )
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        return command(**values)

    # Typer looks at both: the signature for order and defaults, the annotations for types.
    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def _make_option(name: str, annotation: Any, default: Any) -> Parameter:
    # Keyword-only parameters may have defaults in any order. Typer calls commands by keyword.
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
