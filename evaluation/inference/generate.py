"""Generate answers with a loaded model: batched, padded on the left, seeded.

Metrics of answers, samples and speed measurements of models in PyTorch use this module.
Exported models have a loop of their own (`deployment/decoding.py`), because they run
without transformers.

B prompts, T tokens, V tokens of a learnt prompt, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorafleet.jobs.data.answer_frame import PROMPT_TAIL, AnswerFrame
from lorafleet.jobs.schema.job import EvaluateSpec


def generate_answers(
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
    """Generate the answer of a causal model to each prompt.

    Prompts of similar length share a batch. With `do_sample`, answers depend on the seed, the
    rows and the batch size, and not on anything that ran before.

    Args:
        model: The loaded model.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        spec: Generation settings.
        batch_rows: Prompts per batch.
        on_batch: Called before each batch. An exception from it ends the generation.
        ends: End tokens in addition to the model's own (those of its chat template).
        frame: What the model writes before an answer.

    Returns:
        The answers, without frame and end tokens.
    """
    import torch
    from transformers import GenerationConfig

    # PEFT's own generate hides that the model takes position ids: GPT-2 would count the padding.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = list(dict.fromkeys([*get_end_tokens(inner, tokenizer), *ends]))
    options: dict[str, Any] = {
        "max_new_tokens": spec.max_new_tokens,
        "do_sample": spec.do_sample,
        "use_cache": True,
    }
    if spec.do_sample:
        # transformers' default of `top_k` is 50, which would cut the distribution without being
        # asked.
        options |= {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0}
    pad = tokenizer.pad_token_id or 0
    config = GenerationConfig(pad_token_id=pad, eos_token_id=ends or None, **options)
    # Prompts of similar length share a batch and need little padding.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers = [""] * len(prompts)
    # Sampling must not move the random state of the training that goes on afterwards.
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(spec.generation_seed)
        for start in range(0, len(order), batch_rows):
            on_batch()
            rows = order[start : start + batch_rows]
            inputs = pad_prompts(model, [prompts[row] for row in rows], pad)
            with use_generation_config(inner, config):
                output = inner.generate(**inputs, generation_config=config)
            prompt_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            for row, tokens in zip(rows, output[:, prompt_length:].tolist(), strict=True):
                answers[row] = decode_answer(tokens, ends, tokenizer, frame, prompts[row])
    return answers


@contextmanager
def use_generation_config(model: Any, config: Any) -> Iterator[None]:
    """Make `generate` use only the given config.

    transformers takes options that are not set from the model's own config. A base with a
    repetition penalty would then count differently for prompts that are embeddings.
    """
    previous = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = previous


def pad_prompts(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Return prompts of one width as model inputs, padded on the left.

    A learnt prompt (prompt tuning) goes between the padding and the text. It exists only as
    embeddings, so the whole input is given as embeddings then.

    Args:
        model: The model, as PEFT wraps it.
        prompts: Token ids of each prompt; none is empty.
        pad: Token id for padding.

    Returns:
        `attention_mask` with `input_ids` or `inputs_embeds`, on the device of the model.
    """
    import torch

    device = next(model.parameters()).device
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor(
        [[pad] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    ).to(device)
    config = getattr(model, "active_peft_config", None)
    learnt = config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
    mask_BT = torch.tensor([[0] * gap + [1] * (learnt + width - gap) for gap in gaps]).to(device)
    if not learnt:
        return {"input_ids": ids_BT, "attention_mask": mask_BT}
    text_BTD = model.get_base_model().get_input_embeddings()(ids_BT)
    learnt_BVD = model.get_prompt(len(prompts)).to(text_BTD.dtype)
    rows = zip(gaps, text_BTD, learnt_BVD, strict=True)
    embedded_BTD = torch.stack(
        [torch.cat([text_TD[:gap], learnt_VD, text_TD[gap:]]) for gap, text_TD, learnt_VD in rows]
    )
    return {"inputs_embeds": embedded_BTD, "attention_mask": mask_BT}


def get_end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the end tokens of the tokenizer and of the model's own configuration.

    Chat models often end turns with another token than the tokenizer's end token, which
    only their `generation_config.json` names. Those of the chat template are added by the
    caller.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    token_ids = [
        *(configured if isinstance(configured, list) else [configured]),
        tokenizer.eos_token_id,
    ]
    return list(dict.fromkeys(token for token in token_ids if token is not None))


def decode_answer(
    tokens: Sequence[int],
    ends: Sequence[int],
    tokenizer: Any,
    frame: AnswerFrame | None = None,
    prompt: Sequence[int] = (),
) -> str:
    """Return the answer in new tokens: the text up to the first end token, stripped.

    Args:
        tokens: Token ids that the model generated.
        ends: Token ids that end an answer.
        tokenizer: The tokenizer.
        frame: What the model writes before an answer; None if there is nothing to remove.
        prompt: Token ids of the prompt; needed only with a frame.
    """

    def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    length = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    if frame is None:
        return decode(tokens[:length], True).strip()
    end = tokens[length] if length < len(tokens) else None
    return frame.adapt_to_prompt(decode(prompt[-PROMPT_TAIL:], False)).decode_answer(
        tokens[:length], decode, end
    )
