"""What this machine has and what is missing, and how to get it. Looks without importing torch or ray."""

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

from lorafleet.cluster.hardware import cpu_count, find_gpus, free_memory_gib, install_line, torch_cuda
from lorafleet.jobs.data.assets import ASSETS, cache_dir
from lorafleet.jobs.data.hub import hub_cache
from lorafleet.jobs.runs.trust import others_can_write
from lorafleet.jobs.text import counted

Verdict = Literal["ok", "missing", "note"]
_TESTED = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "ray", "wandb", "optuna")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def examine(runs: Path) -> list[Finding]:
    """Look at everything."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _hardware,
        _packages,
        lambda: _disk(runs),
        _caches,
        lambda: _access(runs),
        _wandb,
        _clients,
    )
    return [finding for look in looks for finding in look()]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding(
        "Python", "ok" if good else "missing", version, "" if good else "lorafleet needs Python 3.11 or newer"
    )


def _hardware() -> Iterator[Finding]:
    yield Finding("CPU", "ok", f"{counted(cpu_count(), 'core')} for this process")
    memory = free_memory_gib()
    enough = memory >= 4
    yield Finding(
        "memory",
        "ok" if enough else "note",
        f"{memory} GiB free",
        "" if enough else "a small model's trial takes 1 to 2 GiB",
    )
    gpus = find_gpus()
    if gpus.count:
        yield Finding("GPU", "ok", f"{gpus.count} x {gpus.name}, {gpus.memory_gib:.0f} GiB, driver {gpus.driver}")
        yield from _torch_cuda(gpus.driver)
    else:
        yield Finding("GPU", "note", "none that nvidia-smi lists", "everything runs on CPU, small models only")


def _torch_cuda(driver: str) -> Iterator[Finding]:
    built = torch_cuda()
    if built is None:
        yield Finding("torch with CUDA", "missing", "torch is a CPU build", install_line(driver))
    else:
        yield Finding("torch with CUDA", "ok", f"built for CUDA {built}")


def _packages() -> Iterator[Finding]:
    for name in _TESTED:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", "pip install -e . installs all of them")
    if shutil.which("g++") is None:
        yield Finding("g++", "note", "not found", "DeepSpeed's ZeRO strategies will need it: apt-get install g++")


def _disk(runs: Path) -> Iterator[Finding]:
    for what, folder in (("disk for runs", runs.absolute()), ("disk for caches", cache_dir())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e9
        enough = free > 5
        yield Finding(
            what,
            "ok" if enough else "note",
            f"{free:.0f} GB free at {existing}",
            "" if enough else "a model and its runs want some GB: --runs, LORAFLEET_CACHE or HF_HOME elsewhere",
        )


def _caches() -> Iterator[Finding]:
    here = [name for name, known in ASSETS.items() if known.folder.is_dir()]
    yield Finding("assets", "ok", f"{', '.join(here) or 'none fetched yet'} in {cache_dir()}")
    models = list(hub_cache().glob("models--*"))
    yield Finding("hub cache", "ok", f"{counted(len(models), 'model')} in {hub_cache()}")


def _access(runs: Path) -> Iterator[Finding]:
    """Who else on this machine can change or read what matters (docs/security.md)."""
    remedy = "chmod go-w, or list it in trusted_folders of ~/.config/lorafleet/config.yaml"
    places = {"caches": cache_dir(), "the hub cache": hub_cache(), "runs": runs.absolute()}
    open_ones = {what: others_can_write(folder) for what, folder in places.items() if folder.is_dir()}
    for what, sentence in open_ones.items():
        if sentence:
            yield Finding(f"access to {what}", "note" if what == "runs" else "missing", sentence, remedy)
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_mode & 0o077:
        yield Finding("Ray's old token", "note", f"{token} can be read by others", "delete it: no run needs it")
    if not any(open_ones.values()):
        yield Finding("access", "ok", "nobody else can change caches and runs")


def _wandb() -> Iterator[Finding]:
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc()
    if logged_in:
        yield Finding("W&B", "ok", "logged in: runs are online")
    else:
        yield Finding(
            "W&B",
            "note",
            "not logged in: runs are written offline",
            "`wandb login`, then `lorafleet sync RUN` uploads what was written before",
        )


def _in_netrc() -> bool:
    try:
        return "wandb" in Path(os.environ.get("NETRC") or Path.home() / ".netrc").read_text()
    except OSError:
        return False


def _clients() -> Iterator[Finding]:
    for what, command in (
        ("Slurm client", ["sbatch", "--version"]),
        ("Kubernetes client", ["kubectl", "version", "--client"]),
    ):
        if shutil.which(command[0]) is None:
            yield Finding(what, "note", f"{command[0]} not found", "only needed to send jobs there")
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except subprocess.TimeoutExpired:
            yield Finding(what, "note", f"{command[0]} did not answer within 10 s")
            continue
        said = (done.stdout or done.stderr).strip().splitlines() or ["it says nothing"]
        yield Finding(what, "note" if done.returncode else "ok", said[0])


def same_version(told: dict[str, str], name: str, where: str) -> Finding:
    """Whether a package is the same there as here."""
    here = importlib.metadata.version(name)
    if told[name] == here:
        return Finding(f"{name} {where}", "ok", here)
    return Finding(f"{name} {where}", "missing", told[name], f"here is {here}: they must be the same")


def storage(told: dict[str, str], where: str, advice: str) -> Finding:
    """Whether the storage can be written there."""
    if told["wrong"]:
        return Finding(f"storage {where}", "missing", told["wrong"], advice)
    return Finding(f"storage {where}", "ok", f"can be written, {float(told['free_gb']):.0f} GB free")
