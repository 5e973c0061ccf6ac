"""Environment variables that a file may set: for what it says stands in scripts, records and logs."""

from __future__ import annotations

import re

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}
"""What keeps machines without internet from asking hubs and W&B."""
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "COOKIE", "BEARER")
_CODE_WORDS = (
    r"LD_\w+|DYLD_\w+|BASH_\w+|GIT_\w+|SSH_\w+|OPENSSL_\w+|PERL\w+|RUBY\w+|PIP_\w+|UV_\w+|CONDA_\w+|XDG_\w+"
    r"|MATPLOTLIB\w*|MPL\w+|LORAFLEET_\w+|CUDA_INJECTION\w+|_\w+"
    r"|\w*(HOOKS?|PLUGINS?|PRELOAD\w*|STARTUP|EXECUTABLE|COMPILER|LAUNCHER|WRAPPER|COMMAND|_CMD|_TOOL|BACKEND)"
    r"|\w*(PATH|_HOME|_ROOT|MODULES?|LIBRARY|LIBRARIES|CACHE|_LIBS?|_INIT|_RC|_ENV_FILE|CONF|CONFIG|CONF_FILE|CONFIG_FILE)"
    r"|\w*(MODULE|LIBRARY|EXTENSIONS|PLUGIN|CACHE|CODE|LIB|BIN|CONFIG)_(DIR|PATH|FILE|ROOT|HOME|NAME)S?"
    r"|\w*(CC|CXX|NVCC|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|OPTIONS|PYTHON)"
    r"|PATH|HOME|ENV|IFS|PS4|SHELL|SHELLOPTS|BASHOPTS|PROMPT_COMMAND|EDITOR|VISUAL|PAGER|BROWSER|TERMINFO|NLSPATH"
    r"|OMP_TOOL\w*|NVCC\w*|ZDOTDIR|VIRTUAL_ENV|KUBECONFIG|INPUTRC|TMPDIR|TMP|TEMP|HOSTFILE|HF_ENDPOINT|HF_MIRROR|WANDB_BASE_URL"
)
_CHANGES_CODE = re.compile(_CODE_WORDS, re.IGNORECASE)
_ELSEWHERE = re.compile(
    r"RAY_\w+|\w*_PROXY|\w*CERT\w*|\w*CA_BUNDLE|NETRC|COVERAGE_\w+|OMPI_\w+|PMI\w+|\w*OVERRIDE\w*|\w*TRUST_REMOTE_CODE"
    r"|\w*WEIGHTS_ONLY\w*|\w*(BASE_URL|ENDPOINT|_HOST|REGISTRY|INDEX_URL|MIRROR)|SQL\w*|R_\w+|NODE_\w+|JAVA_\w+",
    re.IGNORECASE,
)
"""What says whom the programs talk to, or gives a library its settings as a whole."""
_PYTHON_HARMLESS = frozenset(
    f"PYTHON{name}"
    for name in "HASHSEED UNBUFFERED FAULTHANDLER UTF8 IOENCODING DONTWRITEBYTECODE MALLOC TRACEMALLOC SAFEPATH "
    "NOUSERSITE ASYNCIODEBUG INTMAXSTRDIGITS DEVMODE".split()
)
"""All that Python reads beside these says which modules it loads, or from where."""
_HARMLESS = frozenset({"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}) | _PYTHON_HARMLESS
"""Names that only sound like it: of the allocator."""


def may_be_secret(name: str) -> bool:
    """Whether a variable's name sounds like one whose value nobody else must see."""
    return any(word in name.upper() for word in _SECRET)


def changes_code(name: str) -> bool:
    """Return whether a variable says which programs, modules or libraries are run, whence they come, or whom they ask.

    Told by its name: what loads code has a few usual words, and a new library brings new names with the same words.
    """
    if name.upper().startswith("PYTHON"):
        return name not in _HARMLESS
    found = _CHANGES_CODE.fullmatch(name) or _ELSEWHERE.fullmatch(name)
    return found is not None and name not in _HARMLESS


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
