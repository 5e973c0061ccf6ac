"""A loaded model and prompts -> answers. Batched, padded on the left, seeded. B prompts, T tokens, D hidden size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorafleet.jobs.data.answer_frame import PROMPT_TAIL, AnswerFrame
from lorafleet.jobs.schema.job import EvaluateSpec


def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    spec: EvaluateSpec,
    batch_rows: int,
    on_batch: Callable[[], None] = lambda: None,
    *,
    ends: Sequence[int] = (),
    frame: AnswerFrame | None = None,
) -> list[str]:
    """Return the answer that a causal model writes to each prompt (token ids), without frame and end tokens.

    `ends` are end tokens beside the model's own (those of its chat template), `frame` is what stands before an answer.
    Prompts alike in length go together. What `do_sample` draws depends on the seed, on which rows there are and on how
    many go together, and on nothing that ran before. `on_batch` is called before each batch; what it raises ends it.
    """
    import torch
    from transformers import GenerationConfig

    # PEFT's own generate hides from transformers that the model takes positions: GPT-2 would count the padding.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = list(dict.fromkeys([*end_tokens(inner, tokenizer), *ends]))
    options: dict[str, Any] = {"max_new_tokens": spec.max_new_tokens, "do_sample": spec.do_sample, "use_cache": True}
    if spec.do_sample:
        options |= {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0}
    pad = tokenizer.pad_token_id or 0
    config = GenerationConfig(pad_token_id=pad, eos_token_id=ends or None, **options)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers = [""] * len(prompts)
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(spec.generation_seed)
        for start in range(0, len(order), batch_rows):
            on_batch()
            rows = order[start : start + batch_rows]
            inputs = padded(model, [prompts[row] for row in rows], pad)
            with own_settings(inner, config):
                written = inner.generate(**inputs, generation_config=config)
            given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            for row, tokens in zip(rows, written[:, given:].tolist(), strict=True):
                answers[row] = decoded(tokens, ends, tokenizer, frame, prompts[row])
    return answers


@contextmanager
def own_settings(model: Any, config: Any) -> Iterator[None]:
    """Have `generate` do what it is told alone: transformers takes what is left open from the model's own settings, and
    a base that comes with a penalty for repetition would have it count differently for prompts that are embeddings."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def padded(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Prompts of one width as a model's inputs: the padding first, and a learnt prompt between it and the text."""
    import torch

    device = next(model.parameters()).device
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor([[pad] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]).to(device)
    config = getattr(model, "active_peft_config", None)
    learnt = config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
    mask_BT = torch.tensor([[0] * gap + [1] * (learnt + width - gap) for gap in gaps]).to(device)
    if not learnt:
        return {"input_ids": ids_BT, "attention_mask": mask_BT}
    words_BTD = model.get_base_model().get_input_embeddings()(ids_BT)
    learnt_BVD = model.get_prompt(len(prompts)).to(words_BTD.dtype)
    rows = zip(gaps, words_BTD, learnt_BVD, strict=True)
    embedded_BTD = torch.stack([torch.cat([words[:gap], own, words[gap:]]) for gap, words, own in rows])
    return {"inputs_embeds": embedded_BTD, "attention_mask": mask_BT}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which an answer is over: the tokenizer's, and those that the model's own configuration names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))


def decoded(
    tokens: Sequence[int],
    ends: Sequence[int],
    tokenizer: Any,
    frame: AnswerFrame | None = None,
    prompt: Sequence[int] = (),
) -> str:
    """Return the answer in new tokens up to the first that ends it, without spaces at its ends."""

    def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    over = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    if frame is None:
        return decode(tokens[:over], True).strip()
    end = tokens[over] if over < len(tokens) else None
    return frame.after(decode(prompt[-PROMPT_TAIL:], False)).answer(tokens[:over], decode, end)
