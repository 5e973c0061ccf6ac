"""Refuse jobs that a site must not, or cannot, run."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any

from lorafleet.jobs.errors import JobFileError, Problem
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.schema.environment import can_change_code
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.precision import get_attention_refusal
from lorafleet.jobs.sites.base import LocalSite, Site


def refuse_environment(loaded: LoadedJob, allowed: Collection[str]) -> None:
    """Raise JobFileError for variables of a job that change which code runs.

    Variables that the site allows by name pass. A job file is data that people share: what it
    runs must be visible in it.
    """
    problems = [
        Problem(
            f"environment.{name}",
            f"environment.{name} changes which code runs, which a job file must not do: export it "
            "in your shell, or set it in the site file (environment, or allow_environment)",
        )
        for name in loaded.job.environment
        if can_change_code(name) and name not in allowed
    ]
    if problems:
        raise JobFileError(str(loaded.path), [loaded.locate(problem) for problem in problems])


_ATTENTION = "model.attn_implementation"


def list_attention(job: JobSpec) -> list[Any]:
    """Return the attention implementations that the trials of a job use."""
    searched = job.search.parameters.get(_ATTENTION) if job.search else None
    values = list((searched.values if searched else None) or [job.model.attn_implementation])
    if job.compare:
        arms = job.comparison.arms.values()
        values += [arm.set[_ATTENTION] for arm in arms if _ATTENTION in arm.set]
    return list(dict.fromkeys(values))


def refuse_attention(job: JobSpec, site: Site, path: str) -> None:
    """Raise JobFileError for an attention implementation that the site cannot use.

    Installed packages are known for this machine only.
    """
    is_local = isinstance(site, LocalSite)
    has_flash = not is_local or importlib.util.find_spec("flash_attn") is not None
    for value in list_attention(job):
        model = job.model.model_copy(update={"attn_implementation": value})
        variant = job.model_copy(update={"model": model})
        message = get_attention_refusal(variant, cuda=uses_gpu(job, site), has_flash=has_flash)
        if message:
            raise JobFileError(path, [Problem(_ATTENTION, message)])


def uses_gpu(job: JobSpec, site: Site) -> bool:
    """Return whether a job's trials run on GPUs of a site.

    A site without GPUs, `resources.device: cpu` and `resources.gpus_per_node: 0` all mean
    the CPU.
    """
    return site.gpus > 0 and job.resources.device != "cpu" and job.resources.gpus_per_node != 0
