"""`lorafleet resume`: go on where a run was killed or stopped."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, Format, OneRun, Output, Quiet, Runs, Trust, confirm_trust, say, tell
from lorafleet.commands.sweep import Detach, Wait


def resume(
    run: OneRun,
    runs: Runs = DEFAULT_RUNS,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    trust: Trust = False,
) -> None:
    """Go on with a run that was interrupted, killed or failed."""
    from lorafleet.cluster.backends import backend_of
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.view import news
    from lorafleet.commands.watch import follow, show_end
    from lorafleet.evaluation.report.model_of_run import check_prompt_format
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.jobs.runs.run import RunState

    found = find_run(runs, run)
    confirm_trust(found, "resume", trust=trust)
    check_prompt_format(found)
    backend = backend_of(found, trust=trust)
    if found.state is RunState.FINISHED and all(trial.state.ended for trial in found.trials()):
        say(f"{found.id} is finished: there is nothing left to train")
        return show_end(found, ExitCode.OK, quiet=quiet, output=output)
    known: set[str] = set()
    list(news(found, known))
    backend.resume(found)
    if detach:
        tell(found.id)
        return None
    return follow(found, backend, quiet=quiet, output=output, silent=wait, known=known)
