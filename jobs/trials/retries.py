"""Decide whether a failed trial is restarted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafleet.jobs.schema.job import RetriesSpec


def get_retry_number(
    failure: Mapping[str, Any], counts: Mapping[str, int], retries: RetriesSpec
) -> int | None:
    """Return the number of the retry after a failure, from 1; None if the trial is not retried.

    `counts` are the earlier retries of the trial by failure class. `data` and `config` are
    never retried: the same failure would occur again.
    """
    kind = str(failure["failure_class"])
    # The block has no field for `data` and `config`, so their limit is 0.
    limit = int(getattr(retries, kind, 0))
    number = counts.get(kind, 0) + 1
    return number if number <= limit and not failure.get("final") else None
