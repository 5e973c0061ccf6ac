"""A conversation as a text, by the chat template that an exported model has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from jobs.errors import UserError


def framed(folder: Path, turns: Sequence[dict[str, str]]) -> str:
    """Messages (role, content), up to where the answer begins.

    Raises UserError where the model has no chat template, or where that refuses the messages.
    """
    tokenizer = _tokenizer(folder)
    if not tokenizer.chat_template:
        raise UserError("this model has no chat template: it takes one user message alone")
    try:
        return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses these messages: {error}") from error


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))
