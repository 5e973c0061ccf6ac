"""Every variant of one model in one table: the base, the adapter on it, and what an export made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.subprocess_measurement import measured_apart
from lorafleet.deployment.export import SUMMARY
from lorafleet.deployment.merge import in_float32
from lorafleet.deployment.runtime import files_mb, read_artefact
from lorafleet.evaluation.render.trial_table import BENCHMARK, number
from lorafleet.evaluation.report.comparison import batches_of, inference_of
from lorafleet.evaluation.report.model_of_run import Shipped
from lorafleet.evaluation.report.search import bare, build_report
from lorafleet.evaluation.tokens import TokenData, row_encoder
from lorafleet.jobs import files
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.export_result import Judged, Parity, read_record
from lorafleet.jobs.runs.report import Arm, Recommendation, Report
from lorafleet.jobs.schema.export import TARGETS, WHAT
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.data import prepare
from lorafleet.training.model import safetensors_folder

LEDGER = "measured.jsonl"


@dataclass(frozen=True)
class Variant:
    """One thing to measure, or why it cannot be."""

    name: str
    what: str
    request: dict[str, Any] | None = None
    """What a fresh process is asked; None: it cannot run here."""
    unavailable: str | None = None
    folder: Path | None = None
    parity: Parity | None = None
    score: dict[str, Any] | None = None
    """How good it is, where no parity says so: metric, value, interval."""
    remarks: tuple[str, ...] = ()
    """What is odd about it."""


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    rounds: int
    rows: int
    new_tokens: int
    threads: int
    points: tuple[tuple[int, int], ...] = ()
    """Batches that are measured as well: (rows, tokens of each)."""


def variants(given: Shipped, out: Path, amount: Amount) -> list[Variant]:
    """The base, the adapter, and every target that an export has made, or could not."""
    summary = files.read_json(out / SUMMARY)
    known = summary.get("targets", {})
    if not known:
        raise UserError(f"{out} holds no {SUMMARY}: `lorafleet export` makes one, --export names its folder")
    given_job = _measured_as(given.job, amount)
    data = prepare(given_job)
    split = "validation" if data.chosen_on_test else "test"
    job = given_job.model_dump(mode="json")
    plain = {"what": "inference", "job": job, "tokens": str(data.folder), "split": split, "gpus": 0}
    plain |= {"rows": amount.rows, "new_tokens": amount.new_tokens, "points": amount.points}
    _check_room(given, amount)
    base = f"the base, untuned{f', {given.job.qlora.quant_type.upper()}' if given.job.method == 'qlora' else ''}"
    score = summary.get("base") or {}
    ours = (score.get("run"), score.get("trial_id")) == (given.run.id, given.trial_id)
    found = [Variant("base", base, plain | {"weights": None}, score=score if ours else None)]
    if given.weights is not None:
        found.append(Variant("adapter", f"{given.job.method}, as trained", plain | {"weights": str(given.weights)}))
    rows = _rows(given, data, split, amount)
    answer, longest = amount.new_tokens if given.job.generates else 0, max(map(len, rows), default=0)
    for target in TARGETS:
        if target not in known:
            continue
        of = (known[target]["run"], known[target]["trial_id"])
        if of != (given.run.id, given.trial_id):
            found.append(Variant(target, WHAT[target], unavailable=f"it was made from {of[0]}, trial {of[1]}"))
            continue
        folder = out / str(known[target]["folder"] or target)
        if known[target]["folder"] is None or not folder.is_dir():
            found.append(Variant(target, WHAT[target], unavailable=str(known[target]["unavailable"] or "it is gone")))
            continue
        points, why = fitting(read_artefact(folder).positions, longest, answer, amount.points)
        if points is None:
            found.append(Variant(target, WHAT[target], unavailable=why))
            continue
        request = {
            "what": "artefact",
            "folder": str(folder),
            "rows": rows,
            "new_tokens": amount.new_tokens,
            "points": points,
            "batch_rows": given.job.train.per_device_eval_batch_size,
            "threads": amount.threads,
        }
        parity = read_record(folder / "parity.json", Parity)
        remarks = (*([why] if why else []), *parity.remarks)
        found.append(Variant(target, WHAT[target], request, folder=folder, parity=parity, remarks=remarks))
    return found


Points = Sequence[tuple[int, int]]


def fitting(ends: int | None, longest: int, answer: int, points: Points) -> tuple[Points | None, str]:
    """(batches that a target has room for, what it has none for); None: not even for the longest row alone.

    `ends`: tokens that it has places for. A program for known sizes ends sooner than the model that it is made from.
    """
    if ends is None:
        return points, ""
    if longest + answer > ends:
        return None, f"its program ends at {ends} tokens, and the longest row takes {longest + answer}"
    fit = [point for point in points if point[1] + answer <= ends]
    left = sorted({length for _, length in points} - {length for _, length in fit})
    return fit, f"batches of {', '.join(map(str, left))} tokens unavailable: its program ends at {ends}" if left else ""


def _check_room(given: Shipped, amount: Amount) -> None:
    """Raises UserError for batches that are longer than the model."""
    spec = given.job.model
    positions = positions_of_model(spec.model_name_or_path, spec.revision)
    answer = amount.new_tokens if given.job.generates else 0
    longest = max((length for _, length in amount.points), default=0)
    if positions is not None and longest + answer > positions:
        more = f", and an answer takes {answer}" if answer else ""
        raise UserError(f"--lengths has {longest}, but the model has {positions} positions{more}")


def _measured_as(job: JobSpec, amount: Amount) -> JobSpec:
    """The job with as many threads as the others get, and computing in float32 as they do."""
    resources = job.resources.model_copy(update={"cpus_per_worker": amount.threads})
    return in_float32(job).model_copy(update={"resources": resources})


def positions_of_model(name: str, revision: str | None) -> int | None:
    """Tokens that a model has places for, by whatever name its kind has for them; None where it does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(safetensors_folder(name, revision)), trust_remote_code=False)  # nosec B615  # a folder of this machine
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found


def _rows(given: Shipped, data: TokenData, split_name: str, amount: Amount) -> list[list[int]]:
    """The tokens that every variant is given: prompts with room for an answer, or texts."""
    if given.job.generates:
        spec, encoder = given.job.model, row_encoder(given.job)
        rows = data.rows(split_name)[: amount.rows]
        positions = positions_of_model(spec.model_name_or_path, spec.revision) or spec.max_length + amount.new_tokens
        room = max(1, min(spec.max_length, positions - amount.new_tokens))
        return [encoder.prompt(row, room) for row in rows]
    return data.tokens(split_name, amount.rows)


def benchmark(
    given: Shipped, found: Sequence[Variant], out: Path, amount: Amount, tell: Callable[[str], None]
) -> Report:
    """Measure each variant in processes of its own, in turn, `rounds` times, and put them in one table.

    Interleaved, so that a machine that is busy for a while costs all alike. What fails is said in its row.
    """
    ledger = out / "benchmark" / LEDGER
    ledger.unlink(missing_ok=True)
    failed: dict[str, str] = {}
    for turn in range(amount.rounds):
        for variant in found:
            if variant.request is None or variant.name in failed:
                continue
            tell(f"measuring {variant.name} (round {turn + 1} of {amount.rounds})")
            try:
                measured = measured_apart(variant.request, given.run.path, amount.threads)
            except RuntimeError as error:
                failed[variant.name] = str(error)
                continue
            files.append_jsonl(ledger, {"variant": variant.name, "round": turn, **measured})
    rows = files.read_jsonl(ledger)
    judged = next((one.parity.judged for one in found if one.parity), None)
    arms = [_arm(given, one, [row for row in rows if row["variant"] == one.name], failed, judged) for one in found]
    metric = "perplexity" if given.job.generates else "accuracy"
    compared = sorted({one.parity.judged.rows for one in found if one.parity})
    ends = " to ".join(map(str, dict.fromkeys([*compared[:1], *compared[-1:]])))
    said = [f"{metric} is of the {ends} rows on which targets were compared with their source"] if judged else []
    return bare(build_report(given.run)).model_copy(
        update={
            "state": BENCHMARK,
            "arms": arms,
            "metric": metric,
            "metrics": [metric],
            "goal": "minimize" if given.job.generates else "maximize",
            "warnings": said,
            "recommendation": _fastest(arms, metric),
        }
    )


def _arm(
    given: Shipped, variant: Variant, rows: list[dict[str, Any]], failed: dict[str, str], source: Judged | None
) -> Arm:
    """`source`: what was found of the adapter, when a target was compared with it."""
    judged = variant.parity.judged if variant.parity else None
    metrics, interval = {}, {}
    if judged:
        metrics[judged.metric], ends = judged.after, judged.after_interval
    elif source and variant.name == "adapter":
        metrics[source.metric], ends = source.before, source.before_interval
    elif variant.score:
        metrics[variant.score["metric"]] = variant.score["value"]
        ends = tuple(variant.score["interval"]) if variant.score["interval"] else None
    else:
        ends = None
    if ends:
        interval[next(iter(metrics))] = ends
    remarks = [f"rejected: {reason}" for reason in (variant.parity.reasons if variant.parity else [])]
    remarks += variant.remarks
    if variant.unavailable:
        remarks.append(f"unavailable: {variant.unavailable}")
    if variant.name in failed:
        remarks.append(f"not measured: {failed[variant.name]}")
    passed = variant.parity is None or variant.parity.accepted
    return Arm(
        arm=variant.name,
        what=variant.what,
        metrics=metrics,
        interval=interval,
        weights=str(variant.folder) if variant.folder else None,
        weights_mb=_size(given, variant),
        inference=inference_of(rows),
        batches=batches_of(rows),
        comparable=passed and not variant.unavailable and variant.name not in failed,
        remarks=remarks,
    )


def _size(given: Shipped, variant: Variant) -> float | None:
    if variant.folder is not None:
        return files_mb(variant.folder)
    if variant.name == "adapter" and given.weights is not None:
        return files_mb(given.weights)
    if variant.name != "base":
        return None
    folder = safetensors_folder(given.job.model.model_name_or_path, given.job.model.revision)
    needed = [*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]  # a hub's folder may hold other formats
    return sum(path.stat().st_size for path in needed) / 1e6


def _fastest(arms: Sequence[Arm], metric: str) -> Recommendation:
    """Of the targets that passed their gate, the one that answers soonest."""
    rule = "of the targets that passed their gate, the fastest"
    timed = [
        arm
        for arm in arms
        if arm.comparable and arm.arm in TARGETS and arm.inference and arm.inference.latency_ms is not None
    ]
    if not timed:
        return Recommendation(trial_id=None, rule=rule, sentence="No target that passed its gate was measured.")
    best = min(timed, key=lambda arm: (arm.inference and arm.inference.latency_ms) or 0.0)
    assert best.inference is not None
    what = "ms a row" if best.inference.ttft_ms is None else "ms an answer"
    return Recommendation(
        trial_id=None,
        arm=best.arm,
        rule=rule,
        sentence=f"Deploy {best.arm}: {number(best.inference.latency_ms, 1)} {what}, {number(best.weights_mb, 1)} MB, "
        f"and it passed its gate{_metric_beside(best, arms, metric)}.",
        adapter=best.weights,
    )


def _metric_beside(best: Arm, arms: Sequence[Arm], metric: str) -> str:
    """What it gives up for that, beside the adapter that it is from."""
    source = next((arm.metrics.get(metric) for arm in arms if arm.arm == "adapter"), None)
    own = best.metrics.get(metric)
    if own is None or source is None:
        return ""
    return f" ({metric} {number(own)}, where the adapter has {number(source)})"
