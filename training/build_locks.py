"""Locks of torch's builds of extensions: one whose builder was killed makes every later build wait without end.

DeepSpeed builds its CPU collectives when it is first used. torch holds the lock by a file that exists, open in its
builder; nothing removes it when that is killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "9p", "fuse")
_QUIET_SECONDS = 900.0
"""Without a change in a build's folder, after which a builder on another machine is taken for dead."""


def clear_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove the locks of builds whose builder is gone; returns them. Those of other users stay."""
    found = []
    for lock in sorted((root or _build_root()).glob("*/*/lock")) if (root or _build_root()).is_dir() else ():
        with contextlib.suppress(OSError):
            if lock.is_file() and not lock.is_symlink() and lock.stat().st_uid == os.geteuid() and _is_stale(lock):
                lock.unlink()
                found.append(lock)
    return found


def _build_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(own).parent if own else Path(get_default_build_root())


def _is_stale(lock: Path) -> bool:
    if _is_held_here(lock):
        return False
    if not _on_network(lock):
        return True
    newest = max(path.lstat().st_mtime for path in lock.parent.iterdir())
    return time.time() - newest > _QUIET_SECONDS


def _is_held_here(lock: Path) -> bool:
    """Whether a process of this user on this machine has the lock open, as its builder has."""
    for process in psutil.process_iter(["uids"]):
        uids = process.info["uids"]
        if uids is None or uids.real != os.geteuid():
            continue
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if handle.readlink() == lock.absolute():
                        return True
    return False


def _on_network(path: Path) -> bool:
    """Whether a path lies on a file system that other machines share."""
    place, kind = "", ""
    for part in psutil.disk_partitions(all=True):
        if f"{path.absolute()}/".startswith(f"{part.mountpoint.rstrip('/')}/") and len(part.mountpoint) >= len(place):
            place, kind = part.mountpoint, part.fstype
    return kind.startswith(_NETWORK)
