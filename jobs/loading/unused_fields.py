"""Report fields that a job sets and that its command, method or task does not use. Pure.

Such a field is valid, so it is a note and not a problem. Without the note, a user would
believe that, for example, a warm-up takes effect. A new rule belongs into `_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.trial_id import METHOD_BLOCKS

_USER_ORIGINS = ("file", "override", "alias", "linked")
"""Origins of values that the user set."""
_BLOCK_NAMES = ("lora", "qlora", "prompt_tuning")


class _Rule(NamedTuple):
    """Fields that are not used, under which condition, and why.

    `applies` gets the job and the name of the command. `why` completes the sentence `X is
    set, but not used: ...`.
    """

    names: tuple[str, ...]
    applies: Callable[[JobSpec, str], bool]
    why: str
    decided_by: str = ""
    """Field that decides whether the rule applies. A search or an arm may vary it."""


_RULES = (
    _Rule(
        ("evaluate.folds",),
        lambda job, command: command == "train",
        "`lorafleet train` trains once, on the training rows",
    ),
    _Rule(
        ("train.warmup_ratio", "train.warmup_steps"),
        lambda job, _: job.train.lr_scheduler_type == "constant",
        "lr_scheduler_type constant has no warm-up (use constant_with_warmup)",
        "train.lr_scheduler_type",
    ),
    _Rule(
        ("train.decay_ratio",),
        lambda job, _: job.train.lr_scheduler_type != "warmup_stable_decay",
        "only lr_scheduler_type warmup_stable_decay uses it",
        "train.lr_scheduler_type",
    ),
    _Rule(
        ("evaluate.temperature", "evaluate.top_p", "evaluate.generation_seed"),
        lambda job, _: not job.evaluate.do_sample,
        "the most likely tokens are generated (evaluate.do_sample is false)",
    ),
    _Rule(
        ("evaluate.max_new_tokens", "evaluate.do_sample", "evaluate.sample_rows"),
        lambda job, _: not job.is_generative,
        "a classifier generates no answers",
    ),
    _Rule(
        ("evaluate.bertscore_model", "evaluate.bertscore_layer"),
        lambda job, _: "bertscore_f1" not in job.text_metrics,
        "evaluate.metrics does not contain bertscore_f1",
    ),
    _Rule(
        (
            *("data.system_prompt", "data.chat_template", "data.chat_template_kwargs"),
            *("data.assistant_only_loss", "data.train_on_turns"),
        ),
        lambda job, _: not job.is_generative,
        "a classifier reads a text, not a conversation",
    ),
    _Rule(("data.labels",), lambda job, _: job.is_generative, "only classification has classes"),
    _Rule(
        ("train.num_train_epochs",),
        lambda job, _: job.train.max_steps is not None,
        "train.max_steps takes precedence",
    ),
)


def collect_unused_notes(loaded: LoadedJob, command: str) -> list[str]:
    """Return a message for each field that the user set and that nothing uses.

    Fields with their default values are not reported, and neither are those that a searched
    or compared field may bring into use.

    Args:
        loaded: The job with the origins of its values.
        command: The command that runs the job, such as `train`, `sweep` or `compare`.
    """
    job = loaded.job
    leaves = fields.get_leaf_fields()
    set_paths = [
        path
        for path, origin in loaded.origins.items()
        if origin.kind in _USER_ORIGINS and path in leaves
    ]
    # `train` ignores a search block, so only the command's own block can vary a field.
    varied = set(job.search.parameters) if job.search and command == "sweep" else set()
    for arm in job.compare.arms.values() if job.compare and command == "compare" else ():
        varied |= {*arm.set, *arm.parameters}
    notes = []
    for rule in _RULES:
        unused_paths = [path for path in rule.names if path in set_paths]
        if unused_paths and rule.decided_by not in varied and rule.applies(job, command):
            notes.append(f"{_format_paths(unused_paths)} set, but not used: {rule.why}")
    # The arms of a comparison may have methods of their own, each with its own blocks.
    if "method" not in varied and not (job.compare and command == "compare"):
        for block in _BLOCK_NAMES:
            unused_paths = [path for path in set_paths if path.startswith(f"{block}.")]
            if unused_paths and block not in METHOD_BLOCKS[job.method]:
                notes.append(
                    f"{_format_paths(unused_paths)} set, but not used: method is {job.method}"
                )
    return notes


def _format_paths(paths: list[str]) -> str:
    return f"{' and '.join(paths)} {'is' if len(paths) == 1 else 'are'}"
