"""Export a merged model to ExecuTorch with XNNPACK, for phones and small devices.

Shapes: one row, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafleet.deployment.onnx_model import suppress_output
from lorafleet.deployment.runtime import PTE_FILE


def export_executorch(merged: Path, out: Path, *, classifies: bool, max_tokens: int) -> None:
    """Export a merged model as an ExecuTorch program with XNNPACK.

    The program takes one row of 1 to `max_tokens` token ids and returns logits: of each
    token, or of the classes. It has no cache.

    Args:
        merged: Folder of the merged model.
        out: Folder for the program. It is created if it does not exist.
        classifies: True for a classifier, False for a causal model.
        max_tokens: Largest number of tokens in a row.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = kind.from_pretrained(
        str(merged), attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    ).eval()

    class Whole(torch.nn.Module):
        """The model as a function of token ids alone.

        All tokens are attended to: there is no padding.
        """

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            options: dict[str, Any] = {} if classifies else {"use_cache": False}
            logits: torch.Tensor = self.model(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options
            ).logits
            return logits

    tokens = torch.export.Dim("tokens", min=1, max=max_tokens)
    with suppress_output(), torch.no_grad():
        exported = torch.export.export(
            Whole().eval(),
            # Any length but 1 will do: the exporter would take a dimension of 1 as fixed.
            (torch.ones((1, 7), dtype=torch.int64),),
            dynamic_shapes=({1: tokens},),
            strict=False,
        )
        program = to_edge_transform_and_lower(
            exported, partitioner=[XnnpackPartitioner()]
        ).to_executorch()
    out.mkdir(parents=True, exist_ok=True)
    with (out / PTE_FILE).open("wb") as sink:
        program.write_to_file(sink)
