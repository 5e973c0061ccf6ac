"""Distribute the work of one trial over its processes.

The strategies are a single process, DDP, FSDP2 and DeepSpeed's ZeRO. A strategy wraps
the loss module, owns the optimiser, and gathers what it has sharded. All processes call
all of its methods in the same order.

Two processes must train what one process with twice the accumulation trains, and a
library that silently falls back to unsynchronised replicas must raise an error here.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from lorafleet.jobs import files
from lorafleet.jobs.schema.deepspeed import build_engine_config
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.build_locks import clear_stale_locks
from lorafleet.training.methods import Tensors, get_trained_parameters
from lorafleet.training.optim import build_optimizer, set_rate


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and size of its process group."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Create from torch.distributed, or for a single process if it is not initialised."""
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())


class SingleProcess:
    """Strategy of a single process, and base class of the others.

    `build_strategy` creates it. `module` is called for training, `loss` for evaluations.

    Args:
        loss_module: The LossModule of the adapted model.
        rate: Peak learning rate.
        fp16: Scale the loss, because small gradients vanish in float16.
    """

    equal_passes = False
    """True if all processes must make the same number of forward passes, in evaluations too."""

    def __init__(
        self,
        job: JobSpec,
        loss_module: nn.Module,
        device: torch.device,
        ranks: Ranks,
        rate: float,
        *,
        fp16: bool,
    ) -> None:
        self.job, self.device, self.ranks, self.rate = job, device, ranks, rate
        self.loss = loss_module
        """The unwrapped module, which evaluations call: ZeRO-3 relies on its hooks if an evaluation
        comes first.
        """
        self.module = loss_module
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self._wrap()

    def _wrap(self) -> None:
        """Wrap the loss module and build the optimiser."""
        self._set_model(self.module.model)
        self.optimizer = build_optimizer(self.trained, self.job, self.rate)

    def _set_model(self, model: nn.Module) -> None:
        """Set the model and the parameters that are trained."""
        self.model = model
        self.trained: Mapping[str, nn.Parameter] = get_trained_parameters(model)

    @property
    def trainable_parameters(self) -> int:
        """Number of trained values, over all processes."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def begin_micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context for the forward and backward pass of one micro-batch.

        Gradients are exchanged only in the step's `last` micro-batch.
        """
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of one micro-batch. They are averaged over the processes."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> torch.Tensor:
        """Clip the gradients, step the optimiser, reset the gradients, and return the norm.

        The returned norm is the one before clipping. With fp16, an infinite norm skips the
        step.

        Args:
            rate: Learning rate of this step, before the ratios of LoRA+.
        """
        set_rate(self.optimizer, rate)
        # Clipping compares with max_grad_norm, so the gradients must be in their true scale.
        self.scaler.unscale_(self.optimizer)
        norm = self._clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip_gradients(self) -> torch.Tensor:
        """Clip the gradients to `train.max_grad_norm` and return their norm before clipping."""
        return nn.utils.clip_grad_norm_(self.trained.values(), self.job.train.max_grad_norm)

    def gather_tensors(self) -> Tensors:
        """Return the complete trained values by name. Only the first process must have them."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def load_tensors(self, values: Tensors) -> None:
        """Set the trained values from complete tensors."""
        with torch.no_grad():
            # In place: the optimiser and the strategy's wrappers hold references to the parameters.
            for name, value in values.items():
                self.trained[name].copy_(value)

    def save_optimizer(self, folder: Path) -> dict[str, Any]:
        """Return the complete optimiser state for the checkpoint in `folder`.

        Only the first process must have it. A strategy may write its state to `folder` instead.
        """
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        """Restore the state that `save_optimizer` returned or wrote."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Release the optimiser and the gradients.

        The references are deleted, so that the memory is free before the next trial of this
        process.
        """
        self.optimizer.zero_grad(set_to_none=True)
        del self.optimizer, self.module, self.loss


class Ddp(SingleProcess):
    """Replicas of the whole model that exchange only the gradients of what is trained.

    Implemented with Accelerate.
    """

    def _wrap(self) -> None:
        """Wrap the loss module with Accelerate.

        Raises RuntimeError if Accelerate did not set up the expected processes.
        """
        super()._wrap()
        from accelerate import Accelerator, DistributedType

        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        expected = (
            DistributedType.MULTI_CPU if self.device.type == "cpu" else DistributedType.MULTI_GPU
        )
        actual = (self.accelerator.distributed_type, self.accelerator.num_processes)
        if actual != (expected, self.ranks.world_size):
            # A bare Accelerator() on CPU silently trains replicas that never communicate.
            raise RuntimeError(
                f"Accelerate set up {actual}, but {(expected, self.ranks.world_size)} was expected"
            )
        self.module = self.accelerator.prepare_model(self.module)

    def begin_micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context that exchanges gradients only in the step's last micro-batch."""
        context: AbstractContextManager[Any] = (
            nullcontext() if last else self.accelerator.no_sync(self.module)
        )
        return context


class Fsdp(SingleProcess):
    """Shards of every layer on every process, gathered when the layer is used (torch's FSDP2).

    torch's `fully_shard` is used directly: on CPU, Accelerate's FSDP2 plugin never engages,
    without a message.
    """

    equal_passes = True

    def _wrap(self) -> None:
        """Shard the model's layers, then the rest of the model."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
        model = self.module.model
        # Inner modules first. Each sharded module is gathered as one unit when it is used.
        for layer in _find_layers(model):
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        # The optimiser must be built from the sharded parameters, which replace the original ones.
        super()._wrap()

    def begin_micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Accumulate gradients locally until the step's last micro-batch."""
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def _clip_gradients(self) -> torch.Tensor:
        """Clip the gradients and return their complete norm before clipping."""
        norm = super()._clip_gradients()
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def gather_tensors(self) -> Tensors:
        """Gather the trained values one by one into the first process's memory.

        All of them together may not fit on a GPU.
        """
        gathered = (
            (name, self._gather(parameter.detach())) for name, parameter in self.trained.items()
        )
        return {name: value for name, value in gathered if value is not None}

    def _gather(self, value: Any) -> Any:
        """Return a value gathered from all processes, on the CPU of the first; None on the
        others.
        """
        full_value = _to_full_tensor(value)
        if self.ranks.rank:
            return None
        return full_value.cpu() if torch.is_tensor(full_value) else full_value

    def load_tensors(self, values: Tensors) -> None:
        """Copy this process's shard of each complete value."""
        with torch.no_grad():
            for name, value in values.items():
                self.trained[name].copy_(_shard_like(value, self.trained[name]))

    def save_optimizer(self, folder: Path) -> dict[str, Any]:
        """Return the optimiser state with gathered moments."""
        state = self.optimizer.state_dict()
        gathered = {
            index: {key: self._gather(value) for key, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return {"optimizer": state | {"state": gathered}, "scaler": self.scaler.state_dict()}

    def load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        """Load this process's shard of the optimiser's moments."""
        saved = state["optimizer"]
        ordered = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        shards = {
            index: {
                key: _shard_like(value, ordered[index])
                # The step counter is a tensor without dimensions and is the same on every process.
                if torch.is_tensor(value) and value.ndim
                else value
                for key, value in entries.items()
            }
            for index, entries in saved["state"].items()
        }
        self.optimizer.load_state_dict(saved | {"state": shards})
        self.scaler.load_state_dict(state["scaler"])


def _find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a transformer.

    These are the members of its outermost module lists with two or more modules.
    """
    layers: list[nn.Module] = []
    nested_ids: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and id(module) not in nested_ids:
            layers += list(module)
            nested_ids |= {id(inner) for inner in module.modules()}
    return layers


def _to_full_tensor(value: Any) -> Any:
    """Return a sharded tensor gathered from all processes; any other value as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _shard_like(value: torch.Tensor, like: Any) -> torch.Tensor:
    """Return the complete `value` sharded like `like`, or unchanged if `like` is not sharded."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "device_mesh"):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


class Zero(SingleProcess):
    """DeepSpeed ZeRO: shards the optimiser state (1), also gradients (2), and also weights (3).

    The engine clips, counts micro-batches and writes its own checkpoint. Building its CPU
    collectives needs a C++ compiler and ninja.
    """

    def _wrap(self) -> None:
        """Set up the DeepSpeed engine.

        Raises RuntimeError if the engine has another stage or world size than the job asks for.
        """
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed builds its CPU collectives with ninja, which is next to this Python but not
        # always on PATH.
        python_folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
        if python_folder not in path.split(os.pathsep):
            os.environ["PATH"] = f"{python_folder}{os.pathsep}{path}"
        for lock in clear_stale_locks():
            warnings.warn(f"removed {lock}, which a killed build left behind", stacklevel=2)
        import deepspeed

        self.stage = int(self.job.resources.strategy[-1])
        self.equal_passes = self.stage == 3
        file = self.job.resources.deepspeed_config
        user_config = json.loads(files.read_regular_text(Path(file))) if file else {}
        first_parameter = next(iter(get_trained_parameters(self.module.model).values()))
        config = build_engine_config(
            self.job, user_config, bf16=first_parameter.dtype is torch.bfloat16
        )
        if self.stage == 3:
            # Shard one parameter after another: the engine would move the whole model to the device
            # before sharding it.
            deepspeed.zero.Init(module=self.module, config_dict_or_path=config)
            for buffer in self.module.buffers():  # neither Init nor the engine moves buffers
                buffer.data = buffer.data.to(self.device)
        super()._wrap()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            model_parameters=list(self.trained.values()),
            config=config,
            # Ray Train has created the process group already.
            dist_init_required=False,
        )
        if (self.engine.world_size, self.engine.zero_optimization_stage()) != (
            self.ranks.world_size,
            self.stage,
        ):
            raise RuntimeError(
                f"DeepSpeed started with ZeRO stage {self.engine.zero_optimization_stage()} and "
                f"{self.engine.world_size} processes, but the job needs stage {self.stage} and "
                f"{self.ranks.world_size} processes. Check resources.workers_per_node, "
                "resources.num_nodes and zero_optimization.stage in resources.deepspeed_config"
            )
        self.module = self.engine

    @property
    def trainable_parameters(self) -> int:
        """Number of trained values. In stage 3 each shard knows its full size."""
        return sum(
            getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.trained.values()
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients with the engine.

        The loss is already divided by the whole batch, so the engine must not divide it by the
        number of micro-batches.
        """
        self.engine.backward(loss, scale_wrt_gas=False)

    def begin_micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Tell the engine whether this is the step's last micro-batch.

        The engine counts micro-batches itself and checks the value.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def step(self, rate: float) -> torch.Tensor:
        """Let the engine clip, step and reset the gradients; return the norm before clipping."""
        set_rate(self.optimizer, rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float(norm or 0.0))

    def gather_tensors(self) -> Tensors:
        """Gather the trained values one by one into the first process's memory."""
        if self.stage < 3:
            return super().gather_tensors()
        import deepspeed

        gathered = {}
        for name, parameter in self.trained.items():
            # All processes must enter the context, in the same order; only the first keeps a copy.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                if self.ranks.rank == 0:
                    gathered[name] = parameter.detach().cpu().clone()
        return gathered

    def load_tensors(self, values: Tensors) -> None:
        """Do nothing: the engine's own checkpoint restores the weights from its shards."""

    def save_optimizer(self, folder: Path) -> dict[str, Any]:
        """Let the engine write its shards, each process its own, and return an empty state."""
        self.engine.save_checkpoint(
            str(folder), tag=_ENGINE_TAG, save_latest=False, exclude_frozen_parameters=True
        )
        return {}

    def load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        """Load the engine's shards. Raises RuntimeError if `folder` contains none."""
        checkpoint_path, _ = self.engine.load_checkpoint(
            str(folder), tag=_ENGINE_TAG, load_module_strict=False
        )
        if checkpoint_path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")

    def close(self) -> None:
        """Release the engine."""
        self.engine.destroy()
        del self.engine, self.optimizer, self.module, self.loss


_ENGINE_TAG = "engine"

_KINDS: dict[str, type[SingleProcess]] = {
    "ddp": Ddp,
    "fsdp": Fsdp,
    "zero1": Zero,
    "zero2": Zero,
    "zero3": Zero,
}


def build_strategy(
    job: JobSpec,
    loss_module: nn.Module,
    device: torch.device,
    ranks: Ranks,
    rate: float,
    *,
    fp16: bool,
) -> SingleProcess:
    """Return the strategy that `resources.strategy` names, set up.

    `auto` has already been resolved by the plan. One process always uses `SingleProcess`.

    Raises:
        RuntimeError: The library did not set up the processes or the stage that the job
            asks for.
    """
    kind = SingleProcess if ranks.world_size == 1 else _KINDS[job.resources.strategy]
    return kind(job, loss_module, device, ranks, rate, fp16=fp16)
