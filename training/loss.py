"""The loss as a sum, so that it can be divided by the whole effective batch's targets, wherever its rows are.

B rows, T tokens, K kept positions, C classes, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.data import IGNORED, Batch


class LossModule(nn.Module):
    """A model with its task's loss; the thing that DDP wraps."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model = model
        self.classifies = task == "classification"
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        prompt: Any = getattr(model, "active_peft_config", None)
        self.before = prompt.num_virtual_tokens if prompt is not None and prompt.is_prompt_learning else 0
        self.keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the negative log-likelihoods of all targets, detail per row).

        The detail is logits_BC for classification and the sum of each row's negative log-likelihood (B) otherwise.
        """
        if self.classifies:
            logits_BC = self.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits.float()
            return functional.cross_entropy(logits_BC, batch.labels, reduction="sum"), logits_BC.detach()
        nll_BK = self._token_losses(batch)
        return nll_BK.sum(), nll_BK.detach().sum(dim=1)

    def _token_losses(self, batch: Batch) -> torch.Tensor:
        """The head's rows are worked out only for positions that predict a target in some row: with masked prompts
        and a vocabulary of 50,000 that is most of a small model's work saved."""
        targets_BT = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        kept_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        kept_in_logits_K = kept_K + self.before  # learnt embeddings stand before the row
        options = {"logits_to_keep": kept_in_logits_K} if self.keeps_logits else {}
        logits = self.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **options).logits
        if not self.keeps_logits:
            logits = logits[:, kept_in_logits_K]
        targets_BK = targets_BT[:, kept_K]
        flat = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets_BK.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return flat.view_as(targets_BK)
