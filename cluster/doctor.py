"""Checks what this machine has and what is missing, and says how to get it.

Imports neither torch nor ray.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lorafleet.cluster.hardware import (
    count_cpus,
    find_gpus,
    format_install_hint,
    get_free_memory_gib,
    get_torch_cuda,
)
from lorafleet.jobs.data.assets import ASSETS, get_cache_dir
from lorafleet.jobs.data.hub import get_hub_cache
from lorafleet.jobs.extras import TRAIN_COMMAND
from lorafleet.jobs.runs.trust import find_other_writer
from lorafleet.jobs.text import format_count

Verdict = Literal["ok", "missing", "note"]
_CHECKED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "ray",
    "wandb",
    "optuna",
)


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `missing` makes `lorafleet doctor` exit with code 3; `note` is information, for example
    that something optional is not installed. `advice` says how to fix it.
    """

    what: str
    verdict: Verdict
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the finding as a dict, for JSON."""
        return asdict(self)


def check_machine(runs: Path) -> list[Finding]:
    """Run all checks on this machine.

    The checks read versions and files only, without importing torch or ray, so that they
    also work in a broken environment.

    Args:
        runs: Folder of the runs; it need not exist.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _check_python,
        _check_hardware,
        _check_packages,
        lambda: _check_disk(runs),
        _check_caches,
        lambda: _check_access(runs),
        _check_wandb,
        _check_clients,
    )
    return [finding for run_check in checks for finding in run_check()]


def _check_python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    is_supported = sys.version_info >= (3, 11)
    yield Finding(
        "Python",
        "ok" if is_supported else "missing",
        version,
        "" if is_supported else "lorafleet needs Python 3.11 or newer",
    )


def _check_hardware() -> Iterator[Finding]:
    yield Finding("CPU", "ok", f"{format_count(count_cpus(), 'core')} for this process")
    memory = get_free_memory_gib()
    is_enough = memory >= 4
    yield Finding(
        "memory",
        "ok" if is_enough else "note",
        f"{memory} GiB free",
        "" if is_enough else "a small model's trial takes 1 to 2 GiB",
    )
    gpus = find_gpus()
    if gpus.count:
        yield Finding(
            "GPU",
            "ok",
            f"{gpus.count} x {gpus.name}, {gpus.memory_gib:.0f} GiB, driver {gpus.driver}",
        )
        yield from _check_torch_cuda(gpus.driver)
    else:
        yield Finding(
            "GPU",
            "note",
            "nvidia-smi lists none",
            "everything runs on the CPU, which is fast enough for small models only",
        )


def _check_torch_cuda(driver: str) -> Iterator[Finding]:
    cuda_version = get_torch_cuda()
    if cuda_version is None:
        yield Finding(
            "torch with CUDA", "missing", "torch is a CPU build", format_install_hint(driver)
        )
    else:
        yield Finding("torch with CUDA", "ok", f"built for CUDA {cuda_version}")


def _check_packages() -> Iterator[Finding]:
    for name in _CHECKED_PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name,
                "missing",
                "not installed",
                f"{TRAIN_COMMAND} installs all of them",
            )
    if shutil.which("g++") is None:
        yield Finding(
            "g++",
            "note",
            "not found",
            "needed for DeepSpeed's ZeRO strategies: apt-get install g++",
        )


def _check_disk(runs: Path) -> Iterator[Finding]:
    for purpose, folder in (
        ("disk for runs", runs.absolute()),
        ("disk for caches", get_cache_dir()),
    ):
        # The folder may not exist yet; its disk is that of the nearest existing parent.
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e9
        is_enough = free > 5
        yield Finding(
            purpose,
            "ok" if is_enough else "note",
            f"{free:.0f} GB free at {existing}",
            ""
            if is_enough
            else (
                "models and runs need several GB: use another disk with --runs, LORAFLEET_CACHE or "
                "HF_HOME"
            ),
        )


def _check_caches() -> Iterator[Finding]:
    fetched = [name for name, known_asset in ASSETS.items() if known_asset.folder.is_dir()]
    yield Finding(
        "assets", "ok", f"{', '.join(fetched) or 'none fetched yet'} in {get_cache_dir()}"
    )
    models = list(get_hub_cache().glob("models--*"))
    yield Finding("hub cache", "ok", f"{format_count(len(models), 'model')} in {get_hub_cache()}")


def _check_access(runs: Path) -> Iterator[Finding]:
    """Check who else on this machine can change or read important folders (docs/security.md)."""
    remedy = "chmod go-w, or list it in trusted_folders of ~/.config/lorafleet/config.yaml"
    folders = {"caches": get_cache_dir(), "the hub cache": get_hub_cache(), "runs": runs.absolute()}
    warnings = {
        purpose: find_other_writer(folder) for purpose, folder in folders.items() if folder.is_dir()
    }
    for purpose, warning in warnings.items():
        if warning:
            yield Finding(
                f"access to {purpose}", "note" if purpose == "runs" else "missing", warning, remedy
            )
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_mode & 0o077:
        yield Finding(
            "Ray's old token",
            "note",
            f"other users can read {token}",
            "delete the file: lorafleet does not use it",
        )
    if not any(warnings.values()):
        yield Finding("access", "ok", "no other user can change caches or runs")


def _check_wandb() -> Iterator[Finding]:
    is_logged_in = bool(os.environ.get("WANDB_API_KEY")) or _is_in_netrc()
    if is_logged_in:
        yield Finding("W&B", "ok", "logged in: runs are tracked online")
    else:
        yield Finding(
            "W&B",
            "note",
            "not logged in: runs are tracked offline",
            "run `wandb login`; `lorafleet sync RUN` uploads earlier offline runs",
        )


def _is_in_netrc() -> bool:
    try:
        return "wandb" in Path(os.environ.get("NETRC") or Path.home() / ".netrc").read_text()
    except OSError:
        return False


def _check_clients() -> Iterator[Finding]:
    for client_name, command in (
        ("Slurm client", ["sbatch", "--version"]),
        ("Kubernetes client", ["kubectl", "version", "--client"]),
    ):
        if shutil.which(command[0]) is None:
            yield Finding(
                client_name,
                "note",
                f"{command[0]} not found",
                "only needed to submit jobs to such a cluster",
            )
            continue
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, timeout=10, check=False
            )
        except subprocess.TimeoutExpired:
            yield Finding(client_name, "note", f"{command[0]} did not answer within 10 s")
            continue
        output_lines = (process.stdout or process.stderr).strip().splitlines() or [
            "it printed nothing"
        ]
        yield Finding(client_name, "note" if process.returncode else "ok", output_lines[0])


def check_version(report: dict[str, str], name: str, location: str) -> Finding:
    """Check that a package has the same version remotely as on this machine.

    Args:
        report: Versions by package, as the other side reports them.
        location: Where that is, for the message.
    """
    local_version = importlib.metadata.version(name)
    if report[name] == local_version:
        return Finding(f"{name} {location}", "ok", local_version)
    return Finding(
        f"{name} {location}",
        "missing",
        report[name],
        f"this machine has {local_version}: install the same version on both",
    )


def check_storage(report: dict[str, str], location: str, advice: str) -> Finding:
    """Check that the remote storage is writable.

    Args:
        report: What `inspect_storage` returned there.
        location: Where that is, for the message.
        advice: What to do if it is not writable.
    """
    if report["wrong"]:
        return Finding(f"storage {location}", "missing", report["wrong"], advice)
    return Finding(f"storage {location}", "ok", f"writable, {float(report['free_gb']):.0f} GB free")
