"""People judge: answers side by side without names, in random order; every click is a line of its rater's file."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lorafleet.evaluation.metrics.intervals import mean_interval
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError, UserError
from lorafleet.jobs.runs.report import Judgement, Ratings
from lorafleet.jobs.runs.run import Run

CRITERIA = ("fluency", "coherence", "correctness")
LOWEST, HIGHEST = 0, 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SLOTS = (*_LETTERS, *(first + second for first in _LETTERS for second in _LETTERS))


@dataclass(frozen=True)
class Item:
    """One row with the answers of all arms, in an order that says nothing."""

    row: int
    prompt: str
    reference: str
    arms: tuple[str, ...]
    """The arm in each place; a rater is not told."""
    texts: tuple[str, ...]
    turns: tuple[tuple[str, str], ...] = ()
    """Of a conversation: who said what before the answer."""

    def shown(self) -> dict[str, Any]:
        """What a rater sees."""
        answers = [{"slot": slot, "text": text} for slot, text in zip(_SLOTS, self.texts, strict=False)]
        turns = [{"role": role, "text": text} for role, text in self.turns]
        return {
            "row": self.row, "prompt": self.prompt, "turns": turns, "reference": self.reference, "answers": answers
        }  # fmt: skip


def sheet(
    rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[str | None]], rater: str, most: int
) -> list[Item]:
    """The rows that all arms have answered, at most so many, in an order of the rater's own that stays the same."""
    own = list(answers.values())
    there = [row for row in range(len(rows)) if all(row < len(texts) and texts[row] is not None for texts in own)]
    draw = random.Random(int.from_bytes(hashlib.sha256(rater.encode()).digest()[:8], "big"))
    chosen = sorted(random.Random(0).sample(there, min(most, len(there))))  # the same rows for all raters
    draw.shuffle(chosen)
    items = []
    for row in chosen:
        arms = list(answers)
        draw.shuffle(arms)
        texts = tuple(answers[arm][row] or "" for arm in arms)
        turns = tuple((str(turn["role"]), str(turn["text"])) for turn in rows[row].get("turns", ()))
        items.append(Item(row, rows[row]["prompt"], rows[row]["reference"], tuple(arms), texts, turns))
    return items


def checked_rater(name: str) -> str:
    """A rater's name, which becomes a file's. Raises UserError."""
    if not _NAME.fullmatch(name):
        raise UserError(f"--rater is {name!r}, but must be letters, digits, dots, dashes and underscores, 64 at most")
    return name


def folder_of(run: Run) -> Path:
    """Where the ratings of a run are."""
    return run.path / "ratings"


@dataclass
class Notebook:
    """The ratings of one rater: lines are added, and the last one on a thing holds."""

    path: Path
    items: list[Item]
    scores: dict[tuple[int, str, str], int] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    history: list[tuple[tuple[int, str, str], int | None]] = field(default_factory=list)
    """(what was rated, the score that it had before) of every rating that stands."""

    @classmethod
    def open(cls, path: Path, items: list[Item]) -> Notebook:
        """A notebook with what was rated before, after a kill too."""
        book = cls(path, items)
        for line in files.read_jsonl(path):
            if line.get("undo"):
                book._take_back()
            elif "note" in line:
                book.notes[line["row"]] = line["note"]
            else:
                book._set((line["row"], line["arm"], line["criterion"]), line["score"])
        return book

    def rate(self, row: int, slot: str, criterion: str, score: int) -> None:
        """Note a score. Raises UserError for what is not on the sheet."""
        key = (row, self._arm(row, slot), criterion)
        if criterion not in CRITERIA or not (isinstance(score, int) and LOWEST <= score <= HIGHEST):
            raise UserError(f"{criterion} {score!r} is no rating: {', '.join(CRITERIA)} from {LOWEST} to {HIGHEST}")
        self._write({"row": row, "arm": key[1], "criterion": criterion, "score": score})
        self._set(key, score)

    def undo(self) -> tuple[int, str, str] | None:
        """Take the last rating back; returns its (row, place, criterion). None: nothing of this sheet was rated."""
        if not self.history or self.history[-1][0][:2] not in self._units:
            return None
        (row, arm, criterion), _ = self.history[-1]
        self._write({"undo": True})
        self._take_back()
        item = next(item for item in self.items if item.row == row)
        return row, _SLOTS[item.arms.index(arm)], criterion

    def note(self, row: int, text: str) -> None:
        """Note a text on a row. Raises UserError for a row that is not on the sheet."""
        if row not in {item.row for item in self.items}:
            raise UserError(f"row {row} is not on the sheet")
        whole = text[:4000].encode(errors="replace").decode()  # half a character would be written, and never read
        self._write({"row": row, "note": whole})
        self.notes[row] = whole

    def means(self) -> list[dict[str, Any]]:
        """What a rater may see once everything is rated: which answers were whose, and each one's mean scores."""
        if self.missing:
            return []
        arms = list(dict.fromkeys(arm for item in self.items for arm in item.arms))
        return [
            {
                "arm": arm,
                "rows": len(self.items),
                "means": {
                    criterion: float(np.mean([self.scores[item.row, arm, criterion] for item in self.items]))
                    for criterion in CRITERIA
                },
            }
            for arm in sorted(arms)
        ]

    def shown(self) -> dict[str, Any]:
        """What a rater sees: rows, answers, and own ratings by place."""
        given = {}
        for item in self.items:
            for slot, arm in zip(_SLOTS, item.arms, strict=False):
                for criterion in CRITERIA:
                    score = self.scores.get((item.row, arm, criterion))
                    if score is not None:
                        given[f"{item.row}/{slot}/{criterion}"] = score
        return {
            "criteria": list(CRITERIA),
            "lowest": LOWEST,
            "highest": HIGHEST,
            "items": [item.shown() for item in self.items],
            "scores": given,
            "notes": {str(row): text for row, text in self.notes.items()},
        }

    @property
    def missing(self) -> int:
        """Ratings that the sheet still wants."""
        return len(self._units) * len(CRITERIA) - sum(key[:2] in self._units for key in self.scores)

    @property
    def _units(self) -> set[tuple[int, str]]:
        """What is on the sheet: (row, arm)."""
        return {(item.row, arm) for item in self.items for arm in item.arms}

    def _arm(self, row: int, slot: str) -> str:
        item = next((item for item in self.items if item.row == row), None)
        place = _SLOTS.index(slot) if slot in _SLOTS else -1
        if item is None or not 0 <= place < len(item.arms):
            raise UserError(f"row {row}, answer {slot} is not on the sheet")
        return item.arms[place]

    def _set(self, key: tuple[int, str, str], score: int) -> None:
        self.history.append((key, self.scores.get(key)))
        self.scores[key] = score

    def _take_back(self) -> None:
        if self.history:
            key, before = self.history.pop()
            if before is None:
                self.scores.pop(key, None)
            else:
                self.scores[key] = before

    def _write(self, line: dict[str, Any]) -> None:
        files.append_jsonl(self.path, {"time": time.time(), **line})


def alpha(values_RU: np.ndarray) -> float | None:
    """Krippendorff's alpha of R raters on U units, NaN where one was not rated; None where it is not defined.

    For interval data: 1 less the observed squared differences within units over those between all values (Krippendorff,
    Computing Krippendorff's Alpha-Reliability, 2011). Units with one rating say nothing of agreement.
    """
    counts_U = (~np.isnan(values_RU)).sum(axis=0)
    units = [unit[~np.isnan(unit)] for unit in values_RU.T[counts_U >= 2]]
    if not units:
        return None
    everything = np.concatenate(units)
    within = sum(((unit[:, None] - unit[None, :]) ** 2).sum() / (len(unit) - 1) for unit in units)
    between = ((everything[:, None] - everything[None, :]) ** 2).sum() / (len(everything) - 1)
    return float(1 - within / between) if between else None


def ratings_of(run: Run) -> Ratings | None:
    """All raters' ratings of a run, by criterion and arm; None where there are none."""
    books = {path.stem: Notebook.open(path, []) for path in sorted(folder_of(run).glob("*.jsonl"))}
    books = {name: book for name, book in books.items() if book.scores}
    if not books:
        return None
    judgements = []
    for criterion in CRITERIA:
        units = sorted({key[:2] for book in books.values() for key in book.scores if key[2] == criterion})
        given = [[book.scores.get((*unit, criterion), np.nan) for unit in units] for book in books.values()]
        values_RU = np.array(given)
        by_arm: dict[str, dict[int, float]] = defaultdict(dict)
        for (row, arm), column in zip(units, values_RU.T, strict=True):
            by_arm[arm][row] = float(np.nanmean(column))
        agreement = alpha(values_RU) if units else None
        for arm, rows in by_arm.items():
            values_U = np.array(list(rows.values()))
            judgements.append(
                Judgement(
                    arm=arm,
                    criterion=criterion,
                    mean=float(values_U.mean()),
                    interval=_of_scores(values_U),
                    rows=len(values_U),
                    alpha=agreement,
                )
            )
    notes = [(name, row, text) for name, book in books.items() for row, text in sorted(book.notes.items()) if text]
    return Ratings(
        raters=list(books),
        judgements=judgements,
        notes=[f"{name}, row {row}: {text}" for name, row, text in notes],
    )


def _of_scores(values_U: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean of scores, which are from 0 to 5."""
    found = mean_interval(values_U)
    return (max(0.0, found[0]), min(5.0, found[1])) if found else None


def sheet_of_run(run: Run, rater: str, most: int) -> list[Item]:
    """What a rater of a run is shown. Raises RunError when there is nothing to rate."""
    from lorafleet.evaluation.report.answers import answers_of

    rows, answers = answers_of(run)
    if len(answers) < 2:
        raise RunError(f"{run.id} has the answers of {len(answers)} models, but must have those of two or more to rate")
    found = sheet(rows, answers, rater, most)
    if not found:
        raise RunError(
            f"{run.id} has no answers of its models to the held-out rows; rating is for tasks whose model writes "
            "(evaluate.sample_rows, or a metric of texts)"
        )
    return found
