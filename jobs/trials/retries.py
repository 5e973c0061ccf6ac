"""Whether a trial that was ended begins again. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafleet.jobs.schema.job import RetriesSpec


def retry_number(failure: Mapping[str, Any], counts: Mapping[str, int], retries: RetriesSpec) -> int | None:
    """The number of the retry that follows a failure, from 1, or None when the trial is given up.

    `counts` are the trial's earlier retries by class. `data` and `config` have no retries: nothing changes by itself.
    """
    kind = str(failure["failure_class"])
    limit = int(getattr(retries, kind, 0))
    number = counts.get(kind, 0) + 1
    return number if number <= limit and not failure.get("final") else None
