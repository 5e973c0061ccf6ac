"""`lorafleet fetch`: download models, data and examples to this machine."""

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
    load_cluster,
    make_console,
    print_json,
    print_message,
    print_text,
)


def fetch(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JOB.yaml | asset:NAME]...", help="Job files or assets to fetch."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the assets.")] = False,
    examples: Annotated[
        bool, typer.Option("--examples", help="Copy the example job files into ./examples.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read every byte of the fetched files and compare checksums."
        ),
    ] = False,
    on: On = None,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Fetch everything that a job uses, or list the assets.

    This needs a network but not torch. With --on, inputs go where the cluster's machines look for
    them. On Kubernetes and on a remote Ray cluster that includes what the job names by a path of
    this machine.
    """
    from lorafleet.cluster.fetch import fetch_asset, fetch_job, verify_job
    from lorafleet.cluster.planning.preflight import check_names
    from lorafleet.jobs.data.assets import ASSETS, PREFIX, get_asset
    from lorafleet.jobs.data.verified_files import check_unchanged
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.job_file import load_job

    # Loaded first: on a Slurm site it sets the cache folder that the assets are looked for in.
    target_cluster = load_cluster(on, None) if on is not None else None
    if show_list:
        return _list_assets(output)
    if examples:
        _copy_examples()
    elif not what:
        raise UserError(
            "fetch needs a JOB.yaml or asset:NAME; `lorafleet fetch --list` shows the assets"
        )
    for name in what or []:
        # A frequent slip. Without this check the name would be read as a job file.
        if name in ASSETS:
            raise UserError(
                f"{name!r} is the name of a data set or model: did you mean {PREFIX}{name}?"
            )
        if name.startswith(PREFIX):
            folder = (
                target_cluster.upload_asset(name, print_message)
                if target_cluster
                else fetch_asset(get_asset(name), print_message)
            )
            if verify and not target_cluster:
                check_unchanged(Path(folder), read_all=True, content=get_asset(name).content)
            print_text(f"{name}  {folder}")
            continue
        loaded = load_job(name)
        if target_cluster:
            check_names(loaded, require_weights=False)
            print_text(f"{name}: {target_cluster.upload_inputs(loaded.job, print_message)}")
        else:
            fetch_job(loaded.job, print_message)
            if verify:
                verify_job(loaded.job, print_message)
            print_text(f"{name}: everything that it uses is on this machine")
    return None


def _list_assets(output: Format) -> None:
    from lorafleet.jobs.data.assets import ASSETS, PREFIX

    if output is Format.JSON:
        return print_json({"assets": [_to_dict(entry) for entry in ASSETS.values()]})
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("asset", "kind", "fetched", "MB", "package", "licence", "SHA-256", "description"):
        table.add_column(name, overflow="fold")
    for entry in ASSETS.values():
        fetched = "yes" if entry.folder.is_dir() else "no"
        package = f"{entry.package} {entry.version}"
        table.add_row(
            f"{PREFIX}{entry.name}",
            entry.kind,
            fetched,
            str(entry.size_mb),
            package,
            entry.licence,
            entry.sha256[:12],
            entry.description,
        )
    make_console().print(table)
    return None


def _to_dict(asset: Asset) -> dict[str, object]:
    return {
        "name": f"asset:{asset.name}",
        "kind": asset.kind,
        "fetched": asset.folder.is_dir(),
        "mb": asset.size_mb,
        "package": asset.package,
        "version": asset.version,
        "licence": asset.licence,
        "sha256": asset.sha256,
        "description": asset.description,
    }


def find_examples() -> Path:
    """Return the folder of the examples: this checkout's, or the one that the wheel installed.

    Raises UserError if neither exists.
    """
    from importlib import metadata

    from lorafleet.jobs.errors import UserError

    folders = [Path(__file__).parent.parent / "examples"]
    for file in (
        metadata.files("lorafleet") or ()
    ):  # the wheel's data may be in sys.prefix, ~/.local or --target
        if file.match("share/lorafleet/examples/quickstart.yaml"):
            folders.append(Path(str(file.locate())).resolve().parent)
    for folder in folders:
        if (folder / "quickstart.yaml").is_file() and (folder / "my-data.yaml").is_file():
            return folder
    raise UserError(
        "the examples are missing from this installation of lorafleet; copy them from examples/ in "
        "its repository"
    )


def _copy_examples() -> None:
    from lorafleet.jobs.errors import UserError

    target = Path("examples")
    source = find_examples()
    if target.exists() and not target.is_dir():
        raise UserError(
            f"{target.absolute()} is a file, but the examples are copied into a folder of that "
            "name: move the file, or run the command in another folder"
        )
    if target.resolve() == source.resolve():
        print_message("the examples are already in this folder")
        return
    for path in [*sorted(source.glob("*.yaml")), *sorted(source.glob("sites/*.yaml"))]:
        copy = target / path.relative_to(source)
        # The user may have edited the copy.
        if copy.exists():
            print_message(f"kept {copy}: it exists already")
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            print_text(copy)
