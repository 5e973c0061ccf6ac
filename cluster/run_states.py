"""Read the states of many runs, each cluster asked once: what `list` shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lorafleet.cluster.backend import RunStatus
from lorafleet.cluster.backends import get_cluster_backend
from lorafleet.cluster.submission import SubmissionRecord, find_record
from lorafleet.jobs.errors import RunError, UserError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.trust import find_distrust_reason


@dataclass
class RunStates:
    """The statuses of submitted runs, and what could not be asked."""

    statuses: dict[Path, RunStatus] = field(default_factory=dict)
    """Folder of the run -> status. Runs of this machine, and runs that must not be acted on, are
    left out.
    """
    notes: list[str] = field(default_factory=list)
    """One message for each cluster that did not answer."""


def read_run_states(runs: Iterable[Run]) -> RunStates:
    """Ask the clusters of submitted runs for their states.

    Runs of one cluster share a query. A run that this user's lorafleet did not create is left
    out: its files could name any cluster. So is a run whose end on a remote cluster is
    recorded.
    """
    groups: dict[str, list[tuple[Run, SubmissionRecord]]] = {}
    for run in runs:
        record = _find_open_record(run)
        if record is not None:
            # All Slurm sites of a machine are one cluster: its commands know no other.
            key = record.kind if record.kind == "slurm" else f"{record.kind} {record.site_name}"
            groups.setdefault(key, []).append((run, record))
    states = RunStates()
    for group in groups.values():
        members = [run for run, _record in group]
        site = group[0][1].site_name
        try:
            answers = get_cluster_backend(group[0][1]).read_statuses(members)
        except UserError as error:
            states.notes.append(f"site {site} was not asked: {error}")
            continue
        states.statuses |= {
            run.path: answer for run, answer in zip(members, answers, strict=True) if answer.fresh
        }
        stale = [answer for answer in answers if not answer.fresh]
        if stale:
            reason = stale[0].message.partition("; the last recorded state")[0]
            states.notes.append(f"{reason}: the states shown for site {site} are the recorded ones")
    return states


def _find_open_record(run: Run) -> SubmissionRecord | None:
    """Return the record of a submitted run whose state a cluster may know better, or None."""
    try:
        record = find_record(run)
        if record is None or find_distrust_reason(run.path) is not None:
            return None
        if record.is_remote and (record.last is not None or run.state not in _ACTIVE):
            return None
    except (RunError, ValueError, OSError):  # `list` reports damaged runs itself
        return None
    return record


_ACTIVE = (RunState.PENDING, RunState.RUNNING)
