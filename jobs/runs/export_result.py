"""Define the request and the results of an export: parity, target selection, folder record.

All functions but `read_record` are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode, UserError
from lorafleet.jobs.runs.records import check_version
from lorafleet.jobs.runs.report import Inference
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.export import Gate, Target
from lorafleet.jobs.schema.validation_messages import describe_unreadable_file

Record = TypeVar("Record", bound=Spec)


class ParityMeasurement(Spec):
    """Differences between a target and its source, measured on the same rows."""

    rows: int
    """Number of held-out rows that both evaluated."""
    positions: int
    """Number of positions (for a classifier: rows) whose logits were compared."""
    max_logit_difference: float | None
    """Largest absolute difference of a logit; null if one is NaN or infinite."""
    mean_logit_difference: float | None
    """Mean absolute difference of the logits."""
    agreement: float
    """Share of positions with the same likeliest token, or of rows with the same class."""
    steps: int = 0
    """Number of tokens in the token-by-token check, over a batch of rows of unequal length."""
    step_logit_difference: float | None = None
    """Largest logit difference if rows are fed token by token and padded on the left, as in
    generation.
    """
    step_agreement: float | None = None
    """Share of these tokens after which the likeliest next token is the same."""
    called_rows: int = 0
    """Number of held-out rows that were sent as a user sends them: to the runner beside the model,
    in its own process.
    """
    called_prompts: float | None = None
    """Share of these rows whose prompt had exactly the tokens that training gives the row."""
    called_answers: float | None = None
    """Share of these rows whose answer begins as the source's answer does."""
    metric: str
    """Name of the metric: accuracy or perplexity."""
    before: float | None
    """Metric of the source; null if it is NaN or infinite."""
    before_interval: tuple[float, float] | None
    """95 % bootstrap interval of `before`, over rows."""
    after: float | None
    """Metric of the target; null if it is NaN or infinite."""
    after_interval: tuple[float, float] | None
    """95 % bootstrap interval of `after`, over rows."""


class Parity(Spec):
    """parity.json: whether a target is accepted, and the reasons if it is not."""

    target: Target
    """The target."""
    accepted: bool
    """True if the target behaves like its source."""
    reasons: list[str] = []
    """Reasons why it is not accepted, one sentence each."""
    gate: Gate
    """Limits that were applied."""
    judged: ParityMeasurement
    """Measured differences."""
    remarks: list[str] = []
    """Further remarks for the user."""


_STEP_TOLERANCE = 0.1
"""Extra tolerance for the token-by-token check: it covers only about 30 tokens, so one
mismatch already costs 3 %.
"""


def find_gate_violations(gate: Gate, measurement: ParityMeasurement) -> list[str]:
    """Return the reasons why a target is refused, one sentence each.

    An empty list means that it is accepted. Values that are NaN or infinite are refused.
    """
    logit_difference = measurement.max_logit_difference
    if (
        logit_difference is None
        or measurement.after is None
        or (measurement.steps and measurement.step_logit_difference is None)
    ):
        return ["its outputs are NaN or infinite"]
    reasons = []
    max_difference = max(logit_difference, measurement.step_logit_difference or 0.0)
    # `not ... <=` instead of `>`: every comparison with NaN is false, and NaN must not pass.
    if gate.max_logit_difference is not None and not max_difference <= gate.max_logit_difference:
        reasons.append(
            f"a logit differs by {max_difference:.2g}, but at most {gate.max_logit_difference:g} "
            "is allowed"
        )
    if gate.min_agreement is not None and not measurement.agreement >= gate.min_agreement:
        compared = "classes" if measurement.metric == "accuracy" else "most likely tokens"
        reasons.append(
            f"{measurement.agreement:.3f} of the {compared} agree, but at least "
            f"{gate.min_agreement:g} must"
        )
    step_agreement = measurement.step_agreement
    if (
        gate.min_agreement is not None
        and step_agreement is not None
        and step_agreement < gate.min_agreement - _STEP_TOLERANCE
    ):
        reasons.append(
            f"token by token, {step_agreement:.3f} of the most likely tokens agree, but at least "
            f"{gate.min_agreement - _STEP_TOLERANCE:g} must"
        )
    if measurement.called_prompts is not None and measurement.called_prompts < 1:
        reasons.append(
            f"only {measurement.called_prompts:.3f} of the user prompts are formatted as in "
            "training, but all must be"
        )
    drop = compute_metric_drop(measurement)
    # The small term lets a drop of exactly the limit pass despite rounding.
    if gate.max_metric_drop is not None and drop is not None and drop > gate.max_metric_drop + 1e-9:
        reasons.append(
            f"{measurement.metric} changes from {measurement.before:.4g} to "
            f"{measurement.after:.4g}, but may get worse by at most "
            f"{gate.max_metric_drop:g}{'' if measurement.metric == 'accuracy' else ' of it'}"
        )
    return reasons


def compute_metric_drop(measurement: ParityMeasurement) -> float | None:
    """Return how much worse the target's metric is.

    Accuracy is in points, perplexity as a share of the source's value. None if a value is NaN
    or infinite.
    """
    if measurement.before is None or measurement.after is None:
        return None
    if measurement.metric == "accuracy":
        return measurement.before - measurement.after
    return measurement.after / measurement.before - 1


class TargetOffer(Spec):
    """An accepted target, described by what it needs on a device."""

    target: Target
    """The target."""
    files_mb: float
    """Size of its files, in MB."""
    ms: float | None
    """Milliseconds per token (for a classifier: per row); null if not measured."""
    metric: str
    """Name of the metric: accuracy or perplexity."""
    value: float
    """Metric on held-out rows."""


class DeviceBudget(Spec):
    """Limits of a device in disk space and time."""

    files_mb: float | None = Field(None, gt=0)
    """Maximum size of the files, in MB."""
    ms: float | None = Field(None, gt=0)
    """Maximum milliseconds per token (for a classifier: per row)."""


_EQUAL_TOLERANCE = 1e-3
"""Metrics closer than this count as equal: float16 and float32 differ by less."""


def choose_target(
    offers: Sequence[TargetOffer], budget: DeviceBudget
) -> tuple[TargetOffer | None, str]:
    """Choose the best target that fits a device.

    The best metric wins; among equal metrics, the smallest files.

    Returns:
        The chosen target (None if nothing fits) and a sentence with the reason.
    """
    if not offers:
        return None, "No target passed its gate, so none can be selected."
    fitting = [offer for offer in offers if not _list_budget_violations(offer, budget)]
    if not fitting:
        reasons = "; ".join(
            f"{offer.target} {', '.join(_list_budget_violations(offer, budget))}"
            for offer in offers
        )
        return None, f"No target fits: {reasons}."
    is_higher_better = fitting[0].metric == "accuracy"
    best = (max if is_higher_better else min)(offer.value for offer in fitting)
    equal = [
        offer
        for offer in fitting
        if abs(offer.value - best) <= _EQUAL_TOLERANCE * max(1.0, abs(best))
    ]
    chosen = min(equal, key=lambda offer: offer.files_mb)
    details = [
        f"{chosen.files_mb:.1f} MB" + (f" of {budget.files_mb:g}" if budget.files_mb else "")
    ]
    if chosen.ms is not None:
        details.append(
            f"{chosen.ms:.1f} ms {_describe_unit(chosen)}"
            + (f" of {budget.ms:g}" if budget.ms else "")
        )
    return (
        chosen,
        f"{chosen.target} is the best target that fits: {', '.join(details)}, {chosen.metric} "
        f"{chosen.value:.4g}.",
    )


def _describe_unit(offer: TargetOffer) -> str:
    """Return the unit of a target's latency: a row or a token."""
    return "per row" if offer.metric == "accuracy" else "per token"


def _list_budget_violations(offer: TargetOffer, budget: DeviceBudget) -> list[str]:
    """Return which limits of a budget a target exceeds, and by how much."""
    violations = []
    if budget.files_mb is not None and offer.files_mb > budget.files_mb:
        excess_mb = offer.files_mb - budget.files_mb
        violations.append(
            f"has {offer.files_mb:.1f} MB, {excess_mb:.1f} more than {budget.files_mb:g}"
        )
    if budget.ms is not None and offer.ms is None:
        violations.append("was not measured")
    elif budget.ms is not None and offer.ms is not None and offer.ms > budget.ms:
        violations.append(
            f"takes {offer.ms:.1f} ms {_describe_unit(offer)}, {offer.ms - budget.ms:.1f} more "
            f"than {budget.ms:g}"
        )
    return violations


EXPORTED = "exported.json"
"""File of an export's run that holds its results."""


class ExportRequest(Spec):
    """Request for an export or a benchmark that runs as a job of its own.

    plan.json holds it as `delivery`, and `DeliveryDriver` (deployment/driver.py) carries it
    out.
    """

    run: str
    """Run that the model comes from: the name of its folder beside this one, or its path on the
    machine that runs the job.
    """
    trial_id: str = ""
    """Trial to export. Default (empty): the trial that the run recommends."""
    output: str = ""
    """Folder for the targets. Default (empty): `export` in the run's folder."""
    targets: tuple[Target, ...] = ()
    """Targets to make."""
    threads: int = 1
    """Number of CPU threads with which targets are measured; 0 skips the measurement.

    Default: 1.
    """
    held_out: int | None = None
    """Number of held-out rows on which targets are compared with their source. Default (null): the
    job's `export.rows`.
    """
    budget: DeviceBudget | None = None
    """Limits of the device."""
    rounds: int = 3
    """For a benchmark: number of times that each variant is measured."""
    rows: int = 8
    """For a benchmark: number of held-out rows."""
    new_tokens: int = 32
    """For a benchmark: number of tokens of every answer."""
    points: tuple[tuple[int, int], ...] = ()
    """For a benchmark: further batches to measure, as (rows, tokens per row)."""


class TargetResult(Spec):
    """Result of an export for one target."""

    target: Target
    """The target."""
    accepted: bool = False
    """True if the target passed its gate."""
    folder: str | None = None
    """Folder of the target; null if it could not be made."""
    unavailable: str | None = None
    """Reason why this target is not available on this machine or for this model."""
    failure: str | None = None
    """Reason why making the target failed."""
    parity: Parity | None = None
    """Comparison with its source."""
    files_mb: float | None = None
    """Size of its files, in MB."""
    inference: Inference | None = None
    """Inference costs on the machine that made it; null if not measured."""
    seconds: float = 0.0
    """Seconds that it took to make."""

    @property
    def ms(self) -> float | None:
        """Return milliseconds per token, or per row of a classifier; None if not measured."""
        costs = self.inference
        if costs is None:
            return None
        return 1000 / costs.tokens_per_second if costs.tokens_per_second else costs.latency_ms

    @property
    def offer(self) -> TargetOffer | None:
        """Return what the target needs on a device; None if it was not accepted."""
        measurement = self.parity.judged if self.parity else None
        if (
            not self.accepted
            or measurement is None
            or measurement.after is None
            or self.files_mb is None
        ):
            return None
        return TargetOffer(
            target=self.target,
            files_mb=self.files_mb,
            ms=self.ms,
            metric=measurement.metric,
            value=measurement.after,
        )


class ExportResult(Spec):
    """Result of an export."""

    targets: list[TargetResult]
    """Results in the order in which the targets were made."""
    picked: Target | None = None
    """Best target that fits the budget."""
    sentence: str = ""
    """Reason for that choice."""
    output: str
    """Folder of the targets."""

    @property
    def code(self) -> ExitCode:
        """Return the exit code of the command.

        The first that applies: GATE_REFUSED if a target was rejected, OUR_FAULT if making one
        failed, USER_INPUT if nothing was compared, GATE_REFUSED if no target fits the budget,
        else OK.
        """
        compared = [result for result in self.targets if result.parity]
        if not all(result.accepted for result in compared):
            return ExitCode.GATE_REFUSED
        if any(result.failure for result in self.targets):
            return ExitCode.OUR_FAULT
        if not compared:
            return ExitCode.USER_INPUT
        nothing_fits = self.sentence and self.picked is None
        return ExitCode.GATE_REFUSED if nothing_fits else ExitCode.OK


class Artefact(Spec):
    """artefact.json: what a folder contains, for whoever runs it."""

    target: Target
    """Target that the folder contains."""
    task: Literal["classification", "generation", "summarization"]
    """Task of the model."""
    source: dict[str, Any]
    """Origin of the model: run, trial_id, method, base and revision."""
    labels: list[str] = []
    """For a classifier: the classes of its outputs, in order."""
    max_length: int
    """Maximum tokens of a row in training; longer rows were cut."""
    positions: int | None = None
    """Maximum number of positions of the model; null if it has no limit."""
    ends: list[int] = []
    """Tokens that end an answer."""
    pad_id: int
    """Padding token."""
    start: list[int] = []
    """Tokens before the text that the prompt does not contain itself."""
    before: str = ""
    """Text of the chat template before the question."""
    system: str = ""
    """System message with which all training rows begin; it is part of `before`. Empty if rows
    have none, or not all the same.
    """
    system_role: str = ""
    """Role of that message: system or developer. Empty if there is none, or if `system` comes from
    an older version.
    """
    after: str = ""
    """Text of the chat template between the question and the answer."""
    strip: bool = False
    """True if the chat template strips spaces from both ends of the question."""
    answer_frame: dict[str, Any] | None = None
    """Frame that the model writes before its answer, in the form that `answer_frame.py` reads;
    null if all that it writes is the answer.
    """
    chat_template_kwargs: dict[str, Any] = {}
    """Variables with which the chat template was rendered."""
    layers: int = 0
    """For a decoder: number of pairs of keys and values in its cache."""
    heads: int = 0
    """Number of key heads."""
    head_size: int = 0
    """Size of a head."""
    opset: int | None = None
    """ONNX operator set."""
    versions: dict[str, str] = {}
    """Package -> version that made the target."""


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a file of an exported folder as the object that it was written from.

    Raises:
        UserError: If the file was written by another version.
    """
    values = files.read_json(path)
    check_version(path, values)
    # `files.write_json` adds this key to every file; the models do not have it.
    values.pop("schema_version", None)
    try:
        return kind.from_record(values)
    except ValidationError as error:
        raise UserError(describe_unreadable_file(path, error)) from None
