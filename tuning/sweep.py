"""Run a search from its run folder to its report. `train` is a search of one assignment.

Every attempt reads the run's own files and continues with the trials that have not ended.
Tune's snapshots are not used.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.cluster.execution.supervisor import Restart
from lorafleet.evaluation.render.write import write_report
from lorafleet.jobs import files
from lorafleet.jobs.data.rows import forget_rows
from lorafleet.jobs.errors import (
    DiskFull,
    ExitCode,
    PlacementRefused,
    RunError,
    make_disk_full_error,
)
from lorafleet.jobs.runs.events import NoteEvent, SearchEvent
from lorafleet.jobs.runs.plan import PackingPlan
from lorafleet.jobs.runs.records import PackRecord
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.types import Assignment
from lorafleet.jobs.sites.base import Node
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.defaults import resolve_learning_rate
from lorafleet.jobs.trials.sampling import list_planned_assignments
from lorafleet.jobs.trials.schedule import build_schedule
from lorafleet.jobs.trials.trial_id import compute_provenance, compute_trial_id
from lorafleet.tuning.budget import Budget
from lorafleet.tuning.driver import TrainingDriver
from lorafleet.tuning.machine_watch import MachineWatch
from lorafleet.tuning.node_check import check_nodes
from lorafleet.tuning.progress import (
    DriverLink,
    LocalLink,
    Pace,
    ProgressBoard,
    RayLink,
    open_exchange,
)
from lorafleet.tuning.proposals import ListProposals, Proposals, SearchThenSeeds, TpeProposals
from lorafleet.tuning.provenance import build_metadata
from lorafleet.tuning.tuner import record_leaked_groups, run_tuner

if TYPE_CHECKING:
    from lorafleet.evaluation.tokens import TokenData
    from lorafleet.tuning.base_cache import BaseCache
    from lorafleet.tuning.ledger import Ledger
    from lorafleet.tuning.recorder import Recorder
    from lorafleet.tuning.tracking import BackgroundTracker
    from lorafleet.tuning.trial_host import TrialHost
    from lorafleet.tuning.trial_queue import ThreadShare, TrialQueue
    from lorafleet.tuning.trial_table import TrackedTrial

_RESULTS_SECONDS = 10.0
"""Seconds between two times that results without an evaluation are saved."""


class Sweep(TrainingDriver):
    """One attempt at a search, or at one training.

    `share` is the range of assignments of an array task; such a task neither evaluates
    held-out rows nor writes a report, because the merging driver does. `judges` is off for
    the arms of a comparison.
    """

    def __init__(self, run: Run, restart: Restart | None = None) -> None:
        super().__init__(run, restart)
        self.searching = self.plan.command == "sweep"
        self.share = self.plan.share
        self.judges = self.plan.judges and not self.share
        self.packing = PackingPlan.model_validate(self.plan.packing) if self.plan.packing else None
        self.progress = ProgressBoard()
        self.trackers = contextlib.ExitStack()
        self.tracker: BackgroundTracker | None = None
        self._results_pace = Pace(_RESULTS_SECONDS)

    def _run_attempt(self, attempt: int) -> ExitCode:
        # Closed when Ray has ended: nothing is kept waiting for W&B but this process.
        with self.trackers:
            if self.trains_in_process and not self._run_in_process():
                self._unpack()
            if not self.trains_in_process:
                self._run_with_ray(attempt)
        # Raised only here, after Ray has stopped: the trials have saved what they could.
        if self.disk_full:
            raise DiskFull(self.disk_full)
        return self._finish()

    def _run_in_process(self) -> bool:
        """Train and evaluate in this process, and return True.

        Returns:
            False if nothing was done, because trials that are not packed need processes of their
            own.
        """
        self._record_phase("reading data")
        self._prepare_process()
        data = self._read_data()
        # Imported here: it imports torch and transformers, which takes seconds.
        from lorafleet.tuning.trial_host import TrialHost

        host = TrialHost(self._build_work(data, LocalLink(self.progress, self.stop_request)))
        pack, packing = None, self.packing
        if packing is not None and self.placement.pack > 1 and not self.stop_file.exists():
            from lorafleet.tuning.pack_size import choose_pack

            with self._record_pack_choice() as jobs:
                cores = self.placement.cpus_per_worker
                pack = choose_pack(self.run, packing, jobs, host, cores, self._pack_stacks)
            if pack.trials == 1 and not self._unpacked_fits_here:
                return False
        if not self.stop_file.exists():
            self._search_in_process(host, data, pack)
        if not self.stop_file.exists() and self.judges:
            self._evaluate_in_process(data, host.bases)
        return True

    @contextlib.contextmanager
    def _record_pack_choice(self) -> Iterator[list[JobSpec]]:
        """Record what is measured and, at the end, the choice of an attempt that has made it.

        Yields the jobs of the trials that are known before the search.
        """
        from lorafleet.tuning.pack_size import describe_pack

        self._record_phase("measuring how many trials fit together")
        earlier = self.run.read_pack()
        yield self._list_known_jobs()
        record = self.run.read_pack()
        if record is not None and (earlier is None or earlier.measuring is not None):
            self.run.add_event(NoteEvent(sentence=describe_pack(record)))

    def _unpack(self) -> None:
        """Place the trials as if they had never been packed: each in a process of its own."""
        assert self.packing is not None
        assert self.packing.unpacked is not None
        self.placement = self.packing.unpacked
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self.placement.slots)

    def _fit_placement(self, nodes: tuple[Node, ...]) -> None:
        """Reduce the number of processes to what the cluster's nodes hold.

        Raises PlacementRefused if they cannot hold a single trial.
        """
        try:
            super()._fit_placement(nodes)
        except PlacementRefused:
            # The machines are smaller than the plan says: one trial may still fit.
            if self.placement.pack == 1:
                raise
            self._unpack()
            super()._fit_placement(nodes)

    def _list_known_jobs(self) -> list[JobSpec]:
        """Return the jobs of the trials that are known before the search."""
        assignments = list_planned_assignments(self._searched_job, self._compute_trial_id)
        return [search.build_trial_job(self._searched_job, each) for each in assignments]

    @property
    def _unpacked_fits_here(self) -> bool:
        """Return whether this process trains the trials also if they are not packed."""
        packing = self.packing
        return packing is None or packing.unpacked is None or packing.unpacked.fits_one_process

    def _run_with_ray(self, attempt: int) -> None:
        """Train and evaluate in processes of Ray."""
        self._record_phase("reading data, starting workers")
        with ThreadPoolExecutor(1) as pool:
            # It imports torch and tokenises, while Ray mostly waits for its processes to start.
            reading = pool.submit(self._read_data)
            with self._open_ray(attempt) as ray_session:
                self.run.add_event(ray_session)
                data = reading.result()
                # A local Ray runs on this machine alone, which has been checked by reading the
                # data.
                if not ray_session.started_by_driver:
                    check_nodes(self.run.path, data.folder, self.job)
                if not self.stop_file.exists() and not self._search_with_packs(data):
                    self._search_with_ray(attempt, data)
                uses_pool = not self.evaluates_in_process
                if self._evaluates_later and uses_pool:
                    self._evaluate_in_pool(data)
        if self._evaluates_later and not uses_pool:
            self._evaluate_in_process(data)

    @property
    def _evaluates_later(self) -> bool:
        """Return whether the finalists were trained by groups of processes or in packs, and are
        left to evaluate.

        Warm actors have evaluated their finalists before the search ends.
        """
        were_evaluated = not self.placement.is_distributed and self.placement.pack == 1
        return not were_evaluated and self.judges and not self.stop_file.exists()

    def _search_with_packs(self, data: TokenData) -> bool:
        """Run the trials that are left in packs of several processes of Ray.

        Returns:
            False if nothing was done, because the trials are not packed.
        """
        if self.placement.pack == 1:
            return False
        assert self.packing is not None
        from lorafleet.tuning.pack_host import PackSize
        from lorafleet.tuning.pack_pool import PackPool

        with open_exchange(self.progress, self.stop_request) as exchange:
            work = self._build_work(data, RayLink(exchange.actor))
            pool = PackPool(work, self.placement, exchange, self._add_note)
            with self._record_pack_choice() as jobs:
                machines = MachineWatch(self.run, self.placement)
                pack = pool.choose(self.run, self.packing, jobs, machines.check)
            if pack is not None and pack.trials > 1:
                size = PackSize(pack.trials, pack.trials_per_pass, pack.max_rank)
                max_open = self.placement.slots * pack.trials
                with self._open_search(data, max_open) as (queue, recorder):
                    pool.run(size, queue, recorder, lambda: self._tick(recorder.ledger))
            pool.close()
        if pack is None or pack.trials > 1:
            return True
        self._unpack()
        self._fit_to_cluster()
        return False

    @property
    def _pack_stacks(self) -> Path:
        """File for the stacks of this process if it hangs with several trials."""
        return self.run.path / "logs" / "pack-stacks.txt"

    def _add_note(self, sentence: str) -> None:
        self.run.add_event(NoteEvent(sentence=sentence))

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

    def _search_in_process(self, host: TrialHost, data: TokenData, pack: PackRecord | None) -> None:
        """Run the trials that are left in this process.

        Args:
            pack: How many are trained at once; None: one at a time.
        """
        from lorafleet.tuning.in_process import run_packed_trials, run_trials
        from lorafleet.tuning.pack_host import PackHost, PackSize

        trials = pack.trials if pack is not None else 1
        with self._open_search(data, max_open=trials) as (queue, recorder):

            def tick() -> None:
                self._tick(recorder.ledger)

            if pack is None or trials == 1:
                run_trials(host, queue, recorder, tick)
                return
            size = PackSize(trials, pack.trials_per_pass, pack.max_rank)
            pack_host = PackHost(host, size, self._add_note, self._pack_stacks)
            run_packed_trials(pack_host, queue, recorder, tick)

    def _search_with_ray(self, attempt: int, data: TokenData) -> None:
        """Run the trials that are left through Ray Tune."""
        from lorafleet.tuning.evaluation_queue import EvaluationQueue
        from lorafleet.tuning.finalists import can_be_evaluated, list_base, record_unevaluated
        from lorafleet.tuning.scheduler import RungScheduler
        from lorafleet.tuning.searcher import ProposalSearcher

        is_distributed = self.placement.is_distributed
        evaluations = None
        if self.judges and not is_distributed:
            evaluations = EvaluationQueue(
                list_base(self.run),
                lambda: self._end_search(data),
                lambda name: can_be_evaluated(self.run, name),
            )
        with (
            self._open_search(data, self._compute_max_open()) as (queue, recorder),
            open_exchange(self.progress, self.stop_request) as exchange,
        ):
            searcher = ProposalSearcher(queue, self.stop_request, evaluations, self.placement.slots)

            def tick() -> None:
                self._tick(recorder.ledger)
                exchange.poll()

            run_tuner(
                self.run,
                attempt,
                self._build_trainable(data, RayLink(exchange.actor)),
                searcher,
                RungScheduler(recorder, searcher, ends_itself=is_distributed),
                tick,
                reuse_actors=not is_distributed,
            )
            if is_distributed:
                record_leaked_groups(self.run)
        if evaluations is not None:
            record_unevaluated(self.run, evaluations.failed)

    @contextlib.contextmanager
    def _open_search(self, data: TokenData, max_open: int) -> Iterator[tuple[TrialQueue, Recorder]]:
        """Yield the trials that are left, and the recorder of their reports.

        On exit, trials that the search has left without a state get one.

        Args:
            max_open: Maximum number of trials that are handed out and have not ended.
        """
        from lorafleet.tuning.ledger import Ledger
        from lorafleet.tuning.recorder import Recorder, record_lost_driver
        from lorafleet.tuning.trial_queue import TrialQueue, report_outcome

        ledger = Ledger(self.run, self.job, self.searching)
        budget = self._build_budget(ledger)
        recorder = Recorder(ledger, budget.describe_spent, self._handle_full_disk)
        if self.restart is not None and self.trains_in_process:
            record_lost_driver(recorder, self.restart.failure)
        ledger.apply_due_decisions()
        assignments = list_planned_assignments(self._searched_job, self._compute_trial_id)
        first_index = 0
        if self.share:
            first_index, last = self.share
            assignments = assignments[first_index:last]
        proposals = self._build_proposals(assignments, ledger)
        for trial in ledger.trials:
            if trial.state.has_ended:
                report_outcome(proposals, ledger, trial)
        total = self._count_trials(assignments)
        self.run.add_event(SearchEvent(trials=total))
        machines = MachineWatch(self.run, self.placement)
        # The due decisions of an earlier attempt are made, so no trial may be left.
        queue = TrialQueue(
            ledger,
            proposals,
            total,
            max_open,
            lambda assignment, index: self._create_trial(
                ledger, assignment, first_index + index, data
            ),
            lambda: self._should_stop(budget, machines),
            self._build_thread_share(),
        )
        self._record_phase("training")
        self.progress.trials = ledger.trials
        ledger.listeners.append(self.progress)
        self._start_tracking(ledger)
        try:
            yield queue, recorder
        except BaseException as error:
            if make_disk_full_error(error, self.run.path):
                self.run.release_reserve()
            with contextlib.suppress(OSError, RunError):
                ledger.write_results()
                self.progress.close()
            raise
        ledger.write_results()
        self._settle_unfinished(ledger, budget.describe_spent())
        ledger.delete_surplus_files()
        self.progress.close()

    def _start_tracking(self, ledger: Ledger) -> None:
        """Mirror the search to W&B, if the job asks for it, until `self.trackers` is closed."""
        from lorafleet.tuning.tracking import open_tracker

        tracker = self.trackers.enter_context(
            open_tracker(self.run, self.job, ledger.trials, self.stop_request.exists)
        )
        if tracker is not None:
            ledger.listeners.append(tracker)
            self.tracker = tracker

    def _settle_unfinished(self, ledger: Ledger, spent_budget: str | None) -> None:
        """Record the state of the trials that the search left without one.

        Raises RuntimeError if the search has ended although trials were left.
        """
        is_stopping = self.stop_file.exists()
        unfinished = list(ledger.trials.unended.values())
        if unfinished and not is_stopping and not spent_budget:
            raise RuntimeError(
                f"the search ended before {len(unfinished)} trials had finished: "
                f"{', '.join(trial.id for trial in unfinished)}"
            )
        # Tune's stopper ends the search without a last report of the trials that still run.
        for trial in unfinished:
            if trial.state is TrialState.PAUSED and spent_budget and not is_stopping:
                ledger.end_trial(trial, TrialState.STOPPED, reason=spent_budget)
            if trial.state is not TrialState.RUNNING:
                continue
            if spent_budget and not is_stopping:
                ledger.end_trial(trial, TrialState.STOPPED, reason=spent_budget)
            else:
                trial.set_state(TrialState.PENDING, reason="interrupted")

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

    def _build_proposals(self, assignments: list[Assignment], ledger: Ledger) -> Proposals:
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
            lambda: is_endless and ledger.searched >= max_searched,
        )

    def _count_trials(self, assignments: list[Assignment]) -> int:
        """Return the total number of trials."""
        if self.searching and self.job.search and self.job.search.method == "tpe":
            return self.job.search.num_samples + self._final_trainings
        return len(assignments) + self._final_trainings

    def _build_thread_share(self) -> ThreadShare:
        """Return how the trials share the CPU cores."""
        from lorafleet.tuning.trial_queue import ThreadShare

        placement = self.placement
        takes_idle = (
            placement.has_auto_cpus
            and not placement.is_distributed
            and placement.pack == 1
            and not self.is_on_cluster
        )
        return ThreadShare(placement.cpus_per_worker, placement.slots, takes_idle)

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

    def _create_trial(
        self, ledger: Ledger, assignment: Assignment, index: int, data: Any
    ) -> TrackedTrial:
        """Create the trial of an assignment, and write its parameters.

        Returns the existing trial if an earlier attempt created it.

        Args:
            index: Position in the search, over all attempts and array tasks.
        """
        job = search.build_trial_job(self._searched_job, assignment)
        trial_id = compute_trial_id(job, self.facts)
        if trial_id in ledger.trials:
            return ledger.trials.get(trial_id)
        self.run.check_current()
        plan = build_schedule(job, data.count_training_rows(job), searching=self.searching)
        resolved = job.model_dump(
            mode="json", exclude={"search", "tracking", "name", "environment"}
        )
        resolved["train"]["learning_rate"] = resolve_learning_rate(job).value
        resolved["resources"]["cpus_per_worker"] = self.placement.cpus_per_worker
        return ledger.add_trial(
            trial_id,
            index,
            assignment,
            resolved=resolved,
            rung_levels=list(plan.rung_levels),
            rung_steps=list(plan.rung_steps),
            total_steps=plan.total_steps,
            batch_rows=plan.batch_rows,
            gpus=self.placement.gpus,
            repeats=search.is_seed_repeat(self._searched_job, assignment),
        )

    def _build_work(self, data: Any, link: DriverLink | None = None) -> Any:
        """Return what every trial of the sweep shares.

        Args:
            link: Connects the trials with this driver.
        """
        from lorafleet.tuning.trial_run import Work

        job = self._searched_job
        resources = job.resources.model_copy(update={"strategy": self.placement.strategy})
        return Work(
            job.model_copy(update={"resources": resources}),
            str(self.run.path),
            str(data.folder),
            self.placement.gpus_per_worker,
            self.placement.cpus_per_worker,
            self.searching,
            self.run.attempt,
            link,
        )

    def _build_trainable(self, data: Any, link: DriverLink) -> Any:
        """Return the Tune trainable: a warm actor, or a group of processes."""
        from ray import tune

        work = self._build_work(data, link)
        if self.placement.is_distributed:
            from lorafleet.tuning.distributed_trial import build_distributed_trainable

            return build_distributed_trainable(work, self.placement)
        from lorafleet.tuning.trainable import WarmTrial

        bundle = {"CPU": self.placement.cpus_per_worker, "GPU": self.placement.ray_gpus}
        labels = {"bundle_label_selector": [self.placement.labels]} if self.placement.labels else {}
        resources = tune.PlacementGroupFactory([bundle], **labels)
        return tune.with_resources(tune.with_parameters(WarmTrial, work=work), resources)

    def _end_search(self, data: TokenData) -> list[str]:
        """Report the recommended trial, and return the models to evaluate on held-out rows.

        The whole report follows when they are evaluated; until then, this one can be read.
        """
        # Imported here: it imports torch, which the thread that reads the data does meanwhile.
        from lorafleet.tuning.finalists import end_search

        self.run.check_current()
        names = end_search(self.run, self.job, data)
        self._record_phase("evaluating on held-out rows")
        write_report(self.run)
        return names

    def _evaluate_in_process(self, data: TokenData, bases: BaseCache | None = None) -> None:
        """Evaluate the base and the finalists on the held-out rows, in this process.

        Args:
            bases: The base of this process, if it has one.
        """
        from lorafleet.tuning.base_cache import BaseCache
        from lorafleet.tuning.finalists import record_unevaluated
        from lorafleet.tuning.held_out import build_evaluation
        from lorafleet.tuning.in_process import evaluate_in_process

        work = self._build_work(data)
        evaluations = [build_evaluation(work, data, name) for name in self._end_search(data)]
        failed = evaluate_in_process(
            work,
            bases or BaseCache(work.gpus),
            evaluations,
            threads=self._compute_cores(),
            is_restart=self.restart is not None,
        )
        record_unevaluated(self.run, failed)

    def _evaluate_in_pool(self, data: TokenData) -> None:
        """Evaluate the base and the finalists on the held-out rows, in processes of Ray."""
        from lorafleet.tuning.evaluation_pool import evaluate_in_pool
        from lorafleet.tuning.finalists import record_unevaluated
        from lorafleet.tuning.held_out import build_evaluation

        work = self._build_work(data)
        evaluations = [build_evaluation(work, data, name) for name in self._end_search(data)]
        failed = evaluate_in_pool(work, evaluations, self.placement.slots, self.stop_request)
        record_unevaluated(self.run, failed)

    def _build_budget(self, ledger: Ledger) -> Budget:
        """Return the budget of the search; a single training has none."""
        search_spec = self.job.search if self.searching else None
        return Budget(
            search_spec.budget if search_spec else None,
            self.placement,
            lambda: ledger.trial_seconds,
            self._compute_wall_seconds,
        )

    def _should_stop(self, budget: Budget, machines: MachineWatch) -> bool:
        """Return whether no further trial may start.

        Called before each trial; Tune asks many times a second. So this is also where the
        driver looks at its machines.
        """
        if signal.getsignal(signal.SIGUSR1) != self._handle_signal:
            self._install_signal_handlers()  # Tune replaces the SIGUSR1 handler when it starts
        if self.stop_request.exists():
            return True
        machines.check()
        return self.stop_request.exists() or budget.describe_spent() is not None

    def _tick(self, ledger: Ledger) -> None:
        """Record what is due while trials run. Called often."""
        self._record_wall_seconds()
        if self._results_pace.is_due():
            ledger.save_results()

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
            return self._get_stop_code()
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
        # Written again, because the report shows the state.
        report = write_report(self.run)
        if self.tracker is None or not self.tracker.is_stuck:
            track_report(self.run, self.job, report)
        return ExitCode.SOME_TRIALS_FAILED if failed else ExitCode.OK

    def _handle_full_disk(self, sentence: str) -> None:
        """Stop all trials after one could not write. What was written before is kept.

        Args:
            sentence: The message that ends the run.
        """
        self.run.release_reserve()
        # The reserve is released first: the record's last writes need its space.
        self.disk_full = sentence
        self._request_stop()
