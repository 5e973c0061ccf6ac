"""What `lorafleet export` does: build each target, compare it with its source, keep it or set it aside.

Every target is made in a scratch folder and moved when it is whole and judged: the output never holds half of one.
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

from lorafleet.cluster.execution.subprocess_measurement import measured_apart
from lorafleet.deployment.availability import Unavailable, why_not
from lorafleet.deployment.card import write_card, write_runner
from lorafleet.deployment.executorch_model import export_executorch
from lorafleet.deployment.merge import Source
from lorafleet.deployment.onnx_int4 import to_int4
from lorafleet.deployment.onnx_model import OPSET, cache_shape, export_onnx, to_fp16, to_int8, to_int8_by_blocks
from lorafleet.deployment.parity import HeldOut, Score, Seen, judge, look, score
from lorafleet.deployment.prompted_check import NEW_TOKENS, Calls, called, calls_of
from lorafleet.deployment.runtime import ARTEFACT_FILE, Loaded, TorchClassifier, TorchDecoder, files_mb, open_artefact
from lorafleet.deployment.tensorrt import to_tensorrt
from lorafleet.evaluation.report.comparison import inference_of
from lorafleet.evaluation.report.model_of_run import Shipped
from lorafleet.evaluation.tokens import TokenData, row_encoder
from lorafleet.jobs import files
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.hub import model_revision
from lorafleet.jobs.errors import MissingExtra, UserError, disk_full
from lorafleet.jobs.runs.export_result import Artefact, Delivery, Exported, Judged, Made, Parity, pick, verdict
from lorafleet.jobs.runs.report import Inference
from lorafleet.jobs.schema.export import NEEDS, TARGETS, Gate, Target, gate_of
from lorafleet.jobs.text import counted
from lorafleet.training.evaluation import room_for_prompts

REJECTED = "rejected"
SUMMARY = "export.json"
_MEASURED_ROWS, _MEASURED_TOKENS = 4, 16
_SENTINEL = "what-is-asked-7f3a"
_PACKAGES = (
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
    given: Shipped, targets: Sequence[Target], out: Path, tell: Callable[[str], None], threads: int = 0
) -> list[Made]:
    """Make the targets below `out`: what passes its gate in `out/TARGET`, what does not in `out/rejected/TARGET`.

    What passes is measured with so many CPU threads, in a process of its own; 0: it is not. Raises UserError for a
    model that cannot be merged. What this machine cannot make is an outcome with its reason.
    """
    for target in targets:
        for place in (out / target, out / REJECTED / target):
            if place.exists() and not (place / ARTEFACT_FILE).is_file():
                raise UserError(f"{place} is there already, and not from an export: name another --output")
    out.mkdir(parents=True, exist_ok=True)
    _sweep_up(out)
    wanted = [target for target in TARGETS if target in targets]
    with tempfile.TemporaryDirectory(dir=out, prefix=_SCRATCH) as scratch, files.locked(Path(scratch) / _HELD):
        try:
            work = _Work(given, Path(scratch), out, tell, threads)
            outcomes = []
            for target in wanted:
                outcomes.append(work.outcome(target))
                _write_summary(given, outcomes[-1], out, work.base)
        except Exception as error:  # safetensors and ONNX have errors of their own for a full disk
            full = disk_full(error, out, "export again: what was accepted is kept")
            if full:
                raise full from error
            raise
    return outcomes


_SCRATCH, _HELD = ".building-", "held"
_BEGUN_SECONDS = 60


def _sweep_up(out: Path) -> None:
    """Remove what exports left that were killed: what nobody holds, here or on another machine with the same disk."""
    for left in out.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # it is gone by itself, or its disk knows no locks
            if time.time() - left.stat().st_mtime < _BEGUN_SECONDS and not list(left.iterdir()):
                continue  # about to be held
            with files.locked(left / _HELD, wait=False) as ours:
                if ours:
                    shutil.rmtree(left, ignore_errors=True)


class _Work:
    """One export: the source is loaded once, seen once, and gone before anything is built from it."""

    def __init__(self, given: Shipped, scratch: Path, out: Path, tell: Callable[[str], None], threads: int) -> None:
        self.given, self.scratch, self.out, self.tell, self.threads = given, scratch, out, tell, threads
        self.built: dict[Target, Path] = {}
        self.failed: set[Target] = set()
        tell("loading the source and what it says of held-out rows")
        source = Source(given)
        self.packed_mb = source.size_mb if source.quantised else None
        self.held_out = held_out_rows(source)
        classifies = bool(self.held_out.classes)
        self.seen: Seen = look((TorchClassifier if classifies else TorchDecoder)(source.model), self.held_out)
        self.base = _base_of(source.model, self.held_out)
        self.systems = source.data.systems
        self.int8_base = source.quantised and given.job.qlora.quant_type == "int8"
        self.about = about(source)
        self.calls = _calls(source) if not classifies else None
        tell("merging the adapter into the weights")
        source.merge(self._place("merged"))
        self.built["merged"] = self._place("merged")
        del source
        gc.collect()

    def _place(self, target: Target) -> Path:
        return self.scratch / target

    def outcome(self, target: Target) -> Made:
        """Build, judge, measure and move one target."""
        made = self._outcome(target)
        if made.parity is None:  # under its name nothing of another model may stay
            for place in (self.out / target, self.out / REJECTED / target):
                if place.is_dir() and files.read_json(place / ARTEFACT_FILE).get("source") != self.about.source:
                    shutil.rmtree(place)
        return made

    def _outcome(self, target: Target) -> Made:
        reason = why_not(target)
        if reason:
            return Made(target=target, unavailable=reason)
        began = time.monotonic()
        broken = NEEDS.get(target)
        if broken in self.failed:
            return Made(target=target, failure=f"it is made from {broken}, which could not be made")
        try:
            folder, parity = self._made(target)
        except (Unavailable, MissingExtra) as error:
            self.failed.add(target)
            return Made(target=target, unavailable=str(error))
        except Exception as error:  # exporters and runtimes have no error of their own in common
            self.failed.add(target)
            return Made(target=target, failure=self._noted(error, target))
        files.write_json(folder / "parity.json", parity.model_dump(mode="json"))
        speed = self._speed(target, folder) if parity.accepted and self.threads else None
        write_card(folder, self._artefact(target), parity, self.given, speed)
        place = self.out / (target if parity.accepted else f"{REJECTED}/{target}")
        _move(folder, place)
        self.built[target] = place
        stale = self.out / (f"{REJECTED}/{target}" if parity.accepted else target)
        shutil.rmtree(stale, ignore_errors=True)
        return Made(
            target=target,
            accepted=parity.accepted,
            folder=str(place),
            parity=parity,
            files_mb=files_mb(place),
            inference=speed,
            seconds=time.monotonic() - began,
        )

    def _noted(self, error: Exception, name: str) -> str:
        """A fault in a sentence, with its traceback in a file.

        Raises it again where it is of the machine, whose memory or disk is full: the other targets would end alike.
        """
        if isinstance(error, MemoryError) or disk_full(error, self.out):
            raise error
        notes = self.out / f"{name}-traceback.txt"
        files.write_text(notes, traceback.format_exc())
        said = (str(error).strip().splitlines() or [""])[0][:200]
        return f"{type(error).__name__}: {said} (its traceback is in {notes})"

    def _speed(self, target: Target, folder: Path) -> Inference | None:
        """What it takes on this machine: a first number, for the card and a budget; `benchmark` compares."""
        self.tell(f"measuring {target}")
        room = (self.about.positions or sys.maxsize) - _MEASURED_TOKENS
        try:
            request = {
                "what": "artefact",
                "folder": str(folder),
                "rows": self.held_out.asked(_MEASURED_ROWS, max(1, room)),
                "new_tokens": _MEASURED_TOKENS,
                "batch_rows": self.given.job.train.per_device_eval_batch_size,
                "threads": self.threads,
            }
            return inference_of([measured_apart(request, self.out, self.threads)])
        except RuntimeError as error:
            self.tell(f"{target} was not measured: {error}")
            return None

    def _made(self, target: Target) -> tuple[Path, Parity]:
        """What exporters and runtimes of others do: the target's folder, and how far it is from its source."""
        folder = self._build(target)
        files.write_json(folder / ARTEFACT_FILE, self._artefact(target).model_dump(mode="json"))
        write_runner(folder, self._artefact(target))
        self.tell(f"comparing {target} with its source")
        parity = self._judged(target, folder)
        if target == "onnx-int8" and not parity.accepted:
            parity = self._by_blocks(folder, parity)
        return folder, parity

    def _by_blocks(self, folder: Path, first: Parity) -> Parity:
        """INT8 the other way, where the fast one fails: slower, and nearer to the source."""
        self.tell("rounding activations as a whole does not pass: building onnx-int8 by blocks")
        other = folder.with_name("onnx-int8-by-blocks")
        try:
            to_int8_by_blocks(self.built["onnx"], other, self.scratch)
        except Exception as error:  # the quantiser's: the first way's verdict stands
            remark = f"by blocks it could not be made: {self._noted(error, 'onnx-int8-by-blocks')}"
            return first.model_copy(update={"remarks": [*first.remarks, remark]})
        for path in other.iterdir():
            path.replace(folder / path.name)
        other.rmdir()
        parity = self._judged("onnx-int8", folder)
        remark = f"in INT8 by blocks, since dynamic quantisation did not pass ({'; '.join(first.reasons)})"
        return parity.model_copy(update={"remarks": [*parity.remarks, remark]})

    def _build(self, target: Target) -> Path:
        """The folder of a target, made from what it needs."""
        if target in self.built:
            return self.built[target]
        source = self._build(NEEDS[target])
        folder = self._place(target)
        self.tell(f"building {target}")
        classifies = self.about.task == "classification"
        if target == "onnx":
            export_onnx(source, folder, classifies=classifies)
        elif target == "onnx-fp16":
            to_fp16(source, folder)
        elif target == "onnx-int8":
            to_int8(source, folder, self.scratch)
        elif target == "onnx-int4":
            to_int4(source, folder, self.scratch, classifies=classifies)
        elif target == "tensorrt":
            to_tensorrt(source, folder, self._artefact(target))
        else:
            longest = self._artefact(target).positions or self.about.max_length
            export_executorch(source, folder, classifies=classifies, longest=longest)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (self.built["merged"] / name).is_file() and not (folder / name).is_file():
                shutil.copy(self.built["merged"] / name, folder / name)
        self.built[target] = folder
        return folder

    def _judged(self, target: Target, folder: Path) -> Parity:
        loaded: Loaded = open_artefact(folder)
        judged: Judged = judge(self.seen, look(loaded.model, self.held_out))
        del loaded
        gc.collect()
        judged = judged.model_copy(update=self._called(folder))
        spec = self.given.job.export
        gate: Gate = gate_of(spec, target, generates=not self.held_out.classes, int8_base=self.int8_base)
        reasons = verdict(gate, judged)
        return Parity(
            target=target, accepted=not reasons, reasons=reasons, gate=gate, judged=judged, remarks=self._remarks()
        )

    def _called(self, folder: Path) -> dict[str, Any]:
        """Ask a target as its user will, where a prompt alone can ask a held-out row."""
        if self.calls is None or not self.calls.prompts:
            return {}
        try:
            prompts, answers = called(folder, self.calls, self.threads)
        except subprocess.TimeoutExpired:
            self.tell(f"{folder.name} was not asked as a user asks: it takes too long")
            return {}
        return {"called_rows": len(self.calls.prompts), "called_prompts": prompts, "called_answers": answers}

    def _remarks(self) -> list[str]:
        return [*self._of_calls(), *self._of_packing()]

    def _of_calls(self) -> list[str]:
        """Say which rows a prompt alone cannot ask."""
        remarks = []
        if self.systems > 1:
            remarks.append(
                "training's rows do not all have the same system message, so that none stands before a prompt; send "
                "one in a conversation where it matters"
            )
        if self.calls is not None and self.calls.others:
            remarks.append(
                f"{counted(self.calls.others, 'held-out row')} cannot be asked by a prompt alone (earlier turns, "
                "tools, or a system message that not all rows have)"
            )
        return remarks

    def _of_packing(self) -> list[str]:
        if self.given.job.method != "qlora" or self.given.weights is None:
            return []
        kind = self.given.job.qlora.quant_type.upper()
        merged_mb = files_mb(self.built["merged"])
        said = [
            f"the adapter was merged onto the {kind} base's values, unpacked to float32: what packing lost stays lost, "
            f"and merged weights take {merged_mb:.1f} MB where the packed base takes {self.packed_mb or 0.0:.1f}"
        ]
        if self.int8_base:
            said.append("the source rounds what goes into its INT8 matrices as well, and no target does")
        return said

    def _artefact(self, target: Target) -> Artefact:
        onnx = target in ("onnx", "onnx-fp16", "onnx-int8", "tensorrt")
        room = self.about.positions or sys.maxsize
        # What is built for sizes that are known beforehand ends where those do.
        longest = {"executorch": 2, "tensorrt": 4}.get(target)
        positions = min(room, longest * self.about.max_length) if longest else self.about.positions
        update = {"target": target, "opset": OPSET if onnx else None, "positions": positions}
        return self.about.model_copy(update=update)


def _base_of(model: Any, held_out: HeldOut) -> Score | None:
    """How good the base is without its adapter on the same rows; None where all of it was trained."""
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return score((TorchClassifier if held_out.classes else TorchDecoder)(model), held_out)


def _calls(source: Source) -> Calls:
    """Ask the source what a user will ask its targets."""
    split = "validation" if source.data.chosen_on_test else "test"
    room = room_for_prompts(source.base.model, source.job, NEW_TOKENS)
    encoder = row_encoder(source.job, source.chat)
    return calls_of(TorchDecoder(source.model), encoder, source.data, split, room, source.ends)


def held_out_rows(source: Source) -> HeldOut:
    """The first test rows of the job's data (validation, where there are no others), at most `export.rows`."""
    data, job = source.data, source.job
    split = data.splits["validation" if data.chosen_on_test else "test"]
    chosen = [row for row in range(len(split)) if job.task == "classification" or split.lengths[row] > 2]
    rows, targets = [], []
    for row in chosen[: job.export.rows]:
        first, last = int(split.starts[row]), int(split.starts[row + 1])
        ids = tuple(int(token) for token in split.ids[first:last])
        if job.generates and len(ids) - max(1, int(split.targets[row])) < 1:
            continue
        rows.append(ids)
        targets.append(int(split.targets[row]))
    return HeldOut(tuple(rows), tuple(targets), data.pad_id, 0 if job.generates else len(data.labels))


def about(source: Source) -> Artefact:
    """What every target of a source says of itself."""
    job, config = source.job, source.base.model.config
    frame = prompt_frame(source.chat, source.data) if job.generates else PromptFrame()
    layers, heads, size = cache_shape(config) if job.generates else (0, 0, 0)
    given = source.given
    return Artefact(
        target="merged",
        task=job.task,
        source={
            "run": given.run.id,
            "trial_id": given.trial_id,
            "arm": given.arm,
            "method": job.method,
            "base": job.model.model_name_or_path,
            "revision": model_revision(job.model.model_name_or_path, job.model.revision),
        },
        labels=list(source.data.labels),
        max_length=job.model.max_length,
        positions=getattr(config, "max_position_embeddings", None),
        ends=source.ends if job.generates else [],
        pad_id=source.data.pad_id,
        start=frame.start,
        before=frame.before,
        after=frame.after,
        system=frame.system.content if frame.system else "",
        system_role=frame.system.role if frame.system else "",
        strip=frame.strip,
        answer_frame=source.data.frame.as_dict() if source.data.frame else None,
        chat_template_kwargs=dict(job.data.chat_template_kwargs),
        layers=layers,
        heads=heads,
        head_size=size,
        versions={name: found for name in _PACKAGES if (found := _version(name))},
    )


@dataclass(frozen=True)
class PromptFrame:
    """What stands around a prompt of a user."""

    before: str = ""
    after: str = ""
    start: list[int] = field(default_factory=list)
    """Tokens before the text, where the prompt does not name them itself."""
    system: Message | None = None
    """The system message that `before` holds."""
    strip: bool = False
    """Whether the chat template takes the spaces off the ends of what is asked."""


def prompt_frame(chat: ChatFormat, data: TokenData) -> PromptFrame:
    """Return what training has around the prompt of a row, so that a runner can put it around any text.

    A system message is part of it only where all rows have the same one. Raises UserError for a chat template that does
    not leave the question as it is.
    """
    if data.frame is None:  # texts alone
        bos = chat.tokenizer.bos_token_id
        return PromptFrame(start=[] if bos is None else [bos])
    first = [data.system] if data.system else []
    whole = chat.template.render([*first, Message("user", _SENTINEL)], generation=True)
    parts = whole.split(_SENTINEL)
    if len(parts) != 2:
        raise UserError("the model's chat template changes what is asked: prompts cannot be framed outside of it")
    spaced = chat.template.render([*first, Message("user", f" {_SENTINEL}\n")], generation=True)
    return PromptFrame(parts[0], parts[1], chat.start_ids, data.system, strip=spaced == whole)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _move(folder: Path, place: Path) -> None:
    """Put a whole folder in its place, in the stead of one that was there before."""
    place.parent.mkdir(parents=True, exist_ok=True)
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    folder.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _write_summary(given: Shipped, made: Made, out: Path, base: Score | None) -> None:
    """export.json: every target that was asked for so far, of which model, and what became of it."""
    before = files.read_json(out / SUMMARY).get("targets", {})
    now = {
        made.target: {
            "run": given.run.id,
            "trial_id": given.trial_id,
            "accepted": made.accepted,
            "folder": str(Path(made.folder).relative_to(out)) if made.folder else None,
            "unavailable": made.unavailable or made.failure,
            "reasons": made.parity.reasons if made.parity else [],
            "files_mb": made.files_mb,
            "ms": made.ms,
            "seconds": round(made.seconds, 1),
        }
    }
    of = {"run": given.run.id, "trial_id": given.trial_id}
    files.write_json(out / SUMMARY, {"targets": before | now, "base": asdict(base) | of if base else None})


def delivered(given: Shipped, wanted: Delivery, out: Path, tell: Callable[[str], None]) -> Exported:
    """Do what was asked for, and pick what fits a device."""
    if wanted.held_out is not None:
        spec = given.job.export.model_copy(update={"rows": wanted.held_out})
        given = replace(given, job=given.job.model_copy(update={"export": spec}))
    made = export(given, wanted.targets, out, tell, wanted.threads)
    if wanted.budget is None:
        return Exported(targets=made, output=str(out))
    picked, sentence = pick([one.offer for one in made if one.offer], wanted.budget)
    return Exported(targets=made, picked=picked.target if picked else None, sentence=sentence, output=str(out))
