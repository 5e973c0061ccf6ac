"""Define JobSpec, the complete content of a job file.

Models are frozen, closed to unknown keys, and every field states its unit. Field names
follow HF, PEFT and TRL for training, and W&B and Ray for the search.

Validation here needs neither model, data nor hardware; cluster/planning/preflight.py
checks what does. The docstrings of classes and fields are documentation for users:
docs/job-file.md is generated from them.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.comparison import CompareSpec
from lorafleet.jobs.schema.compatibility import find_unsupported
from lorafleet.jobs.schema.environment import validate_environment
from lorafleet.jobs.schema.export import ExportSpec
from lorafleet.jobs.schema.metrics import (
    DEFAULT_METRIC,
    DEFAULT_TEXT_METRICS,
    LIKELIHOOD_METRICS,
    METRICS,
    ROW_KEYS,
    TEXT_METRICS,
)
from lorafleet.jobs.schema.search import MetricSpec, NamedMetric, SearchSpec
from lorafleet.jobs.schema.types import Goal, Method, Strategy

Task = Literal["classification", "generation", "summarization"]
DataFormat = Literal["auto", "text_label", "prompt_completion", "instruction", "messages", "text"]
# Parameters of transformers' `apply_chat_template` that lorafleet sets itself for each row.
_TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_special_tokens",
        "max_length",
        "padding",
        "processor_kwargs",
        "return_tensors",
        "tokenizer_kwargs",
    }
    | {"truncation"}
    | {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
    }
    | {"eos_token", "messages", "return_assistant_tokens_mask", "return_dict", "tokenize", "tools"}
)
# A commit of the hub has 40 digits. The SHA-256 that stands for the files of a folder has 64.
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class ModelSpec(Spec):
    """The base model that is adapted."""

    model_name_or_path: str = Field(min_length=1, max_length=400)
    """A hub id (`org/name`), a folder with a safetensors model, or `asset:NAME` (see `lorafleet
    fetch --list`).
    """
    revision: str | None = None
    """Branch, tag or commit of a hub model. Left out: the main branch as it was fetched."""
    max_length: int = Field(512, ge=8, le=1_000_000)
    """Maximum row length in tokens, prompt and answer together. Longer rows are cut, and a warning
    states their number.
    """
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the base's weights. `auto`: bfloat16 if the base is frozen and the GPU
    supports it; float32 on CPU and with `full`, whose small updates bfloat16 would round away.
    """
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = (
        "auto"
    )
    """Attention implementation of transformers. `auto`: torch's scaled dot product attention
    (`sdpa`) if the model supports it. `flash_attention_2` needs a GPU and the flash-attn
    package.
    """
    trust_remote_code: bool = False
    """Allow code from the model's repository to run. Requires `revision` to be a full commit; for
    a folder, the SHA-256 of its files without the weights, which `lorafleet validate` prints.
    """

    @model_validator(mode="after")
    def _check_remote_code(self) -> ModelSpec:
        if self.trust_remote_code and not _COMMIT.fullmatch(self.revision or ""):
            raise SpecProblems(
                [
                    Problem(
                        "model.trust_remote_code",
                        "model.trust_remote_code is true, but model.revision is not a full commit "
                        "of 40 hex digits (for a folder: a hash of 64), so the code could change "
                        "unnoticed. Set model.revision",
                    )
                ]
            )
        return self


class DataSpec(Spec):
    """The rows for training, for model selection, and for the final test."""

    dataset_name: str | None = Field(None, min_length=1, max_length=400)
    """A hub data set (`org/name`) or `asset:NAME`; the alternative to `train_file`."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    dataset_config_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Configuration of a hub data set that has several, such as `3.0.0`."""
    train_file: str | None = Field(None, min_length=1)
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file. All but .parquet may also be
    compressed as .gz or .zst. The path is relative to the job file. In .csv files commas,
    semicolons, tabs or bars separate columns; in .tsv files quotes are ordinary text.
    """
    validation_file: str | None = Field(None, min_length=1)
    """Rows for the search and the selection, instead of the data set's own validation set. If
    there are none, `validation_fraction` of the training rows is held back.
    """
    test_file: str | None = Field(None, min_length=1)
    """Rows for the final test, used once after the selection, instead of the data set's own test
    set. If there are none, `test_fraction` of the validation rows is held back.
    """
    format: DataFormat = "auto"
    """Format of a row. `auto`: determined by the columns that are named here, else by the keys of
    the first row.
    """
    text_column: str = "text"
    """Column with the text (classification, plain text)."""
    label_column: str = "label"
    """Column with the class: a string or an integer."""
    labels: Texts | None = None
    """Names of the classes in the order of their ids: `[negative, positive]` names the classes 0
    and 1 of rows with integers. Left out: the classes of the training rows, integers in
    numerical order and strings in alphabetical order.
    """
    prompt_column: str = "prompt"
    """Column with the prompt (prompt_completion)."""
    completion_column: str = "completion"
    """Column with the answer to learn (prompt_completion)."""
    messages_column: str | None = Field(None, min_length=1)
    """Column with the conversation (messages): a list of `{role, content}` or of ShareGPT's
    `{from, value}`. Left out: `messages`, else `conversations` or `conversation`.
    """
    system_prompt: str | None = Field(None, min_length=1, max_length=100_000)
    """System message for rows that have none."""
    chat_template: str | None = Field(None, min_length=1, max_length=1_000_000)
    """Chat template to use instead of the tokenizer's own: a file (relative to the job file), or
    the name of one of the tokenizer's named templates. A file is read when the job is loaded.
    """
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, such as `{enable_thinking: false}`. They apply in training,
    in metrics and in exported models.
    """
    assistant_only_loss: bool = True
    """Train only on what the assistant says. `false`: train on every token of a conversation,
    except messages with weight 0. TRL's default is false.
    """
    train_on_turns: Literal["all", "last"] = "all"
    """Assistant turns to train on: all of them, or only the last one. Metrics of generated answers
    evaluate the last turn.
    """
    max_train_samples: int | None = Field(None, ge=1)
    """Maximum number of training rows, drawn with `split_seed`."""
    max_validation_samples: int | None = Field(None, ge=1)
    """Maximum number of validation rows."""
    max_test_samples: int | None = Field(None, ge=1)
    """Maximum number of test rows."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training rows that is held back if there is no validation set."""
    test_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the validation rows that is held back if there is no test set."""
    fold: int | None = Field(None, ge=0)
    """Index of the fold of `evaluate.folds` that is held back, from 0. A search with folds sets it
    for each trial.
    """
    split_seed: int = Field(0, ge=0, lt=2**32 - 1)
    """Seed of every sampling of rows. It is independent of `train.seed`, so all trials use the
    same rows.
    """

    @field_validator("labels", mode="before")
    @classmethod
    def _convert_integer_labels(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        return [
            # `labels: [0, 1]` is natural to write, but the classes of the rows are compared as
            # texts.
            str(name) if isinstance(name, int) and not isinstance(name, bool) else name
            for name in value
        ]

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_template_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.isidentifier() or name in _TEMPLATE_ARGUMENTS:
                raise ValueError(
                    f"has {name!r}, but may only contain variables of the chat template, without "
                    f"{', '.join(sorted(_TEMPLATE_ARGUMENTS))}, which are set for each row"
                )
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> DataSpec:
        if (self.dataset_name is None) == (self.train_file is None):
            raise SpecProblems(
                [
                    Problem(
                        "data",
                        "data must have exactly one of dataset_name and train_file",
                    )
                ]
            )
        if not self.assistant_only_loss and self.train_on_turns == "last":
            sentence = (
                "data.train_on_turns is last, but must be all with data.assistant_only_loss: "
                "false, which learns every token of a conversation"
            )
            raise SpecProblems([Problem("data.train_on_turns", sentence)])
        if self.labels is not None and (
            len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)
        ):
            raise SpecProblems(
                [Problem("data.labels", "data.labels must be two or more different names")]
            )
        return self


class LoraSpec(Spec):
    """The low-rank adapter of `lora` and `qlora` (PEFT's field names)."""

    lora_r: int = Field(16, ge=1, le=1024)
    """Rank of the update matrices."""
    lora_alpha: float = Field(32, gt=0)
    """Scale of the update: it is multiplied by lora_alpha / lora_r, or by lora_alpha /
    sqrt(lora_r) with use_rslora.
    """
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an input of the adapter during training."""
    lora_target_modules: str | Texts = "all-linear"
    """Names of the layers that get an adapter, or `all-linear` for every linear layer except the
    head.
    """
    use_rslora: bool = False
    """Scale by 1/sqrt(rank) instead of 1/rank (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Train a magnitude in addition to the direction (DoRA). Slower by a third to a half."""
    init_lora_weights: Literal[
        "default", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"
    ] = "default"
    """Initialisation of the adapter. With `default` and `gaussian` training starts at the base
    model. `pissa` (or its fast variant with 4 or 16 subspace iterations) and `olora` move the
    base's own largest directions into the adapter; the base is loaded again afterwards.
    """
    loraplus_lr_ratio: float | None = Field(None, ge=1, le=1000)
    """LoRA+: ratio of the learning rate of the B matrices to that of the A matrices. Left out:
    both use the same learning rate.
    """

    @property
    def has_modified_base(self) -> bool:
        """Return whether adding the adapter changes the base's weights."""
        return self.init_lora_weights not in ("default", "gaussian")

    @field_validator("lora_target_modules")
    @classmethod
    def _check_target_modules(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = value.split(",") if isinstance(value, str) else value
        cleaned = tuple(name.strip() for name in names)
        if not cleaned or not all(cleaned):
            raise ValueError(
                "must be all-linear or a non-empty list of layer names, such as [query, value]"
            )
        return "all-linear" if cleaned == ("all-linear",) else cleaned


class QloraSpec(Spec):
    """The quantised base of a `qlora` adapter (bitsandbytes)."""

    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Number format of the frozen matrices: 4-bit NormalFloat, 4-bit float, or LLM.int8()."""
    use_double_quant: bool = True
    """Also quantise the scales of 4-bit blocks, which saves 0.4 bits per weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the arithmetic with 4-bit matrices. `auto`: bfloat16 on GPUs that support
    it, float32 on CPU, where bfloat16 is ten times slower without special instructions.
    """
    quant_storage: Literal["auto", "uint8", "float32", "bfloat16", "float16"] = "auto"
    """Storage type of packed 4-bit weights in memory. `auto`: uint8, which every strategy can
    shard.
    """


class PromptTuningSpec(Spec):
    """Trained embeddings before every row, with an unchanged model (Lester et al., 2021)."""

    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """Number of trained embeddings."""
    prompt_tuning_init_text: str | None = Field(None, min_length=1, max_length=10_000)
    """Text whose embeddings are the initial values, repeated or cut to `num_virtual_tokens`. Left
    out: random values.
    """


class TrainSpec(Spec):
    """Training of one trial (HF's field names)."""

    learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak learning rate of AdamW. Left out: with `lora` and `qlora` 1e-3 for models below 200 M
    parameters, 5e-4 below 1 B, and 2e-4 above or if the size is not known yet (small encoders
    stay at chance with 2e-4); with `full` a tenth of it, but at most 5e-5; with `prompt_tuning`
    3e-2.
    """
    num_train_epochs: float = Field(3.0, gt=0, le=10_000)
    """Passes over the training rows. `max_steps`, if set, and a sweep's `max_t` take precedence."""
    max_steps: int | None = Field(None, ge=1, le=1_000_000_000)
    """Optimiser steps; the alternative to `num_train_epochs`."""
    per_device_train_batch_size: int = Field(16, ge=1)
    """Micro-batch size: rows of one forward and backward pass on one device."""
    per_device_eval_batch_size: int = Field(32, ge=1)
    """Rows of one forward pass on one device in an evaluation."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches whose gradients are added up for one optimiser step."""
    global_batch_size: int | None = Field(None, ge=1)
    """Rows of one optimiser step over all devices; the alternative to
    `gradient_accumulation_steps`.
    """
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"
    ] = "linear"
    """Learning rate after the warm-up. `linear` and `cosine` fall to 0 (in a line or a half
    cosine), `constant` and `constant_with_warmup` stay at the peak. `warmup_stable_decay` stays
    at the peak until the last `decay_ratio` of the steps and then falls to 0 in a line, so a
    trial that is stopped before was trained exactly like one that is not.
    """
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of all steps during which the learning rate rises from 0 to its peak. Not used by
    `constant`.
    """
    warmup_steps: int | None = Field(None, ge=0)
    """Optimiser steps of the warm-up; the alternative to `warmup_ratio`."""
    decay_ratio: float = Field(0.2, gt=0, lt=1)
    """Share of all steps during which `warmup_stable_decay` lowers the learning rate to 0."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Decoupled weight decay of AdamW. It applies to matrices only."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        "adamw_torch"
    )
    """Optimiser: torch's fused AdamW, or AdamW of bitsandbytes. The 8-bit variants store 8-bit
    moments for tensors with 4,096 or more numbers; the paged variants page the moments to host
    memory when a GPU is full.
    """
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum norm of the gradient; larger gradients are clipped."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimiser steps between evaluations. Left out: at every rung of a search, else after every
    epoch.
    """
    early_stopping_patience: int | None = Field(None, ge=1)
    """Number of evaluations in a row without a better metric after which a trial ends. Left out:
    it trains to its end. In both cases the weights of the best evaluation are kept.
    """
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes between checkpoints within a trial. Every evaluation also saves a checkpoint."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Number format of the arithmetic. `auto`: bf16 on GPUs that support it and with bfloat16
    weights, else none. fp16 must be asked for, also on GPUs without bfloat16.
    """
    chunked_loss: bool = True
    """Compute the loss of a causal model in chunks, without storing all logits, if its head is
    frozen. The loss is the same.
    """
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them. A third slower, but
    needs far less memory.
    """
    padding_free: Literal["auto"] | bool = "auto"
    """Concatenate the rows of a micro-batch instead of padding them (causal models; the loss is
    the same). `auto`: with `flash_attention_2`, which skips attention between rows; other
    implementations compute it and mask it.
    """
    packing: bool = False
    """Pack short examples into rows of up to `model.max_length` tokens (tasks that generate text).
    Examples do not attend to each other, and the loss is the same. Batch sizes and epoch
    lengths then count packed rows.
    """
    torch_compile: bool = False
    """Compile the model's blocks with torch.compile. The first steps take a minute, which short
    trials never win back. Needs a C++ compiler on CPU. Slower on AMD processors with AVX-512,
    whose faster matrix products compiled code does not use.
    """
    group_by_length: bool = True
    """Batch rows of similar length, which saves padding. The order is otherwise random."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the adapter's and the head's initialisation, of dropout and of the row order."""
    init_adapter: str | None = Field(None, min_length=1)
    """Folder of a PEFT adapter to start from instead of a new one."""

    @model_validator(mode="after")
    def _check_consistency(self) -> TrainSpec:
        if self.global_batch_size and self.gradient_accumulation_steps != 1:
            raise SpecProblems(
                [
                    Problem(
                        "train.global_batch_size",
                        "train has both global_batch_size and gradient_accumulation_steps, but "
                        "must have only one of them",
                    )
                ]
            )
        if (
            # Compared with the default, because the job of a trial is validated from a full dump,
            # in which every field counts as set.
            self.warmup_steps is not None
            and self.warmup_ratio != TrainSpec.model_fields["warmup_ratio"].default
        ):
            sentence = (
                "train has both warmup_steps and warmup_ratio, but must have only one of them"
            )
            raise SpecProblems([Problem("train.warmup_steps", sentence)])
        by_ratio = self.warmup_steps is None and self.warmup_ratio + self.decay_ratio > 1
        if self.lr_scheduler_type == "warmup_stable_decay" and by_ratio:
            raise SpecProblems(
                [
                    Problem(
                        "train.decay_ratio",
                        f"train.warmup_ratio and train.decay_ratio are {self.warmup_ratio:g} and "
                        f"{self.decay_ratio:g}, but their sum must be at most 1",
                    )
                ]
            )
        return self

    def compute_accumulation_steps(self, world_size: int) -> int:
        """Return the number of micro-batches per device and optimiser step.

        Args:
            world_size: Number of training processes of the trial.

        Raises:
            SpecProblems: `global_batch_size` is no multiple of the rows of one micro-batch on all
                devices.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        rows_per_pass = self.per_device_train_batch_size * world_size
        steps, remainder = divmod(self.global_batch_size, rows_per_pass)
        if remainder or not steps:
            raise SpecProblems(
                [
                    Problem(
                        "train.global_batch_size",
                        f"train.global_batch_size is {self.global_batch_size}, but must be a "
                        "multiple of per_device_train_batch_size x processes = "
                        f"{self.per_device_train_batch_size} x {world_size} = {rows_per_pass}",
                    )
                ]
            )
        return steps

    def compute_effective_batch_size(self, world_size: int) -> int:
        """Return the rows of one optimiser step over `world_size` devices.

        Trial ids contain this number and not how it is split into micro-batches.

        Raises:
            SpecProblems: `global_batch_size` cannot be split, as in
                `compute_accumulation_steps`.
        """
        return (
            self.per_device_train_batch_size
            * world_size
            * self.compute_accumulation_steps(world_size)
        )


LabelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9./_-]{0,250}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]


class ResourcesSpec(Spec):
    """Resources of a single trial."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs if the machine has any. `cuda` fails immediately if there is none."""
    num_nodes: int = Field(1, ge=1, le=4096)
    """Number of nodes that one trial spans."""
    workers_per_node: int = Field(1, ge=1, le=256)
    """Training processes on each node, one device each."""
    gpus_per_node: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs on each node. `auto`: one per worker if the machine has GPUs, else none."""
    gpus_per_trial: float = Field(1.0, ge=0.01, le=1)
    """GPUs of a trial of one process. 0.5: two trials run on each GPU, each in a process of its own
    and with half of the GPU's memory. Use it for small trials that cannot be packed.
    """
    cpus_per_worker: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """CPU cores, and therefore threads, of one training process. `auto`: the cores of
    this machine, divided by the trials that run at once; 1 on a cluster. Trials that start
    while cores are idle get those too; a trial keeps its number when it is resumed.
    """
    label_selector: dict[LabelName, LabelValue] = {}
    """Ray labels that the nodes of a trial must have, such as `{ray.io/accelerator-type: H100}`,
    or labels set by `ray start --labels` or a worker group. Empty: any node of the cluster may
    be used.
    """
    strategy: Strategy = "auto"
    """How the processes of one trial share the work. `ddp` replicates the model; `fsdp` (torch's
    FSDP2) shards every layer; `zero1`, `zero2` and `zero3` (DeepSpeed) shard the optimiser
    state, then also the gradients, then also the weights. `auto`: ddp while the base fits on
    one GPU, else fsdp; the plan shows which one and why.
    """
    pack: Annotated[int, Field(ge=1, le=1024)] | Literal["auto", "off"] = "auto"
    """LoRA and QLoRA trials of a sweep that one process trains at once, on one loaded base, with
    the results that each would have alone. `auto`: packs if a measurement at the start of the run
    shows that it is at least 5 % faster; `off` and 1: one trial at a time.
    """
    deepspeed_config: str | None = Field(None, min_length=1)
    """Your own DeepSpeed JSON file for zero1, zero2 and zero3 (offloading, buckets). The job file
    decides batch size, clipping, optimiser and stage; a setting that contradicts it is an
    error.
    """

    @property
    def world_size(self) -> int:
        """Return the number of training processes of one trial."""
        return self.num_nodes * self.workers_per_node

    @property
    def trials_per_gpu(self) -> int:
        """Return the number of trials that share a GPU."""
        # Not below what was meant: 1 / 0.1 is not exactly 10 for every such number.
        return math.floor(1 / self.gpus_per_trial + 1e-9)

    @property
    def min_cpus_per_worker(self) -> int:
        """Return the cores that a training process must have."""
        return 1 if self.cpus_per_worker == "auto" else self.cpus_per_worker

    @field_validator("gpus_per_node", mode="before")
    @classmethod
    def _check_whole_gpus(cls, value: object) -> object:
        if isinstance(value, float) and not value.is_integer():
            sentence = (
                f"resources.gpus_per_node is {value:g}, but must be a whole number. To share a "
                "GPU between trials, set resources.gpus_per_trial"
            )
            raise SpecProblems([Problem("resources.gpus_per_node", sentence)])
        return value

    @model_validator(mode="after")
    def _check_gpus_per_worker(self) -> ResourcesSpec:
        problems = []
        if self.device == "cpu" and self.gpus_per_node not in ("auto", 0):
            problems.append(
                Problem(
                    "resources.gpus_per_node",
                    "resources.gpus_per_node must be 0 when resources.device is cpu",
                )
            )
        if isinstance(self.gpus_per_node, int) and self.gpus_per_node not in (
            0,
            self.workers_per_node,
        ):
            problems.append(
                Problem(
                    "resources.gpus_per_node",
                    f"resources.gpus_per_node is {self.gpus_per_node}, but must be 0 or "
                    f"workers_per_node = {self.workers_per_node}: each training process uses one "
                    "GPU",
                )
            )
        if self.gpus_per_trial < 1:
            problems += self._find_sharing_problems()
        if problems:
            raise SpecProblems(problems)
        return self

    def _find_sharing_problems(self) -> list[Problem]:
        """Return what contradicts trials that share a GPU."""
        path = "resources.gpus_per_trial"
        value = f"{path} is {self.gpus_per_trial:g}"
        if self.trials_per_gpu == 1:
            return [Problem(path, f"{value}, but must be 1, or at most 0.5: two trials on a GPU")]
        reason = None
        if self.device == "cpu" or self.gpus_per_node == 0:
            reason = "the trials use no GPU"
        elif self.world_size > 1:
            reason = "a trial has several processes, and each of these needs a GPU of its own"
        elif self.pack not in ("auto", "off", 1):
            reason = (
                f"resources.pack is {self.pack}: trials share a GPU either in one process (pack) "
                "or in several (gpus_per_trial)"
            )
        return [Problem(path, f"{value}, but must be 1: {reason}")] if reason else []


class RetriesSpec(Spec):
    """Maximum number of restarts of trials from the newest checkpoint, by cause. Counted over the
    whole run.
    """

    oom: int = Field(6, ge=0, le=100)
    """Restarts after running out of memory. Each restart halves the micro-batch size and doubles
    the number of micro-batches, so the rows of an optimiser step stay the same.
    """
    worker_lost: int = Field(2, ge=0, le=100)
    """Restarts after a process was killed, a node was lost or a GPU failed."""
    preempted: int = Field(20, ge=0, le=1000)
    """Restarts after a node was preempted with a notice."""
    hang: int = Field(1, ge=0, le=100)
    """Restarts after `hang_minutes` without progress."""
    nan: int = Field(0, ge=0, le=100)
    """Restarts after a loss or gradient that is NaN or infinite. The same values come again unless
    the hardware was at fault.
    """
    code: int = Field(0, ge=0, le=100)
    """Restarts after any other error."""
    hang_minutes: float = Field(30.0, ge=0, le=10_000)
    """Minutes without a forward pass of training or evaluation after which a process writes down
    where it is and ends itself. 0: never.
    """


MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class CustomMetric(Spec):
    """A metric of your own that gives each answer a number."""

    function: str = Field(min_length=1, max_length=4096)
    """`FILE.py:NAME`, a function of (prediction, reference), and of prompt if it has such a
    parameter, that returns a number for one row; the mean over the rows is the metric. Or
    `FILE.py` alone, a metric module of the package `evaluate`. The path is relative to the job
    file. The file is code and runs with your permissions wherever the job runs.
    """
    goal: Goal = "maximize"
    """Whether a higher (maximize) or a lower (minimize) value is better."""


class EvaluateSpec(Spec):
    """How results are measured."""

    bootstrap_samples: int = Field(10_000, ge=100, le=100_000)
    """Bootstrap samples of the largest difference, for the confidence intervals that hold for all
    candidates simultaneously.
    """
    folds: int | None = Field(None, ge=2, le=100)
    """Number of folds of a cross-validation, for small data. A search trains every configuration
    this many times, each time with another part of the training and validation rows held back,
    and selects by the mean. The best configuration is then trained on the original training
    rows. Equal rows stay in one fold, and classes are spread evenly. Left out: no
    cross-validation.
    """
    metrics: Texts | None = None
    """Metrics of generated answers, in addition to loss and perplexity: rouge1, rouge2, rougeL,
    rougeLsum, bertscore_f1, exact_match, contains, length_ratio. Left out: ROUGE and the length
    ratio (summarization), none (generation).
    """
    custom_metrics: dict[MetricName, CustomMetric] = {}
    """Metrics of your own, by name."""
    max_new_tokens: int = Field(64, ge=1, le=100_000)
    """Maximum length of a generated answer, in tokens."""
    do_sample: bool = False
    """Sample each token by its probability. `false`: take the most likely token (greedy)."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Divisor of the logits for `do_sample`. Below 1, likely tokens become more likely."""
    top_p: float = Field(1.0, gt=0, le=1)
    """`do_sample` samples among the most likely tokens whose probabilities add up to this."""
    generation_seed: int = Field(0, ge=0, lt=2**32)
    """Seed of `do_sample`."""
    sample_rows: int = Field(5, ge=0, le=10_000)
    """Held-out rows for which the report shows generated answers if no metric needs answers. A
    plain text (`format: text`) is continued from its beginning.
    """
    bertscore_model: str = Field("asset:minilm-l6", min_length=1, max_length=400)
    """Encoder of BERTScore: a hub id, a folder, or `asset:NAME`. Scores of different encoders are
    not comparable.
    """
    bertscore_layer: int | None = Field(None, ge=1, le=1000)
    """Layer of the encoder whose embeddings are compared, from 1. Left out: the last layer."""

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in TEXT_METRICS:
                raise ValueError(f"has {name!r}, but may only contain {', '.join(TEXT_METRICS)}")
        return tuple(dict.fromkeys(value)) if value is not None else None

    @model_validator(mode="after")
    def _check_metric_names(self) -> EvaluateSpec:
        for name in self.custom_metrics:
            # A row of metrics.jsonl holds metrics and its other values side by side, under these
            # keys.
            if name in METRICS or name in ROW_KEYS:
                conflict = (
                    "a metric of lorafleet" if name in METRICS else "a key of every row of metrics"
                )
                sentence = (
                    f"evaluate.custom_metrics has {name!r}, which is {conflict}: choose another "
                    "name"
                )
                raise SpecProblems([Problem(f"evaluate.custom_metrics.{name}", sentence)])
        return self


class TrackingSpec(Spec):
    """Weights & Biases: a copy of the run's own record."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online if you are logged in, else offline (`lorafleet sync` uploads later).
    lorafleet never prompts for a login.
    """
    project: str = Field("lorafleet", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    tags: Texts = ()
    """W&B tags of every trial."""
    base_url: str | None = Field(None, pattern=r"^https?://[^@]+$")
    """Address of your own W&B server."""
    upload_samples: bool = False
    """Allow texts of rows and of models to be sent to W&B. `false`: only numbers and settings are
    sent.
    """


class JobSpec(Spec):
    """One job: a base model, a data set, a method, and optionally a search or a comparison."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    """Name of the job: lower-case letters, digits and dashes, at most 40. It becomes part of
    folder names.
    """
    task: Task
    """What is learnt: a label for a text (classification), a continuation of a text (generation),
    or a short version of a long text (summarization: like generation, evaluated with ROUGE).
    """
    method: Method = "lora"
    """How the base is adapted: `lora`; `qlora` (LoRA on a quantised base); `prompt_tuning`; `full`
    (every weight).
    """
    model: ModelSpec
    """The base model."""
    data: DataSpec
    """The rows for training and evaluation."""
    lora: LoraSpec = LoraSpec()
    """The adapter of `lora` and `qlora`."""
    qlora: QloraSpec = QloraSpec()
    """The quantised base of `qlora`."""
    prompt_tuning: PromptTuningSpec = PromptTuningSpec()
    """The trained prompt of `prompt_tuning`."""
    train: TrainSpec = TrainSpec()
    """Training settings."""
    resources: ResourcesSpec = ResourcesSpec()
    """Resources of one trial."""
    retries: RetriesSpec = RetriesSpec()
    """Restarts of trials after a failure."""
    search: SearchSpec | None = None
    """The search. `lorafleet train` ignores it."""
    compare: CompareSpec | None = None
    """The arms that `lorafleet compare` compares. No other command uses it."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """How results are measured."""
    export: ExportSpec = ExportSpec()
    """How exported models are compared with their source."""
    tracking: TrackingSpec = TrackingSpec()
    """Weights & Biases."""
    environment: dict[str, str] = {}
    """Environment variables for every process of the job (`NCCL_DEBUG: INFO`). Names that may hold
    a secret are refused.
    """
    linked: dict[str, str] = Field(default_factory=dict)
    """Dotted field -> arithmetic on other fields, evaluated for each trial (`lora.lora_alpha:
    2*lora_r`).
    """

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        return validate_environment(value)

    @property
    def comparison(self) -> CompareSpec:
        """Return the `compare` section. Raises ValueError for a job that has none."""
        if self.compare is None:
            raise ValueError(f"job {self.name} has no compare section")
        return self.compare

    @property
    def uses_lora(self) -> bool:
        """Return whether the method uses the `lora` block."""
        return self.method in ("lora", "qlora")

    @property
    def is_generative(self) -> bool:
        """Return whether the model generates text instead of naming a class."""
        return self.task != "classification"

    @property
    def text_metrics(self) -> tuple[str, ...]:
        """Return the metrics that need generated answers, custom metrics last.

        It is empty for classification, where custom metrics read the predicted class instead.
        """
        if not self.is_generative:
            return ()
        requested = self.evaluate.metrics
        return (
            *(DEFAULT_TEXT_METRICS[self.task] if requested is None else requested),
            *self.evaluate.custom_metrics,
        )

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """Return the metrics that cost more than one forward pass over the rows."""
        return self.text_metrics if self.is_generative else tuple(self.evaluate.custom_metrics)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return every metric that a held-out evaluation of this job reports."""
        return (*LIKELIHOOD_METRICS[self.task], *self.extra_metrics)

    @property
    def uses_padding_free(self) -> bool:
        """Return whether the rows of a micro-batch are concatenated instead of padded.

        `auto` does so only with `flash_attention_2`, which skips the attention between rows.
        The other implementations would compute it and mask it.
        """
        if self.train.padding_free != "auto":
            return bool(self.train.padding_free)
        flash = self.model.attn_implementation == "flash_attention_2"
        return flash and self.is_generative and self.method != "prompt_tuning"

    @property
    def has_modified_base(self) -> bool:
        """Return whether a trial changes the base's weights.

        No other trial may reuse the loaded base then; it is loaded again.
        """
        return self.method == "full" or (self.uses_lora and self.lora.has_modified_base)

    @property
    def metric(self) -> MetricSpec:
        """Return the metric by which trials are compared.

        The metric of `search` takes precedence over that of `compare`; without both, the task
        has a default.
        """
        for block in (self.search, self.compare):
            if block and block.metric:
                return block.metric
        return MetricSpec.model_validate({"name": DEFAULT_METRIC[self.task]})

    @property
    def decision_metrics(self) -> tuple[NamedMetric, ...]:
        """Return all metrics that decide.

        The first one finds the best candidate; what ships must be within the tolerance of all.
        """
        return (self.metric, *self.metric.also)

    @property
    def tolerances(self) -> dict[str, float | None]:
        """Return the tolerance of each decision metric; None if the job does not set it.

        The decision rule replaces None by its own default (evaluation/report/decide.py). In a
        job with both blocks, `compare` decides.
        """
        block = self.compare or self.search
        tolerance = block.tolerance if block else None
        return {
            metric.name: tolerance.get(metric.name) if isinstance(tolerance, dict) else tolerance
            for metric in self.decision_metrics
        }

    @property
    def metric_block(self) -> str:
        """Return the dotted key at which the metric is set, or would be set."""
        return (
            "compare.metric"
            if self.compare and not (self.search and self.search.metric)
            else "search.metric"
        )

    @model_validator(mode="after")
    def _check_consistency(self) -> JobSpec:
        # All checks run, so that one command shows everything that is wrong.
        problems = (
            _find_format_problems(self)
            + list(_find_metric_problems(self))
            + list(_find_batch_problems(self))
            + list(_find_budget_problems(self))
            + list(_find_fold_problems(self))
            + list(_find_method_problems(self))
        )
        if problems:
            raise SpecProblems(problems)
        return self


def _find_format_problems(job: JobSpec) -> list[Problem]:
    is_labelled = job.data.format == "text_label"
    if job.data.format == "auto" or is_labelled == (job.task == "classification"):
        return []
    expected = (
        "text_label"
        if job.task == "classification"
        else "prompt_completion, instruction, messages or text"
    )
    return [
        Problem(
            "data.format",
            f"data.format is {job.data.format}, but must be {expected} (or auto) for {job.task}",
        )
    ]


def _find_metric_problems(job: JobSpec) -> list[Problem]:
    metric_path = job.metric_block
    allowed = ", ".join(job.metric_names)
    names = [decision_metric.name for decision_metric in job.decision_metrics]
    for index, metric in enumerate(job.decision_metrics):
        path = metric_path if index == 0 else f"{metric_path}.also.{index - 1}"
        name, custom = metric.name, job.evaluate.custom_metrics.get(metric.name)
        if name not in job.metric_names:
            hint = (
                " (add it to evaluate.metrics)"
                if job.is_generative and name in TEXT_METRICS
                else ""
            )
            sentence = f"{path}.name is {name}, but must be one of {allowed} for {job.task}{hint}"
            return [Problem(f"{path}.name", sentence)]
        if custom and metric.goal != custom.goal:
            sentence = (
                f"{path}.goal is {metric.goal}, but evaluate.custom_metrics.{name} has the goal "
                f"{custom.goal}"
            )
            return [Problem(f"{path}.goal", sentence)]
        if names.count(name) > 1:
            return [Problem(metric_path, f"{metric_path} has {name} twice: name each metric once")]
    block = metric_path.partition(".")[0]
    tolerance = getattr(getattr(job, block), "tolerance", None)
    for name in tolerance if isinstance(tolerance, dict) else ():
        if name not in names:
            sentence = (
                f"{block}.tolerance has {name}, but may only contain metrics of {metric_path}: "
                f"{', '.join(names)}"
            )
            return [Problem(f"{block}.tolerance", sentence)]
    if not job.is_generative and job.evaluate.metrics:
        sentence = (
            "evaluate.metrics is for generated text; classification has its own metrics. Leave it "
            "out"
        )
        return [Problem("evaluate.metrics", sentence)]
    return []


def _find_batch_problems(job: JobSpec) -> list[Problem]:
    try:
        job.train.compute_accumulation_steps(job.resources.world_size)
    except SpecProblems as error:
        return error.problems
    return []


def _find_method_problems(job: JobSpec) -> list[Problem]:
    """Return the conflicts between the blocks of the method and of the training."""
    problems = [Problem(field, sentence) for field, sentence in find_unsupported(job)]
    if job.method == "qlora" and job.lora.has_modified_base:
        problems.append(
            Problem(
                "lora.init_lora_weights",
                f"lora.init_lora_weights is {job.lora.init_lora_weights}, but must be default or "
                "gaussian with qlora: it changes the base's weights, and quantised weights cannot "
                "be changed exactly",
            )
        )
    if job.train.padding_free is True and (
        job.task == "classification" or job.method == "prompt_tuning"
    ):
        problems.append(
            Problem(
                "train.padding_free",
                "train.padding_free is true, but must be false or auto for classification (its "
                "models use attention in both directions) and for prompt_tuning (each row has a "
                "learnt prompt)",
            )
        )
    if job.train.packing and (job.task == "classification" or job.method == "prompt_tuning"):
        problems.append(
            Problem(
                "train.packing",
                "train.packing is true, but must be false for classification (its models use "
                "attention in both directions) and for prompt_tuning (each row has a learnt "
                "prompt)",
            )
        )
    if job.method == "full" and job.model.dtype == "float16":
        problems.append(
            Problem(
                "model.dtype",
                "model.dtype is float16, but must be auto, float32 or bfloat16 for method full: "
                "gradients and their squares underflow in float16",
            )
        )
    if job.train.init_adapter and job.method == "full":
        problems.append(
            Problem(
                "train.init_adapter",
                "train.init_adapter continues an adapter, but method full has none",
            )
        )
    if job.train.init_adapter and job.uses_lora and job.lora.has_modified_base:
        problems.append(
            Problem(
                "train.init_adapter",
                f"train.init_adapter and lora.init_lora_weights = {job.lora.init_lora_weights} "
                "both set the adapter's initial weights; keep one of the two",
            )
        )
    if (
        job.method == "prompt_tuning"
        and job.prompt_tuning.num_virtual_tokens >= job.model.max_length
    ):
        problems.append(
            Problem(
                "prompt_tuning.num_virtual_tokens",
                f"prompt_tuning.num_virtual_tokens is {job.prompt_tuning.num_virtual_tokens}, but "
                f"must be below model.max_length = {job.model.max_length}",
            )
        )
    return problems


def _find_fold_problems(job: JobSpec) -> list[Problem]:
    folds, problems = job.evaluate.folds, []
    if job.data.fold is not None and (folds is None or job.data.fold >= folds):
        problems.append(
            Problem(
                "data.fold",
                f"data.fold is {job.data.fold}, but must be below evaluate.folds = {folds}",
            )
        )
    if folds is None or job.search is None:
        return problems
    if job.search.scheduler.type == "asha":
        sentence = (
            "search.scheduler.type is asha, but must be none with evaluate.folds: a trial could be "
            "stopped because of the rows of its fold instead of its configuration"
        )
        problems.append(Problem("search.scheduler.type", sentence))
    if job.search.method == "tpe":
        sentence = (
            "search.method is tpe, but must be random or grid with evaluate.folds: TPE uses the "
            "results of single trials, not of all folds"
        )
        problems.append(Problem("search.method", sentence))
    for metric in job.decision_metrics:
        if metric.name in job.extra_metrics:
            sentence = (
                f"search.metric.name is {metric.name}, but must be a likelihood metric with "
                "evaluate.folds"
            )
            problems.append(Problem("search.metric.name", sentence))
    return problems


def _find_budget_problems(job: JobSpec) -> list[Problem]:
    gpu_hours = job.search.budget.gpu_hours if job.search else None
    # With `auto` only the site can tell: compute_placement checks the budget again.
    uses_no_gpu = job.resources.device == "cpu" or job.resources.gpus_per_node == 0
    if gpu_hours is None or not uses_no_gpu:
        return []
    return [
        Problem(
            "search.budget.gpu_hours",
            "search.budget.gpu_hours counts GPUs, but this job uses none; use "
            "search.budget.wall_hours",
        )
    ]
