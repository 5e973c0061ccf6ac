"""Derive properties of a model from its config.json, such as whether it generates text.

Others are its maximum length and its tied weights. Neither weights nor transformers are
loaded, so that `validate` and `plan` answer at once. Tests compare the tables with the
installed transformers: after an upgrade they name the model types that are missing
here.
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
    qwen4_exp qwen4_exp_text
    recurrent_gemma rwkv sarvam_mla sarvam_moe seed_oss smollm3 solar_open
    stablelm starcoder2 vaultgemma xglm xlstm youtu zamba zamba2 zaya
    """.split()
)
"""Model types whose tokens attend only to earlier tokens."""

DECODER_IF_CONFIGURED = frozenset(
    """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer
    rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet
    """.split()
)
"""Model types that transformers can load as decoders; they are decoders only with
`is_decoder: true`.
"""

ENCODER_DECODERS = frozenset(
    """
    bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian
    mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet seamless_m4t seamless_m4t_v2
    switch_transformers t5 t5gemma t5gemma2 umt5 whisper
    """.split()
)
"""Model types with an encoder and a decoder, unless `is_encoder_decoder` is false."""

TIED_BY_DEFAULT = frozenset(
    """
    biogpt bloom cohere cohere2 cohere2_moe cohere_compass_text ctrl ernie4_5 ernie4_5_moe falcon
    falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese
    granite_swa jetmoe lara_mini lfm2 lfm2_moe lfm3 mamba minicpm3 modernbert-decoder mpt openai-gpt
    opt recurrent_gemma smollm3 starcoder2 vaultgemma xglm youtu zamba zamba2 zaya
    """.split()
)
"""Causal types whose output head shares the embedding matrix unless the config says
otherwise.
"""

_POSITION_TABLES = frozenset(
    """
    albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small
    canine codegen convbert ctrl deberta deberta-v2 distilbert electra ernie flaubert fnet gpt-sw3
    gpt2 gpt_bigcode gpt_neo gptj layoutlm marian mbart megatron-bert mobilebert mpt mra mvp
    nystromformer openai-gpt opt pegasus perceiver plbart prophetnet rembert roc_bert roformer
    squeezebert trocr xlm yoso
    """.split()
)
"""Model types with a table of position embeddings, which limits the length of a row."""
_ROBERTA_LIKE = frozenset(
    """
    camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm mpnet roberta
    roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod
    """.split()
)
"""Model types that reserve entries of the position table before the first token: the padding
id plus one.
"""
_ROBERTA_PADDING = 1
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
_DEFAULT_POSITIONS = {
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
"""Number of positions of a model type if the config does not state it."""
_TRANSPOSED_TYPES = frozenset(("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"))

HEAD_NAMES = frozenset(("lm_head", "embed_out", "output_projection"))
"""Names of output heads."""
CLASSIFIER_HEADS = ("classifier", "score", "pre_classifier", "classification_head")
"""Names of the layers that transformers adds to a base model for classification."""
UNQUANTIZED_MODULES = (*CLASSIFIER_HEADS, "lm_head", "embed_out")
"""Modules that QLoRA never quantizes."""
EMBEDDING_NAMES = frozenset(
    ("embed_tokens", "wte", "word_embeddings", "embed_in", "tokens_embed", "tok_embeddings")
)
"""Names of token embedding tables."""


def get_model_type(config: Config) -> str:
    """Return the model type of a config; empty if it has none."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def get_text_config(config: Config) -> Config:
    """Return the part of a config that describes the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def is_encoder_decoder(config: Config) -> bool:
    """Return whether a model has an encoder and a decoder.

    A flag in the config takes precedence over the table: types such as BART can also be
    saved as decoders.
    """
    flag = config.get("is_encoder_decoder")
    return bool(flag) if flag is not None else get_model_type(config) in ENCODER_DECODERS


def is_causal(config: Config) -> bool:
    """Return whether each token of a model attends only to earlier tokens.

    A type that is not in the tables (a model with custom code, or a newer transformers)
    counts as causal if the name of its architecture says so.
    """
    kind = get_model_type(config)
    inner = get_text_config(config)
    # Causal types such as Gemma 3 are also published as embedding models, which see all tokens.
    is_bidirectional = (
        inner.get("use_bidirectional_attention") is True or inner.get("is_causal") is False
    )
    if is_encoder_decoder(config) or is_bidirectional:
        return False
    if kind in CAUSAL_TYPES:
        return True
    if kind in DECODER_IF_CONFIGURED:
        return config.get("is_decoder") is True
    return not is_known_type(kind) and any(
        name.endswith(("ForCausalLM", "LMHeadModel")) for name in _list_architectures(config)
    )


def _list_architectures(config: Config) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_known_type(kind: str) -> bool:
    """Return whether a model type is in one of the tables."""
    tables = (
        CAUSAL_TYPES,
        DECODER_IF_CONFIGURED,
        ENCODER_DECODERS,
        _POSITION_TABLES,
        _ROBERTA_LIKE,
    )
    return any(kind in table for table in tables)


def get_max_positions(config: Config) -> int:
    """Return the maximum number of tokens of a model's position table; 0 if it has no table.

    Models that compute positions, such as Llama, have no table. RoBERTa and its relatives
    count positions from the padding id plus one, so a table of 514 entries holds 512
    tokens.

    Raises:
        ValueError: A number in the config is not a whole number.
    """
    config = get_text_config(config)
    kind = get_model_type(config)
    if kind not in _POSITION_TABLES | _ROBERTA_LIKE:
        return 0
    if config.get("position_biased_input") is False:  # DeBERTa with relative positions only
        return 0
    # Relative position embeddings depend on distances and have no end.
    if config.get("position_embedding_type", "absolute") != "absolute":
        return 0
    configured = next((config[name] for name in _POSITION_FIELDS if config.get(name)), None)
    positions = (
        _DEFAULT_POSITIONS[kind] if configured is None else _check_integer(configured, "positions")
    )
    if kind not in _ROBERTA_LIKE:
        return positions
    padding = config.get("pad_token_id")
    # MPNet always uses padding index 1 for positions, whatever its config says.
    padding_index = (
        _ROBERTA_PADDING
        if padding is None or kind == "mpnet"
        else _check_integer(padding, "pad_token_id")
    )
    return max(0, positions - padding_index - 1)


def _check_integer(value: Any, name: str) -> int:
    # A config may have `true` here, and bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, which is not a whole number")
    return value


def has_tied_embeddings(config: Config) -> bool:
    """Return whether the output head of a causal model shares its embedding matrix.

    The text part of a multimodal config takes precedence over the config around it. Without
    a flag, transformers' default for the model type decides.
    """
    inner = get_text_config(config)
    for flag in (inner.get("tie_word_embeddings"), config.get("tie_word_embeddings")):
        if flag is not None:
            return bool(flag)
    return get_model_type(inner) in TIED_BY_DEFAULT or get_model_type(config) in TIED_BY_DEFAULT


def has_transposed_layers(config: Config) -> bool:
    """Return whether a model stores its matrices transposed (Conv1D of transformers)."""
    return get_model_type(config) in _TRANSPOSED_TYPES


def find_tied_targets(names: tuple[str, ...], config: Config) -> list[str]:
    """Return the `target_modules` that name a matrix shared by output head and embedding.

    An adapter on one of the two could not be merged, because the merged matrix would also
    replace the other one.

    Args:
        names: Names of layers, with or without the path before them.
    """
    if not has_tied_embeddings(config):
        return []
    return [name for name in names if name.rpartition(".")[2] in HEAD_NAMES | EMBEDDING_NAMES]


def describe_tied_targets(names: list[str], model: str) -> str:
    """Return the message that tied matrices cannot get an adapter."""
    return (
        f"lora.lora_target_modules has {', '.join(names)}, but the embeddings and the output head "
        f"of {model} share one matrix (tie_word_embeddings), and an adapter on one of them cannot "
        "be merged: leave it out, or use a model whose head has its own matrix"
    )


def get_generation_refusal(config: Config, name: str) -> str | None:
    """Return why a model cannot be trained to generate text; None if it can.

    An encoder is refused because each of its tokens sees the answer that it should predict:
    the training loss would fall, and the model could not write.

    Args:
        config: The model's config.json.
        name: The model's name in the message.
    """
    kind = get_model_type(config)
    if not kind or not isinstance(config.get("text_config") or {}, dict):
        return _describe_unreadable_config(name)
    if is_encoder_decoder(config):
        return (
            f"model.model_name_or_path is {name}, which is an encoder-decoder ({kind}), but must "
            "be a causal decoder such as GPT-2, Llama or Qwen: lorafleet does not train "
            "encoder-decoders"
        )
    if is_causal(config):
        return None
    # The type is causal, but this config switches on attention in both directions.
    if kind in CAUSAL_TYPES:
        description = (
            f"of type {kind} with attention in both directions, so its tokens see the answer that "
            "they predict"
        )
    elif kind in DECODER_IF_CONFIGURED:
        description = (
            f"an encoder ({kind} without is_decoder: true), so its tokens see the answer that they "
            "predict"
        )
    else:
        description = f"of type {kind}, which is not a causal decoder"
    return (
        f"model.model_name_or_path is {name}, which is {description}, but must be a causal decoder "
        "such as GPT-2, Llama or Qwen for a task that generates text"
    )


def _describe_unreadable_config(name: str) -> str:
    return (
        f"model.model_name_or_path is {name}, whose config.json has no model_type (or a "
        "text_config that is not a block), so it cannot be loaded"
    )


_UNPACKABLE_TYPES = frozenset(
    """
    bailing_hybrid bamba biogpt bloom falcon_h1 falcon_mamba jamba kimi_linear lara_mini lfm3
    mamba mamba2 minimax mpt nemotron_h olmo_hybrid openai-gpt opt qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text
    recurrent_gemma rwkv xglm xlstm zamba zamba2
    """.split()
)
"""Causal types that take no position ids, or whose examples are influenced by earlier
examples of the same row.
"""


def can_pack(config: Config) -> bool:
    """Return whether a model type can keep packed examples of one row separate.

    Training checks this again.
    """
    return get_model_type(config) not in _UNPACKABLE_TYPES


def describe_packing_refusal(field: str, model: str) -> str:
    """Return the message that a model does not keep the packed examples of one row separate."""
    return f"{field} is true, but {model} cannot keep packed examples separate: set it to false"


def get_classification_refusal(config: Config, name: str) -> str | None:
    """Return why a model cannot be trained as a classifier; None if it can.

    Args:
        config: The model's config.json.
        name: The model's name in the message.
    """
    kind = get_model_type(config)
    if not kind or not isinstance(config.get("text_config") or {}, dict):
        return _describe_unreadable_config(name)
    if is_encoder_decoder(config):
        return (
            f"model.model_name_or_path is {name}, which is an encoder-decoder ({kind}), but must "
            "be an encoder such as BERT or a causal decoder such as Llama for classification"
        )
    if kind in _PADDING_SENSITIVE_TYPES:
        return (
            f"model.model_name_or_path is {name}, but models of type {kind} also read the padding "
            "of a batch, so the class of a row would depend on the other rows; use another encoder"
        )
    return None


_PADDING_SENSITIVE_TYPES = frozenset(
    (
        "canine",
        "convbert",
        "fnet",
        "funnel",
        "nystromformer",
        "perceiver",
        "reformer",
        "xlnet",
        "yoso",
    )
)
"""Model types whose result for a row depends on the amount of padding."""


def get_length_refusal(config: Config, name: str, max_length: int) -> str | None:
    """Return why rows of `max_length` tokens do not fit a model; None if they fit."""
    positions = get_max_positions(config)
    if not positions or max_length <= positions:
        return None
    return (
        f"model.max_length is {max_length}, but {name} has only {positions} learnt positions: set "
        f"model.max_length to at most {positions}"
    )


def get_num_labels(config: Config) -> int | None:
    """Return the number of classes in the config of a classifier; None for other models.

    A classifier whose config names neither classes nor their number has two, as in
    transformers.
    """
    if not any(name.endswith("ForSequenceClassification") for name in _list_architectures(config)):
        return None
    labels = config.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    classes = config.get("num_labels")
    return classes if isinstance(classes, int) and classes > 0 else 2
