"""The driver of an export or a benchmark that is a job of its own, on a cluster."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from lorafleet.cluster.execution.driver import Driver, log
from lorafleet.cluster.run_index import find_run
from lorafleet.deployment.benchmark import Amount, benchmark, variants
from lorafleet.deployment.export import delivered
from lorafleet.evaluation.render.wandb import track_report
from lorafleet.evaluation.report.model_of_run import Shipped, shipped
from lorafleet.evaluation.report.search import write_forms
from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.export_result import EXPORTED, Delivery
from lorafleet.jobs.runs.run import Run, RunState


class _Stopped(BaseException):
    """Somebody asked for the end: no failure of a target."""


class DeliveryDriver(Driver):
    """One attempt. What was made before is made again: it is minutes, and half of it would be worth nothing."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.wanted = Delivery.model_validate_json(json.dumps(self.stored["delivery"]))

    def _attempt(self, attempt: int) -> ExitCode:
        (self.run.path / EXPORTED).unlink(missing_ok=True)  # an earlier attempt's
        source = find_run(self.run.path.parent, self.wanted.run)
        given = shipped(source, self.wanted.trial_id)
        out = Path(self.wanted.output or source.path / "export").absolute()
        try:
            code = self._export(given, out) if self.stored["command"] == "export" else self._benchmark(given, out)
        except _Stopped:
            self.run.set_state(
                RunState.STOPPED, reason="interrupted: `lorafleet resume` makes it anew", wall_seconds=self._wall()
            )
            return ExitCode.INTERRUPTED if self.told in (None, signal.SIGINT) else ExitCode.REQUEUE
        self.run.set_state(RunState.FINISHED, phase=None, wall_seconds=self._wall())
        return code

    def _export(self, given: Shipped, out: Path) -> ExitCode:
        found = delivered(given, self.wanted, out, self._tell)
        files.write_json(self.run.path / EXPORTED, found.model_dump(mode="json"))
        return found.code

    def _benchmark(self, given: Shipped, out: Path) -> ExitCode:
        wanted = self.wanted
        amount = Amount(wanted.rounds, wanted.rows, wanted.new_tokens, wanted.threads, wanted.points)
        report = benchmark(given, variants(given, out, amount), out, amount, self._tell)
        report = report.model_copy(update={"run": self.run.id})
        write_forms(report, out / "benchmark")
        write_forms(report, self.run.path / "report")
        track_report(self.run, given.job, report, "benchmark")
        return ExitCode.OK

    def _tell(self, sentence: str) -> None:
        """What is done next, for whoever watches."""
        if self.stop_file.exists():
            raise _Stopped
        log(sentence)
        self._phase(sentence)
        self._note_wall()
