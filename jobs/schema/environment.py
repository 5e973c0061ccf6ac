"""Check the environment variables that a job file or a site file sets.

Their values are written to scripts, records and logs, so no name may suggest a secret.
Job files are shared between people: a job may not set what changes the code that runs,
unless its site allows the variable. A site file may, because its set-up lines are code
anyway.
"""

from __future__ import annotations

import re

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
}
"""Variables that keep nodes without internet access from contacting hubs and W&B."""
_SECRET_WORDS = (
    "TOKEN",
    "KEY",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "CREDENTIAL",
    "COOKIE",
    "BEARER",
)
_CODE_PATTERN = (
    r"LD_\w+|DYLD_\w+|BASH_\w+|GIT_\w+|SSH_\w+|OPENSSL_\w+|PERL\w+|RUBY\w+|PIP_\w+|UV_\w+"
    r"|CONDA_\w+|XDG_\w+"
    r"|MATPLOTLIB\w*|MPL\w+|LORAFLEET_\w+|CUDA_INJECTION\w+|_\w+"
    r"|\w*(HOOKS?|PLUGINS?|PRELOAD\w*|STARTUP|EXECUTABLE|COMPILER|LAUNCHER|WRAPPER|COMMAND|_CMD"
    r"|_TOOL|BACKEND)"
    r"|\w*(PATH|_HOME|_ROOT|MODULES?|LIBRARY|LIBRARIES|CACHE|_LIBS?|_INIT|_RC|_ENV_FILE|CONF"
    r"|CONFIG|CONF_FILE|CONFIG_FILE)"
    r"|\w*(MODULE|LIBRARY|EXTENSIONS|PLUGIN|CACHE|CODE|LIB|BIN|CONFIG)_(DIR|PATH|FILE|ROOT|HOME"
    r"|NAME)S?"
    r"|\w*(CC|CXX|NVCC|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|OPTIONS|PYTHON)"
    r"|PATH|HOME|ENV|IFS|PS4|SHELL|SHELLOPTS|BASHOPTS|PROMPT_COMMAND|EDITOR|VISUAL|PAGER|BROWSER"
    r"|TERMINFO|NLSPATH"
    r"|OMP_TOOL\w*|NVCC\w*|ZDOTDIR|VIRTUAL_ENV|KUBECONFIG|INPUTRC|TMPDIR|TMP|TEMP|HOSTFILE"
    r"|HF_ENDPOINT|HF_MIRROR|WANDB_BASE_URL"
)
_CHANGES_CODE = re.compile(_CODE_PATTERN, re.IGNORECASE)
_CHANGES_SETTINGS = re.compile(
    r"RAY_\w+|\w*_PROXY|\w*CERT\w*|\w*CA_BUNDLE|NETRC|COVERAGE_\w+|OMPI_\w+|PMI\w+|\w*OVERRIDE\w*"
    r"|\w*TRUST_REMOTE_CODE"
    r"|\w*WEIGHTS_ONLY\w*|\w*(BASE_URL|ENDPOINT|_HOST|REGISTRY|INDEX_URL|MIRROR)|SQL\w*|R_\w+"
    r"|NODE_\w+|JAVA_\w+",
    re.IGNORECASE,
)
"""Variables that decide which servers programs contact, or that replace all settings of a
library.
"""
_PYTHON_HARMLESS = frozenset(
    f"PYTHON{name}"
    for name in "HASHSEED UNBUFFERED FAULTHANDLER UTF8 IOENCODING DONTWRITEBYTECODE MALLOC "
    "TRACEMALLOC SAFEPATH "
    "NOUSERSITE ASYNCIODEBUG INTMAXSTRDIGITS DEVMODE".split()
)
"""Python's harmless variables. All other PYTHON* variables decide which modules are loaded, or
from where.
"""
_HARMLESS = (
    frozenset({"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"})
    | _PYTHON_HARMLESS
)
"""Names that match the patterns but are harmless, such as those of the allocator."""


def is_secret_name(name: str) -> bool:
    """Return whether the name of a variable suggests that its value is a secret.

    The words match anywhere in the name, so harmless names such as TOKENIZERS_PARALLELISM
    match too.
    """
    return any(word in name.upper() for word in _SECRET_WORDS)


def can_change_code(name: str) -> bool:
    """Return whether a variable can change which code runs or which servers it contacts.

    That covers programs, modules, libraries and their origin. The decision is made by name:
    variables that load code use a few common words, and new libraries use the same words.
    """
    # Most of Python's variables decide which modules are loaded, so only the listed ones pass.
    if name.upper().startswith("PYTHON"):
        return name not in _HARMLESS
    match = _CHANGES_CODE.fullmatch(name) or _CHANGES_SETTINGS.fullmatch(name)
    return match is not None and name not in _HARMLESS


def validate_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment if its names and values may be written to a script.

    Raises:
        ValueError: A name is invalid, reserved or may hold a secret, or a value has a line
            break.
    """
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is not a valid name of a variable")
        if name == "RAY_ADDRESS" or name.startswith(("RAY_AUTH_", "LF_", "SLURM_")):
            raise ValueError(f"{name} is set by lorafleet or by the queue, and cannot be set here")
        if is_secret_name(name):
            raise ValueError(
                f"{name} may hold a secret, which others could read in the script and in records: "
                "log in on the machine instead (wandb login, hf auth login)"
            )
        if "\n" in value or "\0" in value:
            raise ValueError(f"{name} has a line break in its value")
    return environment
