"""Tiny models of many types, with random weights: a type's own config class with small sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import word_tokenizer

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim"), 32),
    "word_embed_proj_dim": 32,
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "num_layers",
            "n_layers",
            "encoder_layers",
            "decoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    "use_cache": False,
    "max_seq_len": 64,
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop"), 0.0
    ),
    **dict.fromkeys(
        ("attn_pdrop", "dropout", "attention_dropout", "classifier_dropout", "seq_classif_dropout"),
        0.0,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.2,
}
_ATTENTION = {"gpt_neo": {"attention_types": [[["global"], 2]]}}


def tiny_config(kind: str, positions: int = 64, **fields: Any) -> Any:
    """Return a config of a model type with small sizes, as far as the type has them."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    names = set(config_class().to_dict()) | set(config_class.attribute_map)
    small = {name: value for name, value in _SMALL.items() if name in names}
    small |= {
        name: positions
        for name in ("max_position_embeddings", "n_positions", "n_ctx")
        if name in names
    }
    if "layer_types" in names:
        small["layer_types"] = None
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return config_class(**small | _ATTENTION.get(kind, {}) | tokens | fields)


def save_tiny(folder: Path, kind: str, auto: str = "AutoModel", **fields: Any) -> Path:
    """Write a tiny model and a tokenizer of the tests' words; `auto` names transformers' class for
    it.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    size = word_tokenizer(
        folder, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )
    config = tiny_config(kind, **{"vocab_size": size} | fields)
    getattr(transformers, auto).from_config(config).save_pretrained(folder)
    return folder
