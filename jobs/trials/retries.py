"""Decide whether a failed trial is restarted. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from lorafleet.jobs.runs.records import FailureRecord
from lorafleet.jobs.schema.job import RetriesSpec


def get_retry_number(
    failure: FailureRecord, counts: Mapping[str, int], retries: RetriesSpec
) -> int | None:
    """Return the number of the retry after a failure, from 1; None if the trial is not retried.

    `counts` are the earlier retries of the trial by failure class. `data` and `config` are
    never retried: the same failure would occur again.
    """
    kind = failure.failure_class
    # The block has no field for `data` and `config`, so their limit is 0.
    limit = int(getattr(retries, kind, 0))
    number = counts.get(kind, 0) + 1
    return number if number <= limit and not failure.final else None
