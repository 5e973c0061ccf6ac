"""`lorafleet fetch`: bring models, data and examples to this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorafleet.jobs.data.assets import Asset

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    AnyRuns,
    Format,
    On,
    Output,
    cluster_on,
    console,
    print_json,
    say,
    tell,
)


def fetch(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB.yaml | asset:NAME]...", help="What to fetch.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the assets.")] = False,
    examples: Annotated[bool, typer.Option("--examples", help="Copy the example job files into ./examples.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte of what was fetched, and compare it.")
    ] = False,
    on: On = None,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Fetch all that a job can touch (needs a network, not torch), or list what there is.

    With --on it goes to where the cluster's machines look for it: on Kubernetes and on a Ray elsewhere also what the
    job names by a path of this machine.
    """
    from lorafleet.cluster.fetch import fetch_asset, fetch_job, verify_job
    from lorafleet.cluster.planning.preflight import check_names
    from lorafleet.jobs.data.assets import ASSETS, PREFIX, asset
    from lorafleet.jobs.data.verified_files import check_unchanged
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.job_file import load_job

    there = cluster_on(on, None) if on is not None else None
    if show_list:
        return _list(output)
    if examples:
        _copy_examples()
    elif not what:
        raise UserError("fetch needs a JOB.yaml or asset:NAME; `lorafleet fetch --list` shows the assets")
    for name in what or []:
        if name in ASSETS:
            raise UserError(f"{name!r} is a data set or model: did you mean {PREFIX}{name}?")
        if name.startswith(PREFIX):
            folder = there.provide_asset(name, say) if there else fetch_asset(asset(name), say)
            if verify and not there:
                check_unchanged(Path(folder), whole=True, content=asset(name).content)
            tell(f"{name}  {folder}")
            continue
        loaded = load_job(name)
        if there:
            check_names(loaded, whole=False)
            tell(f"{name}: {there.provide(loaded.job, say)}")
        else:
            fetch_job(loaded.job, say)
            if verify:
                verify_job(loaded.job, say)
            tell(f"{name}: everything it names is on this machine")
    return None


def _list(output: Format) -> None:
    from lorafleet.jobs.data.assets import ASSETS, PREFIX

    if output is Format.JSON:
        return print_json({"assets": [_as_data(known) for known in ASSETS.values()]})
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("asset", "kind", "here", "MB", "package", "licence", "SHA-256", "what it is"):
        table.add_column(name, overflow="fold")
    for known in ASSETS.values():
        here = "yes" if known.folder.is_dir() else "no"
        package = f"{known.package} {known.version}"
        table.add_row(
            f"{PREFIX}{known.name}",
            known.kind,
            here,
            str(known.size_mb),
            package,
            known.licence,
            known.sha256[:12],
            known.description,
        )
    console().print(table)
    return None


def _as_data(known: Asset) -> dict[str, object]:
    return {
        "name": f"asset:{known.name}",
        "kind": known.kind,
        "fetched": known.folder.is_dir(),
        "mb": known.size_mb,
        "package": known.package,
        "version": known.version,
        "licence": known.licence,
        "sha256": known.sha256,
        "description": known.description,
    }


def examples_folder() -> Path:
    """The examples of this checkout, or those that the wheel installed. Raises UserError where they are not."""
    from importlib import metadata

    from lorafleet.jobs.errors import UserError

    folders = [Path(__file__).parent.parent / "examples"]
    for file in metadata.files("lorafleet") or ():  # wherever the wheel's data went: sys.prefix, ~/.local, --target
        if file.match("share/lorafleet/examples/quickstart.yaml"):
            folders.append(Path(str(file.locate())).resolve().parent)
    for folder in folders:
        if (folder / "quickstart.yaml").is_file() and (folder / "my-data.yaml").is_file():
            return folder
    raise UserError("the examples are not where lorafleet was installed; they are in its repository, in examples/")


def _copy_examples() -> None:
    from lorafleet.jobs.errors import UserError

    target = Path("examples")
    source = examples_folder()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target.absolute()} is a file, and the examples go into a folder of that name")
    if target.resolve() == source.resolve():
        say("the examples are already here")
        return
    for path in [*sorted(source.glob("*.yaml")), *sorted(source.glob("sites/*.yaml"))]:
        copy = target / path.relative_to(source)
        if copy.exists():
            say(f"kept your {copy}")
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            tell(copy)
