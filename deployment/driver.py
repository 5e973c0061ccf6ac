"""Run an export or a benchmark as a cluster job of its own.

`export --on SITE` and `benchmark --on SITE` create a run with the request in its plan;
this driver executes it on the node. Without `--on` the commands call `run_delivery` and
`benchmark` directly.
"""

from __future__ import annotations

import signal
from pathlib import Path

from lorafleet.cluster.execution.driver import Driver, log
from lorafleet.cluster.run_index import find_run
from lorafleet.deployment.benchmark import BenchmarkSettings, benchmark, build_variants
from lorafleet.deployment.export import run_delivery
from lorafleet.evaluation.render.wandb import track_report
from lorafleet.evaluation.render.write import write_report_files
from lorafleet.evaluation.report.model_of_run import SelectedModel, select_model
from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.export_result import EXPORTED, ExportRequest
from lorafleet.jobs.runs.run import Run, RunState


class _StopRequested(BaseException):
    """Raised when the user or a signal asks the run to end. It is not the failure of a target."""


class DeliveryDriver(Driver):
    """One attempt at an export or a benchmark.

    `commands/execute.py` creates it for runs whose command is export or benchmark. A new
    attempt starts from the beginning: the work takes minutes, and a half-finished export is
    worth nothing.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.request = ExportRequest.from_record(self.plan.delivery or {})

    def _run_attempt(self, attempt: int) -> ExitCode:
        """Run the export or benchmark, and record the final state of the run.

        Args:
            attempt: Number of the attempt.

        Returns:
            The exit code: 3 (a gate refused a target) among them, or that of an interrupted
                run.
        """
        (self.run.path / EXPORTED).unlink(missing_ok=True)  # left by an earlier attempt
        source = find_run(self.run.path.parent, self.request.run)
        selected = select_model(source, self.request.trial_id)
        out = Path(self.request.output or source.path / "export").absolute()
        try:
            code = (
                self._export(selected, out)
                if self.plan.command == "export"
                else self._benchmark(selected, out)
            )
        except _StopRequested:
            self.run.set_state(
                RunState.STOPPED,
                reason="interrupted: `lorafleet resume` starts it again",
                wall_seconds=self._compute_wall_seconds(),
            )
            return (
                ExitCode.INTERRUPTED
                if self.stop_signal in (None, signal.SIGINT)
                else ExitCode.REQUEUE
            )
        self.run.set_state(RunState.FINISHED, phase=None, wall_seconds=self._compute_wall_seconds())
        return code

    def _export(self, selected: SelectedModel, out: Path) -> ExitCode:
        """Export the selected model, write exported.json, and return the exit code."""
        exported = run_delivery(selected, self.request, out, self._report_progress)
        files.write_json(self.run.path / EXPORTED, exported.model_dump(mode="json"))
        return exported.code

    def _benchmark(self, selected: SelectedModel, out: Path) -> ExitCode:
        """Benchmark the selected model and write the report."""
        delivery = self.request
        settings = BenchmarkSettings(
            delivery.rounds, delivery.rows, delivery.new_tokens, delivery.threads, delivery.points
        )
        report = benchmark(
            selected, build_variants(selected, out, settings), out, settings, self._report_progress
        )
        report = report.model_copy(update={"run": self.run.id})
        write_report_files(report, out / "benchmark")
        write_report_files(report, self.run.path / "report")
        track_report(self.run, selected.job, report, "benchmark")
        return ExitCode.OK

    def _report_progress(self, message: str) -> None:
        """Log the next step and record it in the run.

        It is called between the steps of the work, which is where a run can stop.

        Raises:
            _StopRequested: The run should end.
        """
        if self.stop_file.exists():
            raise _StopRequested
        log(message)
        self._record_phase(message)
        self._record_wall_seconds()
