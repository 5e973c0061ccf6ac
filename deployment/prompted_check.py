"""An exported model asked as its user will ask it: a prompt alone, through its own runner, in a process of its own.

Parity of logits is measured on rows in the frame that training gives each. That says nothing of the frame that the
runner puts around a prompt: it is measured here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.subprocess_measurement import measured_apart
from lorafleet.deployment.answers import pieces
from lorafleet.deployment.decoding import Decoder, write
from lorafleet.deployment.runtime import open_artefact
from lorafleet.evaluation.inference.generate import decoded
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.encoding import RowEncoder
from lorafleet.jobs.data.row_formats import Row

ROWS, NEW_TOKENS = 8, 16
RUNNER = "run.py"
_SECONDS = 600.0


@dataclass(frozen=True)
class Calls:
    """Held-out rows that a prompt alone can ask, with what their source answers."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    """Tokens that training gives each row."""
    answers: tuple[str, ...]
    """The source's own answers."""
    others: int
    """Rows that a prompt alone cannot ask: with earlier turns, tools, or a system message that is not all rows'."""


def calls_of(model: Decoder, encoder: RowEncoder, data: TokenData, split: str, room: int, ends: Sequence[int]) -> Calls:
    """Ask the source its first held-out rows, each in the frame of its training, and keep what it answers."""
    rows = data.rows(split)
    chosen = [row for row in rows if _is_callable(row, data.system)][:ROWS]
    chosen = [row for row in chosen if len(_prompt_of(row).encode()) <= _MAX_ARGUMENT]
    prompts = [_prompt_of(row) for row in chosen]
    ids = [encoder.prompt(row, room) for row in chosen]
    whole = [len(prompt) < room for prompt in ids]  # what was cut to fit is no prompt that a user would ask
    ids = [prompt for prompt, fits in zip(ids, whole, strict=True) if fits]
    prompts = [prompt for prompt, fits in zip(prompts, whole, strict=True) if fits]
    written = write(model, ids, NEW_TOKENS, ends, data.pad_id) if ids else []
    tokenizer = encoder.format.tokenizer
    pairs = zip(written, ids, strict=True)
    answers = tuple(decoded(tokens, ends, tokenizer, data.frame, prompt) for tokens, prompt in pairs)
    others = sum(not _is_callable(row, data.system) for row in rows)
    return Calls(tuple(prompts), tuple(map(tuple, ids)), answers, others)


_MAX_ARGUMENT = 64_000
"""Bytes of a prompt that goes to `run.py` as an argument: Linux takes 128 KiB."""


def _prompt_of(row: Row) -> str:
    return row.messages[-2].content if row.messages else row.prompt


def _is_callable(row: Row, system: Message | None) -> bool:
    if not row.messages:
        return bool(row.prompt)
    roles = [message.role for message in row.messages]
    if row.tools or roles[-2:] != ["user", "assistant"] or len(roles) > 3:
        return False
    return (row.messages[0] if len(roles) == 3 else None) == system


def called(folder: Path, calls: Calls, threads: int) -> tuple[float, float]:
    """Return (share of prompts with the tokens of training, share of answers that are the source's).

    Raises RuntimeError with what the runner said where it failed, and TimeoutExpired.
    """
    records = _by_runner(folder, calls, threads) if (folder / RUNNER).is_file() else _by_us(folder, calls, threads)
    pairs = list(zip(records, calls.prompt_ids, calls.answers, strict=True))
    same_prompts = sum(tuple(record["prompt_ids"]) == ids for record, ids, _ in pairs)
    same_answers = sum(record["text"].strip() == answer for record, _, answer in pairs)
    return same_prompts / len(pairs), same_answers / len(pairs)


def _by_runner(folder: Path, calls: Calls, threads: int) -> list[dict[str, Any]]:
    """Ask `run.py` as its card says."""
    options = ["--json", "--max-new-tokens", str(NEW_TOKENS)]
    done = subprocess.run(
        [sys.executable, str(folder / RUNNER), *options, "--", *calls.prompts],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads))},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise RuntimeError(f"{RUNNER} failed: {last}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _by_us(folder: Path, calls: Calls, threads: int) -> list[dict[str, Any]]:
    """Ask what `lorafleet chat` asks: targets without a runner of their own."""
    request = {"what": "answers", "folder": str(folder), "prompts": calls.prompts, "new_tokens": NEW_TOKENS}
    answers: list[dict[str, Any]] = measured_apart(request, folder, max(1, threads))["answers"]
    return answers


def answer_prompts(folder: Path, prompts: Sequence[str], new_tokens: int) -> dict[str, Any]:
    """Answer prompts with an exported model, in this process."""
    loaded = open_artefact(folder)
    answers = []
    for prompt in prompts:
        ids = loaded.prompt(prompt)
        text = "".join(piece.text for piece in pieces(loaded, ids, new_tokens, None))
        answers.append({"prompt_ids": ids, "text": text})
    return {"answers": answers}
