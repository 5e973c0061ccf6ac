"""What lorafleet keeps for its user (XDG_STATE_HOME), and what the user has set for all runs (XDG_CONFIG_HOME)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from lorafleet.jobs import files
from lorafleet.jobs.errors import JobFileError, Problem
from lorafleet.jobs.loading import yaml12
from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.validation_messages import sentences
from pydantic import ValidationError


class UserConfig(Spec):
    """`~/.config/lorafleet/config.yaml`."""

    share: Literal["none", "group"] = "none"
    """Who may read new run folders beside their owner. They hold the held-out texts."""
    trusted_folders: Texts = ()
    """Folders that others can write to, and whose writers you trust as yourself: a project's, which a group shares."""


def state_folder() -> Path:
    """Where lorafleet remembers what it did for this user."""
    home = os.environ.get("XDG_STATE_HOME") or files.in_home("~/.local/state")
    return Path(home) / "lorafleet"


def config_folder() -> Path:
    """Where the user's own settings and sites lie."""
    home = os.environ.get("XDG_CONFIG_HOME") or files.in_home("~/.config")
    return Path(home) / "lorafleet"


def user_config() -> UserConfig:
    """Read the user's settings; the defaults where there are none. Raises JobFileError."""
    named = os.environ.get("LORAFLEET_TRUSTED_FOLDERS")
    found = _read_config()
    if named:
        folders = tuple(one for one in named.split(os.pathsep) if one)
        found = found.model_copy(update={"trusted_folders": (*found.trusted_folders, *folders)})
    return found


def _read_config() -> UserConfig:
    path = config_folder() / "config.yaml"
    try:
        text = files.read_plain_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return UserConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(str(path), [Problem("", f"cannot be read: {error}")]) from error
    document = yaml12.read(text)
    if document.problems:
        raise JobFileError(str(path), document.problems)
    try:
        return UserConfig.model_validate({} if document.value is None else document.value)
    except ValidationError as error:
        found = sentences(error, known=list(UserConfig.model_fields))
        raise JobFileError(
            str(path), [Problem(one.path, one.sentence, document.lines.get(one.path)) for one in found]
        ) from None
