"""Whether a target still does what its source does, on rows that no training has seen.

T tokens of a row, P positions that are compared, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lorafleet.deployment.decoding import Decoder, left_padded, positions_of
from lorafleet.deployment.runtime import right_padded
from lorafleet.evaluation.metrics.predictions import Classified, RowResults
from lorafleet.evaluation.metrics.scores import scores
from lorafleet.jobs.runs.export_result import Judged

_ALL_POSITIONS, _MOST_POSITIONS, _FEWEST_POSITIONS = 1024, 32, 2
"""Positions whose logits are kept and compared, each with all of a vocabulary's numbers: over all rows, and of one."""
_STEPPED = 4
"""Rows that are given token by token as well."""
_STEPS = 8
_BATCH = 8


@dataclass(frozen=True)
class HeldOut:
    """Rows that a source and its targets are shown."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids."""
    targets: tuple[int, ...]
    """The class, or how many tokens of the row are given before what is learnt."""
    pad_id: int
    classes: int = 0
    """0: a causal model."""

    def places(self, row: int) -> np.ndarray:
        """Positions of a row whose next token is compared: evenly spread over those that are learnt."""
        first, last = max(1, self.targets[row]) - 1, len(self.rows[row]) - 2
        most = min(_MOST_POSITIONS, max(_FEWEST_POSITIONS, _ALL_POSITIONS // len(self.rows)))
        return np.unique(np.linspace(first, last, min(most, last - first + 1)).round().astype(int))

    def asked(self, most: int, room: int) -> list[list[int]]:
        """The first `most` rows as they are asked: prompts of at most `room` tokens, or whole texts."""
        rows = [list(row) for row in self.rows[:most]]
        if self.classes:
            return rows
        return [row[: max(1, given)][-room:] for row, given in zip(rows, self.targets, strict=False)]

    def stepped(self) -> tuple[list[tuple[int, ...]], int]:
        """(rows of unequal length that are given in steps, how many last tokens of each are given one by one)."""
        by_length: dict[int, tuple[int, ...]] = {}
        for row in self.rows:
            by_length.setdefault(len(row), row)
        long = [length for length in by_length if length > _STEPS + 1]
        few = sorted(long or [length for length in by_length if length > 2])
        places = np.unique(np.linspace(0, len(few) - 1, _STEPPED).astype(int))
        chosen = [by_length[few[place]] for place in places if few]
        return chosen, min([_STEPS, *(len(row) - 2 for row in chosen)])


@dataclass
class Seen:
    """What a model said of held-out rows."""

    logits: list[np.ndarray]
    """Of each row: at its places (P x V), or of its classes (C)."""
    results: RowResults
    stepped: list[np.ndarray] = field(default_factory=list)
    """Of the first rows, given in steps: at the places of the last steps (P x V)."""


def look(model: Any, held_out: HeldOut) -> Seen:
    """Show a model all rows, whole; and some of them as answers are written."""
    return _classes(model, held_out) if held_out.classes else _tokens(model, held_out)


def _classes(model: Any, held_out: HeldOut) -> Seen:
    parts = []
    for start in range(0, len(held_out.rows), _BATCH):
        parts.append(model.logits(*right_padded(held_out.rows[start : start + _BATCH], held_out.pad_id)))
    logits_RC = np.concatenate(parts).astype(np.float64)
    shifted_RC = logits_RC - logits_RC.max(axis=1, keepdims=True)
    log_RC = shifted_RC - np.log(np.exp(shifted_RC).sum(axis=1, keepdims=True))
    label_R, rows = np.array(held_out.targets), np.arange(len(held_out.rows))
    said_R = logits_RC.argmax(axis=1)
    said = Classified(label_R, said_R, np.exp(log_RC[rows, said_R]), held_out.classes)
    return Seen(list(logits_RC), RowResults(-log_RC[rows, label_R], np.ones(len(rows), int), said))


def _tokens(model: Decoder, held_out: HeldOut) -> Seen:
    return Seen(*_whole(model, held_out), _in_steps(model, held_out))


def _whole(model: Decoder, held_out: HeldOut) -> tuple[list[np.ndarray], RowResults]:
    """(logits at the places that are compared, how well each row was foretold)."""
    logits, losses, counts = [], [], []
    for number, row in enumerate(held_out.rows):
        ids_1T = np.array([row], np.int64)
        mask_1T = np.ones_like(ids_1T)
        found_1TV, _ = model.step(ids_1T, mask_1T, positions_of(mask_1T), None)
        first = max(1, held_out.targets[number])
        learnt_PV = found_1TV[0, first - 1 : -1].astype(np.float64)
        losses.append(_nll(learnt_PV, ids_1T[0, first:]).sum())
        counts.append(len(row) - first)
        logits.append(found_1TV[0, held_out.places(number)])
    return logits, RowResults(np.array(losses), np.array(counts))


def _in_steps(model: Decoder, held_out: HeldOut) -> list[np.ndarray]:
    """Some rows beside each other, padded on the left: all but their last tokens at once, then one by one.

    What is wrong with a cache, a mask or a position shows here and nowhere else.
    """
    rows, steps = held_out.stepped()
    if not rows:
        return []
    ids_BT, mask_BT = left_padded([row[:-steps] for row in rows], held_out.pad_id)
    found_BTV, cache = model.step(ids_BT, mask_BT, positions_of(mask_BT), None)
    said = [found_BTV[:, -1]]
    for step in range(steps, 1, -1):
        mask_BT = np.concatenate([mask_BT, np.ones((len(rows), 1), np.int64)], axis=1)
        new_B1 = np.array([[row[-step]] for row in rows], np.int64)
        found_BTV, cache = model.step(new_B1, mask_BT, positions_of(mask_BT)[:, -1:], cache)
        said.append(found_BTV[:, -1])
    return list(np.stack(said, axis=1))


def _nll(logits_PV: np.ndarray, tokens_P: np.ndarray) -> np.ndarray:
    top_P1 = logits_PV.max(axis=1, keepdims=True)
    total_P = np.log(np.exp(logits_PV - top_P1).sum(axis=1)) + top_P1[:, 0]
    found: np.ndarray = total_P - logits_PV[np.arange(len(tokens_P)), tokens_P]
    return found


def judge(source: Seen, target: Seen) -> Judged:
    """How far a target is from its source."""
    name = "accuracy" if source.results.classified else "perplexity"
    before, after = (_score(seen.results, name) for seen in (source, target))
    largest, mean = _distance(source.logits, target.logits)
    alike = _agreeing(source.logits, target.logits)
    in_steps = _agreeing(source.stepped, target.stepped)
    return Judged(
        rows=len(source.logits),
        positions=len(alike),
        max_logit_difference=_number(largest),
        mean_logit_difference=_number(mean),
        agreement=float(alike.mean()),
        steps=len(in_steps),
        step_agreement=float(in_steps.mean()) if len(in_steps) else None,
        step_logit_difference=_number(_distance(source.stepped, target.stepped)[0]) if len(in_steps) else None,
        metric=name,
        before=before[0],
        before_interval=before[1],
        after=after[0],
        after_interval=after[1],
    )


@dataclass(frozen=True)
class Score:
    """How good a model is on held-out rows."""

    metric: str
    value: float | None
    interval: tuple[float, float] | None


def score(model: Any, held_out: HeldOut) -> Score:
    """The metric by which targets are judged, of any model."""
    results = _classes(model, held_out).results if held_out.classes else _whole(model, held_out)[1]
    name = "accuracy" if results.classified else "perplexity"
    return Score(name, *_score(results, name))


def _distance(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[float, float]:
    """(largest, mean) absolute difference of logits; row by row, since all of them fill gigabytes."""
    largest, total, count = 0.0, 0.0, 0
    for one, other in zip(ours, theirs, strict=True):
        apart = np.abs(one - other)
        largest = float(np.maximum(largest, apart.max()))  # NaN stays
        total, count = total + float(apart.sum(dtype=np.float64)), count + apart.size
    return largest, total / max(1, count)


def _agreeing(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """Where the likeliest token (class) is the same."""
    alike = [np.atleast_1d(one.argmax(-1) == two.argmax(-1)) for one, two in zip(ours, theirs, strict=True)]
    return np.concatenate(alike) if alike else np.zeros(0, bool)


def _score(results: RowResults, name: str) -> tuple[float | None, tuple[float, float] | None]:
    names = ["accuracy"] if name == "accuracy" else ["loss", "perplexity"]
    found = scores(results, names)
    value, ends = _number(found.metrics[name]), found.intervals.get(name)  # few rows have none
    return value, ends if ends is not None and np.isfinite(ends).all() else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
