"""Translate W&B's Hyperband settings to ASHA. All functions are pure."""

from __future__ import annotations

from typing import Any

_DEFAULT_ETA = 3
"""Default of W&B for Hyperband's `eta`."""
HYPERBAND_KEYS = ("s", "eta", "min_iter", "max_iter")
"""W&B's keys of a Hyperband block."""


def convert_to_asha(block: dict[str, Any]) -> dict[str, Any]:
    """Return the ASHA settings for a block of Hyperband settings.

    The first bracket of Hyperband becomes the first rung, and eta the factor between rungs. An
    iteration is an epoch here.

    Raises:
        ValueError: If a value is not an integer in range.
        TypeError: If a value is not a number.
    """
    eta = _parse_integer(_DEFAULT_ETA if block.get("eta") is None else block["eta"])
    if eta < 2:
        raise ValueError(f"eta is {eta}, but must be at least 2")
    asha: dict[str, Any] = {"time_attr": "epoch", "reduction_factor": eta}
    if block.get("min_iter") is not None:
        asha["grace_period"] = _parse_integer(block["min_iter"])
    if block.get("max_iter") is not None:
        asha["max_t"] = _parse_integer(block["max_iter"])
        brackets = _parse_integer(1 if block.get("s") is None else block["s"])
        # With max_iter and s, W&B's brackets are at max_iter / eta, ..., max_iter / eta^s. The last
        # is the earliest.
        asha.setdefault("grace_period", max(1, asha["max_t"] // eta ** max(0, brackets)))
    return asha


def _parse_integer(value: Any) -> int:
    """Return an integer, which may be written as text. Raises ValueError or TypeError."""
    number = float(value)
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)
