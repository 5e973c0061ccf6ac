"""A rich console that neutralises control characters in everything it prints.

Names, texts of rows and answers of models come from others. An escape sequence in them
could change earlier output, or the title of the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment

from lorafleet.jobs.text import make_printable


class Screen(Console):
    """A console whose texts cannot control the terminal.

    Use `make_console` to create one. Only `print` is safe; for `Live` wrap what is drawn in
    `SafeRenderable`.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `Console` does, without characters that move the cursor or hide text."""
        super().print(
            *(
                make_printable(item) if isinstance(item, str) else SafeRenderable(item)
                for item in objects
            ),
            **options,
        )


class SafeRenderable:
    """A renderable whose control characters are replaced, one mark each.

    Columns keep their width, so tables stay aligned.
    """

    def __init__(self, drawn: RenderableType) -> None:
        self.drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        """Render the wrapped object, and replace control characters in its segments."""
        for segment in console.render(self.drawn, options):
            # Rich's own control segments, such as moving the cursor in a live view. No text can
            # create one.
            if segment.control:
                yield segment
            else:
                yield Segment(_replace_control_characters(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Measure the wrapped object."""
        return Measurement.get(console, options, self.drawn)


def _replace_control_characters(text: str) -> str:
    return (
        text
        if text.isprintable()
        else "".join(
            character if make_printable(character) == character else "\ufffd" for character in text
        )
    )
