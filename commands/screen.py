"""The terminal as rich draws on it, with everything in it that is not rich's own made harmless."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorafleet.jobs.text import printable
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment


class Screen(Console):
    """A console whose texts cannot steer the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `Console` does, less what would move the cursor or hide a text."""
        super().print(*(printable(one) if isinstance(one, str) else Harmless(one) for one in objects), **options)


class Harmless:
    """What something draws, with each control character in its texts as one mark: the columns stay where they are."""

    def __init__(self, drawn: RenderableType) -> None:
        self.drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        """Draw it."""
        for segment in console.render(self.drawn, options):
            if segment.control:
                yield segment
            else:
                yield Segment(_marked(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Measure it."""
        return Measurement.get(console, options, self.drawn)


def _marked(text: str) -> str:
    return text if text.isprintable() else "".join(one if printable(one) == one else "\ufffd" for one in text)
