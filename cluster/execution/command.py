"""The command that runs lorafleet in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path


def get_driver_command() -> list[str]:
    """Return the command that runs lorafleet.

    That is the console script beside this Python. Without the script, Python runs the same
    main function with `-P`, so that no unrelated folder is on its path.
    """
    script = Path(sys.executable).with_name("lorafleet")
    if script.is_file():
        return [str(script)]
    return [sys.executable, "-P", "-c", "from lorafleet.commands.cli import main; main()"]
