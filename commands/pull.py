"""`lorafleet pull`: download a run from a cluster's storage."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    OneRun,
    Runs,
    Trust,
    load_cluster,
    print_message,
    print_text,
)


class Adapters(StrEnum):
    """Trials whose weights are downloaded.

    The values are those of `WeightSelection`. EXPORTS means the models that an export has
    made.
    """

    BEST = "best"
    ALL = "all"
    NONE = "none"
    EXPORTS = "exports"


def pull(
    run: OneRun,
    adapters: Annotated[
        Adapters,
        typer.Option(
            "--adapters",
            help="Weights to download: of the best trial, of all trials, none, or exported models.",
        ),
    ] = Adapters.BEST,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="SITE",
            help="Site that the run is on, if this machine has no record of it yet.",
        ),
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    trust: Trust = False,
) -> None:
    """Download report, metrics, W&B records and adapters of a run on Kubernetes or a remote Ray.

    Only files that have changed are downloaded.
    """
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run
    from lorafleet.jobs import files
    from lorafleet.jobs.text import format_count

    if on is None:
        selected_run = find_run(runs, run)
    else:
        selected_run = load_cluster(on, None).attach(run, runs, print_message)
    count = get_backend(selected_run, trust=trust).pull(selected_run, adapters.value, print_message)
    print_text(f"downloaded {format_count(count, 'file')} to {selected_run.path}")
    recommendation = (
        files.read_json(selected_run.path / "report" / "report.json").get("recommendation") or {}
    )
    # The recommendation is in the report, which a running search does not have yet.
    if adapters is Adapters.BEST and not recommendation.get("trial_id"):
        print_message(
            "no trial is recommended yet, so no weights were downloaded: --adapters all downloads "
            "those of all trials"
        )
