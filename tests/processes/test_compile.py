"""torch.compile changes the time, not the numbers."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import JobMaker
from tests.unit.training.test_session import session


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_blocks_train_the_same(llama_job: JobMaker) -> None:
    losses = {}
    for compiled in (False, True):
        made = session(llama_job(train__torch_compile=compiled, lora__lora_dropout=0.0).job)
        row = made.advance(6)
        losses[compiled] = (row["train_loss"], made.evaluate().metrics["loss"])
        made.close()
        assert all(block._compiled_call_impl is None for block in made.base.model.model.layers)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
