"""Choose the machines of a trial with several processes on each of several machines.

Ray Train asks for one bundle per process, and Ray has no strategy that puts a given number of them
on each machine: PACK fills a machine with as many as fit. So the machines are chosen first, by a
placement group with one bundle per machine, and Ray Train's bundles are then pinned to them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.sites.placement import Placement

_NODE_ID_LABEL = "ray.io/node-id"
"""Label that Ray itself gives to each node."""
_WAIT_SECONDS = 900.0
"""Longest wait for machines. Trials start only while there is room for them."""
_HANDOVER_SECONDS = 60.0
"""Longest time from the release of the machines to Ray Train's own placement group."""
_POLL_SECONDS = 0.1


@contextlib.contextmanager
def choose_machines(placement: Placement, storage: Path) -> Iterator[list[dict[str, str]]]:
    """Yield a label selector for each process: consecutive processes share a machine.

    One trial at a time chooses, until Ray Train has its own placement group there: otherwise
    two trials could be sent to the same free cores. All trials choose on the head node, so a
    lock of that machine is enough.

    Args:
        placement: A placement that `needs_node_bundles`.
        storage: Folder of the lock.

    Raises:
        RuntimeError: Not enough machines were free in time.
    """
    handover = _Handover(placement, storage)
    thread = threading.Thread(target=handover.run, daemon=True, name="choose machines")
    thread.start()
    handover.chosen.wait()
    if handover.error is not None:
        raise handover.error
    per_node = placement.workers // placement.num_nodes
    try:
        yield [
            {**placement.labels, _NODE_ID_LABEL: node}
            for node in handover.nodes
            for _ in range(per_node)
        ]
    finally:
        handover.is_over.set()
        thread.join()


class _Handover:
    """The choice of machines, in a thread that holds the lock until Ray Train has them."""

    def __init__(self, placement: Placement, storage: Path) -> None:
        self.placement, self.storage = placement, storage
        self.nodes: list[str] = []
        self.error: Exception | None = None
        self.chosen = threading.Event()
        """Set once `nodes` or `error` is."""
        self.is_over = threading.Event()
        """Set once the group has ended, perhaps before it had a placement group."""

    def run(self) -> None:
        try:
            with files.hold_lock(self.storage / "machines"):
                self.nodes = _reserve(self.placement)
                earlier_groups = set(_list_groups())
                self.chosen.set()
                # A failure from here on costs only the order of trials, not this one.
                with contextlib.suppress(Exception):
                    self._wait_for_group(earlier_groups)
        # The caller raises it in its own thread.
        except Exception as error:  # noqa: BLE001
            self.error = error
        finally:
            self.chosen.set()

    def _wait_for_group(self, earlier_groups: set[str]) -> None:
        """Wait for Ray Train's placement group, which is none of the earlier ones."""
        deadline = time.monotonic() + _HANDOVER_SECONDS
        while not self.is_over.wait(_POLL_SECONDS) and time.monotonic() < deadline:
            groups = _list_groups()
            if any(self._is_group(groups[name]) for name in groups.keys() - earlier_groups):
                return

    def _is_group(self, row: dict[str, Any]) -> bool:
        nodes = list(row["bundles_to_node_id"].values())
        return (
            row["state"] == "CREATED"
            and len(nodes) == self.placement.workers
            and set(nodes) == set(self.nodes)
        )


def _list_groups() -> dict[str, dict[str, Any]]:
    """Return the placement groups of the cluster: id -> its state and machines."""
    from ray.util.placement_group import placement_group_table

    groups: dict[str, dict[str, Any]] = placement_group_table()
    return groups


def _reserve(placement: Placement) -> list[str]:
    """Return the ids of machines that have room for the trial, and release them."""
    from ray.util.placement_group import (
        placement_group,
        placement_group_table,
        remove_placement_group,
    )

    share = placement.share
    bundle = {"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {})}
    group = placement_group(
        bundles=[bundle] * share.nodes,
        strategy="STRICT_SPREAD",
        bundle_label_selector=[placement.labels] * share.nodes if placement.labels else None,
    )
    try:
        if not group.wait(_WAIT_SECONDS):
            raise RuntimeError(f"the cluster had no room for {share} within 15 minutes")
        bundles = placement_group_table(group)["bundles_to_node_id"]
        return [bundles[number] for number in sorted(bundles)]
    finally:
        remove_placement_group(group)
