"""Measure models, compare and recommend them, and report the results.

`metrics` computes metrics, intervals and paired comparisons from per-row results.
`inference` runs a model that the caller has loaded. `report` builds a `Report` from the
files of a run and decides what ships. `render` turns a `Report` into text, pages and
tables. Training is in `lorafleet.training`, exporting in `lorafleet.deployment`; this
package imports neither.

Commands such as `report` and `status` must answer at once, so torch and transformers
are imported inside functions only (an import-linter contract in pyproject.toml checks
this).
"""
