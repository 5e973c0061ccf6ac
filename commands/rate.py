"""`lorafleet rate RUN`: a person judges answers without knowing whose they are, on a page or in the terminal."""

from __future__ import annotations

import contextlib
import getpass
import os
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, RunName, Runs, Trust, confirm_trust, console, say, tell

if TYPE_CHECKING:
    from lorafleet.evaluation.report.human_rating import Item, Notebook

Rater = Annotated[
    str | None, typer.Option("--rater", metavar="NAME", help="Who rates; left out: the user's name. Kept apart.")
]
Rows = Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Held-out rows to rate.")]
Port = Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: any that is free.")]
InTerminal = Annotated[bool, typer.Option("--terminal", help="Ask here, without a page.")]


def rate(
    run: RunName = None,
    runs: Runs = DEFAULT_RUNS,
    rater: Rater = None,
    rows: Rows = 20,
    port: Port = 0,
    terminal: InTerminal = False,
    trust: Trust = False,
) -> None:
    """Rate the answers of a run's models side by side, blind, from 0 to 5; the report then has what people think."""
    from lorafleet.cluster.run_index import find_run
    from lorafleet.evaluation.report.human_rating import Notebook, checked_rater, folder_of, sheet_of_run
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import RunError

    found = find_run(runs, run)
    confirm_trust(found, "rate", trust=trust)
    name = checked_rater(rater or os.environ.get("LORAFLEET_RATER") or getpass.getuser())
    path = folder_of(found) / f"{name}.jsonl"
    with files.locked(path, wait=False) as alone:
        if not alone:
            raise RunError(f"{name} is rating {found.id} already: end that one, or rate as another (--rater NAME)")
        book = Notebook.open(path, sheet_of_run(found, name, rows))
        if terminal:
            _ask(book)
        else:
            _serve(book, found.id, port)
    say(f"{len(book.scores)} ratings of {name} in {path}; `lorafleet report {found.id}` has them")


def _serve(book: Notebook, title: str, port: int) -> None:
    from lorafleet.jobs.errors import UserError
    from lorafleet.webapp.guard import serve as answer_requests
    from lorafleet.webapp.local import free_socket, new_token
    from lorafleet.webapp.rate import rating_app

    try:
        listening = free_socket(port)
    except OSError as error:
        raise UserError(f"--port is {port}, which cannot be had on 127.0.0.1: {error.strerror}") from error
    with listening:
        token, taken = new_token(), listening.getsockname()[1]
        app = rating_app(book, title, token, taken)
        say(f"rate at  http://127.0.0.1:{taken}/#{token}")
        say("(this machine alone; every rating is kept at once; Ctrl-C ends)")
        host = os.environ.get("SSH_CONNECTION", "").split()[2:3]
        if host:
            say(f"from elsewhere, first: ssh -L {taken}:127.0.0.1:{taken} {host[0]}")
        with contextlib.suppress(KeyboardInterrupt):  # it is told again, once the page is closed
            answer_requests(app, listening)


def _ask(book: Notebook) -> None:
    """Every rating that is missing, one after another, and at the end whose the answers were."""
    _ask_missing(book)
    for one in book.means():
        scores = ", ".join(f"{criterion} {mean:.2f}" for criterion, mean in one["means"].items())
        tell(f"{one['arm']}: {scores} (means of your ratings of {one['rows']} rows)")


def _ask_missing(book: Notebook) -> None:
    from lorafleet.evaluation.report.human_rating import CRITERIA, HIGHEST, LOWEST

    screen = console()
    keys = f"{LOWEST}-{HIGHEST}, u undoes the last, n TEXT notes, s skips the row, q ends"
    at = 0
    while at < len(book.items):
        number, item = at + 1, book.items[at]
        at += 1
        wanted = [(slot, name) for slot in _slots(item) for name in CRITERIA]
        if not _missing(book, item, wanted):
            continue
        screen.rule(f"row {number} of {len(book.items)}")
        for role, text in item.turns:
            screen.print(f"{role}: {text}", markup=False)
        if not item.turns:
            screen.print(item.prompt, markup=False)
        for slot, text in zip(_slots(item), item.texts, strict=True):
            screen.print(f"\n{slot}: {text or '(nothing)'}", markup=False)
        while left := _missing(book, item, wanted):
            slot, name = left[0]
            try:
                said = typer.prompt(f"answer {slot}, {name} ({keys})").strip()
            except (typer.Abort, EOFError):
                return
            if said == "q":
                return
            if said == "s":
                break
            if said == "u":
                undone = book.undo()
                if undone is None:
                    say("there is nothing to undo")
                elif undone[0] != item.row:  # back to that row, and then on from there
                    back = next(place for place, other in enumerate(book.items) if other.row == undone[0])
                    at = min(at - 1, back)  # of a longer sheet the row may come later: it is asked there
                    break
            elif said.startswith("n "):
                book.note(item.row, said[2:])
            elif said.isdigit() and LOWEST <= int(said) <= HIGHEST:
                book.rate(item.row, slot, name, int(said))
            else:
                say(f"{said!r} is none of {keys}")


def _slots(item: Item) -> list[str]:
    return [answer["slot"] for answer in item.shown()["answers"]]


def _missing(book: Notebook, item: Item, wanted: list[tuple[str, str]]) -> list[tuple[str, str]]:
    given = book.shown()["scores"]
    return [(slot, name) for slot, name in wanted if f"{item.row}/{slot}/{name}" not in given]
