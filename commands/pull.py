"""`lorafleet pull`: bring a run from a cluster's storage."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, OneRun, Runs, Trust, cluster_on, say, tell


class Adapters(StrEnum):
    """Whose weights come along."""

    BEST = "best"
    ALL = "all"
    NONE = "none"
    EXPORTS = "exports"


def pull(
    run: OneRun,
    adapters: Annotated[
        Adapters,
        typer.Option("--adapters", help="Weights that come along: of the best trial, all, none, or exported models."),
    ] = Adapters.BEST,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="SITE", help="Where the run is, when there is no record of it here yet."),
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    trust: Trust = False,
) -> None:
    """Bring report, metrics, W&B's records and adapters of a run elsewhere (Kubernetes, Ray): what has changed."""
    from lorafleet.cluster.backends import backend_of
    from lorafleet.cluster.remote.backend import Away
    from lorafleet.cluster.run_index import find_run
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.text import counted

    if on is None:
        found = find_run(runs, run)
    else:
        place = cluster_on(on, None)
        if not isinstance(place, Away):
            raise UserError(f"--on is {on}, a Slurm: its runs lie in its runs_dir itself, and nothing is brought")
        found = place.attach(run, runs, say)
    count = backend_of(found, trust=trust).pull(found, adapters.value, say)
    tell(f"{counted(count, 'file')} came to {found.path}")
    told = files.read_json(found.path / "report" / "report.json").get("recommendation") or {}
    if adapters is Adapters.BEST and not told.get("trial_id"):
        say("no trial is recommended yet, so no weights came: --adapters all brings those that there are")
