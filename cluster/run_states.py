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

_ACTIVE = (RunState.PENDING, RunState.RUNNING)
ENDED = "ended"
"""State of a run that has ended on a remote cluster, and whose record was not downloaded yet: how
it ended is in the record.
"""


@dataclass
class RunStates:
    """The states of submitted runs, and which clusters did not answer."""

    states: dict[Path, str] = field(default_factory=dict)
    """Folder of the run -> state. Runs of this machine, and runs that must not be acted on, are
    left out.
    """
    notes: list[str] = field(default_factory=list)
    """One message for each cluster that did not answer."""


def read_run_states(runs: Iterable[Run]) -> RunStates:
    """Ask the clusters of submitted runs for their states. Nothing is recorded.

    Runs of one cluster share a query. A run that this user's lorafleet did not create is left
    out: its files could name any cluster. So is a damaged run, and one whose end on a remote
    cluster is recorded.
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
        _ask_cluster(group, states)
    return states


def _ask_cluster(group: list[tuple[Run, SubmissionRecord]], states: RunStates) -> None:
    """Add the states of the runs of one cluster.

    If it does not answer, a note is added, unless all of the runs say themselves that they have
    ended.
    """
    runs = [run for run, _record in group]
    site, is_remote = group[0][1].site_name, group[0][1].is_remote
    has_active = any(run.state in _ACTIVE for run in runs)
    try:
        statuses = get_cluster_backend(group[0][1]).read_statuses(runs)
    except (UserError, ValueError) as error:  # the record of a site of another version
        if has_active:
            states.notes.append(f"site {site} was not asked: {error}")
        return
    for run, status in zip(runs, statuses, strict=True):
        if status.fresh:
            states.states[run.path] = _describe_state(status, is_remote=is_remote)
    stale = [status for status in statuses if not status.fresh]
    if stale and has_active:
        states.notes.append(
            f"{stale[0].problem or stale[0].message}: the states shown for site {site} are the "
            "recorded ones"
        )


def _describe_state(status: RunStatus, *, is_remote: bool) -> str:
    """Return the state for people.

    What a remote cluster says of the end is coarse: Ray reports a stopped run as succeeded.
    """
    return ENDED if is_remote and status.state not in _ACTIVE else str(status.state)


def _find_open_record(run: Run) -> SubmissionRecord | None:
    """Return the record of a submitted run whose state a cluster may know better, or None."""
    try:
        record = find_record(run)
        if record is None or find_distrust_reason(run.path) is not None:
            return None
        is_active = run.state in _ACTIVE  # fails for a damaged run
        if record.is_remote and (record.last is not None or not is_active):
            return None
    except (RunError, ValueError, OSError):  # `list` reports damaged runs itself
        return None
    return record
