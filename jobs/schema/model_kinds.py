"""What a model's config says of its kind: whether it writes text, how far it reads, what it shares.

All from config.json alone: no weights, no transformers. A test holds the tables against transformers.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

CAUSAL_TYPES = frozenset(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet
    bloom blt codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx deepseek_v2
    deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory dots1 dots3_note dots3_note_text emu3
    ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint
    fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
    hyperclovax inkling2_loop_text inkling2_text inkling_text internlm3 iquestcoder jais2 jamba
    jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text
    longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text
    ministral ministral3 mistral mixtral mllama modernbert-decoder mpt nanochat nemotron nemotron_h
    olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phi4_multimodal phimoe
    qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    qwen4_exp qwen4_exp_text recurrent_gemma rwkv sarvam_mla sarvam_moe seed_oss smollm3 solar_open
    stablelm starcoder2 vaultgemma xglm xlstm youtu zamba zamba2 zaya
    """.split()
)
"""Model types whose tokens see only what stands before them."""

DECODER_IF_SAID = frozenset(
    """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer
    rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet
    """.split()
)
"""Model types that transformers loads as decoders, and that are decoders with `is_decoder: true`."""

ENCODER_DECODERS = frozenset(
    """
    bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian
    mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet seamless_m4t seamless_m4t_v2
    switch_transformers t5 t5gemma t5gemma2 umt5 whisper
    """.split()
)
"""Model types that are an encoder and a decoder, unless `is_encoder_decoder` is false."""

TIED_BY_DEFAULT = frozenset(
    """
    biogpt bloom cohere cohere2 cohere2_moe cohere_compass_text ctrl ernie4_5 ernie4_5_moe falcon
    falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese
    granite_swa jetmoe lara_mini lfm2 lfm2_moe lfm3 mamba minicpm3 modernbert-decoder mpt openai-gpt
    opt recurrent_gemma smollm3 starcoder2 vaultgemma xglm youtu zamba zamba2 zaya
    """.split()
)
"""Causal types whose output head is the embedding where the config does not say."""

_POSITION_TABLES = frozenset(
    """
    albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small
    canine codegen convbert ctrl deberta deberta-v2 distilbert electra ernie flaubert fnet gpt-sw3
    gpt2 gpt_bigcode gpt_neo gptj layoutlm marian mbart megatron-bert mobilebert mpt mra mvp
    nystromformer openai-gpt opt pegasus perceiver plbart prophetnet rembert roc_bert roformer
    squeezebert trocr xlm yoso
    """.split()
)
"""Model types with a table of positions: a longer row has no place in it."""
_ROBERTA_LIKE = frozenset(
    """
    camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm mpnet roberta
    roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod
    """.split()
)
"""Model types whose table has positions before the first token: as many as the padding id, and one."""
_ROBERTA_PADDING = 1
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
_USUAL_POSITIONS = {
    **dict.fromkeys(_POSITION_TABLES | _ROBERTA_LIKE, 512),
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_bigcode", "biogpt", "bart", "mbart", "mvp"), 1024),
    **dict.fromkeys(("marian", "pegasus", "plbart"), 1024),
    **dict.fromkeys(("gpt_neo", "gptj", "codegen", "opt", "mpt"), 2048),
    "ctrl": 256,
    "canine": 16384,
    "big_bird": 4096,
    "bigbird_pegasus": 4096,
    "blenderbot": 128,
    "xlm-roberta-xl": 514,
    "perceiver": 2048,
    "yoso": 4096,
    "roformer": 1536,
    "mobilebert": 512,
    "esm": 1026,
    "nystromformer": 510,
}
"""Positions where a config does not say."""
_TRANSPOSED = frozenset(("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"))

HEAD_NAMES = frozenset(("lm_head", "embed_out", "output_projection"))
"""What output heads are called."""
CLASSIFIER_HEADS = ("classifier", "score", "pre_classifier", "classification_head")
"""Names under which transformers keeps the layers that a classifier adds to a base."""
UNQUANTIZED_MODULES = (*CLASSIFIER_HEADS, "lm_head", "embed_out")
"""Modules that QLoRA never quantises."""
EMBEDDING_NAMES = frozenset(("embed_tokens", "wte", "word_embeddings", "embed_in", "tokens_embed", "tok_embeddings"))
"""What tables of token embeddings are called."""


def model_type(config: Config) -> str:
    """Return a config's model type, or an empty text."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def text_config(config: Config) -> Config:
    """Return the part of a config that describes the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def is_encoder_decoder(config: Config) -> bool:
    """Whether a model is an encoder and a decoder."""
    said = config.get("is_encoder_decoder")
    return bool(said) if said is not None else model_type(config) in ENCODER_DECODERS


def is_causal(config: Config) -> bool:
    """Whether each token of a model sees only what stands before it.

    A type that is not in the tables (a model with code of its own, a newer transformers) counts as
    causal where its architecture is called so.
    """
    kind = model_type(config)
    inner = text_config(config)
    both_ways = inner.get("use_bidirectional_attention") is True or inner.get("is_causal") is False
    if is_encoder_decoder(config) or both_ways:
        return False
    if kind in CAUSAL_TYPES:
        return True
    if kind in DECODER_IF_SAID:
        return config.get("is_decoder") is True
    return not is_known(kind) and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in _architectures(config))


def _architectures(config: Config) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_known(kind: str) -> bool:
    """Whether a model type is in one of the tables."""
    tables = (CAUSAL_TYPES, DECODER_IF_SAID, ENCODER_DECODERS, _POSITION_TABLES, _ROBERTA_LIKE)
    return any(kind in table for table in tables)


def learnt_positions(config: Config) -> int:
    """Return the most tokens that a model's table of positions has room for; 0: it has none."""
    config = text_config(config)
    kind = model_type(config)
    if kind not in _POSITION_TABLES | _ROBERTA_LIKE:
        return 0
    if config.get("position_biased_input") is False:  # DeBERTa: relative positions alone
        return 0
    if config.get("position_embedding_type", "absolute") != "absolute":
        return 0
    said = next((config[name] for name in _POSITION_FIELDS if config.get(name)), None)
    positions = _USUAL_POSITIONS[kind] if said is None else _whole(said, "positions")
    if kind not in _ROBERTA_LIKE:
        return positions
    padding = config.get("pad_token_id")
    before = _ROBERTA_PADDING if padding is None or kind == "mpnet" else _whole(padding, "pad_token_id")
    return max(0, positions - before - 1)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} is {value!r}, and no whole number")
    return value


def has_tied_embeddings(config: Config) -> bool:
    """Whether a causal model's output head is its table of embeddings."""
    inner = text_config(config)
    for said in (inner.get("tie_word_embeddings"), config.get("tie_word_embeddings")):
        if said is not None:
            return bool(said)
    return model_type(inner) in TIED_BY_DEFAULT or model_type(config) in TIED_BY_DEFAULT


def has_transposed_layers(config: Config) -> bool:
    """Whether a model's matrices are stored transposed (transformers' Conv1D)."""
    return model_type(config) in _TRANSPOSED


def tied_targets(names: tuple[str, ...], config: Config) -> list[str]:
    """Return those of PEFT's `target_modules` that mean a matrix which is the output head and the embedding at once."""
    if not has_tied_embeddings(config):
        return []
    return [name for name in names if name.rpartition(".")[2] in HEAD_NAMES | EMBEDDING_NAMES]


def tied_refusal(names: list[str], model: str) -> str:
    """Say why such matrices get no adapter."""
    return (
        f"lora.lora_target_modules has {', '.join(names)}, but the embeddings and the output head of {model} are one "
        "matrix (tie_word_embeddings), which an adapter on one of the two would tear apart when it is merged: leave "
        "it out, or take a model whose head is a matrix of its own"
    )


def generation_refusal(config: Config, name: str) -> str | None:
    """Say why a model cannot learn to write text; None where it can."""
    kind = model_type(config)
    if not kind or not isinstance(config.get("text_config") or {}, dict):
        return _cannot_be_read(name)
    if is_encoder_decoder(config):
        return (
            f"model.model_name_or_path is {name}, which is an encoder-decoder ({kind}), but must be a "
            "causal decoder such as GPT-2, Llama or Qwen: encoder-decoders are not trained here"
        )
    if is_causal(config):
        return None
    if kind in CAUSAL_TYPES:
        what = f"of type {kind} with attention in both directions, whose tokens see the answer they predict"
    elif kind in DECODER_IF_SAID:
        what = f"an encoder ({kind} without is_decoder: true), whose tokens see the answer they predict"
    else:
        what = f"of type {kind}, which is no causal decoder"
    return (
        f"model.model_name_or_path is {name}, which is {what}, but must be a causal decoder such as "
        "GPT-2, Llama or Qwen for a task that writes text"
    )


def _cannot_be_read(name: str) -> str:
    return (
        f"model.model_name_or_path is {name}, whose config.json has no model_type (or a text_config that is no block): "
        "nothing can load it"
    )


_CANNOT_PACK = frozenset(
    """
    bailing_hybrid bamba biogpt bloom falcon_h1 falcon_mamba jamba kimi_linear lara_mini lfm3 mamba mamba2 minimax mpt
    nemotron_h olmo_hybrid openai-gpt opt qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp
    qwen4_exp_text recurrent_gemma rwkv xglm xlstm zamba zamba2
    """.split()
)
"""Causal types in which an example is reached by what stands before it in its row, or that take no positions."""


def can_pack(config: Config) -> bool:
    """Whether a model may keep the examples of one row apart; each training looks once more."""
    return model_type(config) not in _CANNOT_PACK


def packing_refusal(field: str, model: str) -> str:
    """Say that a model does not keep the examples of one row apart."""
    return f"{field} is true, but {model} does not keep the examples of one row apart: set it to false"


def classification_refusal(config: Config, name: str) -> str | None:
    """Say why a model cannot learn to name a class; None where it can."""
    kind = model_type(config)
    if not kind or not isinstance(config.get("text_config") or {}, dict):
        return _cannot_be_read(name)
    if is_encoder_decoder(config):
        return (
            f"model.model_name_or_path is {name}, which is an encoder-decoder ({kind}), but must be an "
            "encoder such as BERT or a causal decoder such as Llama for classification"
        )
    if kind in _SEES_PADDING:
        return (
            f"model.model_name_or_path is {name}, but models of type {kind} read the padding of a "
            "batch, so that a row's class depends on the rows beside it; use another encoder"
        )
    return None


_SEES_PADDING = frozenset(
    ("canine", "convbert", "fnet", "funnel", "nystromformer", "perceiver", "reformer", "xlnet", "yoso")
)
"""Model types whose result for a row depends on how far it is padded."""


def length_refusal(config: Config, name: str, max_length: int) -> str | None:
    """Say why rows of `max_length` tokens do not fit; None where they do."""
    positions = learnt_positions(config)
    if not positions or max_length <= positions:
        return None
    return (
        f"model.max_length is {max_length}, but {name} has learnt {positions} positions: set "
        f"model.max_length to at most {positions}"
    )


def stated_labels(config: Config) -> int | None:
    """Return how many classes a classifier's config has; None where it is no classifier."""
    if not any(name.endswith("ForSequenceClassification") for name in _architectures(config)):
        return None
    labels = config.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    classes = config.get("num_labels")
    return classes if isinstance(classes, int) and classes > 0 else 2
