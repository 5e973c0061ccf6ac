"""Compute BERTScore (Zhang et al., 2020) with any transformers encoder.

There are no idf weights and no rescaling with a baseline. B pairs, P and Q tokens of
predictions and references, D hidden size.

The package bert-score 0.3.13 fails with transformers 5 on an empty candidate. The
scores here equal those of the package with the same encoder;
`test_bertscore_is_bert_scores` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.jobs.errors import AssetError

_BATCH_SIZE = 32


@dataclass(frozen=True)
class BertScore:
    """A loaded encoder that is cut after the layer whose embeddings are matched.

    `load` creates it and keeps it for the process.
    """

    model: Any
    tokenizer: Any
    most_tokens: int
    """Longest text in tokens. Longer texts are cut, because the encoder has no more positions."""

    def compute_f1(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Return the F1 of each pair (R); 0 if either text is empty.

        Each token is matched with the token of the other text whose embedding has the largest
        cosine. As in the package bert-score, the two tokens that mark a text's ends can be
        matched, but are not counted themselves.
        """
        import torch

        f1_R = np.zeros(len(predictions))
        rows = [
            row
            for row, pair in enumerate(zip(predictions, references, strict=True))
            if all(map(str.strip, pair))
        ]
        rows.sort(
            key=lambda row: len(predictions[row]) + len(references[row])
        )  # similar lengths need little padding
        with torch.inference_mode():
            for start in range(0, len(rows), _BATCH_SIZE):
                batch_rows = rows[start : start + _BATCH_SIZE]
                f1_R[batch_rows] = self._compute_batch(
                    [predictions[row] for row in batch_rows],
                    [references[row] for row in batch_rows],
                )
        return f1_R

    def _compute_batch(self, predictions: list[str], references: list[str]) -> np.ndarray:
        """Return the F1 of the pairs of one batch (B)."""
        vectors_BPD, real_BP, counts_BP = self._embed(predictions)
        others_BQD, real_BQ, counts_BQ = self._embed(references)
        similarity_BPQ = vectors_BPD @ others_BQD.transpose(1, 2)
        similarity_BPQ = similarity_BPQ * (real_BP[:, :, None] * real_BQ[:, None, :])
        precision_B = (similarity_BPQ.amax(dim=2) * counts_BP).sum(dim=1) / counts_BP.sum(dim=1)
        recall_B = (similarity_BPQ.amax(dim=1) * counts_BQ).sum(dim=1) / counts_BQ.sum(dim=1)
        sum_B = precision_B + recall_B
        f1_B = (2 * precision_B * recall_B / sum_B).nan_to_num(0.0)
        values: np.ndarray = f1_B.double().cpu().numpy()
        return values

    def _embed(self, texts: list[str]) -> tuple[Any, Any, Any]:
        """Return (unit vectors BTD, 1 for real tokens BT, 1 for counted tokens BT)."""
        encoded = self.tokenizer(
            [text.strip() for text in texts],
            padding=True,
            truncation=True,
            max_length=self.most_tokens,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        marks_BT = encoded.pop("special_tokens_mask")
        vectors_BTD = self.model(**encoded).last_hidden_state
        vectors_BTD = vectors_BTD / vectors_BTD.norm(dim=-1, keepdim=True)
        real_BT = encoded["attention_mask"].float()
        counts_BT = real_BT * (1 - marks_BT.float())
        # The tokenizer dropped all characters of the text: count its two end tokens instead.
        uncounted_B = counts_BT.sum(dim=1, keepdim=True) == 0
        return vectors_BTD, real_BT, counts_BT + uncounted_B * real_BT


@lru_cache(maxsize=2)
def load(folder: Path, layer: int | None, device: str) -> BertScore:
    """Load the encoder in a folder, or return it if this process has it.

    Args:
        folder: Folder of the encoder.
        layer: The encoder is cut after this layer, counted from 1. None keeps all layers.
        device: Device to load it on.

    Raises:
        AssetError: There is no encoder in the folder, or it has no such layer.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        # A folder of this machine: nothing is downloaded.
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
            folder, trust_remote_code=False
        )
        model = AutoModel.from_pretrained(  # nosec B615
            folder, use_safetensors=True, trust_remote_code=False
        )
        model = model.eval().to(device)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"evaluate.bertscore_model cannot be loaded from {folder}: {error}"
        ) from error
    blocks = getattr(getattr(model, "encoder", None), "layer", None)
    if layer is not None:
        if blocks is None or layer > len(blocks):
            layers_text = f"{len(blocks)} layers" if blocks is not None else "no separate layers"
            raise AssetError(
                f"evaluate.bertscore_layer is {layer}, but {folder.name} has {layers_text}"
            )
        # The output of the last layer is then what the score needs, and further layers cost no
        # time.
        model.encoder.layer = blocks[:layer]
    positions = int(getattr(model.config, "max_position_embeddings", 512))
    return BertScore(model, tokenizer, min(int(tokenizer.model_max_length), positions))
