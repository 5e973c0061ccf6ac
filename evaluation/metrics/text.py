"""Compute metrics of generated texts per row, ROUGE with rouge_score. R rows."""

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
"""Function (predictions, references) -> BERTScore F1 of each pair."""

MAX_WORDS = 3000
"""Most words of a text that ROUGE considers.

The longest common subsequence of two such texts takes a second, and four times as long
for twice the words.
"""
_UNSPACED = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Hiragana}\p{Katakana}\p{Han}]"
"""Scripts without spaces between words: each character counts as a word."""
_WORD = regex.compile(rf"{_UNSPACED}|[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]+", regex.VERSION1)
_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


class WordTokenizer:
    """Tokenizer for rouge_score that keeps the letters of every script.

    English texts get rouge_score's own words: lower case, and Porter stems of words of more
    than three letters. rouge_score alone would drop the letters of other scripts.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem: Callable[[str], str] = cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text, lower-cased and stemmed as rouge_score does.

        Only ASCII words are stemmed: Porter's rules are for English.
        """
        words = _WORD.findall(text.lower())
        return [self.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


@cache
def _get_rouge_scorer(names: tuple[str, ...]) -> RougeScorer:
    """Return the scorer of these variants.

    It is kept for the process, and with it the stems of words that it has seen.
    """
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(names), use_stemmer=True, tokenizer=WordTokenizer())


def compute_text_metrics(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    embedder: Embedder | None = None,
) -> dict[str, Ratio]:
    """Compute the named metrics of each row.

    An empty prediction gets 0, except from exact_match against an empty reference.

    Args:
        names: Metrics. Names of other kinds of metrics are ignored.
        predictions: Answers of the model.
        references: What they are compared with; as many as predictions.
        embedder: Needed for bertscore_f1 only, because it loads an encoder.

    Returns:
        Metric -> numerators and denominators per row, in the order of `names`. The
            denominators are 1, except for length_ratio: there they are the words of the
            references, so that long answers weigh more.
    """
    columns: dict[str, np.ndarray] = {}
    rouges = tuple(name for name in names if name.startswith("rouge"))
    if rouges:
        rouge_rows = [
            _compute_rouge_row(rouges, *pair) for pair in zip(predictions, references, strict=True)
        ]
        columns = {name: np.array([row[name] for row in rouge_rows]) for name in rouges}
    if "exact_match" in names:
        pairs = zip(map(_normalize, predictions), map(_normalize, references), strict=True)
        columns["exact_match"] = np.array([float(p == r) for p, r in pairs])
    if "contains" in names:
        pairs = zip(map(_normalize, predictions), map(_normalize, references), strict=True)
        columns["contains"] = np.array([float(bool(r) and r in p) for p, r in pairs])
    if "bertscore_f1" in names:
        assert embedder is not None
        columns["bertscore_f1"] = embedder(predictions, references)
    ratios = {name: (values, np.ones(len(predictions))) for name, values in columns.items()}
    if "length_ratio" in names:
        ratios["length_ratio"] = (_count_words(predictions), _count_words(references))
    return {name: ratios[name] for name in names if name in TEXT_METRICS}


def _compute_rouge_row(names: tuple[str, ...], prediction: str, reference: str) -> dict[str, float]:
    # rouge_score takes the reference first.
    texts = [_cut_text(reference), _cut_text(prediction)]
    rouge_scores: dict[str, Any] = {}
    if text_names := tuple(name for name in names if name != "rougeLsum"):
        rouge_scores |= _get_rouge_scorer(text_names).score(*texts)
    if "rougeLsum" in names:  # its definition expects one sentence per line
        rouge_scores |= _get_rouge_scorer(("rougeLsum",)).score(*map(_split_sentences, texts))
    return {name: float(rouge_scores[name].fmeasure) for name in names}


def _cut_text(text: str) -> str:
    """Return the first `MAX_WORDS` words of a text."""
    for index, word in enumerate(_WORD.finditer(text)):
        if index == MAX_WORDS:
            return text[: word.start()]
    return text


def _split_sentences(text: str) -> str:
    """Return a text with one sentence per line.

    rouge_score's own splitter needs a model of nltk that is downloaded, so sentences are
    split at punctuation.
    """
    return "\n".join(part for part in _SENTENCE_END.split(text) if part and part.strip())


def _normalize(text: str) -> str:
    """Return a text without surrounding space, in folded case."""
    return text.strip().casefold()


def _count_words(texts: Sequence[str]) -> np.ndarray:
    """Return the number of words of each text."""
    return np.array([len(_WORD.findall(text)) for text in texts], dtype=float)
