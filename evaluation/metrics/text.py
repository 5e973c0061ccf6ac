"""Metrics of what a model wrote, a row at a time, underneath by rouge_score. R rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from lorafleet.evaluation.metrics.predictions import Ratio
from lorafleet.jobs.schema.metrics import TEXT_METRICS

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Embedder = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(predictions, references) -> BERTScore F1 of each."""

MOST_WORDS = 3000
"""Of a text for ROUGE: its longest common subsequences take a second for two such texts, and four times as long for
twice the words."""
_UNSPACED = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Hiragana}\p{Katakana}\p{Han}]"
"""Scripts that put no spaces between words: there a character is a word."""
_WORD = regex.compile(rf"{_UNSPACED}|[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]+", regex.VERSION1)
_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


class Words:
    """rouge_score's own words (lower case, Porter's stems of those over three letters) where a text has English letters
    alone, and the letters of any script elsewhere, where rouge_score would drop them."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem: Callable[[str], str] = cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        words = _WORD.findall(text.lower())
        return [self.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


@cache
def _rouge(names: tuple[str, ...]) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(names), use_stemmer=True, tokenizer=Words())


def text_metrics(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[str], embedder: Embedder | None = None
) -> dict[str, Ratio]:
    """The named metrics of each row. An empty prediction gets 0 from all but exact_match against an empty reference.

    `embedder` is needed for bertscore_f1.
    """
    columns: dict[str, np.ndarray] = {}
    rouges = tuple(name for name in names if name.startswith("rouge"))
    if rouges:
        found = [_rouge_row(rouges, *pair) for pair in zip(predictions, references, strict=True)]
        columns = {name: np.array([row[name] for row in found]) for name in rouges}
    if "exact_match" in names:
        pairs = zip(map(_bare, predictions), map(_bare, references), strict=True)
        columns["exact_match"] = np.array([float(p == r) for p, r in pairs])
    if "contains" in names:
        pairs = zip(map(_bare, predictions), map(_bare, references), strict=True)
        columns["contains"] = np.array([float(bool(r) and r in p) for p, r in pairs])
    if "bertscore_f1" in names:
        assert embedder is not None
        columns["bertscore_f1"] = embedder(predictions, references)
    ratios = {name: (values, np.ones(len(predictions))) for name, values in columns.items()}
    if "length_ratio" in names:
        ratios["length_ratio"] = (_lengths(predictions), _lengths(references))
    return {name: ratios[name] for name in names if name in TEXT_METRICS}


def _rouge_row(names: tuple[str, ...], prediction: str, reference: str) -> dict[str, float]:
    texts = [_short(reference), _short(prediction)]
    found: dict[str, Any] = {}
    if whole := tuple(name for name in names if name != "rougeLsum"):
        found |= _rouge(whole).score(*texts)
    if "rougeLsum" in names:  # sentences on lines of their own, as its definition wants them
        found |= _rouge(("rougeLsum",)).score(*map(_by_sentence, texts))
    return {name: float(found[name].fmeasure) for name in names}


def _short(text: str) -> str:
    """The first words of a text that is too long."""
    for number, word in enumerate(_WORD.finditer(text)):
        if number == MOST_WORDS:
            return text[: word.start()]
    return text


def _by_sentence(text: str) -> str:
    return "\n".join(part for part in _SENTENCE_END.split(text) if part and part.strip())


def _bare(text: str) -> str:
    return text.strip().casefold()


def _lengths(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(_WORD.findall(text)) for text in texts], dtype=float)
