"""W&B's Hyperband as ASHA. Pure."""

from __future__ import annotations

from typing import Any

_ETA = 3
"""What W&B takes where Hyperband says no eta."""
WORDS = ("s", "eta", "min_iter", "max_iter")
"""W&B's words for Hyperband."""


def as_asha(block: dict[str, Any]) -> dict[str, Any]:
    """Return the words of ASHA for those of Hyperband.

    Its first bracket is the first rung, and eta the factor between rungs.
    An iteration is an epoch here. Raises ValueError or TypeError for values that are no whole numbers in range.
    """
    eta = _whole(_ETA if block.get("eta") is None else block["eta"])
    if eta < 2:
        raise ValueError(f"eta is {eta}, but must be at least 2")
    asha: dict[str, Any] = {"time_attr": "epoch", "reduction_factor": eta}
    if block.get("min_iter") is not None:
        asha["grace_period"] = _whole(block["min_iter"])
    if block.get("max_iter") is not None:
        asha["max_t"] = _whole(block["max_iter"])
        brackets = _whole(1 if block.get("s") is None else block["s"])
        asha.setdefault("grace_period", max(1, asha["max_t"] // eta ** max(0, brackets)))
    return asha


def _whole(value: Any) -> int:
    """Return a whole number, which may be written as text. Raises ValueError or TypeError."""
    number = float(value)
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(f"{value!r} is no whole number")
    return int(number)
