"""The site file of an existing Ray cluster, with its job server and its shared folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.environment import validate_environment

ClusterPath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$", max_length=200)]
"""Absolute path on the cluster's machines, without spaces."""


class RayClusterSite(Spec):
    """A Ray cluster that somebody else started.

    Its token is read from RAY_AUTH_TOKEN, never from this file.
    """

    kind: Literal["ray"] = "ray"
    """Backend that runs jobs on the site."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    """Display name of the site. Defaults to the file name."""
    address: Annotated[
        str, Field(pattern=r"^https?://[A-Za-z0-9._:-]+(/[A-Za-z0-9._/-]*)?$", max_length=400)
    ]
    """Address of the job server (the dashboard), such as http://10.0.0.5:8265."""
    storage: ClusterPath
    """Folder that all machines share. Runs are stored in `runs/`, models and data in `cache/`."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one GPU, in GB. Default 0: unknown, so that nothing is checked to fit."""
    internet: bool = False
    """Whether the machines may access the Hub and W&B. Default false: only uploaded inputs are
    used, and W&B runs offline.
    """
    environment: dict[str, str] = {}
    """Environment variables of the driver. Names that may hold a secret are refused: Ray shows
    them on its dashboard.
    """
    allow_environment: Texts = ()
    """Variables that a job's `environment` may set although they change which code runs, such as
    TRITON_CACHE_DIR.
    """

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        return validate_environment(value)
