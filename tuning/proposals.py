"""Choose the next configuration, from a seeded list or Optuna's TPE. None is tried twice.

Proposals know nothing of Tune and of trials on disk. `TrialQueue` asks them for
assignments and reports outcomes, including those of earlier attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import Parameter
from lorafleet.jobs.schema.types import Assignment
from lorafleet.jobs.trials import sampling as search

if TYPE_CHECKING:
    import optuna

_MAX_DRAWS = 200


class Proposals(Protocol):
    """Source of configurations.

    After a restart of the driver, `tell` is called for all ended trials before `next`.
    """

    def next(self) -> Assignment | None:
        """Return the next configuration, or None if there are no more."""

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """Report how a trial ended.

        Args:
            scores: The trial's score at each step.
            state: `finished`, `stopped` or `failed`.
        """


class ListProposals:
    """Configurations that are known in advance: a grid, or random draws."""

    def __init__(self, assignments: list[Assignment]) -> None:
        self._left = iter(assignments)

    def next(self) -> Assignment | None:
        """Return the next configuration of the list, or None."""
        return next(self._left, None)

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """Do nothing: the list does not depend on results."""


class SearchThenSeeds:
    """Proposals of a search, followed by further trainings of its best configuration.

    These begin once all trials of the search have ended.

    Args:
        searched: Proposals of the search.
        best: Returns the best configuration, or None while trials of the search are open.
        is_full: Returns whether the search has created all its trials: TPE would never stop
            proposing.
    """

    def __init__(
        self,
        searched: Proposals,
        job: JobSpec,
        best: Callable[[], Assignment | None],
        is_full: Callable[[], bool],
    ) -> None:
        self.searched, self.job, self.best = searched, job, best
        # Returns whether the search has created all its trials: TPE would never stop proposing.
        self.is_full = is_full
        self._left: Iterator[Assignment] | None = None

    def next(self) -> Assignment | None:
        """Return the next configuration of the search, or of the trainings of its best one.

        The latter start when `best` returns a configuration; until then the result is None.
        """
        if self._left is None:
            assignment = None if self.is_full() else self.searched.next()
            if assignment is not None:
                return assignment
            best = self.best()
            if best is None:
                return None
            self._left = iter(search.list_final_assignments(self.job, best))
        return next(self._left, None)

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """Report an outcome to the search, unless the trial repeats another one."""
        if not search.is_seed_repeat(self.job, assignment):
            self.searched.tell(assignment, scores, state)


class TpeProposals:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011).

    Stopped trials are reported as pruned, because their score is not the one that they
    would have reached. Optuna ranks them below every finished trial, by the step that they
    reached and then by their score there.
    """

    def __init__(
        self, job: JobSpec, startup: list[Assignment], name: Callable[[Assignment], str]
    ) -> None:
        import optuna

        assert job.search is not None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.job, self.search = job, job.search
        self.name = name
        self.distributions = {
            p: build_distribution(parameter)
            for p, parameter in search.select_free_parameters(job.search).items()
        }
        # Several trials run at once. `constant_liar` keeps TPE from proposing the same region to
        # all of them: it counts open trials as bad ones.
        sampler = optuna.samplers.TPESampler(
            seed=job.search.seed,
            n_startup_trials=len(startup),
            constant_liar=True,
            multivariate=False,
        )
        direction = "maximize" if job.metric.goal == "maximize" else "minimize"
        self.study = optuna.create_study(sampler=sampler, direction=direction)
        self._startup = iter(startup)
        self._open: dict[str, optuna.trial.Trial] = {}
        self._seen: set[str] = set()

    def next(self) -> Assignment | None:
        """Return a start-up configuration while there are any, then TPE's best untried one.

        Returns None if TPE proposes no new configuration in `_MAX_DRAWS` draws.
        """
        for startup_assignment in self._startup:
            # An earlier attempt has created this trial; `tell` has added it.
            if self.name(startup_assignment) in self._seen:
                continue
            self._seen.add(self.name(startup_assignment))
            # Optuna must know the values that were drawn here, so the trial is enqueued and asked
            # for at once.
            self.study.enqueue_trial(dict(startup_assignment))
            self._open[self.name(startup_assignment)] = self.study.ask(self.distributions)
            return startup_assignment
        import optuna

        for _ in range(_MAX_DRAWS):
            optuna_trial = self.study.ask(self.distributions)
            assignment = {
                path: self._round_value(path, optuna_trial.params[path])
                for path in self.distributions
            }
            # Optuna knows nothing of combinations that the schema refuses. A failed trial does not
            # count in its model.
            if search.describe_impossible(self.job, assignment):
                self.study.tell(optuna_trial, state=optuna.trial.TrialState.FAIL)
                continue
            name = self.name(assignment)
            if name not in self._seen:
                self._seen.add(name)
                self._open[name] = optuna_trial
                return assignment
            # A duplicate. It is closed, because TPE would count it as an open trial.
            self.study.tell(optuna_trial, state=optuna.trial.TrialState.FAIL)
        return None

    def _round_value(self, path: str, value: Any) -> Any:
        """Return a value drawn by Optuna, rounded as its parameter asks."""
        parameter = self.search.parameters[path]
        return (
            value
            if parameter.values is not None or isinstance(value, int)
            else search.round_value(value, parameter)
        )

    def tell(self, assignment: Assignment, scores: dict[int, float], state: str) -> None:
        """Report a trial to Optuna.

        A finished trial is reported with its last score, a stopped one as pruned with all its
        scores, and a failed one as failed. A trial without scores counts as failed.

        Args:
            assignment: Values of the searched fields.
            scores: Step -> value of the search's metric.
            state: `finished`, `stopped` or `failed`.
        """
        from optuna.trial import TrialState, create_trial

        name = self.name(assignment)
        self._seen.add(name)
        states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
        outcome = states.get(state, TrialState.FAIL) if scores else TrialState.FAIL
        value = scores[max(scores)] if outcome is TrialState.COMPLETE else None
        optuna_trial = self._open.pop(name, None)
        if optuna_trial is not None:
            for step, score in scores.items():
                optuna_trial.report(score, step)
            self.study.tell(optuna_trial, value, state=outcome)
        else:  # the trial is from an earlier attempt of this run
            self.study.add_trial(
                create_trial(
                    params=dict(assignment),
                    distributions=self.distributions,
                    value=value,
                    intermediate_values=scores,
                    state=outcome,
                )
            )


def build_distribution(parameter: Parameter) -> Any:
    """Return a parameter as Optuna's distribution.

    Quantised distributions become continuous ones; `_round_value` rounds what is drawn.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values is not None:
        return CategoricalDistribution(parameter.values)
    assert parameter.min is not None and parameter.max is not None
    if parameter.distribution == "int_uniform":
        return IntDistribution(int(parameter.min), int(parameter.max))
    return FloatDistribution(
        float(parameter.min), float(parameter.max), log="log" in str(parameter.distribution)
    )
