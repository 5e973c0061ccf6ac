"""Load a job's tokenizer and chat format once.

Needs transformers, and no model. The tokenizer is read from the model's folder on this
machine; nothing is downloaded. A process keeps the chat formats that it loaded last,
because planning, tokenizing, evaluating and writing the card all need the same one.
"""

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
from lorafleet.jobs.extras import TRAIN_COMMAND, has_module
from lorafleet.jobs.loading.job_file import is_template_text
from lorafleet.jobs.schema.job import JobSpec


def find_tokenizer_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model's tokenizer.

    If the node has a local copy of the model, the folder of that copy is returned.

    Args:
        name: Hub id, asset or folder, as in `model.model_name_or_path`.
        revision: Revision of a hub model; None for its default.

    Raises:
        AssetError: The model is not on this machine, or is a GGUF file that is not
            converted yet.
    """
    folder = get_model_folder(name, revision)
    # Reading the tokenizer out of a GGUF file takes about ten seconds, so it is read from the
    # folder that `data` and `train` convert once.
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
    """Load a tokenizer from a folder.

    It pads on the right, with the end token if it has no padding token.

    Args:
        name: What messages call the model.
        folder: Folder of the tokenizer, from `find_tokenizer_folder`.
        trust_remote_code: True to run the tokenizer code of the folder. Callers check the
            code first (`check_code`).

    Raises:
        AssetError: The folder has no tokenizer, or transformers is not installed.
    """
    if not has_module("transformers"):
        raise AssetError(
            f"the tokenizer of {name} cannot be read without transformers, which this installation "
            f"does not have: {TRAIN_COMMAND}"
        )
    from transformers import AutoTokenizer

    raise_if_missing(name, folder, describe_missing_tokenizer(folder))
    with silence_libraries():
        # A folder of this machine: nothing is downloaded.
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
            folder, trust_remote_code=trust_remote_code
        )
    # Most causal models have no padding token. Padding is masked everywhere, so any token will do.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    # Training pads on the right. Generation pads its prompts itself, on the left
    # (`inference/generate.py`).
    tokenizer.padding_side = "right"
    return tokenizer


def get_padding_id(tokenizer: Any) -> int:
    """Return the id that rows are padded with.

    It is 0 for a tokenizer without a padding, end or unknown token. The attention mask
    hides padding, so the value matters only to decoders that classify: they find the last
    token of a row by it. `training/model.py` therefore writes the same id into the model's
    configuration.
    """
    return int(tokenizer.pad_token_id or 0)


def load_chat_format(job: JobSpec) -> ChatFormat:
    """Return the tokenizer of a job's model with the chat template and variables of the job.

    The result is shared within the process: callers that read `ChatFormat.counts` must
    clear them first.

    Raises:
        AssetError: The model is not on this machine.
        UserError: The tokenizer has no template of that name.
    """
    spec, data = job.model, job.data
    # As text, because the arguments of a cached function must be hashable.
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
    """Load the chat format of a folder, or return the one that this process loaded before.

    Args:
        name: What messages call the model.
        folder: Folder of the tokenizer.
        _stamps: Names, sizes and times of its files. Only part of the cache key.
        trust_remote_code: True to run the tokenizer code of the folder.
        template: Value of `data.chat_template`; None for the tokenizer's own.
        kwargs: Variables of the template, as JSON.
    """
    tokenizer = read_tokenizer(name, folder, trust_remote_code=trust_remote_code)
    apply_template(tokenizer, template, name)
    return ChatFormat(tokenizer, read_end_ids(folder), json.loads(kwargs))


def apply_template(tokenizer: Any, template: str | None, model: str) -> None:
    """Give a tokenizer the chat template that `data.chat_template` names.

    Args:
        tokenizer: The tokenizer, which is changed in place.
        template: Text of a template, name of one of the tokenizer's templates, or None for
            no change.
        model: What messages call the model.

    Raises:
        UserError: The tokenizer has no template of that name.
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
    """Return the token ids at which a model's own configuration ends an answer.

    `generation_config.json` comes first, because transformers' `generate` reads it.
    `config.json` is used if the first file is missing or names no end token. Empty if
    neither names one.

    Raises:
        AssetError: One of the files is not valid JSON.
    """
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
    """Suppress transformers' loading reports and progress bars, which tear the live view.

    Afterwards the verbosity and Python warnings are as before. Progress bars and PEFT's
    warnings stay off for the rest of the process.
    """
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
