"""Compute the loss as a sum, to be divided by the targets of the whole effective batch.

The sum does not depend on which process holds which rows. Dimensions: B rows, T tokens,
K kept positions, N = B x K, D hidden size, C classes, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorafleet.jobs.trials.defaults import LOGITS_AT_ONCE
from lorafleet.training.data import IGNORED, Batch

_MIN_CHUNK_ROWS = 64


class ChunkedNll(torch.autograd.Function):
    """Negative log-likelihoods of targets behind a frozen head, without storing all logits.

    The gradient of the hidden states (softmax minus target, times the head) is computed
    with the loss, chunk by chunk, and only it is kept: N x D numbers instead of N x V
    twice. The head is frozen, so its gradient is not computed. Related work: Liger Kernel
    (Hsu et al., 2024) has the idea with the head's gradient; Cut Cross-Entropy (Wijmans et
    al., 2024) has the memory argument.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor
    ) -> torch.Tensor:
        """Return nll_N in float32, 0 where the target is IGNORED.

        Args:
            hidden_ND: Hidden states of the kept positions.
            head_VD: Weights of the head. They get no gradient.
            targets_N: Token ids, or IGNORED.
        """
        # Bounds the memory of the logits. The minimum keeps a chunk from shrinking to a few rows
        # with a very large vocabulary.
        rows = max(_MIN_CHUNK_ROWS, LOGITS_AT_ONCE // head_VD.shape[0])
        # Losses are summed over a whole batch, for which 16 bits are too coarse.
        nll_N = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_ND), rows):
            chunk = slice(start, start + rows)
            is_target = targets_N[chunk] != IGNORED
            target = targets_N[chunk].clamp(min=0).unsqueeze(1)
            logits = (hidden_ND[chunk] @ head_VD.t()).float()
            top, picked = logits.amax(dim=1, keepdim=True), logits.gather(1, target)
            logits.sub_(
                top
                # Unnormalised probabilities: the exponential is used for the loss and the gradient.
            ).exp_()
            total = logits.sum(dim=1, keepdim=True)
            nll_N[chunk] = torch.where(is_target, (total.log() + top - picked).squeeze(1), 0.0)
            if gradient_ND is not None:
                # Subtract the target in float32: after a product in bfloat16, two almost equal rows
                # would cancel and the gradient of a token that the model is sure of would vanish.
                logits.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
                gradient_ND[chunk] = (logits.to(head_VD.dtype) @ head_VD) * is_target.unsqueeze(1)
        ctx.save_for_backward(*([gradient_ND] if gradient_ND is not None else []))
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the kept gradient, weighted by `grad_N`."""
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_N.unsqueeze(1).to(gradient_ND.dtype), None, None


class LossModule(nn.Module):
    """A model with its task's loss: the module that strategies wrap.

    The loss must be part of the wrapped module, because DDP and DeepSpeed hook the forward
    pass of what they wrap, and the head's weights may be gathered only inside it.

    Args:
        task: The job's task.
        chunked: Compute the loss without storing all logits where the head allows it
            (`train.chunked_loss`).
        autocast: Number format of mixed precision. None: off.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str,
        *,
        chunked: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast
        self.classifies = task == "classification"
        # PEFT's wrapper forwards any keyword, so the signature of the model inside decides.
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        prompt: Any = getattr(model, "active_peft_config", None)
        self.before = (
            prompt.num_virtual_tokens if prompt is not None and prompt.is_prompt_learning else 0
        )
        self.keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self.head_is_last: bool | None = None  # determined in the first forward pass
        self.frozen_head = (
            _find_frozen_head(inner)
            if chunked and not self.classifies and self.keeps_logits
            else None
        )

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed negative log-likelihood of all targets, and a detail per row.

        The detail is logits_BC for classification, and otherwise the sum of each row's negative
        log-likelihoods (B).
        """
        with self._open_autocast(batch.ids_BT.device.type):
            if self.classifies:
                logits_BC = self.model(**batch.inputs).logits.float()
                return functional.cross_entropy(
                    logits_BC, batch.labels, reduction="sum"
                ), logits_BC.detach()
            nll_BK = self._compute_token_losses(batch)
            return nll_BK.sum(), nll_BK.detach().sum(dim=1)

    def compute_row_losses(self, batch: Batch) -> torch.Tensor:
        """Return the summed negative log-likelihood of each row (B), with its gradient.

        For batches whose rows belong to different trials.
        """
        with self._open_autocast(batch.ids_BT.device.type):
            if self.classifies:
                logits_BC = self.model(**batch.inputs).logits.float()
                return functional.cross_entropy(logits_BC, batch.labels, reduction="none")
            return self._compute_token_losses(batch).sum(dim=1)

    def _open_autocast(self, device: str) -> AbstractContextManager[Any]:
        """Return a context for mixed precision.

        It is opened here and not around a strategy: DeepSpeed's engine disables autocast for
        the module that it wraps unless its own configuration enables it.
        """
        return (
            torch.autocast(device, dtype=self.autocast_dtype)
            if self.autocast_dtype
            else nullcontext()
        )

    def _compute_token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the loss of each kept position (B x K).

        The head is computed only for positions that predict a target in some row. With masked
        prompts and a vocabulary of 50,000, this saves most of a small model's work.
        """
        # Position t predicts token t + 1; the last position predicts nothing.
        targets_BT = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        # Positions are shared by all rows, because `logits_to_keep` takes one list for the whole
        # batch.
        kept_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        kept_in_logits_K = kept_K + self.before  # learnt embeddings precede the row
        targets_BK = targets_BT[:, kept_K]
        options = {"logits_to_keep": kept_in_logits_K} if self.keeps_logits else {}
        if self.frozen_head is not None:
            with _replace_logits_with_losses(self.frozen_head, targets_BK) as head_losses:
                losses: Any = self.model(**batch.inputs, **options).logits
            # Gemma 2 caps its logits and Granite divides them. Such a model changes the losses that
            # stand in their place, which one comparison in the first pass reveals.
            if self.head_is_last is None:
                self.head_is_last = torch.equal(losses.detach(), head_losses[0])
            if self.head_is_last:
                return losses.squeeze(-1)
            # The losses of this pass are wrong, so it is repeated below with the plain loss, as are
            # all later ones.
            self.frozen_head = None
        logits = self.model(**batch.inputs, **options).logits
        if not self.keeps_logits:
            logits = logits[:, kept_in_logits_K]
        flat = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            targets_BK.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return flat.view_as(targets_BK)


def _find_frozen_head(model: Any) -> nn.Linear | None:
    """Return a causal LM's head if it is a plain frozen matrix, else None.

    Subclasses of nn.Linear are excluded: a quantised or adapted head computes something
    else.
    """
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    return head if is_plain else None


@contextmanager
def _replace_logits_with_losses(
    head: nn.Linear, targets_BK: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Let the head return losses (B x K x 1) instead of logits, and yield a list of them.

    The losses are computed in the head's own forward pass, because a strategy may gather
    the head's weights only there.
    """

    def compute_losses(hidden_BKD: torch.Tensor) -> torch.Tensor:
        nll_N = ChunkedNll.apply(hidden_BKD.flatten(0, 1), head.weight, targets_BK.flatten())
        outputs.append(nll_N.detach().view(*targets_BK.shape, 1))
        return nll_N.view(*targets_BK.shape, 1)

    outputs: list[torch.Tensor] = []
    # An instance attribute hides the class's method; deleting it restores the method.
    head.forward = compute_losses
    try:
        yield outputs
    finally:
        del head.forward
