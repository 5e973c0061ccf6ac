"""What is known of a Ray cluster that is up somewhere: where its job server listens, what its machines share."""

from __future__ import annotations

from typing import Annotated, Literal

from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.environment import checked_environment
from pydantic import Field, field_validator

Inside = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$", max_length=200)]
"""An absolute path on the cluster's machines, without spaces."""


class RayClusterSite(Spec):
    """A Ray cluster that somebody else has started. Its token is read from RAY_AUTH_TOKEN, never from here."""

    kind: Literal["ray"] = "ray"
    """Which backend runs it."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    """What sentences call it; the file's name where it is left out."""
    address: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9._:-]+(/[A-Za-z0-9._/-]*)?$", max_length=400)]
    """Its job server (the dashboard), such as http://10.0.0.5:8265."""
    storage: Inside
    """Folder that all its machines share: runs lie in `runs/`, models and data in `cache/`."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one GPU, in GB; 0 where it is not known, and nothing is said to fit or not."""
    internet: bool = False
    """Whether its machines may fetch from the hub and talk to W&B; false: what was brought, and W&B offline."""
    environment: dict[str, str] = {}
    """Variables for the driver. Names that may hold a secret are refused: Ray shows them on its dashboard."""
    allow_environment: Texts = ()
    """Variables that a job's `environment` may set though they change which code runs, such as TRITON_CACHE_DIR."""

    @field_validator("environment")
    @classmethod
    def _holds_no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_environment(value)
