"""Merge, export and benchmark trained models, and compare every export with its source.

`merge` loads a model as it was trained. `export` builds targets from it, compares each
with the source (`parity`, `prompted_check`) and accepts or rejects it. `runtime` and
`decoding` run what was exported, for the checks as for `chat`, `serve` and `benchmark`.
`runners` has scripts that are copied beside a target and run without lorafleet.

Packages of a runtime are imported inside functions: each is an extra that may be
missing.
"""
