"""`lorafleet import`: a job file from another tool's config."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from commands.common import DEFAULT_RUNS, AnyRuns, say


class Tool(StrEnum):
    """Tools whose configs are read."""

    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"


def import_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other tool's YAML.", show_default=False)],
    source: Annotated[Tool, typer.Option("--from", help="Which tool wrote it.")],
    name: Annotated[str, typer.Option(help="Name of the job.")] = "imported",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; printed if left out.")] = None,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Translate a config into a job file, and say what could not be carried over."""
    import yaml

    from jobs import files, yaml12
    from jobs.errors import JobFileError, Problem, UserError
    from jobs.load import load_text, read_text
    from jobs.translate import translate, without_refused

    document = yaml12.read(read_text(file))
    if document.problems:
        raise JobFileError(str(file), document.problems)
    if not isinstance(document.value, dict):
        raise JobFileError(str(file), [Problem("", "a config is a block of keys")])
    made = translate(source, document.value, name)
    while True:
        body = yaml.safe_dump(made.tree, sort_keys=False, allow_unicode=True)
        try:
            load_text(body, output or Path("job.yaml"))
            break
        except JobFileError as error:
            if not without_refused(made, [(problem.path, problem.sentence) for problem in error.problems]):
                said = "; ".join(problem.sentence for problem in error.problems)
                raise UserError(f"{file} makes a job that cannot run: {said}") from None
    text = f"# Translated from {file.name} ({source.value}).\n"
    text += "".join(f"# Not carried over: {line}\n" for line in made.lost)
    text += "".join(f"# Assumed: {line}\n" for line in made.assumed) + body
    for line in made.lost:
        say(f"not carried over: {line}")
    for line in made.assumed:
        say(f"assumed: {line}")
    if made.dropped:
        say(f"without meaning here: {', '.join(made.dropped)}")
    if output is None:
        typer.echo(text, nl=False)
    elif output.exists():
        raise UserError(f"{output} exists already; --output names another")
    else:
        files.write_text(output, text)
        typer.echo(str(output))
