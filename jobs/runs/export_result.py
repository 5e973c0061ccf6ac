"""What an export is asked for and what became of it: parity, the best for a device, the record of a folder. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode, UserError
from lorafleet.jobs.runs.report import Inference
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.export import Gate, Target
from lorafleet.jobs.schema.validation_messages import of_another_version
from pydantic import Field, ValidationError

Record = TypeVar("Record", bound=Spec)


class Judged(Spec):
    """How far one target is from its source, on the same rows."""

    rows: int
    """Held-out rows that both saw."""
    positions: int
    """Positions (or rows, of a classifier) whose logits were compared."""
    max_logit_difference: float | None
    """Largest absolute difference of a logit; null where one is no number."""
    mean_logit_difference: float | None
    """Their mean absolute difference."""
    agreement: float
    """Share of positions (rows) with the same likeliest token (class)."""
    steps: int = 0
    """Tokens that were given one by one, over rows of unequal length beside each other."""
    step_logit_difference: float | None = None
    """The largest difference where rows are given token by token, and padded on the left, as answers are written."""
    step_agreement: float | None = None
    """Share of those tokens after which the likeliest next one is the same."""
    called_rows: int = 0
    """Held-out rows that were asked as a user asks: by the runner beside the model, in a process of its own."""
    called_prompts: float | None = None
    """Share of these whose prompt had the very tokens that training gives the row."""
    called_answers: float | None = None
    """Share of these whose answer begins as the source's own."""
    metric: str
    """accuracy or perplexity."""
    before: float | None
    """The metric of the source; null where it is no number."""
    before_interval: tuple[float, float] | None
    """Its 95 % bootstrap interval over rows."""
    after: float | None
    """The metric of the target; null where it is no number."""
    after_interval: tuple[float, float] | None
    """Its 95 % bootstrap interval over rows."""


class Parity(Spec):
    """parity.json: whether a target may be shipped, and why not."""

    target: Target
    """What was made."""
    accepted: bool
    """Whether it behaves like its source."""
    reasons: list[str] = []
    """Why it is not accepted, a sentence each."""
    gate: Gate
    """What was asked of it."""
    judged: Judged
    """What was found."""
    remarks: list[str] = []
    """What else there is to know."""


_FEW_STEPS = 0.1
"""Less is asked of the few tokens that are given one by one: of thirty, one is three in a hundred."""


def verdict(gate: Gate, judged: Judged) -> list[str]:
    """Why a target is refused, a sentence each; nothing, and it is accepted. What is no number is refused."""
    found = judged.max_logit_difference
    if found is None or judged.after is None or (judged.steps and judged.step_logit_difference is None):
        return ["it says what is no number (NaN, or beyond all bounds)"]
    reasons = []
    worst = max(found, judged.step_logit_difference or 0.0)
    if gate.max_logit_difference is not None and not worst <= gate.max_logit_difference:
        reasons.append(f"a logit differs by {worst:.2g}, and may by {gate.max_logit_difference:g}")
    if gate.min_agreement is not None and not judged.agreement >= gate.min_agreement:
        what = "classes" if judged.metric == "accuracy" else "likeliest tokens"
        reasons.append(f"{judged.agreement:.3f} of {what} agree, and {gate.min_agreement:g} must")
    by_steps = judged.step_agreement
    if gate.min_agreement is not None and by_steps is not None and by_steps < gate.min_agreement - _FEW_STEPS:
        reasons.append(
            f"token by token {by_steps:.3f} of likeliest tokens agree, and {gate.min_agreement - _FEW_STEPS:g} must"
        )
    if judged.called_prompts is not None and judged.called_prompts < 1:
        reasons.append(
            f"{judged.called_prompts:.3f} of the prompts that a user asks are framed as in training, and all must be"
        )
    drop = metric_drop(judged)
    if gate.max_metric_drop is not None and drop is not None and drop > gate.max_metric_drop + 1e-9:
        reasons.append(
            f"{judged.metric} goes from {judged.before:.4g} to {judged.after:.4g}, and may get worse by "
            f"{gate.max_metric_drop:g}{'' if judged.metric == 'accuracy' else ' of it'}"
        )
    return reasons


def metric_drop(judged: Judged) -> float | None:
    """How much worse the target's metric is: accuracy in points, perplexity as a share; None where one is no number."""
    if judged.before is None or judged.after is None:
        return None
    if judged.metric == "accuracy":
        return judged.before - judged.after
    return judged.after / judged.before - 1


class Offer(Spec):
    """A target that passed its gate, by what a device asks of it."""

    target: Target
    """Which."""
    files_mb: float
    """MB on disk."""
    ms: float | None
    """Milliseconds a token (of a classifier: a row); null where it was not measured."""
    metric: str
    """accuracy or perplexity."""
    value: float
    """The metric on held-out rows."""


class Budget(Spec):
    """What a device has room and time for."""

    files_mb: float | None = Field(None, gt=0)
    """MB on disk, at most."""
    ms: float | None = Field(None, gt=0)
    """Milliseconds a token (of a classifier: a row), at most."""


_ALIKE = 1e-3
"""Metrics so near each other are the same: float16 and float32 differ by less."""


def pick(offers: Sequence[Offer], budget: Budget) -> tuple[Offer | None, str]:
    """(the best that fits, a sentence with the reason). Best by metric; of those alike, the smallest."""
    if not offers:
        return None, "There is no target that passed its gate, so none can be picked."
    fitting = [offer for offer in offers if not _beyond(offer, budget)]
    if not fitting:
        why = "; ".join(f"{offer.target} {', '.join(_beyond(offer, budget))}" for offer in offers)
        return None, f"Nothing fits: {why}."
    higher = fitting[0].metric == "accuracy"
    best = (max if higher else min)(offer.value for offer in fitting)
    alike = [offer for offer in fitting if abs(offer.value - best) <= _ALIKE * max(1.0, abs(best))]
    chosen = min(alike, key=lambda offer: offer.files_mb)
    said = [f"{chosen.files_mb:.1f} MB" + (f" of {budget.files_mb:g}" if budget.files_mb else "")]
    if chosen.ms is not None:
        said.append(f"{chosen.ms:.1f} ms {_each(chosen)}" + (f" of {budget.ms:g}" if budget.ms else ""))
    return (
        chosen,
        f"{chosen.target} fits and is the best that does: {', '.join(said)}, {chosen.metric} {chosen.value:.4g}.",
    )


def _each(offer: Offer) -> str:
    return "a row" if offer.metric == "accuracy" else "a token"


def _beyond(offer: Offer, budget: Budget) -> list[str]:
    """What of a budget an offer does not keep, and by how much."""
    found = []
    if budget.files_mb is not None and offer.files_mb > budget.files_mb:
        over = offer.files_mb - budget.files_mb
        found.append(f"has {offer.files_mb:.1f} MB, {over:.1f} more than {budget.files_mb:g}")
    if budget.ms is not None and offer.ms is None:
        found.append("was not measured")
    elif budget.ms is not None and offer.ms is not None and offer.ms > budget.ms:
        found.append(f"takes {offer.ms:.1f} ms {_each(offer)}, {offer.ms - budget.ms:.1f} more than {budget.ms:g}")
    return found


EXPORTED = "exported.json"
"""Of the run of an export: what became of it."""


class Delivery(Spec):
    """What an export or a benchmark is asked for where it runs as a job of its own."""

    run: str
    """The run whose model it is: its folder's name beside this one, or its path there."""
    trial_id: str = ""
    """The trial; empty: what the run recommends."""
    output: str = ""
    """Folder of the targets; empty: `export` in the run's folder."""
    targets: tuple[Target, ...] = ()
    """What to make."""
    threads: int = 1
    """CPU threads with which targets are measured; 0: they are not."""
    held_out: int | None = None
    """Held-out rows on which targets are compared with their source; null: the job's `export.rows`."""
    budget: Budget | None = None
    """What a device has."""
    rounds: int = 3
    """Of a benchmark: how often each variant is measured."""
    rows: int = 8
    """Of a benchmark: held-out rows."""
    new_tokens: int = 32
    """Of a benchmark: tokens of every answer."""
    points: tuple[tuple[int, int], ...] = ()
    """Of a benchmark: batches that are measured as well, (rows, tokens of each)."""


class Made(Spec):
    """One line of what became of an export."""

    target: Target
    """Which."""
    accepted: bool = False
    """Whether it may be shipped."""
    folder: str | None = None
    """Where it lies; null: it could not be made."""
    unavailable: str | None = None
    """Why this machine or this model cannot have it."""
    failure: str | None = None
    """Why it could not be made at all."""
    parity: Parity | None = None
    """How far it is from its source."""
    files_mb: float | None = None
    """MB on disk."""
    inference: Inference | None = None
    """What it takes where it was made; null: not measured."""
    seconds: float = 0.0
    """Seconds that it took to make."""

    @property
    def ms(self) -> float | None:
        """Milliseconds a token, or (of a classifier) a row; None where it was not measured."""
        speed = self.inference
        if speed is None:
            return None
        return 1000 / speed.tokens_per_second if speed.tokens_per_second else speed.latency_ms

    @property
    def offer(self) -> Offer | None:
        """What it has for a device; None for what was not accepted."""
        judged = self.parity.judged if self.parity else None
        if not self.accepted or judged is None or judged.after is None or self.files_mb is None:
            return None
        return Offer(target=self.target, files_mb=self.files_mb, ms=self.ms, metric=judged.metric, value=judged.after)


class Exported(Spec):
    """What became of an export."""

    targets: list[Made]
    """In the order in which they were made."""
    picked: Target | None = None
    """The best that fits the budget."""
    sentence: str = ""
    """Why."""
    output: str
    """Folder of the targets."""

    @property
    def code(self) -> ExitCode:
        """What the command ends with."""
        judged = [one for one in self.targets if one.parity]
        if not all(one.accepted for one in judged):
            return ExitCode.GATE_REFUSED
        if any(one.failure for one in self.targets):
            return ExitCode.OUR_FAULT
        if not judged:
            return ExitCode.USER_INPUT
        nothing_fits = self.sentence and self.picked is None
        return ExitCode.GATE_REFUSED if nothing_fits else ExitCode.OK


class Artefact(Spec):
    """artefact.json: what a folder holds, for whoever runs it."""

    target: Target
    """What it is."""
    task: Literal["classification", "generation", "summarization"]
    """What it does."""
    source: dict[str, Any]
    """run, trial_id, method, base, revision."""
    labels: list[str] = []
    """Of a classifier: what its outputs mean, in order."""
    max_length: int
    """Tokens of a row in training: longer ones were cut."""
    positions: int | None = None
    """Tokens that the model has places for; null: as many as are given."""
    ends: list[int] = []
    """Tokens at which an answer is over."""
    pad_id: int
    """The token that fills rows up."""
    start: list[int] = []
    """Tokens before the text, where the prompt does not name them itself."""
    before: str = ""
    """What stands before what is asked, from the chat template."""
    system: str = ""
    """The system message that all rows of training begin with; `before` has it in it. Empty: they have none, or not
    all the same."""
    system_role: str = ""
    """Role of that message: system or developer. Empty: there is none (or `system` is of an older version)."""
    after: str = ""
    """What stands between what is asked and the answer."""
    strip: bool = False
    """Whether the chat template takes the spaces off the ends of what is asked."""
    answer_frame: dict[str, Any] | None = None
    """What the model writes before its answer, as `answer_frame.py` reads it; null: what it writes is the answer."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables that the chat template was rendered with."""
    layers: int = 0
    """Of a decoder: how many pairs of keys and values it keeps."""
    heads: int = 0
    """Heads of a key."""
    head_size: int = 0
    """Numbers of a head."""
    opset: int | None = None
    """ONNX operator set."""
    versions: dict[str, str] = {}
    """Package -> version that made it."""


def read_record(path: Path, kind: type[Record]) -> Record:
    """A file of an exported folder as the object that it was written from. Raises UserError for another version's."""
    found = files.read_json(path)
    found.pop("schema_version", None)
    try:
        return kind.model_validate_json(json.dumps(found))
    except ValidationError as error:
        raise UserError(of_another_version(path, error)) from None
