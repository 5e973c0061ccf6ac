"""Remove stale locks of torch's extension builds.

DeepSpeed builds its CPU collectives when it is first used. torch represents the lock by
a file that the building process keeps open. If that process is killed, nothing removes
the file and every later build waits forever.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

_NETWORK_FILE_SYSTEMS = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "afs",
    "9p",
    "fuse",
)
_QUIET_SECONDS = 900.0
"""Seconds without a change in a build's folder until a remote builder counts as dead."""


def clear_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove and return the locks of builds whose process is gone.

    Locks of other users, symbolic links and files that vanish meanwhile are left alone.

    Args:
        root: Folder with one subfolder of builds for each Python and CUDA version. None:
            torch's own folder, or the parent of TORCH_EXTENSIONS_DIR.

    Returns:
        The removed lock files. `Zero` warns about each of them.
    """
    removed = []
    for lock in (
        sorted((root or _get_build_root()).glob("*/*/lock"))
        if (root or _get_build_root()).is_dir()
        else ()
    ):
        # Another process of this node may remove the same lock at the same time.
        with contextlib.suppress(OSError):
            if (
                lock.is_file()
                and not lock.is_symlink()
                and lock.stat().st_uid == os.geteuid()
                and _is_stale(lock)
            ):
                lock.unlink()
                removed.append(lock)
    return removed


def _get_build_root() -> Path:
    """Return the folder that contains torch's extension builds."""
    from torch.utils.cpp_extension import get_default_build_root

    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    # The parent covers TORCH_EXTENSIONS_DIR itself with the pattern `*/*/lock`.
    return Path(configured).parent if configured else Path(get_default_build_root())


def _is_stale(lock: Path) -> bool:
    """Return whether the process that created the lock is gone.

    On a network file system, where the process may run on another machine, the build's
    folder must have been unchanged for `_QUIET_SECONDS`.
    """
    if _is_held_locally(lock):
        return False
    if not _is_on_network(lock):
        return True
    # A compiler on another machine is visible only by the files that it writes.
    newest = max(path.lstat().st_mtime for path in lock.parent.iterdir())
    return time.time() - newest > _QUIET_SECONDS


def _is_held_locally(lock: Path) -> bool:
    """Return whether a local process of this user has the lock file open, as its builder does."""
    for process in psutil.process_iter(["uids"]):
        uids = process.info["uids"]
        # The file handles of other users' processes are not readable, and their locks are not ours
        # to judge.
        if uids is None or uids.real != os.geteuid():
            continue
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if handle.readlink() == lock.absolute():
                        return True
    return False


def _is_on_network(path: Path) -> bool:
    """Return whether a path is on a file system that other machines share."""
    # The longest mount point that contains the path is the file system that it is on.
    mountpoint, kind = "", ""
    for partition in psutil.disk_partitions(all=True):
        if f"{path.absolute()}/".startswith(f"{partition.mountpoint.rstrip('/')}/") and len(
            partition.mountpoint
        ) >= len(mountpoint):
            mountpoint, kind = partition.mountpoint, partition.fstype
    return kind.startswith(_NETWORK_FILE_SYSTEMS)
