"""A merged model -> ExecuTorch with XNNPACK, for phones and small devices. One row, T tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafleet.deployment.onnx_model import quiet
from lorafleet.deployment.runtime import PTE_FILE


def export_executorch(merged: Path, out: Path, *, classifies: bool, longest: int) -> None:
    """One row of 1 to `longest` tokens in, logits out: of each token, or of the classes. There is no cache."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = kind.from_pretrained(
        str(merged), attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    ).eval()

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            given: dict[str, Any] = {} if classifies else {"use_cache": False}
            logits: torch.Tensor = self.model(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **given
            ).logits
            return logits

    tokens = torch.export.Dim("tokens", min=1, max=longest)
    with quiet(), torch.no_grad():
        seen = torch.export.export(
            Whole().eval(), (torch.ones((1, 7), dtype=torch.int64),), dynamic_shapes=({1: tokens},), strict=False
        )
        made = to_edge_transform_and_lower(seen, partitioner=[XnnpackPartitioner()]).to_executorch()
    out.mkdir(parents=True, exist_ok=True)
    with (out / PTE_FILE).open("wb") as sink:
        made.write_to_file(sink)
