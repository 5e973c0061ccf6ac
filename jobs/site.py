"""What a place to run offers: the operator's facts, as opposed to the job's wishes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jobs.spec import Spec


class LocalSite(Spec):
    """This machine."""

    kind: Literal["local"] = "local"
    """Which backend runs it."""
    cpus: int = Field(ge=1)
    """CPU cores that this process may use."""
    memory_gib: float = Field(gt=0)
    """Memory, in GiB, that is free or can be freed."""
    gpus: int = Field(0, ge=0)
    """CUDA devices."""
    gpu_memory_gib: float = Field(0.0, ge=0)
    """Memory of the smallest of them, in GiB."""
    gpu_name: str = ""
    """Model of the first GPU."""
