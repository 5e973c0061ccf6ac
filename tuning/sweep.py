"""A search from its run folder to its report. `train` is a search of one assignment.

Every attempt reads the run's own files and begins a new Tuner with the trials that have not ended; Tune's snapshots are
not used.
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

from lorafleet.cluster.execution.allocation import allocation_here
from lorafleet.cluster.ray.nodes import nodes_of
from lorafleet.evaluation.metrics.summary import write_baselines
from lorafleet.evaluation.report.search import build_report, write_report
from lorafleet.jobs import files
from lorafleet.jobs.errors import DiskFull, ExitCode, PlacementRefused, RunError
from lorafleet.jobs.runs.run import Run, RunState, Trial, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import fitted
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.defaults import learning_rate
from lorafleet.jobs.trials.sampling import Assignment, known_assignments
from lorafleet.jobs.trials.schedule import schedule
from lorafleet.jobs.trials.trial_id import facts_of, trial_id
from lorafleet.tuning.driver import TrainingDriver
from lorafleet.tuning.node_check import check_nodes
from lorafleet.tuning.proposals import GivenProposals, Proposals, ThenSeeds, TpeProposals
from lorafleet.tuning.provenance import record_of

_COUNT_SECONDS = 5.0
_GIVE_BACK_SECONDS = 5.0
_MACHINES_SECONDS = 15.0
"""Between two looks at the machines of an allocation."""
_LOOK_SECONDS = 1.0
"""Between two looks at the trials of a run that is to stop."""
_SAVE_SECONDS = 300.0
"""How long trials may take to save when a run is asked to end."""


class Sweep(TrainingDriver):
    """One attempt at a search, or at one training."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.searching = self.stored["command"] == "sweep"
        self.share: list[int] = self.stored.get("share") or []
        self.judges: bool = self.stored.get("judges", True) and not self.share
        self.looked_at, self.too_few = time.monotonic(), False
        self.counted = (-_COUNT_SECONDS, 0.0)  # when GPU-hours were last counted, and how many there were

    def _attempt(self, attempt: int) -> ExitCode:
        self._phase("reading data, starting workers")
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(self._read_data)  # it imports torch, while Ray mostly waits for its processes
            with self._ray(attempt) as ray_facts:
                self.run.event("ray", **ray_facts)
                data = reading.result()
                if not ray_facts["own"]:
                    check_nodes(self.run.path, data.folder, self.job)
                if not self.stop_file.exists():
                    self._search(attempt, data)
                if not self.stop_file.exists() and self.judges:
                    self._exam(data)
        if self.disk_full:
            raise DiskFull(self.disk_full)
        return self._finish()

    def _read_data(self) -> Any:
        """The rows as tokens, and what is known of them written down."""
        from lorafleet.training.data import prepare

        data = prepare(self.job)
        self.facts = facts_of(self._searched_job)
        self._check_facts()
        record = record_of(self.job, self.facts, data) | {"learning_rate": learning_rate(self.job).value}
        files.write_json(self.run.path / "facts.json", record)
        return data

    def _check_facts(self) -> None:
        """Raise RunError when data or model are not what an earlier attempt trained on."""
        self.run.check_current()
        before = files.read_json(self.run.path / "facts.json")
        now = {"data_sha256": self.facts.data_sha256, "model_revisions": self.facts.model_revisions}
        for name, digests in now.items():
            if before and before[name] != digests:
                what = "data files" if name == "data_sha256" else "model"
                raise RunError(
                    f"the {what} of {self.run.id} have changed since it began (facts.json has their digests): put the "
                    "old ones back, or start a new sweep"
                )

    def _search(self, attempt: int, data: Any) -> None:
        from lorafleet.tuning.ledger import Ledger
        from lorafleet.tuning.scheduler import RungScheduler
        from lorafleet.tuning.searcher import ProposalSearcher, tell
        from lorafleet.tuning.tracking import trackers
        from ray import tune
        from ray.tune import FailureConfig

        ledger = Ledger(self.run, self.job, self.searching)
        ledger.settle()
        known = known_assignments(self._searched_job, self._name)
        first = 0
        if self.share:
            first, last = self.share
            known = known[first:last]
        proposals = self._proposals(known, ledger)
        for trial in self.run.trials():
            if trial.state.ended:
                tell(proposals, ledger, trial)
        total = self._total(known)
        self.run.event("search", trials=total)
        # Cut decisions of an earlier attempt are settled, and what is left may be nothing.
        searcher = ProposalSearcher(
            ledger, proposals, total, self._most_open(), lambda a, i: self._make(a, first + i, data), self._no_more
        )
        self._phase("training")
        with trackers(self.run, self.job) as listeners:
            ledger.listeners += listeners
            tuner = tune.Tuner(
                self._trainable(data),
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=RungScheduler(
                        ledger, self._out_of_budget, self._full_disk, ends_itself=self.placement.distributed
                    ),
                    num_samples=-1,
                    reuse_actors=not self.placement.distributed,
                ),
                run_config=tune.RunConfig(
                    name=f"attempt-{attempt}",
                    storage_path=str(self.run.path / "tune"),
                    # Whether a trial begins again is the ledger's to say: it knows what ended it, and how often.
                    failure_config=FailureConfig(max_failures=0),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    stop=_stop_file(self.run, self.stop_file),
                    verbose=0,
                ),
            )
            with _quiet_tune():
                tuner.fit()
        self._count_what_ray_kept()
        left = [trial for trial in self.run.trials() if not trial.state.ended]
        if left and not self.stop_file.exists() and not self._out_of_budget():
            raise RuntimeError(f"Ray Tune ended while {len(left)} trials were left: {', '.join(t.id for t in left)}")
        for trial in self.run.trials():
            if trial.state is TrialState.RUNNING:
                over = self._out_of_budget()
                if over and not self.stop_file.exists():
                    ledger.end(trial, TrialState.STOPPED, reason=over)
                else:
                    trial.set_state(TrialState.PENDING, reason="interrupted")

    def _count_what_ray_kept(self) -> None:
        """Note the placement groups of stopped trials that Ray did not give back: they hold CPUs and GPUs."""
        if not self.placement.distributed:
            return
        from ray.util.placement_group import placement_group_table

        ends = time.monotonic() + _GIVE_BACK_SECONDS
        while left := [row for row in placement_group_table().values() if row["state"] != "REMOVED"]:
            if time.monotonic() > ends:
                break
            time.sleep(0.2)
        self.run.event("ray_left", placement_groups=len(left))

    @property
    def _searched_job(self) -> JobSpec:
        return self.job if self.searching else self.job.model_copy(update={"search": None})

    def _name(self, assignment: Assignment) -> str:
        return trial_id(search.trial(self._searched_job, assignment), self.facts)

    @property
    def _afterwards(self) -> int:
        """Trainings of the best configuration after the search."""
        searching = self.searching and self.job.search is not None and not self.share
        return len(search.after_search(self.job, {})) if searching else 0

    def _proposals(self, known: list[Assignment], ledger: Any) -> Proposals:
        found: Proposals = GivenProposals(known)
        if self.searching and self.job.search and self.job.search.method == "tpe":
            found = TpeProposals(self.job, known, self._name)
        if not self._afterwards:
            return found
        most = self._total(known) - self._afterwards
        endless = isinstance(found, TpeProposals)
        return ThenSeeds(found, self.job, ledger.best_of_search, lambda: endless and len(ledger.searched()) >= most)

    def _total(self, known: list[Assignment]) -> int:
        if self.searching and self.job.search and self.job.search.method == "tpe":
            return self.job.search.num_samples + self._afterwards
        return len(known) + self._afterwards

    def _most_open(self) -> int:
        """Trials handed out and not ended. TPE is asked as late as it can be without an actor standing idle."""
        slots = self.placement.slots
        if self.placement.distributed:
            return slots  # one more would take CPUs that a group needs, and neither could begin
        tpe = self.searching and self.job.search is not None and self.job.search.method == "tpe"
        return slots + 1 if tpe else 2 * slots

    def _make(self, assignment: Assignment, index: int, data: Any) -> Trial:
        self.run.check_current()
        job = search.trial(self._searched_job, assignment)
        plan = schedule(job, data.training_rows(job), searching=self.searching)
        trial = self.run.add_trial(trial_id(job, self.facts), index, assignment)
        params = trial.params()
        if "resolved" not in params:
            resolved = job.model_dump(mode="json", exclude={"search", "tracking", "name", "environment"})
            resolved["train"]["learning_rate"] = learning_rate(job).value
            files.write_json(
                trial.path / "params.json",
                params
                | {
                    "resolved": resolved,
                    "rung_levels": list(plan.rung_levels),
                    "rung_steps": list(plan.rung_steps),
                    "total_steps": plan.total_steps,
                    "batch_rows": plan.batch_rows,
                    "gpus": self.placement.workers * self.placement.gpus_per_worker,
                    "repeats": search.repeats(self._searched_job, assignment),
                },
            )
        return trial

    def _work(self, data: Any) -> Any:
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

    def _trainable(self, data: Any) -> Any:
        from ray import tune

        work = self._work(data)
        if self.placement.distributed:
            from lorafleet.tuning.distributed_trial import distributed_trainable

            return distributed_trainable(work, self.placement)
        from lorafleet.tuning.trainable import WarmTrial

        bundle = {"CPU": self.placement.cpus_per_worker, "GPU": self.placement.gpus_per_worker}
        labels = {"bundle_label_selector": [self.placement.labels]} if self.placement.labels else {}
        resources = tune.PlacementGroupFactory([bundle], **labels)
        return tune.with_resources(tune.with_parameters(WarmTrial, work=work), resources)

    def _no_more(self) -> bool:
        """Whether no further trial may begin."""
        if signal.getsignal(signal.SIGUSR1) != self._ask:
            self._hear_signals()  # Tune takes SIGUSR1 for itself when it begins
        self._note_wall()
        self._look_at_machines()
        return self.stop_file.exists() or self._out_of_budget() is not None

    def _look_at_machines(self) -> None:
        """End, to be requeued, when the nodes that are left of an allocation cannot hold one trial: none comes back."""
        now = time.monotonic()
        if not allocation_here() or now - self.looked_at < _MACHINES_SECONDS or self.stop_file.exists():
            return
        self.looked_at = now
        import ray

        try:
            fitted(self.placement, nodes_of(ray.nodes()))
        except PlacementRefused as error:
            if not self.too_few:
                self.too_few = True  # a node that Ray believes lost for a moment is there at the next look
                return
            self.run.event("note", sentence=f"nodes were lost: {error}; saved, to go on in a new allocation")
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            self.too_few = False

    def _out_of_budget(self) -> str | None:
        """Why no more may be spent, or None."""
        if not self.searching or self.job.search is None:
            return None
        budget = self.job.search.budget
        if budget.wall_hours is not None and self._wall() > 3600 * budget.wall_hours:
            return f"the budget of {budget.wall_hours:g} hours on the clock is spent"
        if budget.gpu_hours is not None and self._gpu_hours(time.monotonic()) > budget.gpu_hours:
            return f"the budget of {budget.gpu_hours:g} GPU-hours is spent"
        return None

    def _gpu_hours(self, now: float) -> float:
        """Over all trials; counted every few seconds, since Tune asks many times a second."""
        if now - self.counted[0] < _COUNT_SECONDS:
            return self.counted[1]
        gpus = self.placement.workers * self.placement.gpus_per_worker
        lasts = [rows[-1] for trial in self.run.trials() if (rows := trial.metrics())]
        spent = gpus * sum(row["train_seconds"] + row["eval_seconds"] for row in lasts) / 3600
        self.counted = (now, spent)
        return spent

    def _exam(self, data: Any) -> None:
        """The base, the recommended trial, and the others that came as far, on the test rows."""
        from lorafleet.tuning.held_out import base_exam, examine_all, trial_exam

        self._phase("evaluating on held-out rows")
        self.run.check_current()
        report = build_report(self.run)
        whole = [t for t in self.run.trials() if t.state in (TrialState.FINISHED, TrialState.STOPPED)]
        finalists = [t.id for t in whole if t.weights.is_dir() and not (t.path / "test.json").is_file()]
        reached = {row.trial_id: row.rung if row.rung is not None else -1 for row in report.trials}
        last = max((reached.get(name, -1) for name in finalists), default=-1)
        chosen = report.recommendation.trial_id
        names = [name for name in finalists if name == chosen or reached.get(name, -1) >= last]
        rows = ("test",) if not data.chosen_on_test else ("validation",)
        files.write_jsonl(self.run.rows_file(rows[0]), (row.shown() for row in data.rows(rows[0])))
        write_baselines(self.run, self.job, {name: data.rows(name) for name in dict.fromkeys(("validation", *rows))})
        work, tokens = self._work(data), str(data.folder)
        exams = []
        if not (self.run.path / "report" / "base.json").is_file():
            exams.append(base_exam(self.run, work.job, tokens, tuple(dict.fromkeys(("validation", *rows)))))
        for trial in (self.run.trial(name) for name in names):
            job = search.trial(work.job, trial.params()["assignment"])
            exams.append(trial_exam(trial, job, tokens, rows))
        failed = examine_all(work, exams, self.placement.slots)
        for name, why in failed.items():
            self.run.event("warning", trial_id=name, sentence=f"not evaluated on the held-out rows: {why}")

    def _finish(self) -> ExitCode:
        wall = self._wall()
        self.run.check_current()
        if self.stop_file.exists():
            self.run.set_state(RunState.STOPPED, reason="interrupted: `lorafleet resume` goes on", wall_seconds=wall)
            if not self.share:
                write_report(self.run)
            return ExitCode.INTERRUPTED if self.told in (None, signal.SIGINT) else ExitCode.REQUEUE
        from lorafleet.evaluation.render.wandb import track_report

        states = [trial.state for trial in self.run.trials()]
        failed = states.count(TrialState.FAILED)
        if self.share:  # the run's last job writes the report, of all parts
            self.run.set_state(RunState.FINISHED, wall_seconds=wall, phase=None)
            return ExitCode.OK
        self._phase("writing the report")
        everything_failed = bool(states) and failed == len(states)
        state = RunState.FAILED if everything_failed else RunState.FINISHED
        reason = f"{failed} of {len(states)} trials failed" if failed else None
        write_report(self.run, with_tokenizer=True)
        self.run.set_state(state, reason=reason, wall_seconds=wall, phase=None)
        track_report(self.run, self.job, write_report(self.run))  # once more: it shows the state
        return ExitCode.SOME_TRIALS_FAILED if failed else ExitCode.OK

    def _full_disk(self, sentence: str) -> None:
        """A trial could not write: all end, with what was written before."""
        self.run.release_reserve()
        self.disk_full = sentence
        self.stop_file.touch()


def _stop_file(run: Run, path: Path) -> Any:
    """Return Tune's stopper for the stop file.

    Trials see the file themselves, save and end. Tune would give an actor ten seconds and then kill it, so it ends the
    search only once no trial runs (all wait for machines, which may never come), or after `_SAVE_SECONDS`.
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
            if time.monotonic() - self.looked_at < _LOOK_SECONDS:  # Tune asks ten times a second
                return False
            self.looked_at = time.monotonic()
            return not any(trial.state is TrialState.RUNNING for trial in run.trials())

    return OnFile()


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Without Tune's complaints that its own result files are missing: ours hold the results."""
    import logging

    names = ("ray.tune.analysis.experiment_analysis", "ray.tune.result_grid")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
