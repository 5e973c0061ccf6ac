"""Python code for the model card: load the weights and ask the model once.

Pure. The code uses plain transformers and PEFT and must do what lorafleet does: the same base and
number format, the same prompt, the same end of an answer.
tests/unit/evaluation/render/test_model_card.py runs it and compares. Every text that is not ours is
written with `repr`, so data cannot add code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafleet.evaluation.render.manifest import PromptMetadata
from lorafleet.jobs.schema.model_kinds import UNQUANTIZED_MODULES


@dataclass(frozen=True)
class LoadingMetadata:
    """Values that the loading code depends on."""

    method: str
    """lora, qlora, prompt_tuning or full."""
    task: str
    """classification, generation or summarization."""
    base: str
    """Hub id or folder of the base model."""
    revision: str | None = None
    """Commit of the base model."""
    dtype: str = "float32"
    """Number format in which the base's weights were loaded for training."""
    trust_remote_code: bool = False
    """True if the base model has code of its own."""
    labels: Sequence[str] = ()
    """Class names in the order of the model's outputs."""
    max_length: int = 512
    """Maximum tokens of a text, as in training."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """The job's `qlora` block."""
    saved_modules: Sequence[str] = ()
    """Modules that were trained and saved in full with the adapter; they are not quantised."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The job's `data.chat_template_kwargs`."""
    prompt: PromptMetadata = field(default_factory=PromptMetadata)


def build_loading_code(metadata: LoadingMetadata) -> list[str]:
    """Return the code as lines.

    It runs in the folder of the weights.

    Args:
        metadata: What the code depends on; texts in it need not be trusted.
    """
    if metadata.task == "classification":
        return [
            *_render_imports(metadata),
            "",
            *_render_loading(metadata),
            "",
            *_render_classification(metadata),
        ]
    return [
        *_render_imports(metadata),
        "",
        *_render_loading(metadata),
        "",
        *_render_generation(metadata),
    ]


def _get_model_class(metadata: LoadingMetadata) -> str:
    return (
        "AutoModelForSequenceClassification"
        if metadata.task == "classification"
        else "AutoModelForCausalLM"
    )


def _render_imports(metadata: LoadingMetadata) -> list[str]:
    names = [_get_model_class(metadata), "AutoTokenizer"]
    if metadata.task != "classification":
        names.append("GenerationConfig")
    if metadata.method == "qlora":
        names.append("BitsAndBytesConfig")
    lines = ["import torch"]
    if metadata.method != "full":
        lines.append("from peft import PeftModel")
    return [*lines, f"from transformers import {', '.join(sorted(names))}"]


def _render_loading(metadata: LoadingMetadata) -> list[str]:
    lines = ['FOLDER = "."  # this folder']
    source = "FOLDER"
    if metadata.method != "full":
        lines.append(f"BASE = {metadata.base!r}")
        source = "BASE"
    if metadata.method == "qlora":
        lines += _render_quantization(metadata)
    options = [f"dtype=torch.{metadata.dtype}"]
    if metadata.revision and metadata.method != "full":
        options.append(f"revision={metadata.revision!r}")
    if metadata.task == "classification" and metadata.method != "full":
        # A head for other classes in the checkpoint is replaced by the adapter's.
        options += [f"num_labels={len(metadata.labels)}", "ignore_mismatched_sizes=True"]
    if metadata.method == "qlora":
        options.append("quantization_config=quantization")
    if metadata.trust_remote_code:
        options.append("trust_remote_code=True")
    trust = ", trust_remote_code=True" if metadata.trust_remote_code else ""
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})")
    lines.append(
        f"model = {_get_model_class(metadata)}.from_pretrained({source}, {', '.join(options)})"
    )
    if metadata.task == "classification":
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    else:
        lines.append("model.generation_config = GenerationConfig.from_pretrained(FOLDER)")
    if metadata.method != "full":
        lines.append("model = PeftModel.from_pretrained(model, FOLDER)")
    return [*lines, "model.eval()"]


def _render_quantization(metadata: LoadingMetadata) -> list[str]:
    """Return the lines that define the quantisation of the base as in training."""
    spec = metadata.quantization
    kind = spec.get("quant_type", "nf4")
    if kind == "int8":
        arguments = ["load_in_8bit=True"]
    else:
        compute = spec.get("compute_dtype", "auto")
        arguments = [
            "load_in_4bit=True",
            f"bnb_4bit_quant_type={kind!r}",
            f"bnb_4bit_use_double_quant={bool(spec.get('use_double_quant', True))}",
            f"bnb_4bit_compute_dtype=torch.{metadata.dtype if compute == 'auto' else compute}",
        ]
    # Modules that were trained in full must be loaded unquantised, or the saved weights do not fit.
    skipped = list(dict.fromkeys([*UNQUANTIZED_MODULES, *metadata.saved_modules]))
    arguments.append(f"llm_int8_skip_modules={skipped!r}")
    return [
        "quantization = BitsAndBytesConfig(",
        *(f"    {argument}," for argument in arguments),
        ")",
    ]


def _render_classification(metadata: LoadingMetadata) -> list[str]:
    """Return the lines that classify a text."""
    return [
        f"LABELS = {list(metadata.labels)!r}",
        f'inputs = tokenizer(["a text"], truncation=True, max_length={metadata.max_length}, '
        "padding=True, "
        'return_tensors="pt")',
        "inputs = inputs.to(model.device)",
        "with torch.inference_mode():",
        "    logits = model(**inputs).logits",
        "print([LABELS[index] for index in logits.argmax(-1)])",
    ]


def _render_generation(metadata: LoadingMetadata) -> list[str]:
    """Return the lines that ask the model once and print the answer."""
    lines = [
        *_render_prompt(metadata),
        "inputs = tokenizer(prompt, add_special_tokens=False, "
        'return_tensors="pt").to(model.device)',
        "with torch.inference_mode():",
        '    output = model.generate(input_ids=inputs["input_ids"], '
        'attention_mask=inputs["attention_mask"])',
        'answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], '
        "skip_special_tokens=True)",
    ]
    # Some templates make the model write a header or thinking block before its answer.
    marker = metadata.prompt.answer_marker
    if marker:
        lines.append(f"answer = answer.split({marker!r})[-1]")
    return [*lines, "print(answer.strip())"]


def _render_prompt(metadata: LoadingMetadata) -> list[str]:
    """Return the lines that build `prompt` as in training."""
    start = metadata.prompt.start
    if not metadata.prompt.conversation:
        return [
            f"prompt = {start!r} + 'the beginning of a text'"
            if start
            else "prompt = 'the beginning of a text'"
        ]
    system = metadata.prompt.system_message
    turns = [*([system] if system else []), {"role": "user", "content": "a question"}]
    messages: list[Mapping[str, Any]] = list(turns)
    if metadata.prompt.content_as_parts:
        messages = [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
            for turn in turns
        ]
    lines = ["messages = [", *(f"    {message!r}," for message in messages), "]"]
    if metadata.prompt.chat_template:
        options = f", **{dict(metadata.template_kwargs)!r}" if metadata.template_kwargs else ""
        call = (
            "tokenizer.apply_chat_template(messages, tokenize=False, "
            f"add_generation_prompt=True{options})"
        )
        return [*lines, f"prompt = {call}"]
    expression = "''.join(message['content'] + '\\n\\n' for message in messages)"
    return [*lines, f"prompt = {start!r} + {expression}" if start else f"prompt = {expression}"]
