"""Hand out the evaluations on held-out rows to the workers of a search, as they become idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from lorafleet.tuning.held_out import MAX_TRIES


class EvaluationQueue:
    """Models that are left to evaluate: some while the search goes on, the others at its end.

    Args:
        names: Models that can be evaluated at once.
        end_search: Called once, when the search is over; returns the other models.
        has_weights: Returns whether a model still has what is evaluated. The weights of a
            trial are deleted when others are better.
    """

    def __init__(
        self,
        names: Iterable[str],
        end_search: Callable[[], Iterable[str]],
        has_weights: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.waiting = list(names)
        self.has_weights = has_weights
        self.end_search: Callable[[], Iterable[str]] | None = end_search
        self.open: set[str] = set()
        self.tries = Counter[str]()
        self.failed: dict[str, str] = {}
        """Model that could not be evaluated -> reason."""

    def is_empty(self) -> bool:
        """Return whether every model has been evaluated, or has failed."""
        return self.end_search is None and not self.waiting and not self.open

    def add(self, name: str) -> None:
        """Add a model that will be evaluated whatever the search still finds."""
        if name not in {*self.waiting, *self.open, *self.tries}:
            self.waiting.append(name)

    def take(self, *, search_is_over: bool) -> tuple[str, int] | None:
        """Return the next model and the number of this try, from 1; None if there is none now."""
        if search_is_over and self.end_search is not None:
            end_search, self.end_search = self.end_search, None
            for name in end_search():
                self.add(name)
        self.waiting = [name for name in self.waiting if self.has_weights(name)]
        if not self.waiting:
            return None
        name = self.waiting.pop(0)
        self.open.add(name)
        self.tries[name] += 1
        return name, self.tries[name]

    def complete(self, name: str, failure: str | None = None) -> None:
        """Record that a model was evaluated, or why it could not be. It is not tried again."""
        self.open.discard(name)
        if failure is not None and self.has_weights(name):
            self.failed[name] = failure

    def lose(self, name: str, reason: str) -> None:
        """Record that the process died. The model is tried again, unless it was the last try."""
        self.open.discard(name)
        if self.tries[name] < MAX_TRIES:
            self.waiting.append(name)
        else:
            self.failed[name] = reason
