"""Load a job's tokenizer and chat format once. Needs transformers, and no model."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.hub import (
    check_code,
    check_fetched,
    describe_missing_tokenizer,
    get_converted_folder,
    get_model_folder,
    raise_if_missing,
)
from lorafleet.jobs.data.local_copy import resolve_node_copy
from lorafleet.jobs.errors import AssetError, UserError
from lorafleet.jobs.loading.job_file import is_template_text
from lorafleet.jobs.schema.job import JobSpec


def find_tokenizer_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model's tokenizer.

    Raises:
        AssetError: The model is not on this machine, or is a GGUF file that is not converted yet.
    """
    folder = get_model_folder(name, revision)
    if not (folder / "model.gguf").is_file():
        check_fetched(name, folder)
        return resolve_node_copy(folder)
    converted = get_converted_folder(folder)
    if not converted.is_dir():
        raise AssetError(
            f"{name} is a GGUF file that has not been converted yet: run `lorafleet data` or "
            "`lorafleet train`"
        )
    return resolve_node_copy(converted)


def read_tokenizer(name: str, folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer.

    It pads on the right, with the end token if it has no padding token.
    """
    from transformers import AutoTokenizer

    raise_if_missing(name, folder, describe_missing_tokenizer(folder))
    with silence_libraries():
        # A folder of this machine: nothing is downloaded.
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
            folder, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return tokenizer


def get_padding_id(tokenizer: Any) -> int:
    """Return the id that rows are padded with."""
    return int(tokenizer.pad_token_id or 0)


def load_chat_format(job: JobSpec) -> ChatFormat:
    """Return the tokenizer of a job's model with the chat template and variables of the job.

    Raises:
        AssetError: The model is not on this machine.
        UserError: The tokenizer has no template of that name.
    """
    spec, data = job.model, job.data
    kwargs = json.dumps(data.chat_template_kwargs, sort_keys=True)
    folder = find_tokenizer_folder(spec.model_name_or_path, spec.revision)
    name = spec.model_name_or_path
    if spec.trust_remote_code:
        check_code(name, spec.revision)
    return _load_cached_chat_format(
        name, folder, _read_stamps(folder), spec.trust_remote_code, data.chat_template, kwargs
    )


def _read_stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, size and time of change of a tokenizer's files.

    They are part of the cache key, because a folder may be rewritten while this process
    lives.
    """
    files = [
        path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt")
    ]
    return tuple(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)
    )


@lru_cache(maxsize=4)
def _load_cached_chat_format(
    name: str,
    folder: Path,
    _stamps: tuple[tuple[str, int, int], ...],
    trust_remote_code: bool,
    template: str | None,
    kwargs: str,
) -> ChatFormat:
    tokenizer = read_tokenizer(name, folder, trust_remote_code=trust_remote_code)
    apply_template(tokenizer, template, name)
    return ChatFormat(tokenizer, read_end_ids(folder), json.loads(kwargs))


def apply_template(tokenizer: Any, template: str | None, model: str) -> None:
    """Give a tokenizer the chat template that `data.chat_template` names.

    Raises UserError for an unknown name.
    """
    if template is None:
        return
    if is_template_text(template):
        tokenizer.chat_template = template
        return
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if template not in templates:
        available = (
            f"it has {', '.join(sorted(templates))}" if templates else "it has no named templates"
        )
        raise UserError(
            f"data.chat_template is {template}, which is neither a file nor a template of "
            f"{model}'s tokenizer ({available})"
        )
    tokenizer.chat_template = templates[template]


def read_end_ids(folder: Path) -> list[int]:
    """Return the token ids at which a model's own configuration ends an answer."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise AssetError(f"{path} cannot be read: {error}") from error
        ids = value if isinstance(value, list) else [value]
        token_ids = [token for token in ids if isinstance(token, int)]
        if token_ids:
            return token_ids
    return []


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Suppress transformers' loading reports and progress bars: they would tear the live view."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
