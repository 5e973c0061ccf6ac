"""A transformer's matrices, from its config alone: no weights, no torch. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Reads = Literal["attention", "attended", "feed_forward", "inner"]
"""Which of a block's tensors a matrix reads: attention's input or output, the feed-forward part's input or middle."""
Family = Literal["bert", "gpt", "llama"]
"""How a block is built, as far as what it keeps for the backward pass goes."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer: where it is in its block, its sides, and what it reads."""

    path: str
    fan_in: int
    fan_out: int
    reads: Reads = "attention"

    @property
    def size(self) -> int:
        """Weights, without the bias."""
        return self.fan_in * self.fan_out

    def is_named(self, names: Iterable[str]) -> bool:
        """Whether one of PEFT's `target_modules` means it: the path's end."""
        return any(self.path == name or self.path.endswith(f".{name}") for name in names)


def named(matrices: Iterable[Matrix], names: str | tuple[str, ...]) -> list[Matrix]:
    """Those that PEFT's `target_modules` mean: `all-linear`, all of them."""
    return [matrix for matrix in matrices if isinstance(names, str) or matrix.is_named(names)]


@dataclass(frozen=True)
class Shape:
    """What memory and adapters depend on."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    block: tuple[Matrix, ...]
    """The matrices of one layer."""
    beside: tuple[Matrix, ...] = ()
    """Matrices that there are once (a pooler)."""
    family: Family = "llama"
    """How its blocks are built."""
    positions: int = 0
    """Learnt positions; 0 where they are worked out."""
    tied: bool = True
    """Whether the output head is the embedding."""
    dropout: float = 0.0
    """Of the model's own layers."""
    attention_dropout: float = 0.0
    """Of attention's scores."""
    norms: int = 0
    """Weights of all norms, where they are known."""

    @property
    def parameters(self) -> int:
        """Number of parameters, for a model whose weights are not downloaded.

        Exact for Llama and Mistral models without biases. For others, biases and norms (below 1 %) are left out.
        """
        embeddings = self.vocabulary * (1 if self.tied else 2) + self.positions
        return self.matrices + self.norms + self.hidden * embeddings

    @property
    def inner(self) -> int:
        """Width of the feed-forward part's middle."""
        return next((matrix.fan_in for matrix in self.block if matrix.reads == "inner"), 4 * self.hidden)

    @property
    def matrices(self) -> int:
        """Weights of all matrices: what QLoRA quantises."""
        return self.layers * sum(m.size for m in self.block) + sum(m.size for m in self.beside)

    def lora_parameters(self, rank: int, names: str | tuple[str, ...], *, dora: bool = False) -> int:
        """rank x (in + out) for every adapted matrix (`all-linear`: all), and a magnitude a row with DoRA."""

        def added(matrices: Iterable[Matrix]) -> int:
            return sum(rank * (m.fan_in + m.fan_out) + (m.fan_out if dora else 0) for m in named(matrices, names))

        return self.layers * added(self.block) + added(self.beside)


_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"),
}
"""One thing, as different configs call it."""
_DROPOUTS = ("hidden_dropout_prob", "resid_pdrop", "resid_dropout", "dropout")
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
_USUAL_DROPOUT = dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "gpt2"), 0.1)
"""What transformers takes where a config does not say."""
_Square = tuple[tuple[str, ...], str, str]
_BERT: _Square = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    "intermediate.dense",
    "output.dense",
)
_SQUARES: dict[str, _Square] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
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
_LLAMAS = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "olmo", "olmo2"),
    *("gemma", "gemma2", "gemma3_text"),
)
"""Model types with Llama's seven matrices a block, under Llama's names."""
_SQUARE_READS: tuple[Reads, ...] = ("attention", "attention", "attention", "attended")


def shape(config: dict[str, Any]) -> Shape | None:
    """The shape that a config.json describes, or None where it says too little or is of a kind that is not known."""
    config = config.get("text_config") or config
    found = {what: next((config[name] for name in names if config.get(name)), None) for what, names in _NAMES.items()}
    kind = str(config.get("model_type", ""))
    known = kind in (*_SQUARES, *_LLAMAS, "gpt2")
    if not (known and found["hidden"] and found["layers"] and config.get("vocab_size")):
        return None
    hidden, layers, heads = int(found["hidden"]), int(found["layers"]), int(found["heads"] or 1)
    inner = int(found["inner"] or 4 * hidden)
    family: Family = "gpt" if kind in ("gpt2", "gpt_neo") else "bert" if kind in _SQUARES else "llama"
    positions = config.get("max_position_embeddings") or config.get("n_positions") or 0
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        vocabulary=int(config["vocab_size"]),
        block=_block(kind, config, hidden, inner, heads),
        beside=(Matrix("pooler.dense", hidden, hidden),) if kind == "bert" else (),
        family=family,
        positions=0 if family == "llama" else int(positions),
        tied=bool(config.get("tie_word_embeddings", family != "llama" or kind.startswith("gemma"))),
        dropout=_first(config, _DROPOUTS, _USUAL_DROPOUT.get(kind, 0.0)),
        attention_dropout=_first(config, _ATTENTION_DROPOUTS, _USUAL_DROPOUT.get(kind, 0.0)),
        norms=(2 * layers + 1) * hidden if kind in ("llama", "mistral") else 0,  # two a layer, and the last
    )


def _first(config: dict[str, Any], names: tuple[str, ...], otherwise: float) -> float:
    return float(next((config[name] for name in names if config.get(name) is not None), otherwise))


def _block(kind: str, config: dict[str, Any], hidden: int, inner: int, heads: int) -> tuple[Matrix, ...]:
    if kind == "gpt2":  # query, key and value are one matrix
        return _feed_forward(hidden, inner, "mlp.c_fc", "mlp.c_proj", Matrix("attn.c_attn", hidden, 3 * hidden),
                             Matrix("attn.c_proj", hidden, hidden, "attended"))  # fmt: skip
    if kind in _SQUARES:
        square, up, down = _SQUARES[kind]
        return _feed_forward(
            hidden,
            inner,
            up,
            down,
            *(Matrix(path, hidden, hidden, reads) for path, reads in zip(square, _SQUARE_READS, strict=True)),
        )
    width = int(config.get("head_dim") or hidden // heads)
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


def _feed_forward(hidden: int, inner: int, up: str, down: str, *attention: Matrix) -> tuple[Matrix, ...]:
    return (*attention, Matrix(up, hidden, inner, "feed_forward"), Matrix(down, inner, hidden, "inner"))
