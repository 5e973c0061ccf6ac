"""Run a search from its run folder to its report. `train` is a search of one assignment.

Every attempt reads the run's own files and starts a new Tuner with the trials that have
not ended. Tune's snapshots are not used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.allocation import get_allocation
from lorafleet.cluster.ray.nodes import parse_nodes
from lorafleet.evaluation.metrics.summary import write_baselines
from lorafleet.evaluation.render.write import write_report
from lorafleet.evaluation.report.build import build_report
from lorafleet.jobs import files
from lorafleet.jobs.data.rows import forget_rows
from lorafleet.jobs.errors import DiskFull, ExitCode, PlacementRefused, RunError
from lorafleet.jobs.runs.events import NoteEvent, RayLeftEvent, SearchEvent, WarningEvent
from lorafleet.jobs.runs.run import Run, RunState, Trial, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.types import Assignment
from lorafleet.jobs.sites.placement import fit_placement
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.defaults import resolve_learning_rate
from lorafleet.jobs.trials.sampling import list_planned_assignments
from lorafleet.jobs.trials.schedule import build_schedule
from lorafleet.jobs.trials.trial_id import compute_provenance, compute_trial_id
from lorafleet.tuning.driver import TrainingDriver
from lorafleet.tuning.node_check import check_nodes
from lorafleet.tuning.proposals import ListProposals, Proposals, SearchThenSeeds, TpeProposals
from lorafleet.tuning.provenance import build_metadata

_COUNT_SECONDS = 5.0
_RELEASE_SECONDS = 5.0
_MACHINES_SECONDS = 15.0
"""Seconds between two checks of the machines of an allocation."""
_STOP_CHECK_SECONDS = 1.0
"""Seconds between two checks of the trials of a run that is asked to stop."""
_SAVE_SECONDS = 300.0
"""Seconds that trials have to save when a run is asked to stop."""


class Sweep(TrainingDriver):
    """One attempt at a search, or at one training.

    `share` is the range of assignments of an array task; such a task neither evaluates
    held-out rows nor writes a report, because the merging driver does. `judges` is off for
    the arms of a comparison.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.searching = self.plan.command == "sweep"
        self.share = self.plan.share
        self.judges = self.plan.judges and not self.share
        # Time of the last check of the machines, and whether it found too few.
        self.looked_at, self.too_few = time.monotonic(), False
        self.counted = (-_COUNT_SECONDS, 0.0)  # (time of the last count, GPU-hours counted then)

    def _run_attempt(self, attempt: int) -> ExitCode:
        self._record_phase("reading data, starting workers")
        with ThreadPoolExecutor(1) as pool:
            # It imports torch and tokenises, while Ray mostly waits for its processes to start.
            reading = pool.submit(self._read_data)
            with self._open_ray(attempt) as ray_session:
                self.run.add_event(ray_session)
                data = reading.result()
                # A local Ray runs on this machine alone, which has been checked by reading the
                # data.
                if not ray_session.own:
                    check_nodes(self.run.path, data.folder, self.job)
                if not self.stop_file.exists():
                    self._run_search(attempt, data)
                if not self.stop_file.exists() and self.judges:
                    self._evaluate_held_out(data)
        # Raised only here, after Ray has stopped: the trials have saved what they could.
        if self.disk_full:
            raise DiskFull(self.disk_full)
        return self._finish()

    def _read_data(self) -> Any:
        """Return the rows as tokens, and write their metadata to facts.json.

        Runs in a thread beside the start of Ray.

        Raises:
            RunError: Data or model differ from those of an earlier attempt.
        """
        from lorafleet.training.data import prepare_tokens

        data = prepare_tokens(self.job)
        forget_rows()  # from here on, the tokens are read
        self.facts = compute_provenance(self._searched_job)
        self._check_unchanged()
        metadata = build_metadata(self.job, self.facts, data)
        learning_rate = resolve_learning_rate(self.job).value
        files.write_json(
            self.run.path / "facts.json",
            metadata.model_copy(update={"learning_rate": learning_rate}).to_dict(),
        )
        return data

    def _check_unchanged(self) -> None:
        """Raise RunError if data or model differ from those of an earlier attempt."""
        self.run.check_current()
        recorded = self.run.read_metadata()
        if recorded.is_empty:
            return
        changed = None
        if recorded.data_sha256 != self.facts.data_sha256:
            changed = "data files"
        elif recorded.model_revisions != self.facts.model_revisions:
            changed = "model files"
        if changed is not None:
            raise RunError(
                f"the {changed} of {self.run.id} have changed since it started (facts.json has "
                "their digests): restore the old ones, or start a new sweep"
            )

    def _run_search(self, attempt: int, data: Any) -> None:
        """Run the trials that are left through Ray Tune."""
        from ray import tune
        from ray.tune import FailureConfig

        from lorafleet.tuning.ledger import Ledger
        from lorafleet.tuning.scheduler import RungScheduler
        from lorafleet.tuning.searcher import ProposalSearcher, report_outcome
        from lorafleet.tuning.tracking import open_trackers

        ledger = Ledger(self.run, self.job, self.searching)
        ledger.apply_due_decisions()
        assignments = list_planned_assignments(self._searched_job, self._compute_trial_id)
        first_index = 0
        if self.share:
            first_index, last = self.share
            assignments = assignments[first_index:last]
        proposals = self._build_proposals(assignments, ledger)
        for trial in self.run.list_trials():
            if trial.state.has_ended:
                report_outcome(proposals, ledger, trial)
        total = self._count_trials(assignments)
        self.run.add_event(SearchEvent(trials=total))
        # The due decisions of an earlier attempt are made, so no trial may be left.
        searcher = ProposalSearcher(
            ledger,
            proposals,
            total,
            self._compute_max_open(),
            lambda assignment, index: self._create_trial(assignment, first_index + index, data),
            self._should_stop,
        )
        self._record_phase("training")
        with open_trackers(self.run, self.job) as listeners:
            ledger.listeners += listeners
            tuner = tune.Tuner(
                self._build_trainable(data),
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=RungScheduler(
                        ledger,
                        self._describe_spent_budget,
                        self._handle_full_disk,
                        ends_itself=self.placement.is_distributed,
                    ),
                    # The searcher ends the search. Tune's own count would include restarted trials.
                    num_samples=-1,
                    reuse_actors=not self.placement.is_distributed,
                ),
                run_config=tune.RunConfig(
                    name=f"attempt-{attempt}",
                    storage_path=str(self.run.path / "tune"),
                    # The ledger decides about restarts: it knows what ended a trial, and how often.
                    failure_config=FailureConfig(max_failures=0),
                    checkpoint_config=tune.CheckpointConfig(
                        checkpoint_frequency=0, checkpoint_at_end=False
                    ),
                    stop=_build_stopper(self.run, self.stop_file),
                    verbose=0,
                ),
            )
            with _silence_tune():
                tuner.fit()
        self._record_leaked_groups()
        unfinished = [trial for trial in self.run.list_trials() if not trial.state.has_ended]
        if unfinished and not self.stop_file.exists() and not self._describe_spent_budget():
            raise RuntimeError(
                f"Ray Tune ended before {len(unfinished)} trials had finished: "
                f"{', '.join(t.id for t in unfinished)}"
            )
        # Tune's stopper ends the search without a last report of the trials that still run.
        for trial in self.run.list_trials():
            if trial.state is TrialState.RUNNING:
                spent_budget = self._describe_spent_budget()
                if spent_budget and not self.stop_file.exists():
                    ledger.end_trial(trial, TrialState.STOPPED, reason=spent_budget)
                else:
                    trial.set_state(TrialState.PENDING, reason="interrupted")

    def _record_leaked_groups(self) -> None:
        """Record the placement groups of stopped trials that Ray did not release.

        These hold CPUs and GPUs.
        """
        if not self.placement.is_distributed:
            return
        from ray.util.placement_group import placement_group_table

        deadline = time.monotonic() + _RELEASE_SECONDS
        while leaked := [
            row for row in placement_group_table().values() if row["state"] != "REMOVED"
        ]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        self.run.add_event(RayLeftEvent(placement_groups=len(leaked)))

    @property
    def _searched_job(self) -> JobSpec:
        """Job of the search; for a single training, the job without its `search` section."""
        return self.job if self.searching else self.job.model_copy(update={"search": None})

    def _compute_trial_id(self, assignment: Assignment) -> str:
        """Return the trial id of an assignment."""
        return compute_trial_id(search.build_trial_job(self._searched_job, assignment), self.facts)

    @property
    def _final_trainings(self) -> int:
        """Number of trainings of the best configuration after the search."""
        searching = self.searching and self.job.search is not None and not self.share
        return len(search.list_final_assignments(self.job, {})) if searching else 0

    def _build_proposals(self, assignments: list[Assignment], ledger: Any) -> Proposals:
        """Return the source of configurations."""
        proposals: Proposals = ListProposals(assignments)
        if self.searching and self.job.search and self.job.search.method == "tpe":
            proposals = TpeProposals(self.job, assignments, self._compute_trial_id)
        if not self._final_trainings:
            return proposals
        max_searched = self._count_trials(assignments) - self._final_trainings
        is_endless = isinstance(proposals, TpeProposals)
        return SearchThenSeeds(
            proposals,
            self.job,
            ledger.find_best_assignment,
            lambda: is_endless and len(ledger.list_searched()) >= max_searched,
        )

    def _count_trials(self, assignments: list[Assignment]) -> int:
        """Return the total number of trials."""
        if self.searching and self.job.search and self.job.search.method == "tpe":
            return self.job.search.num_samples + self._final_trainings
        return len(assignments) + self._final_trainings

    def _compute_max_open(self) -> int:
        """Return the maximum number of trials that are handed out and have not ended.

        TPE is asked as late as possible without leaving an actor idle.
        """
        slots = self.placement.slots
        if self.placement.is_distributed:
            return slots  # one more would take CPUs that a group needs, and neither could start
        uses_tpe = (
            self.searching and self.job.search is not None and self.job.search.method == "tpe"
        )
        return slots + 1 if uses_tpe else 2 * slots

    def _create_trial(self, assignment: Assignment, index: int, data: Any) -> Trial:
        """Create the trial of an assignment, and write its parameters.

        Returns the existing trial if an earlier attempt created it.

        Args:
            index: Position in the search, over all attempts and array tasks.
        """
        self.run.check_current()
        job = search.build_trial_job(self._searched_job, assignment)
        plan = build_schedule(job, data.count_training_rows(job), searching=self.searching)
        trial = self.run.add_trial(compute_trial_id(job, self.facts), index, assignment)
        params = trial.read_params()
        # A kill between the two writes leaves a trial without them.
        if not params.resolved:
            resolved = job.model_dump(
                mode="json", exclude={"search", "tracking", "name", "environment"}
            )
            resolved["train"]["learning_rate"] = resolve_learning_rate(job).value
            files.write_json(
                trial.path / "params.json",
                params.to_dict()
                | {
                    "resolved": resolved,
                    "rung_levels": list(plan.rung_levels),
                    "rung_steps": list(plan.rung_steps),
                    "total_steps": plan.total_steps,
                    "batch_rows": plan.batch_rows,
                    "gpus": self.placement.workers * self.placement.gpus_per_worker,
                    "repeats": search.is_seed_repeat(self._searched_job, assignment),
                },
            )
        return trial

    def _build_work(self, data: Any) -> Any:
        """Return what every trial of the sweep shares."""
        from lorafleet.tuning.trial_run import Work

        job = self._searched_job
        resources = job.resources.model_copy(update={"strategy": self.placement.strategy})
        return Work(
            job.model_copy(update={"resources": resources}),
            str(self.run.path),
            str(data.folder),
            self.placement.gpus_per_worker,
            self.searching,
            self.run.attempt,
        )

    def _build_trainable(self, data: Any) -> Any:
        """Return the Tune trainable: a warm actor, or a group of processes."""
        from ray import tune

        work = self._build_work(data)
        if self.placement.is_distributed:
            from lorafleet.tuning.distributed_trial import build_distributed_trainable

            return build_distributed_trainable(work, self.placement)
        from lorafleet.tuning.trainable import WarmTrial

        bundle = {"CPU": self.placement.cpus_per_worker, "GPU": self.placement.gpus_per_worker}
        labels = {"bundle_label_selector": [self.placement.labels]} if self.placement.labels else {}
        resources = tune.PlacementGroupFactory([bundle], **labels)
        return tune.with_resources(tune.with_parameters(WarmTrial, work=work), resources)

    def _should_stop(self) -> bool:
        """Return whether no further trial may start.

        Tune asks many times a second, so this is also where the driver records its time and
        looks at its machines.
        """
        if signal.getsignal(signal.SIGUSR1) != self._handle_signal:
            self._install_signal_handlers()  # Tune replaces the SIGUSR1 handler when it starts
        self._record_wall_seconds()
        self._check_machines()
        return self.stop_file.exists() or self._describe_spent_budget() is not None

    def _check_machines(self) -> None:
        """Stop the run, to be requeued, if the remaining nodes cannot hold one trial.

        Lost nodes of an allocation do not come back.
        """
        now = time.monotonic()
        if (
            not get_allocation()
            or now - self.looked_at < _MACHINES_SECONDS
            or self.stop_file.exists()
        ):
            return
        self.looked_at = now
        import ray

        try:
            fit_placement(self.placement, parse_nodes(ray.nodes()))
        except PlacementRefused as error:
            if not self.too_few:
                # Ray may report a node as lost for a moment: only two checks in a row count.
                self.too_few = True
                return
            sentence = (
                f"nodes were lost: {error}; the trials are saved, to continue in a new allocation"
            )
            self.run.add_event(NoteEvent(sentence=sentence))
            # The same path as a warning from the queue: trials save, and the exit code asks for a
            # requeue.
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            self.too_few = False

    def _describe_spent_budget(self) -> str | None:
        """Return which budget is spent, as text, or None."""
        if not self.searching or self.job.search is None:
            return None
        budget = self.job.search.budget
        if (
            budget.wall_hours is not None
            and self._compute_wall_seconds() > 3600 * budget.wall_hours
        ):
            return f"the budget of {budget.wall_hours:g} hours of wall-clock time is spent"
        if (
            budget.gpu_hours is not None
            and self._count_gpu_hours(time.monotonic()) > budget.gpu_hours
        ):
            return f"the budget of {budget.gpu_hours:g} GPU-hours is spent"
        return None

    def _count_gpu_hours(self, now: float) -> float:
        """Return the GPU-hours of all trials.

        They are counted every few seconds only, because Tune asks many times a second.
        """
        if now - self.counted[0] < _COUNT_SECONDS:
            return self.counted[1]
        gpus = self.placement.workers * self.placement.gpus_per_worker
        # The times in a row are sums over the trial's life, over all attempts.
        last_rows = [rows[-1] for trial in self.run.list_trials() if (rows := trial.read_metrics())]
        seconds = sum((row.train_seconds or 0.0) + (row.eval_seconds or 0.0) for row in last_rows)
        spent = gpus * seconds / 3600
        self.counted = (now, spent)
        return spent

    def _evaluate_held_out(self, data: Any) -> None:
        """Evaluate the base and the finalists on the held-out rows.

        Finalists are the recommended trial and the trials that reached as high a rung as any.
        """
        from lorafleet.tuning.held_out import (
            build_base_evaluation,
            build_trial_evaluation,
            evaluate_all,
        )

        self._record_phase("evaluating on held-out rows")
        self.run.check_current()
        report = build_report(self.run)
        # Trials that stopped early have weights too, of their best evaluation.
        ended = [
            t
            for t in self.run.list_trials()
            if t.state in (TrialState.FINISHED, TrialState.STOPPED)
        ]
        finalists = [
            t.id for t in ended if t.weights.is_dir() and not (t.path / "test.json").is_file()
        ]
        last_rungs = {
            row.trial_id: row.rung if row.rung is not None else -1 for row in report.trials
        }
        highest_rung = max((last_rungs.get(name, -1) for name in finalists), default=-1)
        chosen = report.recommendation.trial_id
        names = [
            name for name in finalists if name == chosen or last_rungs.get(name, -1) >= highest_rung
        ]
        splits = ("test",) if not data.chosen_on_test else ("validation",)
        shown_rows = (row.to_display_record() for row in data.read_rows(splits[0]))
        files.write_jsonl(self.run.get_rows_file(splits[0]), shown_rows)
        write_baselines(
            self.run,
            self.job,
            {name: data.read_rows(name) for name in dict.fromkeys(("validation", *splits))},
        )
        work, tokens = self._build_work(data), str(data.folder)
        evaluations = []
        if not (self.run.path / "report" / "base.json").is_file():
            evaluations.append(
                build_base_evaluation(
                    self.run, work.job, tokens, tuple(dict.fromkeys(("validation", *splits)))
                )
            )
        for trial in (self.run.get_trial(name) for name in names):
            job = search.build_trial_job(work.job, trial.read_params().assignment)
            evaluations.append(build_trial_evaluation(trial, job, tokens, splits))
        failed = evaluate_all(work, evaluations, self.placement.slots)
        for name, reason in failed.items():
            sentence = f"not evaluated on the held-out rows: {reason}"
            self.run.add_event(WarningEvent(trial_id=name, sentence=sentence))

    def _finish(self) -> ExitCode:
        """Record the final state, write the report, and return the exit code."""
        wall_seconds = self._compute_wall_seconds()
        self.run.check_current()
        if self.stop_file.exists():
            self.run.set_state(
                RunState.STOPPED,
                reason="interrupted: continue with `lorafleet resume`",
                wall_seconds=wall_seconds,
            )
            if not self.share:
                write_report(self.run)
            return ExitCode.INTERRUPTED if self.told in (None, signal.SIGINT) else ExitCode.REQUEUE
        from lorafleet.evaluation.render.wandb import track_report

        states = [trial.state for trial in self.run.list_trials()]
        failed = states.count(TrialState.FAILED)
        if self.share:  # the run's last job writes the report of all array tasks
            self.run.set_state(RunState.FINISHED, wall_seconds=wall_seconds, phase=None)
            return ExitCode.OK
        self._record_phase("writing the report")
        everything_failed = bool(states) and failed == len(states)
        state = RunState.FAILED if everything_failed else RunState.FINISHED
        reason = f"{failed} of {len(states)} trials failed" if failed else None
        # Before the state changes: a run that says `finished` has its report.
        write_report(self.run, with_tokenizer=True)
        self.run.set_state(state, reason=reason, wall_seconds=wall_seconds, phase=None)
        track_report(
            self.run, self.job, write_report(self.run)
        )  # written again, because the report shows the state
        return ExitCode.SOME_TRIALS_FAILED if failed else ExitCode.OK

    def _handle_full_disk(self, sentence: str) -> None:
        """Stop all trials after one could not write. What was written before is kept.

        Args:
            sentence: The message that ends the run.
        """
        self.run.release_reserve()
        # The reserve is released first: the record's last writes need its space.
        self.disk_full = sentence
        self.stop_file.touch()


def _build_stopper(run: Run, path: Path) -> Any:
    """Return Tune's stopper for the stop file.

    Trials check the file themselves, save and end. Tune would kill an actor after ten
    seconds, so this stopper ends the search only when no trial runs (all may wait for
    machines that never come), or after `_SAVE_SECONDS`.

    Args:
        path: The stop file.
    """
    from ray.tune.stopper import Stopper

    class OnFile(Stopper):
        looked_at = 0.0

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            try:
                age = time.time() - path.stat().st_mtime
            except FileNotFoundError:
                return False
            if age > _SAVE_SECONDS:
                return True
            if (
                time.monotonic() - self.looked_at < _STOP_CHECK_SECONDS
            ):  # Tune asks ten times a second
                return False
            self.looked_at = time.monotonic()
            return not any(trial.state is TrialState.RUNNING for trial in run.list_trials())

    return OnFile()


@contextlib.contextmanager
def _silence_tune() -> Iterator[None]:
    """Suppress Tune's warnings about missing result files: the run's own files hold the results."""
    import logging

    names = ("ray.tune.analysis.experiment_analysis", "ray.tune.result_grid")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
