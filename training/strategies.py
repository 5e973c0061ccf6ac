"""How the processes of one trial share the work: not at all (one alone), DDP, FSDP2, or DeepSpeed's ZeRO.

A strategy wraps the loss module, owns the optimiser, and makes whole what it has cut up. All processes call all of its
methods in the same order.
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
from lorafleet.jobs import files
from lorafleet.jobs.schema.deepspeed import engine_config
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.build_locks import clear_stale_locks
from lorafleet.training.methods import Tensors, trained_parameters
from lorafleet.training.optim import build_optimizer, set_rate
from torch import distributed, nn


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """From torch.distributed, or one process alone."""
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())


class Alone:
    """One process. What the others do differently, they override."""

    equal_passes = False
    """Whether every process must make as many forward passes as every other, in evaluations too."""

    def __init__(
        self, job: JobSpec, loss_module: nn.Module, device: torch.device, ranks: Ranks, rate: float, *, fp16: bool
    ) -> None:
        self.job, self.device, self.ranks, self.rate = job, device, ranks, rate
        self.loss = loss_module
        """The module itself: what an evaluation calls, since ZeRO-3 counts on its hooks for whatever comes first."""
        self.module = loss_module
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self._wrap()

    def _wrap(self) -> None:
        self._take_parameters(self.module.model)
        self.optimizer = build_optimizer(self.trained, self.job, self.rate)

    def _take_parameters(self, model: nn.Module) -> None:
        self.model = model
        self.trained: Mapping[str, nn.Parameter] = trained_parameters(model)

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are trained, over all processes."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def one_pass(self, *, last: bool) -> AbstractContextManager[Any]:
        """The surroundings of a forward and backward pass; only the step's `last` exchanges gradients."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one pass. Over the processes they are averaged."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> torch.Tensor:
        """Clip, take the optimiser's step and forget the gradients; returns the norm before clipping."""
        set_rate(self.optimizer, rate)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.trained.values(), self.job.train.max_grad_norm)

    def tensors(self) -> Tensors:
        """What is trained, whole, by name; only the first process has to have it."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def put_tensors(self, values: Tensors) -> None:
        """Set what is trained from whole values."""
        with torch.no_grad():
            for name, value in values.items():
                self.trained[name].copy_(value)

    def save_optimizer(self, folder: Path) -> dict[str, Any]:
        """The optimiser's state, whole, for the checkpoint in `folder`; only the first process has to have it."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        """Take up what `save_optimizer` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Let go of the optimiser and the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        del self.optimizer, self.module, self.loss


class Ddp(Alone):
    """Whole copies; only gradients of what is trained are exchanged. Through Accelerate."""

    def _wrap(self) -> None:
        super()._wrap()
        from accelerate import Accelerator, DistributedType

        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        expected = DistributedType.MULTI_CPU if self.device.type == "cpu" else DistributedType.MULTI_GPU
        found = (self.accelerator.distributed_type, self.accelerator.num_processes)
        if found != (expected, self.ranks.world_size):
            # A bare Accelerator() on CPU trains replicas that never hear of each other, without a word.
            raise RuntimeError(f"Accelerate set up {found}, but {(expected, self.ranks.world_size)} was wanted")
        self.module = self.accelerator.prepare_model(self.module)

    def one_pass(self, *, last: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients once a step, in its last pass."""
        context: AbstractContextManager[Any] = nullcontext() if last else self.accelerator.no_sync(self.module)
        return context


class Fsdp(Alone):
    """Every process holds a share of every layer and gathers a layer when it is used. torch's FSDP2."""

    equal_passes = True

    def _wrap(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
        model = self.module.model
        for layer in _layers(model):
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        super()._wrap()

    def one_pass(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed up locally until the step's last pass."""
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def _clip(self) -> torch.Tensor:
        norm = super()._clip()
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def tensors(self) -> Tensors:
        """What is trained, gathered one by one into the first process's memory: whole it may not fit a GPU."""
        gathered = ((name, self._gathered(parameter.detach())) for name, parameter in self.trained.items())
        return {name: value for name, value in gathered if value is not None}

    def _gathered(self, value: Any) -> Any:
        """A value made whole by all processes, on the CPU of the first; None on the others."""
        whole = _whole(value)
        if self.ranks.rank:
            return None
        return whole.cpu() if torch.is_tensor(whole) else whole

    def put_tensors(self, values: Tensors) -> None:
        """Every process takes its share of whole values."""
        with torch.no_grad():
            for name, value in values.items():
                self.trained[name].copy_(_share(value, self.trained[name]))

    def save_optimizer(self, folder: Path) -> dict[str, Any]:
        """The moments, gathered."""
        state = self.optimizer.state_dict()
        whole = {
            index: {key: self._gathered(value) for key, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return {"optimizer": state | {"state": whole}, "scaler": self.scaler.state_dict()}

    def load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        """Every process takes its share of the moments."""
        saved = state["optimizer"]
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        shares = {
            index: {
                key: _share(value, ordered[index]) if torch.is_tensor(value) and value.ndim else value
                for key, value in entries.items()
            }
            for index, entries in saved["state"].items()
        }
        self.optimizer.load_state_dict(saved | {"state": shares})
        self.scaler.load_state_dict(state["scaler"])


def _layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: the members of its outermost lists of two or more alike modules."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and id(module) not in inside:
            found += list(module)
            inside |= {id(inner) for inner in module.modules()}
    return found


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _share(value: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "device_mesh"):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


class Zero(Alone):
    """DeepSpeed: optimiser state (1), gradients (2) and weights too (3) in shares."""

    def _wrap(self) -> None:
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed builds its CPU collectives with ninja, which lies beside this Python and not always on PATH.
        here, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
        if here not in path.split(os.pathsep):
            os.environ["PATH"] = f"{here}{os.pathsep}{path}"
        for lock in clear_stale_locks():
            warnings.warn(f"{lock} was left by a build that was killed, and is removed", stacklevel=2)
        import deepspeed

        self.stage = int(self.job.resources.strategy[-1])
        self.equal_passes = self.stage == 3
        file = self.job.resources.deepspeed_config
        own = json.loads(files.read_plain_text(Path(file))) if file else {}
        first = next(iter(trained_parameters(self.module.model).values()))
        config = engine_config(self.job, own, bf16=first.dtype is torch.bfloat16)
        if self.stage == 3:
            # One parameter after another: the engine would move the whole model to the device before it cuts it up.
            deepspeed.zero.Init(module=self.module, config_dict_or_path=config)
            for buffer in self.module.buffers():  # which it leaves where they are, and the engine then does too
                buffer.data = buffer.data.to(self.device)
        super()._wrap()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            model_parameters=list(self.trained.values()),
            config=config,
            dist_init_required=False,
        )
        if (self.engine.world_size, self.engine.zero_optimization_stage()) != (self.ranks.world_size, self.stage):
            raise RuntimeError(f"DeepSpeed set up stage {self.engine.zero_optimization_stage()} of another world")
        self.module = self.engine

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are trained; a share of stage 3 knows its whole."""
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.trained.values())

    def backward(self, loss: torch.Tensor) -> None:
        """The engine's own; the loss is divided by the whole batch already, so not by the passes once more."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def one_pass(self, *, last: bool) -> AbstractContextManager[Any]:
        """The engine counts passes itself; what it is told is checked."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def step(self, rate: float) -> torch.Tensor:
        """The engine clips, steps and forgets the gradients."""
        set_rate(self.optimizer, rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float(norm or 0.0))

    def tensors(self) -> Tensors:
        """What is trained, gathered one by one into the first process's memory."""
        if self.stage < 3:
            return super().tensors()
        import deepspeed

        found = {}
        for name, parameter in self.trained.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                if self.ranks.rank == 0:
                    found[name] = parameter.detach().cpu().clone()
        return found

    def put_tensors(self, values: Tensors) -> None:
        """Nothing: weights come back with the engine's own checkpoint, whose shares hold them."""

    def save_optimizer(self, folder: Path) -> dict[str, Any]:
        """The engine writes its shares itself, every process its own."""
        self.engine.save_checkpoint(str(folder), tag=_ENGINE, save_latest=False, exclude_frozen_parameters=True)
        return {}

    def load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        """Read the shares."""
        found, _ = self.engine.load_checkpoint(str(folder), tag=_ENGINE, load_module_strict=False)
        if found is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")

    def close(self) -> None:
        """Let go of the engine."""
        self.engine.destroy()
        del self.engine, self.optimizer, self.module, self.loss


_ENGINE = "engine"

_KINDS: dict[str, type[Alone]] = {"ddp": Ddp, "fsdp": Fsdp, "zero1": Zero, "zero2": Zero, "zero3": Zero}


def strategy(
    job: JobSpec, loss_module: nn.Module, device: torch.device, ranks: Ranks, rate: float, *, fp16: bool
) -> Alone:
    """The strategy that `resources.strategy` names (`auto` has been resolved by the plan), set up."""
    kind = Alone if ranks.world_size == 1 else _KINDS[job.resources.strategy]
    return kind(job, loss_module, device, ranks, rate, fp16=fp16)
