"""Python code for the model card: load the weights with plain transformers and PEFT, and ask the model once. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafleet.jobs.schema.model_kinds import UNQUANTIZED_MODULES


@dataclass(frozen=True)
class LoadingFacts:
    """What the code depends on."""

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
    """Whether the base brings code of its own."""
    labels: Sequence[str] = ()
    """Class names in the order of the model's outputs."""
    max_length: int = 512
    """Most tokens of a text, as in training."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """The job's `qlora` block."""
    saved_modules: Sequence[str] = ()
    """Modules that were trained whole and are saved with the adapter: they were not quantised."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The job's `data.chat_template_kwargs`."""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    """What `evaluation.render.inference_files.save_inference_files` returned."""


def loading_code(facts: LoadingFacts) -> list[str]:
    """Return the code as lines. It runs in the folder of the weights."""
    if facts.task == "classification":
        return [*_imports(facts), "", *_load(facts), "", *_classify(facts)]
    return [*_imports(facts), "", *_load(facts), "", *_generate(facts)]


def _model_class(facts: LoadingFacts) -> str:
    return "AutoModelForSequenceClassification" if facts.task == "classification" else "AutoModelForCausalLM"


def _imports(facts: LoadingFacts) -> list[str]:
    names = [_model_class(facts), "AutoTokenizer"]
    if facts.task != "classification":
        names.append("GenerationConfig")
    if facts.method == "qlora":
        names.append("BitsAndBytesConfig")
    lines = ["import torch"]
    if facts.method != "full":
        lines.append("from peft import PeftModel")
    return [*lines, f"from transformers import {', '.join(sorted(names))}"]


def _load(facts: LoadingFacts) -> list[str]:
    lines = ['FOLDER = "."  # this folder']
    source = "FOLDER"
    if facts.method != "full":
        lines.append(f"BASE = {facts.base!r}")
        source = "BASE"
    if facts.method == "qlora":
        lines += _quantization(facts)
    options = [f"dtype=torch.{facts.dtype}"]
    if facts.revision and facts.method != "full":
        options.append(f"revision={facts.revision!r}")
    if facts.task == "classification" and facts.method != "full":
        # A head for other classes in the checkpoint is replaced by the adapter's.
        options += [f"num_labels={len(facts.labels)}", "ignore_mismatched_sizes=True"]
    if facts.method == "qlora":
        options.append("quantization_config=quantization")
    if facts.trust_remote_code:
        options.append("trust_remote_code=True")
    trust = ", trust_remote_code=True" if facts.trust_remote_code else ""
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})")
    lines.append(f"model = {_model_class(facts)}.from_pretrained({source}, {', '.join(options)})")
    if facts.task == "classification":
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    else:
        lines.append("model.generation_config = GenerationConfig.from_pretrained(FOLDER)")
    if facts.method != "full":
        lines.append("model = PeftModel.from_pretrained(model, FOLDER)")
    return [*lines, "model.eval()"]


def _quantization(facts: LoadingFacts) -> list[str]:
    spec = facts.quantization
    kind = spec.get("quant_type", "nf4")
    if kind == "int8":
        arguments = ["load_in_8bit=True"]
    else:
        compute = spec.get("compute_dtype", "auto")
        arguments = [
            "load_in_4bit=True",
            f"bnb_4bit_quant_type={kind!r}",
            f"bnb_4bit_use_double_quant={bool(spec.get('use_double_quant', True))}",
            f"bnb_4bit_compute_dtype=torch.{facts.dtype if compute == 'auto' else compute}",
        ]
    skipped = list(dict.fromkeys([*UNQUANTIZED_MODULES, *facts.saved_modules]))
    arguments.append(f"llm_int8_skip_modules={skipped!r}")
    return ["quantization = BitsAndBytesConfig(", *(f"    {argument}," for argument in arguments), ")"]


def _classify(facts: LoadingFacts) -> list[str]:
    return [
        f"LABELS = {list(facts.labels)!r}",
        f'inputs = tokenizer(["a text"], truncation=True, max_length={facts.max_length}, padding=True, '
        'return_tensors="pt")',
        "inputs = inputs.to(model.device)",
        "with torch.inference_mode():",
        "    logits = model(**inputs).logits",
        "print([LABELS[index] for index in logits.argmax(-1)])",
    ]


def _generate(facts: LoadingFacts) -> list[str]:
    lines = [
        *_prompt(facts),
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)',
        "with torch.inference_mode():",
        '    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])',
        'answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
    ]
    marker = facts.prompt.get("answer_marker")
    if marker:
        lines.append(f"answer = answer.split({marker!r})[-1]")
    return [*lines, "print(answer.strip())"]


def _prompt(facts: LoadingFacts) -> list[str]:
    """Return the lines that build `prompt` as training built it."""
    start = facts.prompt.get("start") or ""
    if not facts.prompt.get("conversation"):
        return [f"prompt = {start!r} + 'the beginning of a text'" if start else "prompt = 'the beginning of a text'"]
    system = facts.prompt.get("system_message")
    messages = [system] if isinstance(system, dict) else []
    messages = [*messages, {"role": "user", "content": "a question"}]
    if facts.prompt.get("content_as_parts"):
        messages = [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    lines = ["messages = [", *(f"    {message!r}," for message in messages), "]"]
    if facts.prompt.get("chat_template"):
        options = f", **{dict(facts.template_kwargs)!r}" if facts.template_kwargs else ""
        call = f"tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{options})"
        return [*lines, f"prompt = {call}"]
    joined = "''.join(message['content'] + '\\n\\n' for message in messages)"
    return [*lines, f"prompt = {start!r} + {joined}" if start else f"prompt = {joined}"]
