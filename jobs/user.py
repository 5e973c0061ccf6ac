"""The user's state folder and settings for all runs.

The state folder (XDG_STATE_HOME) holds what lorafleet records about this user's runs
and downloads, such as which run folders are trusted. The settings (XDG_CONFIG_HOME)
apply to all runs of the user. Settings of one run belong in its job file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from lorafleet.jobs import files, yaml12
from lorafleet.jobs.errors import JobFileError, Problem
from lorafleet.jobs.schema.base import Spec, Texts


class UserConfig(Spec):
    """The user's settings, from `~/.config/lorafleet/config.yaml`."""

    share: Literal["none", "group"] = "none"
    """Who may read new run folders besides their owner. Run folders contain held-out texts."""
    trusted_folders: Texts = ()
    """Folders that others can write to and whose writers you trust like yourself, such as a
    project folder shared by a group.
    """


def get_state_folder() -> Path:
    """Return the folder in which lorafleet records what it did for this user.

    It is `lorafleet` below XDG_STATE_HOME, by default ~/.local/state. It may not exist, or
    may not be writable: callers then work without their record.
    """
    home = os.environ.get("XDG_STATE_HOME") or files.expand_home("~/.local/state")
    return Path(home) / "lorafleet"


def get_config_folder() -> Path:
    """Return the folder of the user's settings and sites.

    It is `lorafleet` below XDG_CONFIG_HOME, by default ~/.config. It may not exist.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or files.expand_home("~/.config")
    return Path(home) / "lorafleet"


def load_user_config() -> UserConfig:
    """Load the user's settings, or the defaults if there is no config.yaml.

    The folders of the environment variable LORAFLEET_TRUSTED_FOLDERS (separated as in PATH)
    are added to `trusted_folders`.

    Raises:
        JobFileError: If config.yaml cannot be read or has wrong values; all problems are
            listed with their lines.
    """
    extra_folders = os.environ.get("LORAFLEET_TRUSTED_FOLDERS")
    config = _read_config()
    # The variable is for one shell or container, such as a job's container, which does not see the
    # user's config.yaml.
    if extra_folders:
        folders = tuple(folder for folder in extra_folders.split(os.pathsep) if folder)
        config = config.model_copy(update={"trusted_folders": (*config.trusted_folders, *folders)})
    return config


def _read_config() -> UserConfig:
    path = get_config_folder() / "config.yaml"
    try:
        text = files.read_regular_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return UserConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(str(path), [Problem("", f"cannot be read: {error}")]) from error
    document = yaml12.parse_document(text)
    if document.problems:
        raise JobFileError(str(path), document.problems)
    try:
        return UserConfig.model_validate({} if document.value is None else document.value)
    except ValidationError as error:
        # Imported here: it builds the schema of the whole job, which few commands need.
        from lorafleet.jobs.schema.validation_messages import list_problems

        problems = list_problems(error, valid_keys=list(UserConfig.model_fields))
        raise JobFileError(
            str(path),
            [
                Problem(problem.path, problem.sentence, document.lines.get(problem.path))
                for problem in problems
            ],
        ) from None
