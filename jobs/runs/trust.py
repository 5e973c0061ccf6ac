"""Check that a run folder is the user's own.

That is: their lorafleet created it, and nobody else could write to it since. A folder
from elsewhere can name any code, any process and any path. lorafleet records the
folders that it creates by their inode, in the user's state folder, which nobody else
can write. A copy, an unpacked archive or another user's folder has no record.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import stat
import struct
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.user import get_state_folder, load_user_config

_ACL = "system.posix_acl_access"
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK = 0x02, 0x04, 0x08, 0x10
_WRITE = 2


def record_own_run(run: Path) -> None:
    """Record that this user's lorafleet created a run folder.

    If the state folder cannot be written, no record is made.
    """
    try:
        mark = secrets.token_hex(16)
        files.write_text(run / _MARK, mark)
        files.write_json(_get_record_path(run), {"path": str(run.absolute()), "mark": mark})
    except OSError:
        return


_MARK = ".own"
"""File with a random mark, which is stored in the run folder and in its record. The inode
alone is not enough, because it can be reused by another folder.
"""


def _read_mark(run: Path) -> str:
    try:
        return files.read_regular_text(run / _MARK, 100)
    except (OSError, ValueError):
        return ""


def remove_run_record(run: Path) -> None:
    """Remove the record of a run folder before the folder is deleted: its inode can be reused."""
    try:
        _get_record_path(run).unlink(missing_ok=True)
    except OSError:
        return


def _get_record_path(run: Path) -> Path:
    """Return the path of a run folder's record.

    Name and inode are part of it: a run that is moved under its name keeps its record, and
    a copy has none.
    """
    return get_state_folder() / "runs" / f"{run.name}-{run.stat().st_ino}.json"


def get_outermost_run(run: Path) -> Path:
    """Return the folder of the run that contains an arm's or an array task's folder."""
    return run.parent.parent if run.parent.name in ("arms", "parts") else run


def find_distrust_reason(run: Path) -> str | None:
    """Return why a run folder may not be this user's own, or None if it is.

    Two conditions must hold. Nobody else can write the folder, the folders above it or the
    state folder. And the state folder has a record of this folder with the mark in its
    `.own` file. The folder of an arm or an array task is judged by the run around it.
    """
    folder = get_outermost_run(run.absolute())
    try:
        reason = find_other_writer(folder) or _find_inner_writer(folder)
        reason = reason or (
            find_other_writer(get_state_folder()) if get_state_folder().is_dir() else None
        )
        if reason:
            return reason
        record = (
            files.read_json(_get_record_path(folder)) if _get_record_path(folder).is_file() else {}
        )
        if record.get("mark") and record["mark"] == _read_mark(folder):
            return None
    except RunError as error:  # a damaged note
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} cannot be accessed: {error.strerror}"
    if not os.access(
        next(path for path in (get_state_folder(), *get_state_folder().parents) if path.exists()),
        os.W_OK,
    ):
        return (
            f"{folder} is unknown, because {get_state_folder()}, where lorafleet records your "
            "runs, is not writable (set XDG_STATE_HOME to another folder)"
        )
    return (
        f"{folder} was not created by your lorafleet at this location: it was copied, or created "
        "by another user or an earlier version"
    )


def check_trusted(run: Path, command: str, *, trust: bool) -> str | None:
    """Raise RunError for a run that is not this user's own, listing what `command` would run.

    Args:
        run: Folder of the run, of an arm or of an array task.
        command: Name of the command, for the message.
        trust: The user has confirmed with `--trust`. A folder that belongs to the user is
            then recorded as their own.

    Returns:
        A note on what runs with `trust`; None for the user's own runs.

    Raises:
        RunError: The run is not the user's own, and `trust` is false.
    """
    reason = find_distrust_reason(run)
    if reason is None:
        return None
    if not trust:
        raise RunError(format_refusal(reason, command, run))
    folder = get_outermost_run(run.absolute())
    if folder.stat().st_uid == os.geteuid():
        record_own_run(folder)
    return f"{reason}. `{command}` runs what its files name: {'; '.join(list_executed_code(run))}"


def format_refusal(reason: str, command: str, run: Path) -> str:
    """Return the error message for a command on a run that is not trusted."""
    return (
        f"{reason}. `{command}` would run what its files name: "
        f"{'; '.join(list_executed_code(run))}. Check the files first, then use --trust to "
        "continue (docs/security.md)"
    )


def find_other_writer(folder: Path) -> str | None:
    """Return which other user can change or replace a folder, as a message, or None.

    The folders above count as well: whoever can write one of them can replace the folder.
    If the path leads through a link, the parents of both ends are checked.
    """
    resolved = files.resolve_links(folder)
    if _is_trusted(
        resolved
        # Its parents are not checked: those who can write them could replace it, and are trusted
        # too.
    ):
        return None
    chain = dict.fromkeys(
        [folder.absolute(), *folder.absolute().parents, resolved, *resolved.parents]
    )
    for path in chain:
        status = path.lstat()
        if stat.S_ISLNK(
            status.st_mode
        ):  # the link target is part of the chain; the owner of the link can redirect it
            if status.st_uid not in (os.geteuid(), 0):
                return f"{path} is a link that belongs to user {_get_user_name(status.st_uid)}"
            continue
        message = _find_writer(path, status, is_target=path in (folder.absolute(), resolved))
        if message:
            return message
    return None


def _is_trusted(resolved: Path) -> bool:
    """Return whether a folder is inside one of the user's trusted folders."""
    trusted = [
        files.resolve_links(files.expand_home(folder))
        for folder in load_user_config().trusted_folders
    ]
    return any(folder == resolved or folder in resolved.parents for folder in trusted)


def _find_writer(path: Path, status: os.stat_result, *, is_target: bool) -> str | None:
    """Return which other user can write a path, as a message, or None.

    Args:
        path: A folder or a file; not a link.
        status: Result of `lstat` for it.
        is_target: False for a folder above the checked one. There a sticky bit protects the
            entries of other users.
    """
    user_id = os.geteuid()
    if status.st_uid not in (user_id, 0):
        return f"{path} belongs to user {_get_user_name(status.st_uid)}"
    if status.st_mode & stat.S_ISVTX and not is_target:
        return None  # in a sticky folder nobody can replace another user's files
    if status.st_mode & stat.S_IWOTH:
        return f"{path} can be written by every user"
    entries = _read_acl(path)
    if entries is None:
        if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid):
            return f"{path} can be written by group {_get_group_name(status.st_gid)}"
        return None
    # The mask limits what entries of users and groups allow; without one they count in full.
    mask = next((perm for tag, perm, _ in entries if tag == _ACL_MASK), 7)
    for tag, perm, number in entries:
        if not perm & mask & _WRITE:
            continue
        if tag == _ACL_USER and number not in (user_id, 0):
            return (
                f"{path} can be written by user {_get_user_name(number)} (according to its access "
                "control list)"
            )
        group = status.st_gid if tag == _ACL_GROUP_OBJ else number
        if tag in (_ACL_GROUP, _ACL_GROUP_OBJ) and not _is_private(group):
            return f"{path} can be written by group {_get_group_name(group)}"
    return None


def _find_inner_writer(folder: Path) -> str | None:
    """Return which other user can write inside a folder that others can reach, or None."""
    top = folder.stat()
    if _is_trusted(files.resolve_links(folder)):
        return None
    # Without the execute bit nobody else reaches what is inside, so its modes do not matter. This
    # saves the walk for runs with the default mode 0700.
    if not top.st_mode & 0o011 and _read_acl(folder) is None:
        return None
    for path, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            inner = Path(path) / name
            status = inner.lstat()
            if not stat.S_ISLNK(status.st_mode):
                message = _find_writer(inner, status, is_target=True)
                if message:
                    return message
    return None


def _read_acl(path: Path) -> list[tuple[int, int, int]] | None:
    """Return the entries of a folder's POSIX ACL, or None if it has none.

    Each entry is (tag, permissions, user or group id).
    """
    try:
        raw = os.getxattr(path, _ACL)
    except AttributeError:  # not Linux
        return None
    except OSError as error:
        # The path has no ACL, or its file system has none at all.
        if error.errno in (errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EINVAL):
            return None
        raise
    # After a version of 4 bytes, each entry has 8 (linux/posix_acl_xattr.h).
    return [struct.unpack_from("<HHI", raw, offset) for offset in range(4, len(raw) - 7, 8)]


def _is_private(group: int) -> bool:
    """Return whether a group is the user's own: it has the user's name and no other members."""
    user_id = os.geteuid()
    if group == 0 and user_id == 0:
        return True
    try:
        user, group_entry = pwd.getpwuid(user_id), grp.getgrgid(group)
    except KeyError:
        return False
    return (
        group == user.pw_gid
        and group_entry.gr_name == user.pw_name
        and set(group_entry.gr_mem) <= {user.pw_name}
    )


def _get_user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _get_group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def list_executed_code(run: Path) -> list[str]:
    """Return the code and actions that running a folder would execute, according to its files."""
    try:
        plan, site = files.read_json(run / "plan.json"), files.read_json(run / "site.json")
    except RunError as error:
        return [str(error)]
    job = _get_block(plan, "job")
    items = [
        f"custom metric {name} ({_get_block(metric).get('function')})"
        for name, metric in _get_block(job, "evaluate", "custom_metrics").items()
    ]
    if _get_block(job, "environment"):
        items.append(f"environment {', '.join(map(str, _get_block(job, 'environment')))}")
    if _get_block(job, "model").get("trust_remote_code"):
        items.append(f"the code of model {_get_block(job, 'model').get('model_name_or_path')}")
    if (run / "slurm" / "job.sbatch").is_file():
        items.append("the batch script slurm/job.sbatch")
    elif site:
        site_config = _get_block(site, "site")
        items.append(
            f"requests to site {site_config.get('name')} "
            f"({site_config.get('address') or site.get('kind')})"
        )
    site_config = _get_block(site, "site")
    if site_config.get("setup") or site_config.get("template"):
        items.append(f"the set-up lines and template of site {site_config.get('name')}")
    address = _get_block(job, "tracking").get("base_url")
    if address:
        items.append(f"W&B at {address}")
    output = _get_block(plan, "delivery").get("output")
    if output:
        items.append(f"export files to {output}")
    nested = sorted({path.parent.parent.name for path in run.glob("*/*/plan.json")})
    if nested:
        items.append(f"what the plans in {' and '.join(nested)} name")
    model = _get_block(job, "model").get("model_name_or_path")
    data = _get_block(job, "data").get("train_file") or _get_block(job, "data").get("dataset_name")
    return [*items, f"a {plan.get('command', 'training')} of {model} on {data}"]


def _get_block(tree: Any, *keys: str) -> dict[str, Any]:
    """Return a block of a tree that anybody may have written; empty if it is not a block."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
