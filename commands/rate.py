"""`lorafleet rate RUN`: rate answers blind, on a page or in the terminal."""

from __future__ import annotations

import contextlib
import getpass
import os
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    RunName,
    Runs,
    Trust,
    confirm_trust,
    make_console,
    print_message,
    print_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from lorafleet.evaluation.report.human_rating import Item, Notebook

Rater = Annotated[
    str | None,
    typer.Option(
        "--rater",
        metavar="NAME",
        help=(
            "Name of the rater. Default: the user name. Each rater's ratings are kept separately."
        ),
    ),
]
Rows = Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Held-out rows to rate.")]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        metavar="PORT",
        min=0,
        max=65535,
        help="Port of the page on 127.0.0.1. 0: any free port.",
    ),
]
InTerminal = Annotated[
    bool, typer.Option("--terminal", help="Ask in this terminal instead of on a web page.")
]


def rate(
    run: RunName = None,
    runs: Runs = DEFAULT_RUNS,
    rater: Rater = None,
    rows: Rows = 20,
    port: Port = 0,
    terminal: InTerminal = False,
    trust: Trust = False,
) -> None:
    """Rate the answers of a run's models side by side, blind, from 0 to 5.

    The report then includes the ratings.
    """
    from lorafleet.cluster.run_index import find_run
    from lorafleet.evaluation.report.human_rating import (
        Notebook,
        get_ratings_folder,
        validate_rater,
    )
    from lorafleet.evaluation.report.rating_sheet import build_run_sheet
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import RunError

    selected_run = find_run(runs, run)
    confirm_trust(selected_run, "rate", trust=trust)
    rater_name = validate_rater(rater or os.environ.get("LORAFLEET_RATER") or getpass.getuser())
    path = get_ratings_folder(selected_run) / f"{rater_name}.jsonl"
    # Two processes of one rater would overwrite each other's ratings.
    with files.hold_lock(path, wait=False) as is_locked:
        if not is_locked:
            raise RunError(
                f"{rater_name} is already rating {selected_run.id} in another process: end that "
                "one, or rate under another name (--rater NAME)"
            )
        book = Notebook.open(path, build_run_sheet(selected_run, rater_name, rows))
        if terminal:
            _ask_for_ratings(book)
        else:
            _serve(book, selected_run.id, port)
    print_message(
        f"{len(book.scores)} ratings of {rater_name} are saved in {path}; `lorafleet report "
        f"{selected_run.id}` includes them"
    )


def _serve(book: Notebook, title: str, port: int) -> None:
    from lorafleet.jobs.errors import UserError
    from lorafleet.webapp.guard import serve as answer_requests
    from lorafleet.webapp.local import create_token, open_socket
    from lorafleet.webapp.rate import create_rating_app

    try:
        listener = open_socket(port)
    except OSError as error:
        raise UserError(
            f"--port is {port}, which cannot be opened on 127.0.0.1 ({error.strerror}): choose "
            "another port, or 0 for any free one"
        ) from error
    with listener:
        token, bound_port = create_token(), listener.getsockname()[1]
        app = create_rating_app(book, title, token, bound_port)
        # After the `#`, the token is not sent with requests and does not appear in logs.
        print_message(f"rate at  http://127.0.0.1:{bound_port}/#{token}")
        print_message(
            "(only reachable from this machine; every rating is saved immediately; Ctrl-C ends)"
        )
        # CLIENT PORT SERVER PORT: the third word is the address that the user has reached this
        # machine at.
        host = os.environ.get("SSH_CONNECTION", "").split()[2:3]
        if host:
            print_message(
                f"from another machine, first run: ssh -L {bound_port}:127.0.0.1:{bound_port} "
                f"{host[0]}"
            )
        with contextlib.suppress(
            KeyboardInterrupt
        ):  # Ctrl-C ends the page; uvicorn raises it again when it has closed
            answer_requests(app, listener)


def _ask_for_ratings(book: Notebook) -> None:
    """Ask for every missing rating in turn, then print whose the answers were.

    The means are shown only at the end: knowing the arms would no longer be blind.
    """
    _ask_missing_ratings(book)
    for arm_means in book.compute_means():
        scores = ", ".join(
            f"{criterion} {mean:.2f}" for criterion, mean in arm_means["means"].items()
        )
        print_text(
            f"{arm_means['arm']}: {scores} (means of your ratings of {arm_means['rows']} rows)"
        )


def _ask_missing_ratings(book: Notebook) -> None:
    from lorafleet.evaluation.report.human_rating import CRITERIA, MAX_SCORE, MIN_SCORE

    screen = make_console()
    keys = f"{MIN_SCORE}-{MAX_SCORE}, u undoes the last, n TEXT notes, s skips the row, q ends"
    position = 0
    while position < len(book.items):
        number, item = position + 1, book.items[position]
        position += 1
        required = [(slot, name) for slot in _list_slots(item) for name in CRITERIA]
        # Rated completely in an earlier session.
        if not _find_missing(book, item, required):
            continue
        _show_item(screen, item, f"row {number} of {len(book.items)}")
        while missing := _find_missing(book, item, required):
            slot, name = missing[0]
            try:
                answer = typer.prompt(f"answer {slot}, {name} ({keys})").strip()
            except (typer.Abort, EOFError):
                return
            if answer == "q":
                return
            if answer == "s":
                break
            if answer == "u":
                undone_position = _undo_rating(book, item, position)
                if undone_position is not None:
                    position = undone_position
                    break
            elif answer.startswith("n "):
                book.add_note(item.row, answer[2:])
            elif answer.isdigit() and MIN_SCORE <= int(answer) <= MAX_SCORE:
                book.rate(item.row, slot, name, int(answer))
            else:
                print_message(f"{answer!r} is not valid; enter one of: {keys}")


def _show_item(screen: Console, item: Item, title: str) -> None:
    """Print a row and its answers."""
    screen.rule(title)
    for role, text in item.turns:
        screen.print(f"{role}: {text}", markup=False)
    if not item.turns:
        screen.print(item.prompt, markup=False)
    for slot, text in zip(_list_slots(item), item.texts, strict=True):
        screen.print(f"\n{slot}: {text or '(nothing)'}", markup=False)


def _undo_rating(book: Notebook, item: Item, position: int) -> int | None:
    """Undo the last rating; return the position of its row if that is another one.

    With more --rows than before, that row may come later, and is asked then.
    """
    undone = book.undo()
    if undone is None:
        print_message("there is nothing to undo")
        return None
    if undone[0] == item.row:
        return None
    rows = [candidate.row for candidate in book.items]
    return min(position - 1, rows.index(undone[0]))


def _list_slots(item: Item) -> list[str]:
    return [answer["slot"] for answer in item.to_dict()["answers"]]


def _find_missing(
    book: Notebook, item: Item, required: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    scores = book.to_dict()["scores"]
    return [(slot, name) for slot, name in required if f"{item.row}/{slot}/{name}" not in scores]
