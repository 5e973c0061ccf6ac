"""Environment variables that a file may set: for what it says stands in scripts, records and logs."""

from __future__ import annotations

import re

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}
"""What keeps machines without internet from asking hubs and W&B."""
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")


def may_be_secret(name: str) -> bool:
    """Whether a variable's name sounds like one whose value nobody else must see."""
    return any(word in name.upper() for word in _SECRET)


def checked_environment(environment: dict[str, str]) -> dict[str, str]:
    """Names and values that may stand in a script. Raises ValueError for names that may hold a secret."""
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name of a variable")
        if name == "RAY_ADDRESS" or name.startswith(("RAY_AUTH_", "LF_", "SLURM_")):
            raise ValueError(f"{name} is set by lorafleet or by the queue itself, and must not stand here")
        if may_be_secret(name):
            raise ValueError(
                f"{name} may hold a secret, which would stand in the script and in records that others can read: log "
                "in on the machine instead (wandb login, hf auth login)"
            )
        if "\n" in value or "\0" in value:
            raise ValueError(f"{name} has a line break in its value")
    return environment
