"""Chat templates of current model families, on tiny tokenizers that have their special tokens.

Templates come from TRL's wheel where it ships them; the others are minimal ones with the same
frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.conversation import Message

_SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9▁]+\|>|<｜[^<>\s]+?｜>|<(?:start|end)_of_(?:turn|image|utterance)>|"
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK)\]|<sop>|</?s>|<bos>|<eos>"
)
_ADDED = re.compile(r"</?(?:think|tool_call|tool_response)>")
_CORPUS = [
    f"what is the capital of country {number}? it is city {number}." for number in range(50)
] + [
    "user assistant system model tool final analysis name arguments function weather sunny be kind "
    "short"
] * 10

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor "
    "%}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NO_GENERATION_PROMPT = CHATML.split("{% if add", maxsplit=1)[0]
_SPEAKERS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n"
    "{% else %}Assistant: {{ m['content'] }}\n{% endif %}{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ "
    "m['content'] }}[/SYSTEM_PROMPT]{% elif m['role'] == 'user' %}[INST]{{ m['content'] "
    "}}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
_MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 == "
    "1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}{{ "
    "m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif "
    "%}{% endfor %}"
)
_PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% "
    "endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
_SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}{{ "
    "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SMOLLM3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ "
    "'<|im_start|>assistant\n<think>\n\n</think>\n' + m['content'] + '<|im_end|>\n' }}{% "
    "endgeneration %}{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"
)
_GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}{% if "
    "add_generation_prompt %}<|assistant|>\n{% endif %}{# <|system|> <|user|> <|assistant|> "
    "<|observation|> #}"
)


@dataclass(frozen=True)
class Family:
    """One chat template with the tokens that its model has, and what a turn's trained span is."""

    name: str
    template: str
    """A file of TRL's (without .jinja), or a template's text."""
    eos: str
    before: str = ""
    """What the model writes before an answer that has no reasoning."""
    after: str = ""
    """What it writes after the answer, the end token included."""
    bos: str | None = None
    ends: tuple[str, ...] = ()
    """Further end tokens of its generation_config."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    together: bool = True
    """Whether one example teaches all turns of a conversation."""
    system: bool = True
    """Whether the template takes a system message."""

    def __str__(self) -> str:
        return self.name

    @property
    def text(self) -> str:
        return (
            trl_template(self.template)
            if self.template and "{" not in self.template
            else self.template
        )

    @property
    def end(self) -> str:
        """The token that ends a turn."""
        return _SPECIAL.findall(self.after)[-1]

    def tokenizer(self) -> Any:
        return build_tokenizer(self.text, self.eos, self.bos, self.after)

    def format(self, tokenizer: Any = None) -> ChatFormat:
        tokenizer = tokenizer or self.tokenizer()
        return ChatFormat(
            tokenizer, [tokenizer.convert_tokens_to_ids(name) for name in self.ends], self.kwargs
        )


def trl_templates() -> Path:
    """The folder of chat templates in TRL's wheel. Importing TRL would take seconds."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


def trl_template(name: str) -> str:
    """Read one of them."""
    return (trl_templates() / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def _trained_bpe() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    return str(tokenizer.to_str())


def build_tokenizer(template: str, eos: str, bos: str | None = None, more: str = "") -> Any:
    """Return a byte-level tokenizer that has a template's special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = {*_SPECIAL.findall(template), *_SPECIAL.findall(more), eos, *([bos] if bos else [])}
    tokenizer = Tokenizer.from_str(_trained_bpe())
    tokenizer.add_special_tokens(["<pad>", *sorted(names)])
    tokenizer.add_tokens(sorted(set(_ADDED.findall(template))))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token="<pad>"
    )
    fast.chat_template = template or None
    return fast


_NO_THOUGHT = "<think>\n\n</think>\n\n"
_IM_END = "<|im_end|>"
FAMILIES = (
    Family("llama3.1", "llama3_1", "<|eot_id|>", after="<|eot_id|>", bos="<|begin_of_text|>"),
    Family("llama3.2", "llama3_2", "<|eot_id|>", after="<|eot_id|>", bos="<|begin_of_text|>"),
    Family("qwen2.5", "qwen2_5", _IM_END, after=_IM_END),
    Family("qwen3", "qwen3", _IM_END, before=_NO_THOUGHT, after=_IM_END, together=False),
    Family(
        "qwen3-off",
        "qwen3",
        _IM_END,
        after=_IM_END,
        kwargs={"enable_thinking": False},
        together=False,
    ),
    Family("qwen3-markers", "qwen3_training", _IM_END, before=_NO_THOUGHT, after=_IM_END),
    Family(
        "qwen3.5", "qwen3_5_think", _IM_END, before="\n</think>\n\n", after=_IM_END, together=False
    ),
    Family("qwen3.6", "qwen3_6", _IM_END, before="\n</think>\n\n", after=_IM_END, together=False),
    Family(
        "gemma3", "gemma3", "<eos>", after="<end_of_turn>", bos="<bos>", ends=("<end_of_turn>",)
    ),
    Family("phi3", "phi3", "<|endoftext|>", after="<|end|>", bos="<s>"),
    Family("phi4", _PHI4, _IM_END, after=_IM_END),
    Family("mistral", _MISTRAL, "</s>", after="</s>", bos="<s>"),
    Family("mistral-v1", _MISTRAL_V1, "</s>", before=" ", after="</s>", bos="<s>"),
    Family("glm4", _GLM4, "<|endoftext|>", after="<|user|>", ends=("<|user|>", "<|observation|>")),
    Family(
        "glm4.5",
        "glm4moe",
        "<|endoftext|>",
        before="\n<think></think>\n",
        after="<|user|>",
        ends=("<|user|>", "<|observation|>"),
    ),
    Family(
        "gpt-oss",
        "gptoss",
        "<|return|>",
        "<|channel|>final<|message|>",
        "<|return|>",
        together=False,
    ),
    Family(
        "deepseek-v3",
        "deepseekv3",
        "<｜end▁of▁sentence｜>",
        before="\n</think>\n\n",
        after="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        together=False,
    ),
    Family(
        "nemotron3", "nemotron_3_nano", _IM_END, before="</think>", after=_IM_END, together=False
    ),
    Family(
        "cohere",
        "cohere",
        "<|END_OF_TURN_TOKEN|>",
        after="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    Family(
        "cohere2",
        "cohere2",
        "<|END_OF_TURN_TOKEN|>",
        after="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    Family("smollm2", _SMOLLM2, _IM_END, after=_IM_END),
    Family("smollm3", _SMOLLM3, _IM_END, after=_IM_END),
    Family("chatml-base", CHATML, "<|endoftext|>", after=_IM_END),
    Family(
        "no-generation-prompt",
        _NO_GENERATION_PROMPT,
        _IM_END,
        before="<|im_start|>assistant\n",
        after=_IM_END,
    ),
    Family(
        "no-end-token",
        _SPEAKERS + "{% if add_generation_prompt %}Assistant: {% endif %}",
        "</s>",
        after="</s>",
        bos="<s>",
        together=False,
        system=False,
    ),
    Family(
        "header-always",
        _NO_GENERATION_PROMPT + "{{ '<|im_start|>assistant\n' }}",
        _IM_END,
        after=_IM_END,
    ),
    Family("no-template", "", "</s>", after="</s>", bos="<s>", together=False),
)
BY_NAME = {family.name: family for family in FAMILIES}


def conversation(*turns: str, system: str = "") -> tuple[Message, ...]:
    """Build messages from texts: the user's and the assistant's in turn."""
    first = [Message("system", system)] if system else []
    roles = ("user", "assistant")
    return (*first, *(Message(roles[place % 2], text) for place, text in enumerate(turns)))


def learnt_spans(ids: list[int], learnt: list[bool]) -> Iterator[list[int]]:
    """Yield the stretches of tokens that are learnt."""
    span: list[int] = []
    for token, is_learnt in zip(ids, learnt, strict=True):
        if is_learnt:
            span.append(token)
        elif span:
            yield span
            span = []
    if span:
        yield span


def model_folder(family: Family, folder: Path, hidden: int = 32) -> Path:
    """A tiny Llama of two heads with a family's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = family.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=2048, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(name) for name in family.ends)],
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
