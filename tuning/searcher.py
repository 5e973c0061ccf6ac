"""Our proposals as a Ray Tune searcher. Trials of an earlier attempt that have not ended come first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.trials.sampling import Assignment
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.proposals import Proposals
from ray.tune.search import Searcher


class ProposalSearcher(Searcher):
    """Hands out trials while fewer than `most_open` are unfinished.

    Tune keeps only one trial waiting for a searcher that is not its own; TUNE_MAX_PENDING_TRIALS_PG (set in the sweep)
    raises that, so that a freed actor always finds a waiting trial and is reused instead of torn down.
    """

    def __init__(
        self,
        ledger: Ledger,
        proposals: Proposals,
        total: int,
        most_open: int,
        make: Callable[[Assignment, int], Trial],
        stopping: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.ledger, self.proposals, self.total, self.most_open = ledger, proposals, total, most_open
        self.make, self.stopping = make, stopping
        self.half_done = [trial for trial in self.run.trials() if not trial.state.ended]
        self.earlier = {trial.id for trial in self.run.trials()}
        self.made = len(self.earlier)
        self.open: dict[str, Trial] = {}

    @property
    def run(self) -> Run:
        """The run that the trials belong to."""
        return self.ledger.run

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """The metric is the job's, not Tune's."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config; None for "not now", FINISHED for "no more"."""
        if self.stopping():
            return Searcher.FINISHED
        if len(self.open) >= self.most_open:
            return None
        trial = self._next()
        if trial is None:
            # One that is still open may come back: FINISHED is final for Tune.
            return None if self.open else Searcher.FINISHED
        self.open[trial_id] = trial
        return {"trial_id": trial.id, "assignment": trial.params()["assignment"]}

    def _next(self) -> Trial | None:
        if self.half_done:
            return self.half_done.pop(0)
        while self.made < self.total:
            assignment = self.proposals.next()
            if assignment is None:
                return None
            trial = self.make(assignment, self.made)
            if trial.id in self.earlier:
                continue  # an earlier attempt of this run has tried it, or it was among the half-done
            self.made += 1
            return trial
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the proposals how it went; a trial that waits to begin again is the next one."""
        trial = self.open.pop(trial_id, None)
        if trial is None:
            return
        if trial.state.ended:
            tell(self.proposals, self.ledger, trial)
        else:
            self.half_done.append(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the run's own files hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


def tell(proposals: Proposals, ledger: Ledger, trial: Trial) -> None:
    """Tell the proposals how a trial ended, from its own record."""
    scores = {
        int(row["step"]): float(row[ledger.metric]) for row in trial.evaluations() if row.get(ledger.metric) is not None
    }
    proposals.tell(trial.params()["assignment"], scores, trial.state)
