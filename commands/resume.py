"""`lorafleet resume`: continue a run that was killed or stopped."""

from __future__ import annotations

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Format,
    OneRun,
    Output,
    Quiet,
    Runs,
    Trust,
    confirm_trust,
    print_message,
    print_text,
)
from lorafleet.commands.options import Detach, Wait


def resume(
    run: OneRun,
    runs: Runs = DEFAULT_RUNS,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    trust: Trust = False,
) -> None:
    """Continue a run that was interrupted, killed or failed."""
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.followed_run import FollowedRun
    from lorafleet.commands.view import iterate_news
    from lorafleet.commands.watch import follow, show_end
    from lorafleet.evaluation.report.model_of_run import check_prompt_format
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.jobs.runs.run import RunState

    selected_run = find_run(runs, run)
    confirm_trust(selected_run, "resume", trust=trust)
    # Trials of one run must not be trained with prompts of two formats.
    check_prompt_format(selected_run)
    backend = get_backend(selected_run, trust=trust)
    if selected_run.state is RunState.FINISHED and all(
        trial.state.has_ended for trial in selected_run.list_trials()
    ):
        print_message(f"{selected_run.id} is finished: no trial is left to train")
        return show_end(selected_run, ExitCode.OK, quiet=quiet, output=output)
    shown_lines: set[str] = set()
    # Consumed but not printed: the news of earlier attempts must not appear again.
    list(iterate_news(FollowedRun(selected_run), shown_lines))
    backend.resume(selected_run)
    if detach:
        print_text(selected_run.id)
        return None
    return follow(
        selected_run, backend, quiet=quiet, output=output, silent=wait, shown_lines=shown_lines
    )
