"""Hand out the evaluations on held-out rows to the workers of a search, as they become idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from lorafleet.tuning.held_out import MAX_TRIES


class EvaluationQueue:
    """Models that are left to evaluate: the base at once, the finalists when the search is over.

    Args:
        names: Models that can be evaluated before the search is over.
        end_search: Called once, when the search is over; returns the other models.
    """

    def __init__(self, names: Iterable[str], end_search: Callable[[], Iterable[str]]) -> None:
        self.waiting = list(names)
        self.end_search: Callable[[], Iterable[str]] | None = end_search
        self.open: set[str] = set()
        self.tries = Counter[str]()
        self.failed: dict[str, str] = {}
        """Model that could not be evaluated -> reason."""

    def is_empty(self) -> bool:
        """Return whether every model has been evaluated, or has failed."""
        return self.end_search is None and not self.waiting and not self.open

    def take(self, *, search_is_over: bool) -> tuple[str, int] | None:
        """Return the next model and the number of this try, from 1; None if there is none now."""
        if search_is_over and self.end_search is not None:
            end_search, self.end_search = self.end_search, None
            known = {*self.waiting, *self.open, *self.tries}
            self.waiting += [name for name in end_search() if name not in known]
        if not self.waiting:
            return None
        name = self.waiting.pop(0)
        self.open.add(name)
        self.tries[name] += 1
        return name, self.tries[name]

    def complete(self, name: str, failure: str | None = None) -> None:
        """Record that a model was evaluated, or why it could not be. It is not tried again."""
        self.open.discard(name)
        if failure is not None:
            self.failed[name] = failure

    def lose(self, name: str, reason: str) -> None:
        """Record that the process died. The model is tried again, unless it was the last try."""
        self.open.discard(name)
        if self.tries[name] < MAX_TRIES:
            self.waiting.append(name)
        else:
            self.failed[name] = reason
