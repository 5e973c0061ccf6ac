"""The loss as a sum, so that it can be divided by the whole effective batch's targets, wherever its rows are.

B rows, T tokens, K kept positions, N = B x K, D hidden size, C classes, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lorafleet.jobs.trials.defaults import LOGITS_AT_ONCE
from lorafleet.training.data import IGNORED, Batch
from torch import nn
from torch.nn import functional

_FEWEST_ROWS = 64


class ChunkedNll(torch.autograd.Function):
    """Negative log-likelihoods of targets behind a frozen head, without ever holding all logits.

    The gradient of the hidden states (softmax minus target, times the head) is worked out with the loss, chunk by
    chunk, and only it is kept: N x D numbers instead of N x V twice. The head's own is not made, since it is frozen
    (Liger Kernel, Hsu et al., 2024, has the idea with the head's gradient; Cut Cross-Entropy, Wijmans et al., 2024, the
    memory argument).
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """nll_N in float32, 0 where the target is IGNORED."""
        rows = max(_FEWEST_ROWS, LOGITS_AT_ONCE // head_VD.shape[0])
        nll_N = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            wanted = targets_N[part] != IGNORED
            target = targets_N[part].clamp(min=0).unsqueeze(1)
            logits = (hidden_ND[part] @ head_VD.t()).float()
            top, picked = logits.amax(dim=1, keepdim=True), logits.gather(1, target)
            logits.sub_(top).exp_()  # the probabilities, up to their sum: one exponential of each serves both
            total = logits.sum(dim=1, keepdim=True)
            nll_N[part] = torch.where(wanted, (total.log() + top - picked).squeeze(1), 0.0)
            if gradient_ND is not None:
                # The target is taken off in float32: after a product in bfloat16 two rows that are almost equal would
                # leave nothing of the gradient of a token that the model is sure of.
                logits.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
                gradient_ND[part] = (logits.to(head_VD.dtype) @ head_VD) * wanted.unsqueeze(1)
        ctx.save_for_backward(*([gradient_ND] if gradient_ND is not None else []))
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The kept gradient, weighted."""
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_N.unsqueeze(1).to(gradient_ND.dtype), None, None


class LossModule(nn.Module):
    """A model with its task's loss; the thing that strategies wrap."""

    def __init__(
        self, model: nn.Module, task: str, *, chunked: bool = True, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast
        self.classifies = task == "classification"
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        prompt: Any = getattr(model, "active_peft_config", None)
        self.before = prompt.num_virtual_tokens if prompt is not None and prompt.is_prompt_learning else 0
        self.keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self.head_is_last: bool | None = None  # seen in the first pass
        self.frozen_head = _frozen_head(inner) if chunked and not self.classifies and self.keeps_logits else None

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the negative log-likelihoods of all targets, detail per row).

        The detail is logits_BC for classification and the sum of each row's negative log-likelihood (B) otherwise.
        """
        with self._autocast(batch.ids_BT.device.type):
            if self.classifies:
                logits_BC = self.model(**batch.inputs).logits.float()
                return functional.cross_entropy(logits_BC, batch.labels, reduction="sum"), logits_BC.detach()
            nll_BK = self._token_losses(batch)
            return nll_BK.sum(), nll_BK.detach().sum(dim=1)

    def _autocast(self, device: str) -> AbstractContextManager[Any]:
        """Mixed precision, opened here and not around a strategy: DeepSpeed's engine switches it off for what it wraps
        unless its own configuration asks for it."""
        return torch.autocast(device, dtype=self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def _token_losses(self, batch: Batch) -> torch.Tensor:
        """The head's rows are worked out only for positions that predict a target in some row: with masked prompts
        and a vocabulary of 50,000 that is most of a small model's work saved."""
        targets_BT = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        kept_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        kept_in_logits_K = kept_K + self.before  # learnt embeddings stand before the row
        targets_BK = targets_BT[:, kept_K]
        options = {"logits_to_keep": kept_in_logits_K} if self.keeps_logits else {}
        if self.frozen_head is not None:
            with _head_makes_losses(self.frozen_head, targets_BK) as made:
                losses: Any = self.model(**batch.inputs, **options).logits
            if self.head_is_last is None:
                self.head_is_last = torch.equal(losses.detach(), made[0])
            if self.head_is_last:
                return losses.squeeze(-1)
            self.frozen_head = None  # this model caps or scales its logits, and did so to the losses
        logits = self.model(**batch.inputs, **options).logits
        if not self.keeps_logits:
            logits = logits[:, kept_in_logits_K]
        flat = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets_BK.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return flat.view_as(targets_BK)


def _frozen_head(model: Any) -> nn.Linear | None:
    """A causal LM's head, where it is a plain frozen matrix."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    return head if plain else None


@contextmanager
def _head_makes_losses(head: nn.Linear, targets_BK: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """While this lasts the head returns losses (B x K x 1) in the place of logits; what it made is in the list.

    They are made in the head's own forward pass, since a strategy may have its weights together only there.
    """

    def losses(hidden_BKD: torch.Tensor) -> torch.Tensor:
        found = ChunkedNll.apply(hidden_BKD.flatten(0, 1), head.weight, targets_BK.flatten())
        made.append(found.detach().view(*targets_BK.shape, 1))
        return found.view(*targets_BK.shape, 1)

    made: list[torch.Tensor] = []
    head.forward = losses
    try:
        yield made
    finally:
        del head.forward
