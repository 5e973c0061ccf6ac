"""Download the record of a run: through its head while it runs, then through a storage pod."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from lorafleet.cluster.backend import Say, WeightSelection, ignore_message
from lorafleet.cluster.remote.place import download_record
from lorafleet.cluster.submission import record_if_missing
from lorafleet.jobs import files
from lorafleet.jobs.errors import CommandFailed
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s.connections import Connections
from lorafleet.k8s.errors import ClusterError
from lorafleet.k8s.render import get_run_folder
from lorafleet.k8s.storage_pod import find_head, open_storage_pod, read_submitter_log

_FINAL_POD_TIMEOUT_SECONDS = 120.0
"""Seconds that the end of a run waits for the storage pod that downloads its record; `pull`
waits longer.
"""


@dataclass(frozen=True)
class RecordSync:
    """Downloads what runs of a site write."""

    site: KubernetesSite
    connections: Connections

    def download_from_head(self, run: Run, submission: int) -> bool:
        """Download a run's record through its head.

        Returns False if the head is not running or refuses the command.

        Raises:
            ClusterError: No API server answers.
        """
        head = find_head(self.connections.quick_client, run, submission)
        if head is None:
            return False
        try:
            download_record(head, get_run_folder(self.site, run.id), run, wait=False)
        except (ClusterError, CommandFailed):
            return False
        self.save_driver_output(run, submission)
        return True

    def save_driver_output(self, run: Run, submission: int) -> None:
        """Save the driver's output from the submitter pod's log.

        Does nothing if the driver's own log is here.
        """
        own_log = run.path / "logs" / "driver.log"
        if own_log.is_file():
            return
        with contextlib.suppress(ClusterError):
            output = read_submitter_log(self.connections.quick_client, run, submission)
            # Another thread may have downloaded the log while the cluster was asked.
            if output and not own_log.is_file():
                files.write_text(run.path / "logs" / "submitter.log", output)

    def collect(self, run: Run, submission: int, *, ran: bool) -> None:
        """Download the record of a submission that has ended.

        A failure is recorded, and the run's status shows it.

        Args:
            run: The run.
            submission: Number of the submission.
            ran: Whether a driver started, so that there is something to download through a
                storage pod.
        """
        self.save_driver_output(run, submission)
        with record_if_missing(run, submission):
            self.download(
                run, submission, "none", through_pod=ran, up_seconds=_FINAL_POD_TIMEOUT_SECONDS
            )

    def download(
        self,
        run: Run,
        submission: int,
        weights: WeightSelection,
        *,
        include_wandb: bool = False,
        through_pod: bool = True,
        say: Say = ignore_message,
        up_seconds: float | None = None,
    ) -> int:
        """Download a run's record through its head, or else through a storage pod.

        Args:
            run: The run.
            submission: Number of the submission.
            weights: Which weights to download.
            include_wandb: Download W&B's files too.
            through_pod: Start a storage pod if the head is gone.
            say: Receives messages about the storage pod.
            up_seconds: How long to wait for that pod; None: the default of `open_storage_pod`.

        Returns:
            The number of files; 0 if the head is gone and `through_pod` is false.

        Raises:
            UserError: The files could not be downloaded.
        """
        folder = get_run_folder(self.site, run.id)
        head = find_head(self.connections.client, run, submission)
        if head is not None:
            return download_record(head, folder, run, weights, include_wandb=include_wandb)
        if not through_pod:
            return 0
        with open_storage_pod(self.site, self.connections.client, say, up_seconds) as runner:
            return download_record(runner, folder, run, weights, include_wandb=include_wandb)
