"""Which configuration is tried next: from the seeded list, or asked of Optuna's TPE. No configuration twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import Parameter
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.sampling import Assignment

if TYPE_CHECKING:
    import optuna

_DRAWS_FOR_A_NEW_ONE = 200


class Proposals(Protocol):
    """Where configurations come from."""

    def next(self) -> Assignment | None:
        """The next configuration; None when there are no more."""

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """How a trial ended: its score at each step, and `finished`, `stopped` or `failed`."""


class GivenProposals:
    """A grid, or random draws: known beforehand."""

    def __init__(self, assignments: list[Assignment]) -> None:
        self._left = iter(assignments)

    def next(self) -> Assignment | None:
        """The next of the list."""
        return next(self._left, None)

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """Results change nothing here."""


class ThenSeeds:
    """A search's proposals, and once all have ended what is trained of the best of them."""

    def __init__(
        self, searched: Proposals, job: JobSpec, best: Callable[[], Assignment | None], is_full: Callable[[], bool]
    ) -> None:
        self.searched, self.job, self.best = searched, job, best
        self.is_full = is_full  # whether the search has made all its trials: TPE would go on for ever
        self._left: Iterator[Assignment] | None = None

    def next(self) -> Assignment | None:
        """The next of the search; then, when `best` knows it, of the seeds."""
        if self._left is None:
            assignment = None if self.is_full() else self.searched.next()
            if assignment is not None:
                return assignment
            best = self.best()
            if best is None:
                return None
            self._left = iter(search.after_search(self.job, best))
        return next(self._left, None)

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """The search hears of its own configurations alone."""
        if not search.repeats(self.job, assignment):
            self.searched.tell(assignment, scores, state)


class TpeProposals:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), told of cut trials as pruned ones.

    A cut trial's score is not the score it would have had: Optuna ranks it below every finished trial, by how far it
    came and then by its score there.
    """

    def __init__(self, job: JobSpec, startup: list[Assignment], name: Callable[[Assignment], str]) -> None:
        import optuna

        assert job.search is not None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.job, self.search = job, job.search
        self.name = name
        self.distributions = {p: distribution(parameter) for p, parameter in search.free_parameters(job.search).items()}
        sampler = optuna.samplers.TPESampler(
            seed=job.search.seed, n_startup_trials=len(startup), constant_liar=True, multivariate=False
        )
        direction = "maximize" if job.metric.goal == "maximize" else "minimize"
        self.study = optuna.create_study(sampler=sampler, direction=direction)
        self._startup = iter(startup)
        self._open: dict[str, optuna.trial.Trial] = {}
        self._seen: set[str] = set()

    def next(self) -> Assignment | None:
        """A start-up trial while there are any, then what the model holds most promising and was not tried yet."""
        for planned in self._startup:
            if self.name(planned) in self._seen:
                continue
            self._seen.add(self.name(planned))
            self.study.enqueue_trial(dict(planned))
            self._open[self.name(planned)] = self.study.ask(self.distributions)
            return planned
        import optuna

        for _ in range(_DRAWS_FOR_A_NEW_ONE):
            asked = self.study.ask(self.distributions)
            assignment = {path: self._value(path, asked.params[path]) for path in self.distributions}
            if search.impossible(self.job, assignment):
                self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
                continue
            name = self.name(assignment)
            if name not in self._seen:
                self._seen.add(name)
                self._open[name] = asked
                return assignment
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _value(self, path: str, value: Any) -> Any:
        parameter = self.search.parameters[path]
        return value if parameter.values is not None or isinstance(value, int) else search.rounded(value, parameter)

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """Finished trials with their last score, cut ones as pruned with all their scores, failed ones as failed."""
        from optuna.trial import TrialState, create_trial

        name = self.name(assignment)
        self._seen.add(name)
        states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
        outcome = states.get(state, TrialState.FAIL) if scores else TrialState.FAIL
        value = scores[max(scores)] if outcome is TrialState.COMPLETE else None
        asked = self._open.pop(name, None)
        if asked is not None:
            for step, score in scores.items():
                asked.report(score, step)
            self.study.tell(asked, value, state=outcome)
        else:  # a trial of an earlier attempt of this run
            self.study.add_trial(
                create_trial(
                    params=dict(assignment),
                    distributions=self.distributions,
                    value=value,
                    intermediate_values=scores,
                    state=outcome,
                )
            )


def distribution(parameter: Parameter) -> Any:
    """A parameter as Optuna's distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values is not None:
        return CategoricalDistribution(parameter.values)
    assert parameter.min is not None and parameter.max is not None
    if parameter.distribution == "int_uniform":
        return IntDistribution(int(parameter.min), int(parameter.max))
    return FloatDistribution(float(parameter.min), float(parameter.max), log="log" in str(parameter.distribution))
