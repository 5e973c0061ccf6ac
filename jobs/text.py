"""Format text for messages: counts, shortened text, and text that is safe to print.

Names, reasons, rows and model output come from anybody. Whatever is printed in a
terminal goes through `make_printable` or `make_json_printable`, so that no text can
move the cursor, hide other text or look like a message of lorafleet.
"""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
# The joiners U+200C and U+200D are not in the list: Persian, Indian scripts and emoji need them.
_UNSAFE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Characters that control a terminal, hide or reverse text, or cannot be encoded as UTF-8.
Line breaks and tabs are not included.
"""


_MAX_MESSAGE_CHARS, _HEAD_CHARS, _TAIL_CHARS = 1000, 560, 360
"""Maximum length of a message, and of its beginning and end if it is shortened. A value of 300
characters fits.
"""


def escape_line_breaks(text: str) -> str:
    """Return a text with escaped line breaks.

    A key or a value of a file can then not look like a second message.
    """
    return text.replace("\r", "\\r").replace("\n", "\\n")


def shorten_text(text: str, max_chars: int = _MAX_MESSAGE_CHARS) -> str:
    """Return a text of at most about `max_chars` characters.

    A longer text becomes its beginning, the number of characters left out, and its end: the
    end of an error often names the cause.

    Args:
        text: The text.
        max_chars: Maximum length in characters, not counting the note in the middle.
    """
    if len(text) <= max_chars:
        return text
    head, tail = (
        max_chars * _HEAD_CHARS // _MAX_MESSAGE_CHARS,
        max_chars * _TAIL_CHARS // _MAX_MESSAGE_CHARS,
    )
    return f"{text[:head]}... ({len(text) - head - tail:,} more) ...{text[-tail:]}"


def make_printable(text: str) -> str:
    """Return a text that is safe to print in a terminal.

    ANSI colours are removed. Other control characters are written as visible escapes, and
    so are lone surrogates: the result can always be encoded as UTF-8. Line breaks, tabs and
    all printable characters stay.
    """
    return _UNSAFE_CHARACTERS.sub(_escape_character, _COLOURS.sub("", text))


def make_json_printable(text: str) -> str:
    """Return a JSON document with the same values that is safe to print in a terminal.

    JSON allows bidirectional marks and lone surrogates unescaped inside strings. They are
    escaped here; other characters beyond ASCII stay readable.

    Args:
        text: A valid JSON document. Control characters below 0x20 are already escaped in
            it.
    """
    return re.sub(r"[\x7f-\uffff]|[\U000e0000-\U000e007f]", _escape_json_character, text)


def _escape_character(match: re.Match[str]) -> str:
    code = ord(match[0])
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def _escape_json_character(match: re.Match[str]) -> str:
    if not _UNSAFE_CHARACTERS.match(match[0]):
        return match[0]
    code = ord(match[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    # JSON has escapes of four digits only: a character above U+FFFF is a surrogate pair (RFC 8259,
    # section 7).
    return f"\\u{0xD800 + ((code - 0x10000) >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 trial`, `2 trials`, `3 processes`, `2 batches`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch", "sh", "x")) else "s"
    return f"{number:,} {noun}{ending}"


def format_decimal(value: float, digits: int = 3) -> str:
    """Format a number with `digits` decimals; a number that rounds to 0 has no sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text
