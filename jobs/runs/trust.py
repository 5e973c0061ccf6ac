"""Whether a run folder is this user's own: made by their lorafleet, and written by nobody else since.

A folder that came from elsewhere can name any code, any process and any path. What lorafleet made it remembers by the
folder's inode in the user's state folder, which nobody else can write; a copy, an unpacked archive or another user's
folder is not remembered.
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
from lorafleet.jobs.user import state_folder, user_config

_ACL = "system.posix_acl_access"
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK = 0x02, 0x04, 0x08, 0x10
_WRITE = 2


def remember(run: Path) -> None:
    """Note that this user's lorafleet has made a run folder. A state folder that cannot be written costs the note."""
    try:
        mark = secrets.token_hex(16)
        files.write_text(run / _MARK, mark)
        files.write_json(_note(run), {"path": str(run.absolute()), "mark": mark})
    except OSError:
        return


_MARK = ".own"
"""A random word in a run's folder and in the note on it: an inode alone is given to another folder again."""


def _mark_of(run: Path) -> str:
    try:
        return files.read_plain_text(run / _MARK, 100)
    except (OSError, ValueError):
        return ""


def forget(run: Path) -> None:
    """Take the note away, before its folder goes: another may get its inode."""
    try:
        _note(run).unlink(missing_ok=True)
    except OSError:
        return


def _note(run: Path) -> Path:
    return state_folder() / "runs" / f"{run.name}-{run.stat().st_ino}.json"


def outermost(run: Path) -> Path:
    """Return the folder of the run that an arm's or a part's belongs to."""
    return run.parent.parent if run.parent.name in ("arms", "parts") else run


def distrust(run: Path) -> str | None:
    """Say why a run folder may not be this user's own; None where it is."""
    folder = outermost(run.absolute())
    try:
        sentence = others_can_write(folder) or _inner_writers(folder)
        sentence = sentence or (others_can_write(state_folder()) if state_folder().is_dir() else None)
        if sentence:
            return sentence
        note = files.read_json(_note(folder)) if _note(folder).is_file() else {}
        if note.get("mark") and note["mark"] == _mark_of(folder):
            return None
    except RunError as error:  # a damaged note
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} cannot be looked at: {error.strerror}"
    if not os.access(next(one for one in (state_folder(), *state_folder().parents) if one.exists()), os.W_OK):
        return f"{folder} is not known: {state_folder()}, where your runs are noted, cannot be written (XDG_STATE_HOME)"
    return (
        f"{folder} was not created by your lorafleet at this location: it was copied, or created by another user or an "
        "earlier version"
    )


def check_trusted(run: Path, command: str, *, trust: bool) -> str | None:
    """Raise RunError for a run that is not this user's own, with what `command` would run.

    With `trust`, return a note on what runs instead (None for the user's own runs). A folder that belongs to the
    user is then remembered as their own.
    """
    reason = distrust(run)
    if reason is None:
        return None
    if not trust:
        raise RunError(refusal(reason, command, run))
    folder = outermost(run.absolute())
    if folder.stat().st_uid == os.geteuid():
        remember(folder)
    return f"{reason}. `{command}` runs what it says: {'; '.join(what_runs(run))}"


def refusal(reason: str, command: str, run: Path) -> str:
    """Return the message for a command on a run that is not trusted."""
    return (
        f"{reason}. `{command}` would run what it says: {'; '.join(what_runs(run))}. Look into it first; --trust goes "
        "on (docs/security.md)"
    )


def others_can_write(folder: Path) -> str | None:
    """Say which other user can change a folder, by itself or by putting another in its place; None where none can."""
    resolved = files.real(folder)
    if _is_trusted(resolved):  # with all that is above it: its writers could put another in its place, and are trusted
        return None
    chain = dict.fromkeys([folder.absolute(), *folder.absolute().parents, resolved, *resolved.parents])
    for place in chain:
        now = place.lstat()
        if stat.S_ISLNK(now.st_mode):  # what it leads to is in the chain; its owner can turn it round
            if now.st_uid not in (os.geteuid(), 0):
                return f"{place} is a link of user {_user(now.st_uid)}"
            continue
        sentence = _open_to(place, now, own=place in (folder.absolute(), resolved))
        if sentence:
            return sentence
    return None


def _is_trusted(resolved: Path) -> bool:
    """Whether a folder lies in one that the user has listed."""
    trusted = [files.real(files.in_home(one)) for one in user_config().trusted_folders]
    return any(one == resolved or one in resolved.parents for one in trusted)


def _open_to(place: Path, now: os.stat_result, *, own: bool) -> str | None:
    me = os.geteuid()
    if now.st_uid not in (me, 0):
        return f"{place} belongs to user {_user(now.st_uid)}"
    if now.st_mode & stat.S_ISVTX and not own:
        return None  # in a sticky folder nobody replaces what is another's
    if now.st_mode & stat.S_IWOTH:
        return f"{place} can be written by every user"
    entries = _acl(place)
    if entries is None:
        if now.st_mode & stat.S_IWGRP and not _is_private(now.st_gid):
            return f"{place} can be written by group {_group(now.st_gid)}"
        return None
    mask = next((perm for tag, perm, _ in entries if tag == _ACL_MASK), 7)
    for tag, perm, number in entries:
        if not perm & mask & _WRITE:
            continue
        if tag == _ACL_USER and number not in (me, 0):
            return f"{place} can be written by user {_user(number)} (its access list says so)"
        group = now.st_gid if tag == _ACL_GROUP_OBJ else number
        if tag in (_ACL_GROUP, _ACL_GROUP_OBJ) and not _is_private(group):
            return f"{place} can be written by group {_group(group)}"
    return None


def _inner_writers(folder: Path) -> str | None:
    """Look at what is inside, where others can reach it."""
    top = folder.stat()
    if _is_trusted(files.real(folder)):
        return None
    if not top.st_mode & 0o011 and _acl(folder) is None:
        return None
    for path, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            inner = Path(path) / name
            now = inner.lstat()
            if not stat.S_ISLNK(now.st_mode):
                sentence = _open_to(inner, now, own=True)
                if sentence:
                    return sentence
    return None


def _acl(place: Path) -> list[tuple[int, int, int]] | None:
    """(tag, permissions, user or group) of each entry of a POSIX access list; None where there is none."""
    try:
        raw = os.getxattr(place, _ACL)
    except AttributeError:  # not Linux
        return None
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EINVAL):
            return None
        raise
    return [struct.unpack_from("<HHI", raw, at) for at in range(4, len(raw) - 7, 8)]


def _is_private(group: int) -> bool:
    """Whether a group is the user's own: named as they are, and without other members."""
    me = os.geteuid()
    if group == 0 and me == 0:
        return True
    try:
        user, found = pwd.getpwuid(me), grp.getgrgid(group)
    except KeyError:
        return False
    return group == user.pw_gid and found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def what_runs(run: Path) -> list[str]:
    """Return what a run's folder would have executed, as far as its files say."""
    try:
        plan, site = files.read_json(run / "plan.json"), files.read_json(run / "site.json")
    except RunError as error:
        return [str(error)]
    job = _inner(plan, "job")
    found = [
        f"custom metric {name} ({_inner(metric).get('function')})"
        for name, metric in _inner(job, "evaluate", "custom_metrics").items()
    ]
    if _inner(job, "environment"):
        found.append(f"environment {', '.join(map(str, _inner(job, 'environment')))}")
    if _inner(job, "model").get("trust_remote_code"):
        found.append(f"the code of model {_inner(job, 'model').get('model_name_or_path')}")
    if (run / "slurm" / "job.sbatch").is_file():
        found.append("the batch script slurm/job.sbatch")
    elif site:
        own = _inner(site, "site")
        found.append(f"requests to site {own.get('name')} ({own.get('address') or site.get('kind')})")
    own = _inner(site, "site")
    if own.get("setup") or own.get("template"):
        found.append(f"the set-up lines and template of site {own.get('name')}")
    address = _inner(job, "tracking").get("base_url")
    if address:
        found.append(f"W&B at {address}")
    output = _inner(plan, "delivery").get("output")
    if output:
        found.append(f"exported files in {output}")
    nested = sorted({path.parent.parent.name for path in run.glob("*/*/plan.json")})
    if nested:
        found.append(f"what the plans below {' and '.join(nested)} say")
    model = _inner(job, "model").get("model_name_or_path")
    data = _inner(job, "data").get("train_file") or _inner(job, "data").get("dataset_name")
    return [*found, f"a {plan.get('command', 'training')} of {model} on {data}"]


def _inner(tree: Any, *keys: str) -> dict[str, Any]:
    """Return a block of a tree that anybody may have written; empty where it is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
