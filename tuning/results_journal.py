"""Keep results that wait to be written to the files of their trials.

A result without an evaluation is shown, and nothing is decided by it. Hundreds of trials
have some each second, so they are appended to one file of the run, and moved to the trials
later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.records import MetricsRow, parse_record, read_lines
from lorafleet.jobs.runs.run import Run


class JournalRow(MetricsRow):
    """A line of the journal: a result, and the trial that it belongs to."""

    trial_id: str


class ResultsJournal:
    """The file of a run with the results that wait.

    Args:
        run: The run, with the attempt that writes.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows = 0
        """Number of results that this attempt has appended since the file was emptied."""

    @property
    def path(self) -> Path:
        """Return the path of the file, which often does not exist."""
        return self.run.path / "waiting-results.jsonl"

    def append(self, results: Iterable[tuple[str, MetricsRow]]) -> None:
        """Append results and flush them to the disk.

        Args:
            results: Trial ids and rows.
        """
        lines = [{**row.to_dict(), "trial_id": trial_id} for trial_id, row in results]
        if lines:
            self.run.check_current()
            files.append_jsonl(self.path, *lines)
            self.rows += len(lines)

    def clear(self) -> None:
        """Delete the file: all results are in the files of their trials."""
        if self.rows:
            self.run.check_current()
            self.path.unlink(missing_ok=True)
            self.rows = 0

    def recover(self) -> None:
        """Write the results that a killed driver has left to the files of their trials.

        Call it before the trials are read. Results that are there already are left out. If the
        file is damaged, a note says so: nothing is decided by it.
        """
        if not self.path.exists():
            return
        try:
            lines = read_lines(self.path)
        except RunError as error:
            self._keep_damaged(error)
            return
        rows_of: dict[str, list[MetricsRow]] = {}
        for line in lines:
            with contextlib.suppress(RunError):  # costs this result only
                row = parse_record(self.path, JournalRow, line)
                values = row.to_dict()
                values.pop("trial_id")
                rows_of.setdefault(row.trial_id, []).append(MetricsRow.model_validate(values))
        for trial in self.run.list_trials():
            if trial.id in rows_of:
                last_step = max((row.step for row in trial.read_metrics()), default=-1)
                missing = [row for row in rows_of[trial.id] if row.step > last_step]
                if missing:
                    trial.add_rows(*missing)
        self.run.check_current()
        self.path.unlink(missing_ok=True)

    def _keep_damaged(self, error: RunError) -> None:
        """Rename a file that cannot be read: nothing is decided by it."""
        self.run.check_current()
        with contextlib.suppress(OSError):
            self.path.rename(self.path.with_name(f"{self.path.name}.damaged"))
        sentence = f"results without an evaluation are not shown: {error}"
        self.run.add_event(NoteEvent(sentence=sentence))
