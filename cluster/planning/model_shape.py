"""Read the shape of a transformer from its config alone: no weights, no torch. Pure.

A plan must work for a model that is not downloaded. A model type that is not in the
tables has no shape, and the plan then says that its memory is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Reads = Literal["attention", "attended", "feed_forward", "inner"]
"""The tensor of a block that a matrix reads: attention's input (`attention`) or output
(`attended`), or the input (`feed_forward`) or middle (`inner`) of the feed-forward part.
"""
Family = Literal["bert", "gpt", "llama"]
"""Architecture of a block, which determines the tensors that it keeps for the backward pass."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer: its path in its block, its widths, and the tensor it reads."""

    path: str
    fan_in: int
    fan_out: int
    reads: Reads = "attention"

    @property
    def size(self) -> int:
        """Return the number of weights, without the bias."""
        return self.fan_in * self.fan_out

    def is_named(self, names: Iterable[str]) -> bool:
        """Return whether PEFT's `target_modules` select it.

        That is so if its path, or the end of its path, equals one of the names.
        """
        return any(self.path == name or self.path.endswith(f".{name}") for name in names)


def select_matrices(matrices: Iterable[Matrix], names: str | tuple[str, ...]) -> list[Matrix]:
    """Return the matrices that PEFT's `target_modules` select; `all-linear` selects all of them.

    Args:
        names: `all-linear`, or names of layers.
    """
    return [matrix for matrix in matrices if isinstance(names, str) or matrix.is_named(names)]


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model that decide its memory and the size of its adapters.

    `parse_shape` creates it. Biases are not part of it.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    block: tuple[Matrix, ...]
    """The matrices of one layer."""
    beside: tuple[Matrix, ...] = ()
    """Matrices outside the layers, present once (a pooler)."""
    family: Family = "llama"
    """Architecture of the blocks."""
    positions: int = 0
    """Number of learnt position embeddings; 0 if positions are computed."""
    tied: bool = True
    """True if the output head shares the embedding's weights."""
    dropout: float = 0.0
    """Dropout probability of the model's own layers."""
    attention_dropout: float = 0.0
    """Dropout probability of the attention scores."""
    norms: int = 0
    """Number of weights of all norms; 0 if unknown."""

    @property
    def parameters(self) -> int:
        """Return the number of parameters, for a model whose weights are not downloaded.

        Exact for Llama and Mistral models without biases. For others, biases and norms (below 1
        %) are left out.
        """
        embeddings = self.vocabulary * (1 if self.tied else 2) + self.positions
        return self.matrices + self.norms + self.hidden * embeddings

    @property
    def inner(self) -> int:
        """Return the width of the feed-forward part's middle."""
        return next(
            (matrix.fan_in for matrix in self.block if matrix.reads == "inner"), 4 * self.hidden
        )

    @property
    def matrices(self) -> int:
        """Return the number of weights in all matrices: the weights that QLoRA quantises."""
        return self.layers * sum(m.size for m in self.block) + sum(m.size for m in self.beside)

    def count_lora_parameters(
        self, rank: int, names: str | tuple[str, ...], *, dora: bool = False
    ) -> int:
        """Return the number of LoRA parameters.

        They are rank x (in + out) for every adapted matrix (`all-linear` adapts all), and with
        DoRA one magnitude per output row.
        """

        def count_added(matrices: Iterable[Matrix]) -> int:
            return sum(
                rank * (m.fan_in + m.fan_out) + (m.fan_out if dora else 0)
                for m in select_matrices(matrices, names)
            )

        return self.layers * count_added(self.block) + count_added(self.beside)


_CONFIG_KEYS = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"),
}
"""Dimension -> the keys that different configs use for it."""
_DROPOUTS = ("hidden_dropout_prob", "resid_pdrop", "resid_dropout", "dropout")
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
_DEFAULT_DROPOUT = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "gpt2"), 0.1
)
"""Model type -> the dropout that transformers uses if the config does not set it."""
_SquareLayout = tuple[tuple[str, ...], str, str]
_BERT_LAYOUT: _SquareLayout = (
    (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    "intermediate.dense",
    "output.dense",
)
_SQUARE_LAYOUTS: dict[str, _SquareLayout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT_LAYOUT),
    "distilbert": (
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        "ffn.lin1",
        "ffn.lin2",
    ),
    "gpt_neo": (
        tuple(f"attn.attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        "mlp.c_fc",
        "mlp.c_proj",
    ),
}
"""Model type -> its square matrices, and the two of its feed-forward part."""
_LLAMA_TYPES = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "olmo", "olmo2"),
    *("gemma", "gemma2", "gemma3_text"),
)
"""Model types with Llama's seven matrices per block, under Llama's names."""
_SQUARE_READS: tuple[Reads, ...] = ("attention", "attention", "attention", "attended")


def parse_shape(config: dict[str, Any]) -> Shape | None:
    """Return the shape that a config.json describes.

    Returns None if the config is incomplete or its model type is not supported.
    """
    # Models with several inputs have the language model's config in a block of its own.
    config = config.get("text_config") or config
    dimensions = {
        dimension: next((config[name] for name in names if config.get(name)), None)
        for dimension, names in _CONFIG_KEYS.items()
    }
    kind = str(config.get("model_type", ""))
    is_supported = kind in (*_SQUARE_LAYOUTS, *_LLAMA_TYPES, "gpt2")
    if not (
        is_supported and dimensions["hidden"] and dimensions["layers"] and config.get("vocab_size")
    ):
        return None
    hidden, layers, heads = (
        int(dimensions["hidden"]),
        int(dimensions["layers"]),
        int(dimensions["heads"] or 1),
    )
    inner = int(dimensions["inner"] or 4 * hidden)
    family: Family = (
        "gpt" if kind in ("gpt2", "gpt_neo") else "bert" if kind in _SQUARE_LAYOUTS else "llama"
    )
    positions = config.get("max_position_embeddings") or config.get("n_positions") or 0
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        vocabulary=int(config["vocab_size"]),
        block=_build_block(kind, config, hidden, inner, heads),
        beside=(Matrix("pooler.dense", hidden, hidden),) if kind == "bert" else (),
        family=family,
        positions=0 if family == "llama" else int(positions),
        tied=bool(config.get("tie_word_embeddings", family != "llama" or kind.startswith("gemma"))),
        dropout=_get_first(config, _DROPOUTS, _DEFAULT_DROPOUT.get(kind, 0.0)),
        attention_dropout=_get_first(config, _ATTENTION_DROPOUTS, _DEFAULT_DROPOUT.get(kind, 0.0)),
        norms=(2 * layers + 1) * hidden
        if kind in ("llama", "mistral")
        else 0,  # two per layer, and the final norm
    )


def _get_first(config: dict[str, Any], names: tuple[str, ...], default: float) -> float:
    return float(next((config[name] for name in names if config.get(name) is not None), default))


def _build_block(
    kind: str, config: dict[str, Any], hidden: int, inner: int, heads: int
) -> tuple[Matrix, ...]:
    if kind == "gpt2":  # query, key and value are one matrix
        return _build_feed_forward_block(
            hidden,
            inner,
            "mlp.c_fc",
            "mlp.c_proj",
            Matrix("attn.c_attn", hidden, 3 * hidden),
            Matrix("attn.c_proj", hidden, hidden, "attended"),
        )
    if kind in _SQUARE_LAYOUTS:
        square, up, down = _SQUARE_LAYOUTS[kind]
        return _build_feed_forward_block(
            hidden,
            inner,
            up,
            down,
            *(
                Matrix(path, hidden, hidden, reads)
                for path, reads in zip(square, _SQUARE_READS, strict=True)
            ),
        )
    # Some models (Qwen3, Gemma) have heads whose widths do not add up to the hidden size.
    width = int(config.get("head_dim") or hidden // heads)
    # Grouped-query attention has fewer heads for keys and values than for queries.
    pairs = int(config.get("num_key_value_heads") or heads)
    return (
        Matrix("self_attn.q_proj", hidden, heads * width),
        Matrix("self_attn.k_proj", hidden, pairs * width),
        Matrix("self_attn.v_proj", hidden, pairs * width),
        Matrix("self_attn.o_proj", heads * width, hidden, "attended"),
        Matrix("mlp.gate_proj", hidden, inner, "feed_forward"),
        Matrix("mlp.up_proj", hidden, inner, "feed_forward"),
        Matrix("mlp.down_proj", inner, hidden, "inner"),
    )


def _build_feed_forward_block(
    hidden: int, inner: int, up: str, down: str, *attention: Matrix
) -> tuple[Matrix, ...]:
    return (
        *attention,
        Matrix(up, hidden, inner, "feed_forward"),
        Matrix(down, inner, hidden, "inner"),
    )
