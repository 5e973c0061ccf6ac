"""A search whose trials are simulated, around the driver's real code.

    python -m benchmarks.stub_search RUN [--slots 64] [--keeps-clocks]

Everything that the driver does for a search is real: lease, ledger, queue, proposals,
recorder, scheduler, searcher, report. Only the trials are not: no process is started and
nothing is learnt. A trial's scores follow from its id, and its reports come at the moments of
a simulated clock. So the same search always has the same results, whatever was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.trials.trial_id import Provenance
from lorafleet.tuning.progress import make_progress
from lorafleet.tuning.recorder import Recorder
from lorafleet.tuning.scheduler import RungScheduler
from lorafleet.tuning.searcher import ProposalSearcher
from lorafleet.tuning.sweep import Sweep
from lorafleet.tuning.trial_queue import TrialQueue
from lorafleet.tuning.trial_report import TrialReport, WorkerInfo
from lorafleet.tuning.trial_table import TrackedTrial

ROWS = 6400
"""Training rows that the simulated data has."""


class StubData:
    """Simulated data: the part of `TokenData` that the driver uses before trials start."""

    def count_training_rows(self, job: Any) -> int:
        """Return the number of training rows."""
        return ROWS


@dataclass(order=True)
class StubTrial:
    """A trial in a simulated process. Ordered by the moment of its next report."""

    at: float
    """Simulated time of the next report, in seconds."""
    index: int
    tune_id: str = field(compare=False)
    trial: TrackedTrial = field(compare=False)
    started: float = field(compare=False)
    """Simulated time of its start."""
    step: int = field(compare=False, default=0)

    def draw(self, *what: object) -> float:
        """Return a number between 0 and 1 that follows from the trial and from `what`."""
        text = repr((self.trial.id, *what)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:6]) / 2**48

    @property
    def step_seconds(self) -> float:
        """Return the simulated time of a step: trials differ by up to a factor of two."""
        return 0.05 * (1 + self.draw("speed"))

    def get_targets(self) -> list[int]:
        """Return the steps of its reports: each rung, and two results before it."""
        targets, previous = [], 0
        for rung in self.trial.read_params().rung_steps:
            thirds = [previous + (rung - previous) * part // 3 for part in (1, 2)]
            targets += [step for step in thirds if previous < step < rung] + [rung]
            previous = rung
        return targets

    def set_next(self) -> None:
        """Set the moment of the next report; after the last one, that of the last one."""
        last = self.trial.read_params().rung_steps[-1]
        step = next((target for target in self.get_targets() if target > self.step), last)
        self.at = self.started + step * self.step_seconds
        self.step = step

    def build_report(self) -> TrialReport:
        """Return the report of the current step."""
        rungs = self.trial.read_params().rung_steps
        rung = rungs.index(self.step) if self.step in rungs else None
        progress = 1 - math.exp(-3 * self.step / rungs[-1])
        values: dict[str, Any] = {
            "step": self.step,
            "samples": 8 * self.step,
            "epoch": 8 * self.step / ROWS,
            "train_loss": 2.0 - progress,
            "learning_rate": 1e-3,
            "train_seconds": self.step * self.step_seconds,
            "eval_seconds": 0.1,
            "tokens": 256 * self.step,
            "tokens_per_second": 256 / self.step_seconds,
            "samples_per_second": 8 / self.step_seconds,
            "peak_memory_gib": 1.5,
            "trainable_parameters": 73_728,
            "number_formats": "weights float32, computation float32",
            "host": "stub:1",
            "first_gradient_at": self.started,
        }
        if rung is not None:
            score = 0.5 + progress * (0.3 * self.draw("quality") + 0.1 * self.draw(self.step))
            values |= {"evaluated": True, "rung": rung, "accuracy": round(score, 3)}
            values |= {"f1_macro": score, "loss": 1.5 - score}
            values["intervals"] = {"accuracy": [score - 0.05, score + 0.05]}
        worker = WorkerInfo(name="stub:1", base_loads=1, seconds=1.0)
        return TrialReport(
            row=MetricsRow.model_validate(values), done=self.step == rungs[-1], worker=worker
        )


class StubSearch(Sweep):
    """One attempt at a simulated search.

    Args:
        run: A run of a sweep, as `write_run` makes it.
        slots: Number of simulated processes.
        keeps_clocks: Each trial stores the moment of its start, as a real trial its checkpoint,
            so that a killed search continues with the same clock.
        on_result: Called with the number of results so far, after each one.
    """

    def __init__(
        self,
        run: Run,
        slots: int,
        *,
        keeps_clocks: bool = False,
        on_result: Callable[[int], None] = lambda count: None,
    ) -> None:
        super().__init__(run)
        self.slots, self.keeps_clocks, self.on_result = slots, keeps_clocks, on_result
        self.judges = False
        self.now, self.results, self.search_seconds, self.search_cpu = 0.0, 0, 0.0, 0.0
        self.open: list[StubTrial] = []

    def _run_attempt(self, attempt: int) -> ExitCode:
        self.facts = Provenance(
            {}, {self.job.model.model_name_or_path: "stub"}, {self.job.method: 1e-3}
        )
        data: Any = StubData()
        with self._open_search(data, self._compute_max_open()) as (queue, recorder):
            self.now = max((row.time or 0.0 for row in self._list_moments(recorder)), default=0.0)
            started, cpu = time.perf_counter(), time.process_time()
            self.simulate(queue, recorder)
            self.search_seconds = time.perf_counter() - started
            self.search_cpu = time.process_time() - cpu
        return self._finish()

    def _compute_max_open(self) -> int:
        return self.slots

    def _list_moments(self, recorder: Recorder) -> list[MetricsRow]:
        """Return the last recorded row of each trial, its `time` being the simulated one."""
        rows = [rows[-1] for trial in recorder.ledger.trials if (rows := trial.read_metrics())]
        return [
            row.model_copy(
                update={"time": (row.first_gradient_at or 0.0) + (row.train_seconds or 0.0)}
            )
            for row in rows
        ]

    def simulate(self, queue: TrialQueue, recorder: Recorder) -> None:
        """Run the trials of a queue, as Ray Tune would."""
        searcher = ProposalSearcher(queue, self.stop_request, None, self.slots)
        scheduler = RungScheduler(recorder, searcher, ends_itself=False)
        handed_out = 0
        while True:
            while len(self.open) < self.slots:
                config = searcher.suggest(f"tune-{handed_out}")
                if not isinstance(config, dict):
                    break
                self._start(recorder, f"tune-{handed_out}", config["trial_id"])
                handed_out += 1
            if not self.open:
                return
            stub = heapq.heappop(self.open)
            self.wait_until(stub.at, recorder)
            self.now = max(self.now, stub.at)
            tune_trial: Any = SimpleNamespace(config={"trial_id": stub.trial.id}, status="RUNNING")
            result = stub.build_report().to_result()
            decision = scheduler.on_trial_result(None, tune_trial, result)
            self.results += 1
            self.on_result(self.results)
            self._tick(recorder.ledger)
            if decision == TrialScheduler.STOP:
                searcher.on_trial_complete(stub.tune_id, result)
            else:
                stub.set_next()
                heapq.heappush(self.open, stub)

    def wait_until(self, moment: float, recorder: Recorder) -> None:
        """Do nothing: the simulated clock does not wait."""

    def _start(self, recorder: Recorder, tune_id: str, trial_id: str) -> None:
        """Start a trial in a free slot, or continue it.

        Like a real trial, it first repeats its last report: the driver may not have received it.
        """
        trial = recorder.ledger.trials.get(trial_id)
        started = self.now
        clock = trial.path / "checkpoints" / "last" / "clock.json"
        if self.keeps_clocks:
            if clock.is_file():
                started = float(files.read_json(clock)["started"])
            else:
                files.write_json(clock, {"started": started})
        stub = StubTrial(0.0, trial.read_params().index, tune_id, trial, started)
        stub.step = recorder.ledger.results[trial_id].last_step
        if stub.step < 0:
            stub.step = 0
            stub.set_next()
        else:
            stub.at = stub.started + stub.step * stub.step_seconds
        heapq.heappush(self.open, stub)


class PacedSearch(StubSearch):
    """A simulated search in real time: trials report every few seconds and send heartbeats.

    It ends after `seconds`, by a request to stop.
    """

    beat_seconds, report_seconds = 1.5, 15.0

    def __init__(self, run: Run, slots: int, seconds: float) -> None:
        super().__init__(run, slots)
        self.seconds, self.heartbeats = seconds, 0

    def simulate(self, queue: TrialQueue, recorder: Recorder) -> None:
        """Let all slots train for `seconds`, with neither evaluations nor rungs."""
        searcher = ProposalSearcher(queue, self.stop_request, None, self.slots)
        scheduler = RungScheduler(recorder, searcher, ends_itself=False)
        for number in range(self.slots):
            config = searcher.suggest(f"tune-{number}")
            assert isinstance(config, dict)
            self._start(recorder, f"tune-{number}", config["trial_id"])
        stubs = sorted(self.open, key=lambda stub: stub.index)
        for stub in stubs:
            recorder.ledger.start_trial(stub.trial)
        self.on_training()
        began = time.monotonic()
        beats = [(began + self.beat_seconds * i / len(stubs), i) for i in range(len(stubs))]
        reports = [(began + self.report_seconds * i / len(stubs), i) for i in range(len(stubs))]
        steps = dict.fromkeys(range(len(stubs)), 0)
        while (now := time.monotonic()) < began + self.seconds:
            while beats[0][0] <= now:
                at, number = heapq.heappop(beats)
                steps[number] += 1
                self.heartbeats += 1
                row = MetricsRow.model_validate(self._build_row(steps[number]))
                self.progress.update(stubs[number].trial.id, make_progress(row, 10**6))
                heapq.heappush(beats, (at + self.beat_seconds, number))
            while reports[0][0] <= now:
                at, number = heapq.heappop(reports)
                row = MetricsRow.model_validate(self._build_row(steps[number]))
                tune_trial: Any = SimpleNamespace(
                    config={"trial_id": stubs[number].trial.id}, status="RUNNING"
                )
                result = TrialReport(row=row).to_result()
                scheduler.on_trial_result(None, tune_trial, result)
                heapq.heappush(reports, (at + self.report_seconds, number))
            self._should_stop_trials(queue)
            self._tick(recorder.ledger)
            self.progress.write_if_due()
            time.sleep(0.02)
        self.on_trained()
        self.stop_file.touch()

    def on_training(self) -> None:
        """Do nothing; called when all trials have started."""

    def on_trained(self) -> None:
        """Do nothing; called before the search is asked to stop."""

    def _should_stop_trials(self, queue: TrialQueue) -> None:
        """Ask for another trial, as Tune does many times a second. All slots are in use."""
        queue.take()

    def _build_row(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "samples": 8 * step,
            "train_loss": 1.0,
            "tokens_per_second": 1000.0,
            "train_seconds": 0.1 * step,
        }


def main() -> None:
    """Run a simulated search to its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--keeps-clocks", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="do not print each hundredth result")
    arguments = parser.parse_args()

    def show(count: int) -> None:
        if count % 100 == 0 and not arguments.quiet:
            print(count, flush=True)

    search = StubSearch(
        Run(arguments.run), arguments.slots, keeps_clocks=arguments.keeps_clocks, on_result=show
    )
    code = search.execute()
    print(f"{search.results} results in {search.search_seconds:.2f} s", flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
