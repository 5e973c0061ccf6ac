"""Collect blind ratings of answers: side by side, without names, in random order.

Every click appends a line to the rater's file, so a killed process loses nothing and
one rater's file never conflicts with another's. A page or the terminal sees answers
only by slot (A, B, ...); the arm behind a slot is told when everything is rated.
"""

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

from lorafleet.evaluation.metrics.intervals import compute_mean_interval
from lorafleet.jobs import files
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.report import Judgement, Ratings
from lorafleet.jobs.runs.run import Run

CRITERIA = ("fluency", "coherence", "correctness")
MIN_SCORE, MAX_SCORE = 0, 5
_RATER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SLOTS = (*_LETTERS, *(first + second for first in _LETTERS for second in _LETTERS))


@dataclass(frozen=True)
class Item:
    """One row with the answers of all arms, in random order."""

    row: int
    prompt: str
    reference: str
    arms: tuple[str, ...]
    """Arm of each answer. The rater does not see it."""
    texts: tuple[str, ...]
    turns: tuple[tuple[str, str], ...] = ()
    """Conversation before the answer: (role, text) of each turn."""

    def to_dict(self) -> dict[str, Any]:
        """Return what a rater sees of the row."""
        answers = [
            {"slot": slot, "text": text} for slot, text in zip(_SLOTS, self.texts, strict=False)
        ]
        turns = [{"role": role, "text": text} for role, text in self.turns]
        return {
            "row": self.row,
            "prompt": self.prompt,
            "turns": turns,
            "reference": self.reference,
            "answers": answers,
        }


def build_sheet(
    rows: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Sequence[str | None]],
    rater: str,
    max_rows: int,
) -> list[Item]:
    """Return up to `max_rows` rows that all arms have answered.

    All raters get the same rows, so that their agreement can be computed. The order of rows
    and answers differs by rater and stays the same for each rater, also after a restart.

    Args:
        rows: Held-out rows, with `prompt`, `reference` and, for conversations, `turns`.
        answers: Arm -> its answer to each row; None where it was not asked.
        rater: Name of the rater, from which the order is drawn.
        max_rows: Most rows to rate.
    """
    answer_lists = list(answers.values())
    answered_rows = [
        row
        for row in range(len(rows))
        if all(row < len(texts) and texts[row] is not None for texts in answer_lists)
    ]
    # Python's `hash` of a text differs from process to process; a digest does not.
    generator = random.Random(int.from_bytes(hashlib.sha256(rater.encode()).digest()[:8], "big"))
    chosen = sorted(
        random.Random(0).sample(answered_rows, min(max_rows, len(answered_rows)))
    )  # the same rows for all raters
    generator.shuffle(chosen)
    items = []
    for row in chosen:
        arms = list(answers)
        generator.shuffle(arms)
        texts = tuple(answers[arm][row] or "" for arm in arms)
        turns = tuple((str(turn["role"]), str(turn["text"])) for turn in rows[row].get("turns", ()))
        items.append(
            Item(row, rows[row]["prompt"], rows[row]["reference"], tuple(arms), texts, turns)
        )
    return items


def validate_rater(name: str) -> str:
    """Return a rater's name, which is also a file name.

    Raises:
        UserError: The name has other characters than letters, digits, dots, dashes and
            underscores, or more than 64. Slashes or leading dots could name a file
            elsewhere.
    """
    if not _RATER_NAME.fullmatch(name):
        raise UserError(
            f"--rater is {name!r}, but must have only letters, digits, dots, dashes and "
            "underscores, 64 at most"
        )
    return name


def get_ratings_folder(run: Run) -> Path:
    """Return the folder of a run's ratings."""
    return run.path / "ratings"


@dataclass
class Notebook:
    """Ratings of one rater.

    Lines are only appended; the last line about a rating is valid. `lorafleet rate` opens
    one and holds a lock on its file, so a rater has one process at a time. Methods are not
    safe for several threads at once; the page calls them under a lock of its own. Ratings
    of rows that are not on the sheet are kept: a rater may first rate 20 rows and later 50.
    """

    path: Path
    items: list[Item]
    scores: dict[tuple[int, str, str], int] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    history: list[tuple[tuple[int, str, str], int | None]] = field(default_factory=list)
    """(what was rated, its previous score) of every rating that was not undone."""

    @classmethod
    def open(cls, path: Path, items: list[Item]) -> Notebook:
        """Open a notebook with all earlier ratings, also after the process was killed.

        Args:
            path: File of the rater. It need not exist.
            items: The sheet; empty to read ratings for a report.
        """
        book = cls(path, items)
        for line in files.read_jsonl(path):
            if line.get("undo"):
                book._undo_last()
            elif "note" in line:
                book.notes[line["row"]] = line["note"]
            else:
                book._set_score((line["row"], line["arm"], line["criterion"]), line["score"])
        return book

    def rate(self, row: int, slot: str, criterion: str, score: int) -> None:
        """Record a score.

        It is on disk before this returns.

        Args:
            row: Row of the sheet.
            slot: Letters of the answer, such as A.
            criterion: One of `CRITERIA`.
            score: From `MIN_SCORE` to `MAX_SCORE`.

        Raises:
            UserError: The row, slot, criterion or score is not allowed.
        """
        key = (row, self._find_arm(row, slot), criterion)
        if criterion not in CRITERIA or not (
            isinstance(score, int) and MIN_SCORE <= score <= MAX_SCORE
        ):
            raise UserError(
                f"{criterion} {score!r} is not a rating: {', '.join(CRITERIA)} from {MIN_SCORE} to "
                f"{MAX_SCORE}"
            )
        # The arm is stored, not the slot: slots depend on the rater and on the arms of the run.
        self._append_line({"row": row, "arm": key[1], "criterion": criterion, "score": score})
        self._set_score(key, score)

    def undo(self) -> tuple[int, str, str] | None:
        """Undo the last rating and return its (row, slot, criterion).

        Returns None if the last rating is not of this sheet, or if there is none. Undoing is a
        line of the file too, so earlier lines stay as they are.
        """
        if not self.history or self.history[-1][0][:2] not in self._units:
            return None
        (row, arm, criterion), _ = self.history[-1]
        self._append_line({"undo": True})
        self._undo_last()
        item = next(item for item in self.items if item.row == row)
        return row, _SLOTS[item.arms.index(arm)], criterion

    def add_note(self, row: int, text: str) -> None:
        """Record a note on a row, at most 4,000 characters.

        A new note replaces the earlier one.

        Raises:
            UserError: The row is not on the sheet.
        """
        if row not in {item.row for item in self.items}:
            raise UserError(f"row {row} is not on the sheet")
        stored_text = (
            text[:4000].encode(errors="replace").decode()
        )  # half a character could be written, but not read back
        self._append_line({"row": row, "note": stored_text})
        self.notes[row] = stored_text

    def compute_means(self) -> list[dict[str, Any]]:
        """Return the number of rows and the mean scores of each arm.

        Empty until everything is rated: a rater may not see the arms before.

        Returns:
            One record per arm, by name: `arm`, `rows` and `means` (criterion -> mean score).
        """
        if self.missing:
            return []
        arms = list(dict.fromkeys(arm for item in self.items for arm in item.arms))
        return [
            {
                "arm": arm,
                "rows": len(self.items),
                "means": {
                    criterion: float(
                        np.mean([self.scores[item.row, arm, criterion] for item in self.items])
                    )
                    for criterion in CRITERIA
                },
            }
            for arm in sorted(arms)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return what a rater sees: rows, answers, and the rater's own scores and notes.

        Keys of `scores` are `ROW/SLOT/CRITERION`. No name of an arm is part of it.
        """
        scores_by_slot = {}
        for item in self.items:
            for slot, arm in zip(_SLOTS, item.arms, strict=False):
                for criterion in CRITERIA:
                    score = self.scores.get((item.row, arm, criterion))
                    if score is not None:
                        scores_by_slot[f"{item.row}/{slot}/{criterion}"] = score
        return {
            "criteria": list(CRITERIA),
            "lowest": MIN_SCORE,
            "highest": MAX_SCORE,
            "items": [item.to_dict() for item in self.items],
            "scores": scores_by_slot,
            "notes": {str(row): text for row, text in self.notes.items()},
        }

    @property
    def missing(self) -> int:
        """Number of ratings that are still missing on the sheet."""
        return len(self._units) * len(CRITERIA) - sum(key[:2] in self._units for key in self.scores)

    @property
    def _units(self) -> set[tuple[int, str]]:
        """The (row, arm) pairs on the sheet."""
        return {(item.row, arm) for item in self.items for arm in item.arms}

    def _find_arm(self, row: int, slot: str) -> str:
        item = next((item for item in self.items if item.row == row), None)
        index = _SLOTS.index(slot) if slot in _SLOTS else -1
        if item is None or not 0 <= index < len(item.arms):
            raise UserError(f"row {row}, answer {slot} is not on the sheet")
        return item.arms[index]

    def _set_score(self, key: tuple[int, str, str], score: int) -> None:
        self.history.append((key, self.scores.get(key)))
        self.scores[key] = score

    def _undo_last(self) -> None:
        if self.history:
            key, previous = self.history.pop()
            if previous is None:
                self.scores.pop(key, None)
            else:
                self.scores[key] = previous

    def _append_line(self, line: dict[str, Any]) -> None:
        files.append_jsonl(self.path, {"time": time.time(), **line})


def compute_alpha(values_RU: np.ndarray) -> float | None:
    """Return Krippendorff's alpha of R raters on U units; None if it is not defined.

    For interval data: 1 less the observed squared differences within units over those
    between all values (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).
    Units with a single rating are ignored, because they show no agreement.

    Args:
        values_RU: Scores. Missing ratings are NaN.

    Returns:
        1 for perfect agreement, 0 for agreement by chance, negative for less. None without
            a unit that two raters rated, or if all scores are equal.
    """
    counts_U = (~np.isnan(values_RU)).sum(axis=0)
    units = [unit[~np.isnan(unit)] for unit in values_RU.T[counts_U >= 2]]
    if not units:
        return None
    all_values = np.concatenate(units)
    within = sum(((unit[:, None] - unit[None, :]) ** 2).sum() / (len(unit) - 1) for unit in units)
    between = ((all_values[:, None] - all_values[None, :]) ** 2).sum() / (len(all_values) - 1)
    return float(1 - within / between) if between else None


def load_ratings(run: Run) -> Ratings | None:
    """Load all raters' ratings of a run, by criterion and arm; None if there are none.

    Each row counts once: scores of several raters are averaged first. The interval is over
    rows.
    """
    books = {
        path.stem: Notebook.open(path, [])
        for path in sorted(get_ratings_folder(run).glob("*.jsonl"))
    }
    # A rater who opened the page and rated nothing does not count as one.
    books = {name: book for name, book in books.items() if book.scores}
    if not books:
        return None
    judgements = []
    for criterion in CRITERIA:
        units = sorted(
            {key[:2] for book in books.values() for key in book.scores if key[2] == criterion}
        )
        score_rows = [
            [book.scores.get((*unit, criterion), np.nan) for unit in units]
            for book in books.values()
        ]
        values_RU = np.array(score_rows)
        by_arm: dict[str, dict[int, float]] = defaultdict(dict)
        for (row, arm), column in zip(units, values_RU.T, strict=True):
            by_arm[arm][row] = float(np.nanmean(column))
        agreement = compute_alpha(values_RU) if units else None
        for arm, rows in by_arm.items():
            values_U = np.array(list(rows.values()))
            judgements.append(
                Judgement(
                    arm=arm,
                    criterion=criterion,
                    mean=float(values_U.mean()),
                    interval=_compute_score_interval(values_U),
                    rows=len(values_U),
                    alpha=agreement,
                )
            )
    notes = [
        (name, row, text)
        for name, book in books.items()
        for row, text in sorted(book.notes.items())
        if text
    ]
    return Ratings(
        raters=list(books),
        judgements=judgements,
        notes=[f"{name}, row {row}: {text}" for name, row, text in notes],
    )


def _compute_score_interval(values_U: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean of scores, which are from 0 to 5."""
    interval = compute_mean_interval(values_U)
    return (max(0.0, interval[0]), min(5.0, interval[1])) if interval else None
