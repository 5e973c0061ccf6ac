"""Files beside recommended weights for use without lorafleet.

With them, plain transformers prepares prompts and ends answers as in training.
"""

from __future__ import annotations

from pathlib import Path

from lorafleet.evaluation.render.manifest import PromptMetadata
from lorafleet.evaluation.tokenizer import load_chat_format, silence_libraries
from lorafleet.evaluation.tokens import prepare
from lorafleet.jobs import files
from lorafleet.jobs.schema.job import JobSpec


def save_inference_files(job: JobSpec, folder: Path) -> PromptMetadata:
    """Save the tokenizer, and for a generating model the generation settings, beside weights.

    The tokenizer has the chat template of training; `generation_config.json` has its end
    tokens. Needs transformers, and the model and data on this machine.

    Args:
        job: The job of the trial whose weights are in `folder`.
        folder: Folder of the weights. Files of the same names are replaced.

    Returns:
        Metadata with which the code of the model card builds a prompt.

    Raises:
        AssetError: The model or the data is not on this machine.
        DataError: The rows cannot be used.
    """
    chat = load_chat_format(job)
    with silence_libraries():
        chat.tokenizer.save_pretrained(str(folder))
    if not job.is_generative:
        return PromptMetadata(tokenizer=True)
    from transformers import GenerationConfig

    data = prepare(job)
    # Turns may end with a token that only the chat template names. Without it, plain transformers
    # would generate on until the limit.
    end_ids = list(dict.fromkeys([*chat.model_ends, *data.ends]))
    sampling = {}
    if job.evaluate.do_sample:
        sampling = {
            "temperature": job.evaluate.temperature,
            "top_p": job.evaluate.top_p,
            "top_k": 0,
        }
    config = GenerationConfig(
        max_new_tokens=job.evaluate.max_new_tokens,
        do_sample=job.evaluate.do_sample,
        eos_token_id=end_ids or None,
        pad_token_id=chat.tokenizer.pad_token_id,
        **sampling,
    )
    files.write_text(folder / "generation_config.json", config.to_json_string())
    conversation = data.frame is not None
    has_template = conversation and bool(chat.template.source)
    system = data.system
    return PromptMetadata(
        tokenizer=True,
        conversation=conversation,
        chat_template=has_template,
        content_as_parts=has_template and chat.template.needs_content_parts,
        start="" if has_template else chat.tokenizer.bos_token or "",
        system_message={"role": system.role, "content": system.content} if system else None,
        answer_marker=data.frame.marker if data.frame is not None and data.frame.strict else None,
    )
