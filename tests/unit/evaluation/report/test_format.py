"""Names, reasons and what models write come from anybody: no terminal, page or card does what they
say.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

from lorafleet.commands.screen import SafeRenderable, Screen
from lorafleet.evaluation.report.format import escape_markdown
from lorafleet.jobs.text import make_json_printable, make_printable

STEERING = [
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "\x9b31m",
    "a\rb",
    "\x08\x08",
    "\x1b[?1049h",
    "\x1bP0q\x1b\\",
    "\u202eevil\u202c",
    "\u2066x\u2069",
    "\ufeff",
    "\ud800",
    "\U000e0041",
    "\x00",
    "\x7f",
    "\u2028",
]


def steers(text: str) -> list[str]:
    """The characters of a text that a terminal obeys, that hide text, or that cannot be written."""
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [
        one
        for one in text
        if one not in "\n\t"
        and (
            unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(one) in bidi
        )
    ]


@given(st.text())
@example("".join(STEERING))
def test_no_text_steers_the_terminal(text: str) -> None:
    shown = make_printable(text)
    assert not steers(shown)
    shown.encode()
    harmless = "".join(one for one in text if one.isprintable() or one in "\n\t")
    assert make_printable(harmless) == harmless


def test_what_is_written_in_any_script_stays() -> None:
    for text in ("naïve Ünïcode", "日本語", "هذا نص", "नमस्ते", "👩‍👩‍👧", "a\tb\nc"):
        assert make_printable(text) == text
    assert make_printable("\x1b[36m(trial)\x1b[0m ok") == "(trial) ok"
    assert make_printable("a\x1b[2Jb\r") == "a\\x1b[2Jb\\x0d"


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@example(STEERING)
def test_json_keeps_its_values(value: object) -> None:
    shown = make_json_printable(json.dumps(value, ensure_ascii=False))
    assert not steers(shown)
    assert json.loads(shown) == value


@pytest.mark.parametrize("hostile", STEERING)
def test_a_table_keeps_its_columns(hostile: str) -> None:
    out = io.StringIO()
    screen = Screen(file=out, width=60, force_terminal=True, color_system="standard")
    table = Table(box=None, pad_edge=False)
    table.add_column(Text("name"))
    table.add_column("state")
    table.add_row(Text(f"x{hostile}y"), Text("failed", style="red"))
    screen.print(table)
    screen.print(f"reason: {hostile}", markup=False)
    screen.print(SafeRenderable(Text(hostile)))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert not steers(shown)
    assert "\x1b[31mfailed" in out.getvalue()


HTML = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<a href='//evil'>x</a>",
    "&lt;script&gt;",
]
LINKS = [
    "[x](http://evil)",
    "![x](http://evil/p.png)",
    "<http://evil>",
    "http://evil.example/a",
    "www.evil.example",
    "https://evil",
    "[x]: http://evil",
    "a | b",
    "ann@evil.example",
    "mailto:ann@evil.example",
    "ftp://evil",
    "javascript:alert(1)",
    "`code`",
    "**b**",
    "~~s~~",
    "x\n# heading",
    "x\n\n<b>bold</b>",
    "\\[x](http://evil)",
    "[[x]](a)",
    "xmpp:a@b.c",
]


@pytest.mark.parametrize("hostile", HTML + LINKS)
@pytest.mark.parametrize("frame", ["{}", "- {}", "**{}**", "| a |\n|---|\n| {} |", "# {}"])
def test_markdown_shows_a_text_as_it_is(hostile: str, frame: str) -> None:
    made = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    drawn = made.render(frame.format(escape_markdown(hostile)))
    empty = made.render(frame.format("x"))
    assert re.findall(r"<[^>]*>", drawn) == re.findall(r"<[^>]*>", empty)
    # Readers that make links of bare addresses look at the source.
    assert not re.search(
        r"(?i)(https?|ftp)://|(mailto|xmpp):|www\.|[\w.]@", escape_markdown(hostile)
    )


@pytest.mark.parametrize("hostile", HTML + LINKS)
def test_the_words_stay(hostile: str) -> None:
    from html import unescape

    drawn = MarkdownIt("commonmark").render(f"{escape_markdown(hostile)}")
    if not escape_markdown(hostile).startswith("#"):
        assert unescape(re.sub(r"<[^>]*>", "", drawn)).strip() == " ".join(hostile.split())
