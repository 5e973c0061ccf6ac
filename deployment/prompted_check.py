"""Test an exported model as its user calls it: a prompt alone, through its own runner.

The runner is a separate process. Logit parity is measured on rows that training has
already framed. It does not cover the frame that the runner puts around a prompt, its
end tokens or the removal of text before an answer; this module does. A wrong frame
gives fluent and worse answers, which nobody notices.
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

from lorafleet.cluster.execution.subprocess_measurement import measure_in_subprocess
from lorafleet.deployment.answers import generate_pieces
from lorafleet.deployment.decoding import Decoder, generate_answers
from lorafleet.deployment.runtime import open_artefact
from lorafleet.evaluation.inference.generate import decode_answer
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.encoding import RowEncoder
from lorafleet.jobs.data.row_formats import Row

MAX_ROWS, NEW_TOKENS = 8, 16
RUNNER = "run.py"
_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class PromptCases:
    """Held-out rows that can be asked by a prompt alone, with the source model's answers."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    """Token ids that training gives each row."""
    answers: tuple[str, ...]
    """The source model's answers."""
    others: int
    """Number of rows that a prompt alone cannot ask: those with earlier turns, tools, or a
    system message that not all rows share.
    """


def build_prompt_cases(
    model: Decoder,
    encoder: RowEncoder,
    data: TokenData,
    split: str,
    max_prompt_tokens: int,
    end_ids: Sequence[int],
) -> PromptCases:
    """Select the first callable held-out rows and record the source model's answers to them.

    The source gets each row in the frame of its training.

    Args:
        model: The source model.
        encoder: Encodes a row as training does.
        data: The tokenised data of the job.
        split: Name of the held-out split.
        max_prompt_tokens: Prompts with this many tokens or more were truncated and are left
            out.
        end_ids: Token ids that end an answer.

    Returns:
        At most `MAX_ROWS` cases. `others` counts the rows of the whole split that a prompt
            alone cannot ask.
    """
    rows = data.read_rows(split)
    chosen = [row for row in rows if _is_callable(row, data.system)][:MAX_ROWS]
    chosen = [row for row in chosen if len(_get_prompt(row).encode()) <= _MAX_ARGUMENT_BYTES]
    prompts = [_get_prompt(row) for row in chosen]
    ids = [encoder.encode_prompt(row, max_prompt_tokens) for row in chosen]
    is_complete = [
        len(prompt) < max_prompt_tokens for prompt in ids
    ]  # no user would ask a truncated prompt
    ids = [prompt for prompt, is_whole in zip(ids, is_complete, strict=True) if is_whole]
    prompts = [prompt for prompt, is_whole in zip(prompts, is_complete, strict=True) if is_whole]
    generated = generate_answers(model, ids, NEW_TOKENS, end_ids, data.pad_id) if ids else []
    tokenizer = encoder.format.tokenizer
    pairs = zip(generated, ids, strict=True)
    answers = tuple(
        decode_answer(tokens, end_ids, tokenizer, data.frame, prompt) for tokens, prompt in pairs
    )
    others = sum(not _is_callable(row, data.system) for row in rows)
    return PromptCases(tuple(prompts), tuple(map(tuple, ids)), answers, others)


_MAX_ARGUMENT_BYTES = 64_000
"""Largest size in bytes of a prompt that is passed to `run.py` as an argument. Linux
allows 128 KiB.
"""


def _get_prompt(row: Row) -> str:
    """Return the text that a user would type to ask a row."""
    return row.messages[-2].content if row.messages else row.prompt


def _is_callable(row: Row, system: Message | None) -> bool:
    """Return whether a prompt alone can ask a row.

    That is a single user turn, preceded at most by the system message that all rows share.
    """
    if not row.messages:
        return bool(row.prompt)
    roles = [message.role for message in row.messages]
    if row.tools or roles[-2:] != ["user", "assistant"] or len(roles) > 3:
        return False
    return (row.messages[0] if len(roles) == 3 else None) == system


def measure_prompt_cases(folder: Path, cases: PromptCases, threads: int) -> tuple[float, float]:
    """Run an exported model on the prompts and compare the result with the source.

    Args:
        folder: The exported model.
        cases: Prompts with their expected token ids and answers.
        threads: CPU threads of the process.

    Returns:
        (share of prompts with the same tokens as in training, share of answers equal to the
            source's).

    Raises:
        RuntimeError: The runner failed; the message holds the last line of its output.
        TimeoutExpired: The runner took too long.
    """
    records = (
        _ask_runner(folder, cases, threads)
        if (folder / RUNNER).is_file()
        else _ask_lorafleet(folder, cases, threads)
    )
    pairs = list(zip(records, cases.prompt_ids, cases.answers, strict=True))
    same_prompts = sum(tuple(record["prompt_ids"]) == ids for record, ids, _ in pairs)
    same_answers = sum(record["text"].strip() == answer for record, _, answer in pairs)
    return same_prompts / len(pairs), same_answers / len(pairs)


def _ask_runner(folder: Path, cases: PromptCases, threads: int) -> list[dict[str, Any]]:
    """Ask the prompts through `run.py`, as the model card documents it.

    Returns:
        One record per prompt: `prompt_ids`, `ids` and `text`.

    Raises:
        RuntimeError: The script failed.
        TimeoutExpired: The script took too long.
    """
    options = ["--json", "--max-new-tokens", str(NEW_TOKENS)]
    process = subprocess.run(
        # A prompt may begin with a dash, so "--" ends the options.
        [sys.executable, str(folder / RUNNER), *options, "--", *cases.prompts],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads))},
    )
    if process.returncode:
        last_line = (
            process.stderr.strip().splitlines() or [f"it ended with exit code {process.returncode}"]
        )[-1]
        raise RuntimeError(f"{RUNNER} failed: {last_line}")
    return [json.loads(line) for line in process.stdout.splitlines()]


def _ask_lorafleet(folder: Path, cases: PromptCases, threads: int) -> list[dict[str, Any]]:
    """Ask the prompts as `lorafleet chat` does, for targets without a runner of their own."""
    request = {
        "what": "answers",
        "folder": str(folder),
        "prompts": cases.prompts,
        "new_tokens": NEW_TOKENS,
    }
    answers: list[dict[str, Any]] = measure_in_subprocess(request, folder, max(1, threads))[
        "answers"
    ]
    return answers


def answer_prompts(folder: Path, prompts: Sequence[str], new_tokens: int) -> dict[str, Any]:
    """Answer prompts with an exported model in this process.

    `lorafleet measure` calls it in the process that `_ask_lorafleet` starts.

    Args:
        folder: The exported model.
        prompts: Texts, without a frame.
        new_tokens: Most tokens of an answer.

    Returns:
        `answers`: one record per prompt, with `prompt_ids` and `text`.
    """
    loaded = open_artefact(folder)
    answers = []
    for prompt in prompts:
        ids = loaded.encode_prompt(prompt)
        text = "".join(piece.text for piece in generate_pieces(loaded, ids, new_tokens, None))
        answers.append({"prompt_ids": ids, "text": text})
    return {"answers": answers}
