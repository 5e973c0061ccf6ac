"""Train several LoRA trials at once on one frozen base.

Each trial is a slot: a row of flat buffers (`buffers.py`), a part of every adapted layer
(`layers.py`) and a group of rows of each micro-batch (`group.py`). The path of a single trial
(`training/session.py`) stays the reference: a packed trial must give the same results.
"""
