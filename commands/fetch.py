"""`lorafleet fetch`: bring models, data and examples to this machine."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from commands.common import Format, Output, console, print_json, say


def fetch(
    what: Annotated[list[str] | None, typer.Argument(metavar="[JOB.yaml | asset:NAME]...", help="What to fetch.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the assets.")] = False,
    examples: Annotated[bool, typer.Option("--examples", help="Copy the example job files into ./examples.")] = False,
    output: Output = Format.TEXT,
) -> None:
    """Fetch all that a job can touch (needs a network, not torch), or list what there is."""
    from cluster.fetch import fetch_asset, fetch_job
    from jobs.assets import PREFIX, asset
    from jobs.errors import UserError
    from jobs.load import load_job

    if show_list:
        return _list(output)
    if examples:
        _copy_examples()
    elif not what:
        raise UserError("fetch needs a JOB.yaml or asset:NAME; `lorafleet fetch --list` shows the assets")
    for name in what or []:
        if name.startswith(PREFIX):
            typer.echo(f"{name}  {fetch_asset(asset(name), say)}")
        else:
            fetch_job(load_job(name).job, say)
            typer.echo(f"{name}: everything it names is on this machine")


def _list(output: Format) -> None:
    from jobs.assets import ASSETS, PREFIX

    rows = [
        {
            "name": f"{PREFIX}{known.name}",
            "kind": known.kind,
            "fetched": known.folder.is_dir(),
            "mb": known.size_mb,
            "package": f"{known.package} {known.version}",
            "licence": known.licence,
            "sha256": known.sha256,
            "description": known.description,
        }
        for known in ASSETS.values()
    ]
    if output is Format.JSON:
        return print_json({"assets": rows})
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("asset", "kind", "here", "MB", "package", "licence", "SHA-256", "what it is"):
        table.add_column(name, overflow="fold")
    for row in rows:
        here = "yes" if row["fetched"] else "no"
        table.add_row(row["name"], row["kind"], here, str(row["mb"]), row["package"], row["licence"],  # type: ignore[arg-type]
                      f"{row['sha256']:.12}", row["description"])  # type: ignore[arg-type]
    console().print(table)
    return None


def examples_folder() -> Path:
    """The examples of this checkout, or those that the wheel installed."""
    checkout = Path(__file__).parent.parent / "examples"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "lorafleet" / "examples"


def _copy_examples() -> None:
    target = Path("examples")
    source = examples_folder()
    if target.resolve() == source.resolve():
        say("the examples are already here")
        return
    target.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.yaml")):
        if (target / path.name).exists():
            say(f"kept your {target / path.name}")
        else:
            shutil.copy(path, target / path.name)
            typer.echo(target / path.name)
