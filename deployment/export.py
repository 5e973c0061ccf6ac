"""Build export targets, compare each with its source, and accept or reject it.

Every target is built in a scratch folder and moved once it is complete and evaluated:
the output folder never holds a partial one. The source is loaded, evaluated and freed
first; targets are then compared with its recorded outputs, so that two models never
share the memory for long.

Failures stay with their target: exporters of other packages fail in many ways, and the
remaining targets are still wanted. Only a full disk or memory ends the export.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.subprocess_measurement import measure_in_subprocess
from lorafleet.deployment.availability import find_unavailable_reason
from lorafleet.deployment.card import write_card, write_runner
from lorafleet.deployment.executorch_model import export_executorch
from lorafleet.deployment.extras import Unavailable
from lorafleet.deployment.merge import Source
from lorafleet.deployment.onnx_int4 import to_int4
from lorafleet.deployment.onnx_model import (
    OPSET,
    export_onnx,
    get_cache_shape,
    to_fp16,
    to_int8,
    to_int8_by_blocks,
)
from lorafleet.deployment.parity import (
    HeldOut,
    ModelOutputs,
    Score,
    collect_outputs,
    compare_outputs,
    compute_score,
)
from lorafleet.deployment.prompted_check import (
    NEW_TOKENS,
    PromptCases,
    build_prompt_cases,
    measure_prompt_cases,
)
from lorafleet.deployment.runtime import (
    ARTEFACT_FILE,
    LoadedModel,
    TorchClassifier,
    TorchDecoder,
    compute_files_mb,
    open_artefact,
)
from lorafleet.deployment.tensorrt_export import to_tensorrt
from lorafleet.evaluation.report.comparison import summarize_inference
from lorafleet.evaluation.report.model_of_run import SelectedModel
from lorafleet.evaluation.tokens import TokenData, make_row_encoder
from lorafleet.jobs import files
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.hub import resolve_model_revision
from lorafleet.jobs.errors import MissingExtra, UserError, make_disk_full_error
from lorafleet.jobs.runs.export_result import (
    Artefact,
    ExportRequest,
    ExportResult,
    Parity,
    ParityMeasurement,
    TargetResult,
    choose_target,
    find_gate_violations,
)
from lorafleet.jobs.runs.report import Inference
from lorafleet.jobs.schema.export import TARGET_SOURCES, TARGETS, Gate, Target, resolve_gate
from lorafleet.jobs.text import format_count
from lorafleet.training.evaluation import compute_max_prompt_tokens

REJECTED = "rejected"
SUMMARY = "export.json"
_MEASURE_ROWS, _MEASURE_TOKENS = 4, 16
_SENTINEL = "what-is-asked-7f3a"
_VERSIONED_PACKAGES = (
    "lorafleet",
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
    "executorch",
)


def export(
    selected: SelectedModel,
    targets: Sequence[Target],
    out: Path,
    tell: Callable[[str], None],
    threads: int = 0,
) -> list[TargetResult]:
    """Build targets: accepted ones in `out/TARGET`, rejected ones in `out/rejected/TARGET`.

    A target that this machine cannot build is an outcome with a reason, not an error.
    export.json is updated after each target, so a killed export keeps what was accepted.

    Args:
        selected: The model to export.
        targets: What to build. The order does not matter; prerequisites are built as
            needed.
        out: Folder of the targets.
        tell: Called with a message before each step. An exception from it ends the export.
        threads: CPU threads for measuring accepted targets in a separate process. 0: do not
            measure.

    Returns:
        One result per target, in the order of `TARGETS`.

    Raises:
        UserError: The model cannot be merged, or `out` holds a folder that is not from an
            export.
        DiskFull: The disk is full. Targets accepted so far are kept.
    """
    # Targets replace folders of their name. A folder that no export made may be somebody's data.
    for target in targets:
        for folder in (out / target, out / REJECTED / target):
            if folder.exists() and not (folder / ARTEFACT_FILE).is_file():
                raise UserError(
                    f"{folder} exists already and was not made by an export: name another folder "
                    "with --output"
                )
    out.mkdir(parents=True, exist_ok=True)
    _remove_stale_scratch(out)
    ordered_targets = [target for target in TARGETS if target in targets]
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=_SCRATCH_PREFIX) as scratch,
        # The lock tells other exports that this folder is in use (`_remove_stale_scratch`).
        files.hold_lock(Path(scratch) / _LOCK_FILE),
    ):
        try:
            exporter = _Exporter(selected, Path(scratch), out, tell, threads)
            outcomes = []
            for target in ordered_targets:
                outcomes.append(exporter.export_target(target))
                _write_summary(selected, outcomes[-1], out, exporter.base)
        except Exception as error:  # safetensors and ONNX raise their own disk errors
            disk_error = make_disk_full_error(
                error, out, "run the export again: accepted targets are kept"
            )
            if disk_error:
                raise disk_error from error
            raise
    return outcomes


_SCRATCH_PREFIX, _LOCK_FILE = ".building-", "held"
_MIN_AGE_SECONDS = 60


def _remove_stale_scratch(out: Path) -> None:
    """Remove scratch folders of killed exports.

    A folder that is locked by a running export, on this or another machine with the same
    disk, stays. So does a new and empty one, whose owner has not locked it yet.
    """
    for scratch in out.glob(f"{_SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # already removed, or no locks on this file system
            if time.time() - scratch.stat().st_mtime < _MIN_AGE_SECONDS and not list(
                scratch.iterdir()
            ):
                continue  # its owner is about to lock it
            with files.hold_lock(scratch / _LOCK_FILE, wait=False) as is_locked:
                if is_locked:
                    shutil.rmtree(scratch, ignore_errors=True)


class _Exporter:
    """One export.

    The source is loaded and evaluated once, and freed before any target is built from it.
    `export` creates it inside the scratch folder's lifetime and calls `export_target` for
    each target. A target that was built stays in `built`, because others are made from it.
    """

    def __init__(
        self,
        selected: SelectedModel,
        scratch: Path,
        out: Path,
        tell: Callable[[str], None],
        threads: int,
    ) -> None:
        self.given, self.scratch, self.out, self.tell, self.threads = (
            selected,
            scratch,
            out,
            tell,
            threads,
        )
        self.built: dict[Target, Path] = {}
        self.failed: set[Target] = set()
        tell("loading the source model and evaluating it on held-out rows")
        source = Source(selected)
        self.packed_mb = source.size_mb if source.is_quantised else None
        self.held_out = load_held_out(source)
        is_classifier = bool(self.held_out.classes)
        self.seen: ModelOutputs = collect_outputs(
            (TorchClassifier if is_classifier else TorchDecoder)(source.model), self.held_out
        )
        self.base = _score_base(source.model, self.held_out)
        self.systems = source.data.systems
        self.int8_base = source.is_quantised and selected.job.qlora.quant_type == "int8"
        self.about = build_artefact(source)
        self.calls = _ask_source(source) if not is_classifier else None
        tell("merging the adapter into the weights")
        source.merge(self._get_scratch_folder("merged"))
        self.built["merged"] = self._get_scratch_folder("merged")
        # The model is no longer needed and would double the memory while targets are loaded.
        del source
        gc.collect()

    def _get_scratch_folder(self, target: Target) -> Path:
        """Return the scratch folder of a target."""
        return self.scratch / target

    def export_target(self, target: Target) -> TargetResult:
        """Build, compare, measure and move one target.

        If it could not be built, a folder of this name that was made from another model is
        removed: it would be taken for a target of this one.
        """
        outcome = self._export_target(target)
        if outcome.parity is None:  # a folder with this name must not hold a different model
            for folder in (self.out / target, self.out / REJECTED / target):
                if (
                    folder.is_dir()
                    and files.read_json(folder / ARTEFACT_FILE).get("source") != self.about.source
                ):
                    shutil.rmtree(folder)
        return outcome

    def _export_target(self, target: Target) -> TargetResult:
        """Build, compare, measure and move one target; turn its failure into an outcome.

        Raises:
            MemoryError: Memory is full, which the other targets would meet as well.
            Exception: The error of a full disk, whatever its type: exporters have their own.
        """
        reason = find_unavailable_reason(target)
        if reason:
            return TargetResult(target=target, unavailable=reason)
        start_time = time.monotonic()
        prerequisite = TARGET_SOURCES.get(target)
        if prerequisite in self.failed:
            return TargetResult(
                target=target, failure=f"it is built from {prerequisite}, which failed"
            )
        try:
            folder, parity = self._build_and_compare(target)
        except (Unavailable, MissingExtra) as error:
            self.failed.add(target)
            return TargetResult(target=target, unavailable=str(error))
        # Exporters and runtimes share no base class for their errors.
        except Exception as error:  # noqa: BLE001
            self.failed.add(target)
            return TargetResult(target=target, failure=self._save_traceback(error, target))
        files.write_json(folder / "parity.json", parity.model_dump(mode="json"))
        inference = (
            self._measure_speed(target, folder) if parity.accepted and self.threads else None
        )
        write_card(folder, self._make_artefact(target), parity, self.given, inference)
        destination = self.out / (target if parity.accepted else f"{REJECTED}/{target}")
        _replace_folder(folder, destination)
        self.built[target] = destination
        outdated = self.out / (f"{REJECTED}/{target}" if parity.accepted else target)
        shutil.rmtree(outdated, ignore_errors=True)
        return TargetResult(
            target=target,
            accepted=parity.accepted,
            folder=str(destination),
            parity=parity,
            files_mb=compute_files_mb(destination),
            inference=inference,
            seconds=time.monotonic() - start_time,
        )

    def _save_traceback(self, error: Exception, name: str) -> str:
        """Save the traceback of an error to a file and return a one-line message.

        Args:
            error: The error, which is being handled.
            name: Name of the target or step, for the file.

        Raises:
            Exception: `error` itself, if memory or disk is full: the other targets would fail
                in the same way.
        """
        if isinstance(error, MemoryError) or make_disk_full_error(error, self.out):
            raise error
        path = self.out / f"{name}-traceback.txt"
        files.write_text(path, traceback.format_exc())
        first_line = (str(error).strip().splitlines() or [""])[0][:200]
        return f"{type(error).__name__}: {first_line} (see {path})"

    def _measure_speed(self, target: Target, folder: Path) -> Inference | None:
        """Measure a target on this machine in a separate process; None if that fails.

        The result is a first number for the model card and for a budget. `benchmark` compares
        variants.
        """
        self.tell(f"measuring {target}")
        max_prompt_tokens = (self.about.positions or sys.maxsize) - _MEASURE_TOKENS
        try:
            request = {
                "what": "artefact",
                "folder": str(folder),
                "rows": self.held_out.list_prompts(_MEASURE_ROWS, max(1, max_prompt_tokens)),
                "new_tokens": _MEASURE_TOKENS,
                "batch_rows": self.given.job.train.per_device_eval_batch_size,
                "threads": self.threads,
            }
            # A process of its own: this one has torch, the exporters and their memory.
            return summarize_inference([measure_in_subprocess(request, self.out, self.threads)])
        except RuntimeError as error:
            self.tell(f"{target} was not measured: {error}")
            return None

    def _build_and_compare(self, target: Target) -> tuple[Path, Parity]:
        """Build a target and return (its folder, its parity record).

        Other packages' exporters and runtimes run here, so any exception may be raised. The
        folder is still in the scratch folder.
        """
        folder = self._build(target)
        files.write_json(
            folder / ARTEFACT_FILE, self._make_artefact(target).model_dump(mode="json")
        )
        write_runner(folder, self._make_artefact(target))
        self.tell(f"comparing {target} with its source")
        parity = self._compare(target, folder)
        # Dynamic quantisation is the fastest, but trained Llama models have activations that one
        # scale per tensor does not fit: SmolLM2's perplexity went from 14 to 4e7.
        if target == "onnx-int8" and not parity.accepted:
            parity = self._retry_int8_by_blocks(folder, parity)
        return folder, parity

    def _retry_int8_by_blocks(self, folder: Path, first: Parity) -> Parity:
        """Build onnx-int8 by blocks after dynamic quantisation failed the gate.

        This is slower but more exact. Returns the new parity record, or the first one with a
        remark if building by blocks fails.
        """
        self.tell("onnx-int8 with dynamic quantisation did not pass: building it by blocks")
        blocks_folder = folder.with_name("onnx-int8-by-blocks")
        try:
            to_int8_by_blocks(self.built["onnx"], blocks_folder, self.scratch)
        # Whatever the quantiser raises: the first verdict stays.
        except Exception as error:  # noqa: BLE001
            remark = (
                f"building by blocks failed: {self._save_traceback(error, 'onnx-int8-by-blocks')}"
            )
            return first.model_copy(update={"remarks": [*first.remarks, remark]})
        for path in blocks_folder.iterdir():
            path.replace(folder / path.name)
        blocks_folder.rmdir()
        parity = self._compare("onnx-int8", folder)
        remark = (
            "in INT8 by blocks, because dynamic quantisation did not pass "
            f"({'; '.join(first.reasons)})"
        )
        return parity.model_copy(update={"remarks": [*parity.remarks, remark]})

    def _build(self, target: Target) -> Path:
        """Return the folder of a target, building it and its prerequisites if needed."""
        if target in self.built:
            return self.built[target]
        source = self._build(TARGET_SOURCES[target])
        folder = self._get_scratch_folder(target)
        self.tell(f"building {target}")
        is_classifier = self.about.task == "classification"
        if target == "onnx":
            export_onnx(source, folder, classifies=is_classifier)
        elif target == "onnx-fp16":
            to_fp16(source, folder)
        elif target == "onnx-int8":
            to_int8(source, folder, self.scratch)
        elif target == "onnx-int4":
            to_int4(source, folder, self.scratch, classifies=is_classifier)
        elif target == "tensorrt":
            to_tensorrt(source, folder, self._make_artefact(target))
        else:
            max_tokens = self._make_artefact(target).positions or self.about.max_length
            export_executorch(source, folder, classifies=is_classifier, max_tokens=max_tokens)
        # Every target is complete by itself: users copy one folder.
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (self.built["merged"] / name).is_file() and not (folder / name).is_file():
                shutil.copy(self.built["merged"] / name, folder / name)
        self.built[target] = folder
        return folder

    def _compare(self, target: Target, folder: Path) -> Parity:
        """Compare a target with its source and return the parity record.

        The target is loaded as users load it, from its folder and in its runtime.

        Args:
            target: The target.
            folder: Its folder, with artefact.json.
        """
        loaded: LoadedModel = open_artefact(folder)
        judged: ParityMeasurement = compare_outputs(
            self.seen, collect_outputs(loaded.model, self.held_out)
        )
        del loaded
        gc.collect()
        judged = judged.model_copy(update=self._check_prompts(folder))
        spec = self.given.job.export
        gate: Gate = resolve_gate(
            spec, target, generates=not self.held_out.classes, int8_base=self.int8_base
        )
        reasons = find_gate_violations(gate, judged)
        return Parity(
            target=target,
            accepted=not reasons,
            reasons=reasons,
            gate=gate,
            judged=judged,
            remarks=self._collect_remarks(),
        )

    def _check_prompts(self, folder: Path) -> dict[str, Any]:
        """Run the target on prompts as a user would, and return the fields for its parity record.

        Returns:
            `called_rows`, `called_prompts` and `called_answers`. Empty if no held-out row can
                be asked by a prompt alone, or on a timeout.
        """
        if self.calls is None or not self.calls.prompts:
            return {}
        try:
            prompts, answers = measure_prompt_cases(folder, self.calls, self.threads)
        except subprocess.TimeoutExpired:
            self.tell(f"{folder.name} was not tested with user prompts: that would take too long")
            return {}
        return {
            "called_rows": len(self.calls.prompts),
            "called_prompts": prompts,
            "called_answers": answers,
        }

    def _collect_remarks(self) -> list[str]:
        """Return the remarks on prompts and on quantisation."""
        return [*self._describe_unasked_rows(), *self._describe_quantisation()]

    def _describe_unasked_rows(self) -> list[str]:
        """Return remarks on system messages and on rows that a prompt alone cannot ask."""
        remarks = []
        if self.systems > 1:
            remarks.append(
                "the training rows do not all have the same system message, so none is added to a "
                "prompt; include one in a conversation if it matters"
            )
        if self.calls is not None and self.calls.others:
            remarks.append(
                f"{format_count(self.calls.others, 'held-out row')} cannot be sent as a single "
                "prompt (earlier turns, tools, or a system message that not all rows have)"
            )
        return remarks

    def _describe_quantisation(self) -> list[str]:
        """Return remarks on what a quantised base means for the merged weights."""
        if self.given.job.method != "qlora" or self.given.weights is None:
            return []
        quant_type = self.given.job.qlora.quant_type.upper()
        merged_mb = compute_files_mb(self.built["merged"])
        remarks = [
            f"the adapter was merged into the {quant_type} base, unpacked to float32: the "
            f"precision lost by quantisation stays lost, and merged weights take {merged_mb:.1f} "
            f"MB instead of {self.packed_mb or 0.0:.1f} for the packed base"
        ]
        if self.int8_base:
            remarks.append(
                "the source also rounds the inputs of its INT8 matrices, but no target does"
            )
        return remarks

    def _make_artefact(self, target: Target) -> Artefact:
        """Return the description of a target for artefact.json."""
        is_onnx = target in ("onnx", "onnx-fp16", "onnx-int8", "tensorrt")
        max_positions = self.about.positions or sys.maxsize
        # ExecuTorch and TensorRT programs are built for a fixed maximum length.
        length_factor = {"executorch": 2, "tensorrt": 4}.get(target)
        positions = (
            min(max_positions, length_factor * self.about.max_length)
            if length_factor
            else self.about.positions
        )
        update = {"target": target, "opset": OPSET if is_onnx else None, "positions": positions}
        return self.about.model_copy(update=update)


def _score_base(model: Any, held_out: HeldOut) -> Score | None:
    """Score the base without its adapter on the same rows; None for a fully trained model.

    `benchmark` shows it beside the targets. The metric of the run's report is over other
    rows.
    """
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return compute_score(
            (TorchClassifier if held_out.classes else TorchDecoder)(model), held_out
        )


def _ask_source(source: Source) -> PromptCases:
    """Record the source's answers to the prompts that its targets will be asked."""
    split = "validation" if source.data.chosen_on_test else "test"
    max_prompt_tokens = compute_max_prompt_tokens(source.base.model, source.job, NEW_TOKENS)
    encoder = make_row_encoder(source.job, source.chat)
    return build_prompt_cases(
        TorchDecoder(source.model), encoder, source.data, split, max_prompt_tokens, source.ends
    )


def load_held_out(source: Source) -> HeldOut:
    """Return the first test rows of the job's data, at most `export.rows`.

    Validation rows are used if the model was selected on the test rows. Rows that are too
    short to compare are left out: a text of one or two tokens leaves no position after its
    prompt.
    """
    data, job = source.data, source.job
    split = data.splits["validation" if data.chosen_on_test else "test"]
    chosen = [
        row for row in range(len(split)) if job.task == "classification" or split.lengths[row] > 2
    ]
    rows, targets = [], []
    for row in chosen[: job.export.rows]:
        first, last = int(split.starts[row]), int(split.starts[row + 1])
        ids = tuple(int(token) for token in split.ids[first:last])
        if job.is_generative and len(ids) - max(1, int(split.targets[row])) < 1:
            continue
        rows.append(ids)
        targets.append(int(split.targets[row]))
    return HeldOut(
        tuple(rows), tuple(targets), data.pad_id, 0 if job.is_generative else len(data.labels)
    )


def build_artefact(source: Source) -> Artefact:
    """Return the description that all targets of a source share.

    It is written to artefact.json and is all that a runner knows beside the model and the
    tokenizer. `_Exporter._make_artefact` adds what differs between targets.
    """
    job, config = source.job, source.base.model.config
    frame = build_prompt_frame(source.chat, source.data) if job.is_generative else PromptFrame()
    layers, heads, head_size = get_cache_shape(config) if job.is_generative else (0, 0, 0)
    selected = source.given
    return Artefact(
        target="merged",
        task=job.task,
        source={
            "run": selected.run.id,
            "trial_id": selected.trial_id,
            "arm": selected.arm,
            "method": job.method,
            "base": job.model.model_name_or_path,
            "revision": resolve_model_revision(job.model.model_name_or_path, job.model.revision),
        },
        labels=list(source.data.labels),
        max_length=job.model.max_length,
        positions=getattr(config, "max_position_embeddings", None),
        ends=source.ends if job.is_generative else [],
        pad_id=source.data.pad_id,
        start=frame.start,
        before=frame.before,
        after=frame.after,
        system=frame.system.content if frame.system else "",
        system_role=frame.system.role if frame.system else "",
        strip=frame.strip,
        answer_frame=source.data.frame.to_dict() if source.data.frame else None,
        chat_template_kwargs=dict(job.data.chat_template_kwargs),
        layers=layers,
        heads=heads,
        head_size=head_size,
        versions={
            name: installed for name in _VERSIONED_PACKAGES if (installed := _get_version(name))
        },
    )


@dataclass(frozen=True)
class PromptFrame:
    """Text and tokens around a user's prompt."""

    before: str = ""
    after: str = ""
    start: list[int] = field(default_factory=list)
    """Token ids before the text, where the tokenizer does not add them itself."""
    system: Message | None = None
    """System message that `before` contains."""
    strip: bool = False
    """True if the chat template strips whitespace from both ends of the prompt."""


def build_prompt_frame(chat: ChatFormat, data: TokenData) -> PromptFrame:
    """Return the frame that training puts around a prompt.

    Runners without a template engine put it around any text. The frame includes a system
    message only if all rows share it.

    Args:
        chat: The chat format of the job.
        data: Its tokens.

    Raises:
        UserError: The chat template changes the text of the prompt, so no fixed frame
            exists.
    """
    if data.frame is None:  # plain texts, no prompt and answer
        bos = chat.tokenizer.bos_token_id
        return PromptFrame(start=[] if bos is None else [bos])
    system_turns = [data.system] if data.system else []
    # Templates are programs: the frame is found by rendering a text that occurs nowhere else and
    # looking at what surrounds it.
    rendered = chat.template.render([*system_turns, Message("user", _SENTINEL)], generation=True)
    parts = rendered.split(_SENTINEL)
    if len(parts) != 2:
        raise UserError(
            "the model's chat template changes the user's text, so prompts cannot be formatted "
            "without it"
        )
    spaced = chat.template.render(
        [*system_turns, Message("user", f" {_SENTINEL}\n")], generation=True
    )
    return PromptFrame(parts[0], parts[1], chat.start_ids, data.system, strip=spaced == rendered)


def _get_version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _replace_folder(folder: Path, destination: Path) -> None:
    """Move a complete folder to its destination, replacing an earlier one.

    Both are on the same disk, so each move is a rename. A kill between them leaves the
    earlier folder as `.NAME.old`.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    old = destination.with_name(f".{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    folder.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _write_summary(
    selected: SelectedModel, outcome: TargetResult, out: Path, base: Score | None
) -> None:
    """Update export.json: every target exported so far, its model and its outcome."""
    earlier = files.read_json(out / SUMMARY).get("targets", {})
    entry = {
        outcome.target: {
            "run": selected.run.id,
            "trial_id": selected.trial_id,
            "accepted": outcome.accepted,
            "folder": str(Path(outcome.folder).relative_to(out)) if outcome.folder else None,
            "unavailable": outcome.unavailable or outcome.failure,
            "reasons": outcome.parity.reasons if outcome.parity else [],
            "files_mb": outcome.files_mb,
            "ms": outcome.ms,
            "seconds": round(outcome.seconds, 1),
        }
    }
    origin = {"run": selected.run.id, "trial_id": selected.trial_id}
    files.write_json(
        out / SUMMARY, {"targets": earlier | entry, "base": asdict(base) | origin if base else None}
    )


def run_delivery(
    selected: SelectedModel, delivery: ExportRequest, out: Path, tell: Callable[[str], None]
) -> ExportResult:
    """Export the requested targets and pick the best one that fits the budget.

    Args:
        selected: The model to export.
        delivery: The request: targets, threads, held-out rows and budget.
        out: Folder of the targets.
        tell: Called with a message before each step.

    Returns:
        The results of all targets. `picked` is None without a budget, or if no target fits
            it.

    Raises:
        UserError: The model cannot be merged, or `out` holds a folder that is not from an
            export.
        DiskFull: The disk is full.
    """
    if delivery.held_out is not None:
        spec = selected.job.export.model_copy(update={"rows": delivery.held_out})
        selected = replace(selected, job=selected.job.model_copy(update={"export": spec}))
    outcomes = export(selected, delivery.targets, out, tell, delivery.threads)
    if delivery.budget is None:
        return ExportResult(targets=outcomes, output=str(out))
    picked, sentence = choose_target(
        [outcome.offer for outcome in outcomes if outcome.offer], delivery.budget
    )
    return ExportResult(
        targets=outcomes,
        picked=picked.target if picked else None,
        sentence=sentence,
        output=str(out),
    )
