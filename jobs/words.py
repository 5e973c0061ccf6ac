"""Small things of sentences."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """`1 trial`, `2 trials`, `3 processes`."""
    ending = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{ending}"
