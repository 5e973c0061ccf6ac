"""JobSpec: all that one job file can say. Frozen, closed, and every field states its unit.

The words are HF, PEFT and TRL's for training, W&B's and Ray's for the search.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.comparison import CompareSpec
from lorafleet.jobs.schema.compatibility import Method, Strategy, refusals
from lorafleet.jobs.schema.environment import checked_environment
from lorafleet.jobs.schema.export import ExportSpec
from lorafleet.jobs.schema.metrics import (
    DEFAULT_METRIC,
    DEFAULT_TEXT_METRICS,
    LIKELIHOOD_METRICS,
    METRICS,
    ROW_WORDS,
    TEXT_METRICS,
)
from lorafleet.jobs.schema.search import MetricSpec, NamedMetric, SearchSpec
from lorafleet.jobs.trials.asha import Goal
from pydantic import Field, field_validator, model_validator

Task = Literal["classification", "generation", "summarization"]
DataFormat = Literal["auto", "text_label", "prompt_completion", "instruction", "messages", "text"]
_TEMPLATE_ARGUMENTS = frozenset(
    {"add_special_tokens", "max_length", "padding", "processor_kwargs", "return_tensors", "tokenizer_kwargs"}
    | {"truncation"}
    | {"add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "conversation", "documents"}
    | {"eos_token", "messages", "return_assistant_tokens_mask", "return_dict", "tokenize", "tools"}
)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class ModelSpec(Spec):
    """Which base model is adapted."""

    model_name_or_path: str = Field(min_length=1, max_length=400)
    """A hub id (`org/name`), a folder with a safetensors model, or `asset:NAME` (see `lorafleet fetch --list`)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; left out: the main branch as it was fetched."""
    max_length: int = Field(512, ge=8, le=1_000_000)
    """Longest row in tokens, prompt and answer together; longer rows are cut, and counted in a warning."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the base's weights. `auto`: bfloat16 on GPUs that have it, where they are frozen; float32 on CPU
    and with `full`, whose small updates bfloat16 would round away."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Which attention transformers uses; `auto`: torch's scaled dot product (`sdpa`) where the model has it.
    `flash_attention_2` needs a GPU and the flash-attn package."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run. Needs `revision` to be a full commit; of a folder, the SHA-256
    of its files without the weights, which `lorafleet validate` prints."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> ModelSpec:
        if self.trust_remote_code and not _COMMIT.fullmatch(self.revision or ""):
            raise SpecProblems(
                [
                    Problem(
                        "model.trust_remote_code",
                        "model.trust_remote_code is true, but must go with a model.revision of 40 hex digits (of a "
                        "folder, 64): code that can change under you is not run",
                    )
                ]
            )
        return self


class DataSpec(Spec):
    """Which rows the model learns from, is chosen by, and is finally judged on."""

    dataset_name: str | None = Field(None, min_length=1, max_length=400)
    """A hub data set (`org/name`) or `asset:NAME`; the alternative to `train_file`."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    dataset_config_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Configuration of a hub data set that has several, such as `3.0.0`."""
    train_file: str | None = Field(None, min_length=1)
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, all but the last also as .gz or .zst; relative to
    the job file. In .csv commas, semicolons, tabs or bars separate columns; in .tsv quotes are text."""
    validation_file: str | None = Field(None, min_length=1)
    """Rows that the search and the choice look at, in the place of a data set's own. Where there are none,
    `validation_fraction` of the training rows is held back."""
    test_file: str | None = Field(None, min_length=1)
    """Rows that are looked at once, after the choice, in the place of a data set's own. Where there are none,
    `test_fraction` of the validation rows is held back."""
    format: DataFormat = "auto"
    """What a row looks like; `auto` goes by the columns that are named here, else by the keys of the first row."""
    text_column: str = "text"
    """Column with the text (classification, plain text)."""
    label_column: str = "label"
    """Column with the class: a string or a whole number."""
    labels: Texts | None = None
    """Names of the classes in the order of their ids: `[negative, positive]` names the classes 0 and 1 of rows with
    whole numbers. Left out: what the training rows have, whole numbers in their order and words in the alphabet's."""
    prompt_column: str = "prompt"
    """Column with the prompt (prompt_completion)."""
    completion_column: str = "completion"
    """Column with the answer to learn (prompt_completion)."""
    messages_column: str | None = Field(None, min_length=1)
    """Column with the conversation (messages): a list of `{role, content}` or of ShareGPT's `{from, value}`. Left out:
    `messages`, else `conversations` or `conversation`."""
    system_prompt: str | None = Field(None, min_length=1, max_length=100_000)
    """System message for rows that bring none."""
    chat_template: str | None = Field(None, min_length=1, max_length=1_000_000)
    """Chat template in the place of the tokenizer's own: a file (relative to the job file), or the name of one of the
    tokenizer's named templates. A file is read when the job is loaded."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, such as `{enable_thinking: false}`: in training, metrics and exported models."""
    assistant_only_loss: bool = True
    """Learn only what the assistant says. `false`: every token of a conversation (but for messages with weight 0).
    TRL's default is false."""
    train_on_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learnt: all, or the last one alone. Metrics of answers judge the last one."""
    max_train_samples: int | None = Field(None, ge=1)
    """Use at most this many training rows, drawn with `split_seed`."""
    max_validation_samples: int | None = Field(None, ge=1)
    """Use at most this many validation rows."""
    max_test_samples: int | None = Field(None, ge=1)
    """Use at most this many test rows."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training rows held back when there is no validation set."""
    test_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the validation rows held back when there is no test set."""
    fold: int | None = Field(None, ge=0)
    """Which of `evaluate.folds` is held back, from 0; a search with folds sets it for each trial."""
    split_seed: int = Field(0, ge=0, lt=2**32 - 1)
    """Seed of every draw of rows; it does not depend on `train.seed`, so all trials see the same rows."""

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_as_texts(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        return [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in value]

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.isidentifier() or name in _TEMPLATE_ARGUMENTS:
                raise ValueError(
                    f"has {name!r}, but must hold variables of the chat template, and none of "
                    f"{', '.join(sorted(_TEMPLATE_ARGUMENTS))}, which are set for each row"
                )
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.dataset_name is None) == (self.train_file is None):
            raise SpecProblems(
                [Problem("data", "data must have either dataset_name or train_file, and exactly one of the two")]
            )
        if not self.assistant_only_loss and self.train_on_turns == "last":
            sentence = (
                "data.train_on_turns is last, but must be all with data.assistant_only_loss: false, which learns every "
                "token of a conversation"
            )
            raise SpecProblems([Problem("data.train_on_turns", sentence)])
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise SpecProblems([Problem("data.labels", "data.labels must be two or more names, each once")])
        return self


class LoraSpec(Spec):
    """The low-rank adapter of `lora` and `qlora` (PEFT's names)."""

    lora_r: int = Field(16, ge=1, le=1024)
    """Rank of the update matrices."""
    lora_alpha: float = Field(32, gt=0)
    """Scale of the update: it is multiplied by lora_alpha / lora_r (by lora_alpha / sqrt(lora_r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is dropped while training."""
    lora_target_modules: str | Texts = "all-linear"
    """Names of the layers that get an adapter, or `all-linear` for every linear layer but the head."""
    use_rslora: bool = False
    """Scale by 1/sqrt(rank) instead of 1/rank (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Train a magnitude beside the direction (DoRA); slower by a third to a half."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"] = "default"
    """How the adapter begins. `default` and `gaussian` begin at the base; `pissa` (or its fast form with so many
    subspace iterations) and `olora` take the base's own largest directions out of it, and it is loaded anew after."""
    loraplus_lr_ratio: float | None = Field(None, ge=1, le=1000)
    """LoRA+: the learning rate of the B matrices over that of the A matrices. Left out: both the same."""

    @property
    def changes_base(self) -> bool:
        """Whether putting the adapter on writes to the base's weights."""
        return self.init_lora_weights not in ("default", "gaussian")

    @field_validator("lora_target_modules")
    @classmethod
    def _names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = value.split(",") if isinstance(value, str) else value
        cleaned = tuple(name.strip() for name in names)
        if not cleaned or not all(cleaned):
            raise ValueError("must be all-linear or names of layers, such as [query, value], and not empty")
        return "all-linear" if cleaned == ("all-linear",) else cleaned


class QloraSpec(Spec):
    """The quantised base under a `qlora` adapter (bitsandbytes)."""

    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Number format of the frozen matrices: 4-bit NormalFloat, 4-bit float, or LLM.int8()."""
    use_double_quant: bool = True
    """Quantise the scales of 4-bit blocks too, which saves 0.4 bits a weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the arithmetic with 4-bit matrices. `auto`: bfloat16 on GPUs that have it, float32 on CPU (where
    bfloat16 is ten times slower without instructions for it)."""
    quant_storage: Literal["auto", "uint8", "float32", "bfloat16", "float16"] = "auto"
    """Type under which packed 4-bit weights lie in memory. `auto`: uint8, which every strategy here can cut up."""


class PromptTuningSpec(Spec):
    """Learnt embeddings before every row, with the model left as it is (Lester et al., 2021)."""

    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """How many."""
    prompt_tuning_init_text: str | None = Field(None, min_length=1, max_length=10_000)
    """A sentence whose embeddings they begin as, repeated or cut to their number. Left out: random."""


class TrainSpec(Spec):
    """How one trial is trained (HF's names)."""

    learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak learning rate of AdamW. Left out: with `lora` and `qlora` 1e-3 for models below 200 M parameters, 5e-4 below
    1 B, 2e-4 above or when the size is not known yet (small encoders stay at chance with 2e-4); with `full` a tenth of
    it, but at most 5e-5; with `prompt_tuning` 3e-2."""
    num_train_epochs: float = Field(3.0, gt=0, le=10_000)
    """Passes over the training rows; `max_steps`, where given, and a sweep's `max_t` come before it."""
    max_steps: int | None = Field(None, ge=1, le=1_000_000_000)
    """Optimiser steps; the alternative to `num_train_epochs`."""
    per_device_train_batch_size: int = Field(16, ge=1)
    """Rows in one forward and backward pass on one device."""
    per_device_eval_batch_size: int = Field(32, ge=1)
    """Rows in one forward pass of an evaluation on one device."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Passes that are added up before one optimiser step."""
    global_batch_size: int | None = Field(None, ge=1)
    """Rows in one optimiser step over all devices; the alternative to `gradient_accumulation_steps`."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"] = "linear"
    """How the learning rate moves after the warm-up: to 0 in a line or a half cosine, not at all, or not until the last
    `decay_ratio` of the steps and then to 0 in a line (a trial that is cut before was trained like one that is not)."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of all steps in which the learning rate rises from 0 to its peak (not used by `constant`)."""
    warmup_steps: int | None = Field(None, ge=0)
    """Optimiser steps in which it rises; the alternative to `warmup_ratio`."""
    decay_ratio: float = Field(0.2, gt=0, lt=1)
    """Share of all steps in which `warmup_stable_decay` lets the learning rate fall to 0."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """AdamW's decoupled weight decay, of matrices only."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    """AdamW as one fused pass of torch, or bitsandbytes' with 8-bit moments (of tensors with 4,096 numbers or more) and
    with moments that are paged to host memory when a GPU is full."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient's norm is clipped to this."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimiser steps between evaluations. Left out: at every rung of a search, else after every epoch."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Evaluations in a row without a better metric after which a trial ends. Left out: it trains to its end. The
    weights of its best evaluation are kept either way."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes between checkpoints inside a trial; every evaluation saves one as well."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Number format of the arithmetic. `auto`: bf16 on GPUs that have it and with bfloat16 weights, else none."""
    chunked_loss: bool = True
    """Work out a causal model's loss without holding all logits, where its head is frozen; the loss is the same."""
    gradient_checkpointing: bool = False
    """Work activations out again in the backward pass instead of keeping them: a third slower, far less memory."""
    padding_free: Literal["auto"] | bool = "auto"
    """Lay a pass's rows end to end instead of padding them (causal models; the loss is the same). `auto`: with
    `flash_attention_2`, which skips what one row is to another; other attention works it out and masks it."""
    packing: bool = False
    """Lay short examples one after another into rows of up to `model.max_length` tokens (tasks that write text). Each
    sees only itself, and the loss is the same; rows of a batch, and steps of an epoch, are then packed ones."""
    torch_compile: bool = False
    """Compile the model's blocks with torch.compile; the first steps take a minute, which short trials never win
    back. Needs a C++ compiler on CPU."""
    group_by_length: bool = True
    """Put rows of like length into one batch, which saves padding; the order is random but for that."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the adapter's and the head's initialisation, the dropout and the order of the rows."""
    init_adapter: str | None = Field(None, min_length=1)
    """Folder of a PEFT adapter to start from instead of a fresh one."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainSpec:
        if self.global_batch_size and self.gradient_accumulation_steps != 1:
            raise SpecProblems(
                [
                    Problem(
                        "train.global_batch_size",
                        "train has both global_batch_size and gradient_accumulation_steps, but must have one of them",
                    )
                ]
            )
        if self.warmup_steps is not None and self.warmup_ratio != TrainSpec.model_fields["warmup_ratio"].default:
            sentence = "train has both warmup_steps and warmup_ratio, but must have one of them"
            raise SpecProblems([Problem("train.warmup_steps", sentence)])
        by_ratio = self.warmup_steps is None and self.warmup_ratio + self.decay_ratio > 1
        if self.lr_scheduler_type == "warmup_stable_decay" and by_ratio:
            raise SpecProblems(
                [
                    Problem(
                        "train.decay_ratio",
                        f"train.warmup_ratio and train.decay_ratio are {self.warmup_ratio:g} and {self.decay_ratio:g}, "
                        "but must be at most 1 together",
                    )
                ]
            )
        return self

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes on each of `world_size` devices before one optimiser step."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        per_pass = self.per_device_train_batch_size * world_size
        steps, rest = divmod(self.global_batch_size, per_pass)
        if rest or not steps:
            raise SpecProblems(
                [
                    Problem(
                        "train.global_batch_size",
                        f"train.global_batch_size is {self.global_batch_size}, but must be a multiple of "
                        f"per_device_train_batch_size x processes = {self.per_device_train_batch_size} x {world_size} "
                        f"= {per_pass}",
                    )
                ]
            )
        return steps

    def effective_batch_size(self, world_size: int) -> int:
        """Rows in one optimiser step over `world_size` devices."""
        return self.per_device_train_batch_size * world_size * self.accumulation_steps(world_size)


LabelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9./_-]{0,250}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]


class ResourcesSpec(Spec):
    """What ONE trial needs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs where the machine has them. `cuda` fails at once where there is none."""
    num_nodes: int = Field(1, ge=1, le=4096)
    """Machines that one trial spans."""
    workers_per_node: int = Field(1, ge=1, le=256)
    """Training processes on each of them, one device each."""
    gpus_per_node: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs on each of them. `auto`: one a worker where the machine has GPUs, else none."""
    cpus_per_worker: int = Field(1, ge=1, le=1024)
    """CPU cores, and so threads, of one training process."""
    label_selector: dict[LabelName, LabelValue] = {}
    """Ray labels that a trial's machines must have, such as `{ray.io/accelerator-type: H100}`, or what `ray start
    --labels` or a worker group gave them; nothing, and every machine of the cluster may be used."""
    strategy: Strategy = "auto"
    """How the processes of one trial share the work: whole copies (`ddp`); shares of every layer (`fsdp`, torch's
    FSDP2); shares of the optimiser state, of gradients too, of weights too (`zero1`, `zero2`, `zero3`, DeepSpeed).
    `auto`: ddp while the base fits a GPU, else fsdp; the plan says which and why."""
    deepspeed_config: str | None = Field(None, min_length=1)
    """A DeepSpeed JSON of your own for zero1, zero2 and zero3 (offloading, buckets); the job file decides batch,
    clipping, optimiser and stage, and what contradicts it is an error."""

    @property
    def world_size(self) -> int:
        """Training processes of one trial."""
        return self.num_nodes * self.workers_per_node

    @field_validator("gpus_per_node", mode="before")
    @classmethod
    def _whole_gpus(cls, value: object) -> object:
        if isinstance(value, float) and not value.is_integer():
            sentence = (
                f"resources.gpus_per_node is {value:g}, but must be a whole number: trials that share a GPU are not "
                "kept out of each other's memory, and NCCL takes one process a GPU"
            )
            raise SpecProblems([Problem("resources.gpus_per_node", sentence)])
        return value

    @model_validator(mode="after")
    def _one_gpu_a_worker(self) -> ResourcesSpec:
        problems = []
        if self.device == "cpu" and self.gpus_per_node not in ("auto", 0):
            problems.append(
                Problem("resources.gpus_per_node", "resources.gpus_per_node must be 0 when resources.device is cpu")
            )
        if isinstance(self.gpus_per_node, int) and self.gpus_per_node not in (0, self.workers_per_node):
            problems.append(
                Problem(
                    "resources.gpus_per_node",
                    f"resources.gpus_per_node is {self.gpus_per_node}, but must be 0 or workers_per_node = "
                    f"{self.workers_per_node}: a training process has one GPU",
                )
            )
        if problems:
            raise SpecProblems(problems)
        return self


class RetriesSpec(Spec):
    """How often a trial begins again from its newest checkpoint, by what ended it. Counted over the whole run."""

    oom: int = Field(6, ge=0, le=100)
    """After running out of memory: each time with half the rows a pass and twice the passes, so that the rows of a step
    stay what they were."""
    worker_lost: int = Field(2, ge=0, le=100)
    """After a process was killed, a node was lost or a GPU failed."""
    preempted: int = Field(20, ge=0, le=1000)
    """After a node was taken away with a notice."""
    hang: int = Field(1, ge=0, le=100)
    """After `hang_minutes` without a sign of life."""
    nan: int = Field(0, ge=0, le=100)
    """After a loss or a gradient that is no number; the same numbers come again unless the hardware was at fault."""
    code: int = Field(0, ge=0, le=100)
    """After an error that none of the others describes."""
    hang_minutes: float = Field(30.0, ge=0, le=10_000)
    """Minutes without a pass of training or evaluation after which a process writes down where it stands and ends
    itself; 0: never."""


MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class CustomMetric(Spec):
    """A number of your own that an answer gets."""

    function: str = Field(min_length=1, max_length=4096)
    """`FILE.py:NAME`, a function of (prediction, reference), and of prompt if it names it, that returns a number for
    one row: its mean is the metric. Or `FILE.py` alone, a metric module of the package `evaluate`. Relative to the
    job file; it is code, and runs with your rights wherever the job runs."""
    goal: Goal = "maximize"
    """Which way is better."""


class EvaluateSpec(Spec):
    """How results are measured."""

    bootstrap_samples: int = Field(10_000, ge=100, le=100_000)
    """Draws of the largest difference behind the intervals that hold for all candidates at once."""
    folds: int | None = Field(None, ge=2, le=100)
    """Cross-validation for small data: a search trains every configuration so many times, each time with another part
    of the training and validation rows held back, and chooses by the mean; the best is then trained on the training
    rows as they are. Rows that are equal stay in one part, and classes are spread evenly."""
    metrics: Texts | None = None
    """What answers are judged by, beside loss and perplexity: rouge1, rouge2, rougeL, rougeLsum, bertscore_f1,
    exact_match, contains, length_ratio. Left out: ROUGE and the length ratio (summarization), none (generation)."""
    custom_metrics: dict[MetricName, CustomMetric] = {}
    """Metrics of your own, by name."""
    max_new_tokens: int = Field(64, ge=1, le=100_000)
    """Longest answer, in tokens, that a model may write."""
    do_sample: bool = False
    """Draw each token by its probability; else the likeliest is taken (greedy)."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Divides the logits that `do_sample` draws by: below 1 the likely tokens gain."""
    top_p: float = Field(1.0, gt=0, le=1)
    """`do_sample` draws among the likeliest tokens that have this probability together."""
    generation_seed: int = Field(0, ge=0, lt=2**32)
    """Seed of what `do_sample` draws."""
    sample_rows: int = Field(5, ge=0, le=10_000)
    """Held-out rows that are answered for the report where no metric asks for answers; a text alone (`format: text`)
    is continued from its beginning."""
    bertscore_model: str = Field("asset:minilm-l6", min_length=1, max_length=400)
    """Encoder of BERTScore: a hub id, a folder, or `asset:NAME`. Scores of two encoders cannot be compared."""
    bertscore_layer: int | None = Field(None, ge=1, le=1000)
    """The encoder's layer whose embeddings are matched, from 1; left out: its last."""

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in TEXT_METRICS:
                raise ValueError(f"has {name!r}, but must hold some of {', '.join(TEXT_METRICS)}")
        return tuple(dict.fromkeys(value)) if value is not None else None

    @model_validator(mode="after")
    def _new_names(self) -> EvaluateSpec:
        for name in self.custom_metrics:
            if name in METRICS or name in ROW_WORDS:
                what = "a metric of our own" if name in METRICS else "a word of every row of metrics"
                sentence = f"evaluate.custom_metrics has {name!r}, which is {what}: name it otherwise"
                raise SpecProblems([Problem(f"evaluate.custom_metrics.{name}", sentence)])
        return self


class TrackingSpec(Spec):
    """Weights & Biases: a mirror of the run's own record."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online when logged in, else offline (`lorafleet sync` uploads later); never a prompt."""
    project: str = Field("lorafleet", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    tags: Texts = ()
    """W&B tags of every trial."""
    base_url: str | None = Field(None, pattern=r"^https?://[^@]+$")
    """Address of a W&B server of your own."""
    upload_samples: bool = False
    """Whether texts of rows and of models may be sent to W&B; without it numbers and settings alone are."""


class JobSpec(Spec):
    """One job: a base model, a data set, a method, and what to search."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    """Lower-case letters, digits and dashes, 40 at most: it becomes part of folder names."""
    task: Task
    """What is learnt: a label for a text (classification), text that follows text (generation), or a short text for a
    long one (summarization: as generation, and judged by ROUGE)."""
    method: Method = "lora"
    """How the base is adapted: `lora`; `qlora` (LoRA on a quantised base); `prompt_tuning`; `full` (every weight)."""
    model: ModelSpec
    """Which base model."""
    data: DataSpec
    """Which rows."""
    lora: LoraSpec = LoraSpec()
    """The adapter."""
    qlora: QloraSpec = QloraSpec()
    """The quantised base of `qlora`."""
    prompt_tuning: PromptTuningSpec = PromptTuningSpec()
    """The learnt prompt."""
    train: TrainSpec = TrainSpec()
    """The training."""
    resources: ResourcesSpec = ResourcesSpec()
    """What one trial needs."""
    retries: RetriesSpec = RetriesSpec()
    """What happens to a trial that is ended from outside."""
    search: SearchSpec | None = None
    """What is searched; `lorafleet train` does not look at it."""
    compare: CompareSpec | None = None
    """What `lorafleet compare` puts side by side; no other command looks at it."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """How results are measured."""
    export: ExportSpec = ExportSpec()
    """How exported models are compared with their source."""
    tracking: TrackingSpec = TrackingSpec()
    """Weights & Biases."""
    environment: dict[str, str] = {}
    """Variables for every process of the job (`NCCL_DEBUG: INFO`). Names that may hold a secret are refused."""
    linked: dict[str, str] = Field(default_factory=dict)
    """Dotted field -> arithmetic on other fields, evaluated anew for each trial (`lora.lora_alpha: 2*lora_r`)."""

    @field_validator("environment")
    @classmethod
    def _holds_no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_environment(value)

    @property
    def adapts_with_lora(self) -> bool:
        """Whether the `lora` block says how the base is adapted."""
        return self.method in ("lora", "qlora")

    @property
    def generates(self) -> bool:
        """Whether the model writes text, and does not name a class."""
        return self.task != "classification"

    @property
    def text_metrics(self) -> tuple[str, ...]:
        """Metrics for which the model has to write answers, the user's own last."""
        if not self.generates:
            return ()
        asked = self.evaluate.metrics
        return (*(DEFAULT_TEXT_METRICS[self.task] if asked is None else asked), *self.evaluate.custom_metrics)

    @property
    def extra_metrics(self) -> tuple[str, ...]:
        """Metrics that cost more than one pass over the rows."""
        return self.text_metrics if self.generates else tuple(self.evaluate.custom_metrics)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric that a held-out evaluation of this job has."""
        return (*LIKELIHOOD_METRICS[self.task], *self.extra_metrics)

    @property
    def padding_free(self) -> bool:
        """Whether a pass's rows are laid end to end."""
        if self.train.padding_free != "auto":
            return bool(self.train.padding_free)
        flash = self.model.attn_implementation == "flash_attention_2"
        return flash and self.generates and self.method != "prompt_tuning"

    @property
    def changes_base(self) -> bool:
        """Whether a trial writes to the base's weights, so that no other trial may have the same loaded base."""
        return self.method == "full" or (self.adapts_with_lora and self.lora.changes_base)

    @property
    def metric(self) -> MetricSpec:
        """What trials are compared by."""
        for block in (self.search, self.compare):
            if block and block.metric:
                return block.metric
        return MetricSpec.model_validate({"name": DEFAULT_METRIC[self.task]})

    @property
    def decision_metrics(self) -> tuple[NamedMetric, ...]:
        """All that decide: the first finds the best, and what ships must keep all."""
        return (self.metric, *self.metric.also)

    @property
    def tolerances(self) -> dict[str, float | None]:
        """How much of each metric that decides may be lost; None where the job does not say."""
        block = self.compare or self.search
        given = block.tolerance if block else None
        return {one.name: given.get(one.name) if isinstance(given, dict) else given for one in self.decision_metrics}

    @property
    def metric_block(self) -> str:
        """Where that is said, or would be."""
        return "compare.metric" if self.compare and not (self.search and self.search.metric) else "search.metric"

    @model_validator(mode="after")
    def _fields_agree(self) -> JobSpec:
        problems = (
            _format_problems(self)
            + list(_metric_problems(self))
            + list(_batch_problems(self))
            + list(_budget_problems(self))
            + list(_fold_problems(self))
            + list(_method_problems(self))
        )
        if problems:
            raise SpecProblems(problems)
        return self


def _format_problems(job: JobSpec) -> list[Problem]:
    labelled = job.data.format == "text_label"
    if job.data.format == "auto" or labelled == (job.task == "classification"):
        return []
    wanted = "text_label" if job.task == "classification" else "prompt_completion, instruction, messages or text"
    return [Problem("data.format", f"data.format is {job.data.format}, but must be {wanted} (or auto) for {job.task}")]


def _metric_problems(job: JobSpec) -> list[Problem]:
    where = job.metric_block
    known = ", ".join(job.metric_names)
    names = [one.name for one in job.decision_metrics]
    for place, metric in enumerate(job.decision_metrics):
        at = where if place == 0 else f"{where}.also.{place - 1}"
        name, own = metric.name, job.evaluate.custom_metrics.get(metric.name)
        if name not in job.metric_names:
            more = " (evaluate.metrics adds it)" if job.generates and name in TEXT_METRICS else ""
            sentence = f"{at}.name is {name}, but must be one of {known} for {job.task}{more}"
            return [Problem(f"{at}.name", sentence)]
        if own and metric.goal != own.goal:
            sentence = f"{at}.goal is {metric.goal}, but evaluate.custom_metrics.{name} says {own.goal}"
            return [Problem(f"{at}.goal", sentence)]
        if names.count(name) > 1:
            return [Problem(where, f"{where} has {name} twice: name each metric once")]
    block = where.partition(".")[0]
    given = getattr(getattr(job, block), "tolerance", None)
    for name in given if isinstance(given, dict) else ():
        if name not in names:
            sentence = f"{block}.tolerance has {name}, but must have metrics of {where}: {', '.join(names)}"
            return [Problem(f"{block}.tolerance", sentence)]
    if not job.generates and job.evaluate.metrics:
        sentence = "evaluate.metrics is for texts that a model writes; classification has its own metrics"
        return [Problem("evaluate.metrics", sentence)]
    return []


def _batch_problems(job: JobSpec) -> list[Problem]:
    try:
        job.train.accumulation_steps(job.resources.world_size)
    except SpecProblems as wrong:
        return wrong.problems
    return []


def _method_problems(job: JobSpec) -> list[Problem]:
    """What the blocks of a method and the training say against each other."""
    problems = [Problem(field, sentence) for field, sentence in refusals(job)]
    if job.method == "qlora" and job.lora.changes_base:
        problems.append(
            Problem(
                "lora.init_lora_weights",
                f"lora.init_lora_weights is {job.lora.init_lora_weights}, but must be default or gaussian with qlora: "
                "it takes directions out of the base's weights, and quantised ones cannot be written back exactly",
            )
        )
    if job.train.padding_free is True and (job.task == "classification" or job.method == "prompt_tuning"):
        problems.append(
            Problem(
                "train.padding_free",
                "train.padding_free is true, but must be false or auto for classification (its models look at a row "
                "from both sides) and for prompt_tuning (a learnt prompt stands before each row)",
            )
        )
    if job.train.packing and (job.task == "classification" or job.method == "prompt_tuning"):
        problems.append(
            Problem(
                "train.packing",
                "train.packing is true, but must be false for classification (its models look at a row from both "
                "sides) and for prompt_tuning (a learnt prompt stands before each row)",
            )
        )
    if job.method == "full" and job.model.dtype == "float16":
        problems.append(
            Problem(
                "model.dtype",
                "model.dtype is float16, but must be auto, float32 or bfloat16 for method full: gradients and their "
                "squares are too small for float16",
            )
        )
    if job.train.init_adapter and job.method == "full":
        problems.append(
            Problem("train.init_adapter", "train.init_adapter begins from an adapter, and method full has none")
        )
    if job.train.init_adapter and job.adapts_with_lora and job.lora.changes_base:
        problems.append(
            Problem(
                "train.init_adapter",
                f"train.init_adapter and lora.init_lora_weights = {job.lora.init_lora_weights} both say how the "
                "adapter begins; drop one of the two",
            )
        )
    if job.method == "prompt_tuning" and job.prompt_tuning.num_virtual_tokens >= job.model.max_length:
        problems.append(
            Problem(
                "prompt_tuning.num_virtual_tokens",
                f"prompt_tuning.num_virtual_tokens is {job.prompt_tuning.num_virtual_tokens}, but must be below "
                f"model.max_length = {job.model.max_length}",
            )
        )
    return problems


def _fold_problems(job: JobSpec) -> list[Problem]:
    folds, found = job.evaluate.folds, []
    if job.data.fold is not None and (folds is None or job.data.fold >= folds):
        found.append(Problem("data.fold", f"data.fold is {job.data.fold}, but must be below evaluate.folds = {folds}"))
    if folds is None or job.search is None:
        return found
    if job.search.scheduler.type == "asha":
        sentence = (
            "search.scheduler.type is asha, but must be none with evaluate.folds: a trial would be cut for the rows of "
            "its fold, and not for its configuration"
        )
        found.append(Problem("search.scheduler.type", sentence))
    if job.search.method == "tpe":
        sentence = "search.method is tpe, but must be random or grid with evaluate.folds: TPE looks at single trials"
        found.append(Problem("search.method", sentence))
    for one in job.decision_metrics:
        if one.name in job.extra_metrics:
            sentence = f"search.metric.name is {one.name}, but must be a likelihood metric with evaluate.folds"
            found.append(Problem("search.metric.name", sentence))
    return found


def _budget_problems(job: JobSpec) -> list[Problem]:
    gpu_hours = job.search.budget.gpu_hours if job.search else None
    uses_none = job.resources.device == "cpu" or job.resources.gpus_per_node == 0
    if gpu_hours is None or not uses_none:
        return []
    return [
        Problem(
            "search.budget.gpu_hours",
            "search.budget.gpu_hours counts GPUs and this job asks for none; use search.budget.wall_hours",
        )
    ]
