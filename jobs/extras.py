"""The parts of lorafleet that a client-only installation does not have.

`pip install lorafleet` installs the client: it checks and plans jobs, submits them to clusters and
reads runs. `lorafleet[train]` adds what trains, evaluates and exports.
"""

from __future__ import annotations

import importlib.util
import re

from lorafleet.jobs.errors import MissingExtra

TRAIN_COMMAND = "pip install 'lorafleet[train]'"
TRAIN_MODULES = frozenset(
    """
    accelerate bitsandbytes datasets deepspeed evaluate fastapi gguf matplotlib nltk optuna peft
    pyarrow pynvml ray regex rouge_score safetensors scipy sse_starlette torch transformers uvicorn
    wandb
    """.split()
)
"""Modules that the extra `train` installs."""


def has_module(name: str) -> bool:
    """Return whether a module is installed. It is looked up and not imported."""
    return importlib.util.find_spec(name) is not None


def require_training(purpose: str) -> None:
    """Check that the packages of the extra `train` are installed.

    Args:
        purpose: What needs them, as the beginning of the message.

    Raises:
        MissingExtra: One of them is missing. The message has the install command.
    """
    missing = [name for name in ("torch", "ray", "transformers") if not has_module(name)]
    if missing:
        raise MissingExtra(
            f"{purpose} needs {', '.join(missing)}, which this installation does not have: "
            f"{TRAIN_COMMAND}"
        )


def describe_missing_module(name: str) -> str | None:
    """Return a message for a missing module of the extra `train`; None for any other module."""
    if name.partition(".")[0] not in TRAIN_MODULES:
        return None
    return (
        f"this command needs {name.partition('.')[0]}, which this installation does not have: "
        f"{TRAIN_COMMAND}"
    )


def get_ray_version() -> str:
    """Return the version of Ray that a cluster must have.

    It is the installed version. A client without Ray takes the lowest version that lorafleet
    allows, which is the one that it was released with.
    """
    # Imported here, because it takes a while and most commands do not need it.
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        return version("ray")
    except PackageNotFoundError:
        bounds = next(line for line in requires("lorafleet") or () if re.match(r"ray\b", line))
        match = re.search(r">=\s*([0-9.]+)", bounds)
        if match is None:
            raise MissingExtra(f"the version of Ray is not known: {TRAIN_COMMAND}") from None
        return match[1]
