"""Render a conversation as text with the chat template of an exported model."""

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


def render_conversation(
    folder: Path, turns: Sequence[dict[str, str]], template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """Render messages (role, content) up to the point where the answer begins.

    Used by `serve` for conversations of several turns. A single prompt needs no template at
    run time: `artefact.json` has the text around it.

    Args:
        folder: The exported model.
        turns: Messages with role and content.
        template_kwargs: Variables for the chat template, as in training.

    Raises:
        UserError: The model has no chat template, or the template refuses the messages.
    """
    chat = _load_template(folder, json.dumps(dict(template_kwargs or {}), sort_keys=True))
    if not chat.source:
        raise UserError("this model has no chat template: send a single user message")
    try:
        return chat.render(
            [Message(turn["role"], turn["content"]) for turn in turns], generation=True
        )
    except TemplateRefusal as error:
        raise UserError(str(error).replace("this row", "these messages")) from error


@functools.cache
def _load_template(folder: Path, template_kwargs: str) -> ChatTemplate:
    """Load the chat template of a folder. `template_kwargs` is JSON, so that it can be cached."""
    return ChatTemplate(read_tokenizer(str(folder), folder), json.loads(template_kwargs))
