"""Small things of sentences."""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""x, hides or turns round text, or cannot be written as UTF-8; not line breaks and tabs."""


_LONGEST_LINE, _HEAD, _TAIL = 1000, 560, 360
"""Characters of a sentence, and of its two ends where it is cut: a value of 300 characters has room in it."""


def one_line(text: str) -> str:
    """Return a text with its line breaks spelt: a key or a value of a file does not make a second message."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def cut(text: str, most: int = _LONGEST_LINE) -> str:
    """Return a text of at most about `most` characters: its beginning and its end, and how much is left out."""
    if len(text) <= most:
        return text
    head, tail = most * _HEAD // _LONGEST_LINE, most * _TAIL // _LONGEST_LINE
    return f"{text[:head]}... ({len(text) - head - tail:,} more) ...{text[-tail:]}"


def printable(text: str) -> str:
    """Return a text that cannot steer the terminal that shows it: control characters are spelt, colours are gone."""
    return _UNPRINTABLE.sub(_spelt, _COLOURS.sub("", text))


def printable_json(text: str) -> str:
    """Return a JSON document with the same values that is safe to show: what JSON lets stand is escaped as well."""
    return re.sub(r"[\x7f-\uffff]|[\U000e0000-\U000e007f]", _escaped, text)


def _spelt(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escaped(found: re.Match[str]) -> str:
    if not _UNPRINTABLE.match(found[0]):
        return found[0]
    code = ord(found[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + ((code - 0x10000) >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def counted(number: int, what: str) -> str:
    """`1 trial`, `2 trials`, `3 processes`."""
    ending = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{ending}"


def unsigned_zero(value: float, digits: int = 3) -> str:
    """Write a number; one that rounds to 0 has no sign."""
    written = f"{value:.{digits}f}"
    return written.lstrip("-") if float(written) == 0 else written
