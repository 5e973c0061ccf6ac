"""Keep the base model that a process has loaded last, for all that it trains and evaluates."""

from __future__ import annotations

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.model import Base, load_base, resolve_device


class BaseCache:
    """Holds one base model, and replaces it when another one is needed.

    Trials and evaluations of one process share it; they use it one after another.

    Args:
        gpus: Number of GPUs of this process.
    """

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.base: Base | None = None
        self.loads = 0
        """Number of times that a base was loaded."""

    def get(self, job: JobSpec, labels: int, *, untuned: bool = False) -> Base:
        """Return a base for the job, loading one if the current base does not fit.

        Args:
            labels: Number of classes of the job's data.
            untuned: The head that comes with the checkpoint must not have been replaced.

        Raises:
            UserError: The model cannot do the job's task, or torch reaches no GPU.
            AssetError: The checkpoint cannot be loaded.
        """
        # An adapter may have replaced the head that came with the base.
        head_may_differ = self.base is not None and self.base.own_head and untuned
        if self.base is None or head_may_differ or not self.base.can_serve(job, labels):
            self.base = None  # two bases may not fit into memory at the same time
            self.base = load_base(job, labels, resolve_device(self.gpus))
            self.loads += 1
        return self.base

    def drop(self) -> None:
        """Release the base, so that the next call of `get` loads one."""
        self.base = None
