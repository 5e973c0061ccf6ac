"""A conversation as a text, by the chat template that an exported model has."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.evaluation.tokenizer import read_tokenizer
from lorafleet.jobs.data.chat_template import ChatTemplate, TemplateRefusal
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.errors import UserError


def framed(folder: Path, turns: Sequence[dict[str, str]], template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Render messages (role, content) with the variables of training, up to where the answer begins.

    Raises UserError where the model has no chat template, or where that refuses the messages.
    """
    chat = _template(folder, json.dumps(dict(template_kwargs or {}), sort_keys=True))
    if not chat.source:
        raise UserError("this model has no chat template: it takes one user message alone")
    try:
        return chat.render([Message(turn["role"], turn["content"]) for turn in turns], generation=True)
    except TemplateRefusal as error:
        raise UserError(str(error).replace("this row", "these messages")) from error


@functools.cache
def _template(folder: Path, template_kwargs: str) -> ChatTemplate:
    return ChatTemplate(read_tokenizer(str(folder), folder), json.loads(template_kwargs))
