"""Log what the command line does, to standard error and to a run's client.log.

Standard error gets the records only with --verbose. The command line starts the log.
Drivers and workers do not: their output is in driver.log. Records hold no request
headers, no bodies and no values of variables.
"""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler
from pathlib import Path

NAME = "client.log"
_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_MAX_EARLY_RECORDS = 1000
"""Records that are kept until the command knows its run."""

PRINTED = {"printed": True}
"""Passed as `extra`: the record's text was printed already, so --verbose does not repeat it."""

_EARLY_RECORDS: list[MemoryHandler] = []


class _ClientLogHandler(logging.FileHandler):
    """Writes to a run's log file. Errors, such as a full disk, do not disturb the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; the folder is created for the first one."""
        try:
            Path(self.baseFilename).parent.mkdir(exist_ok=True)
            super().emit(record)
        except OSError:
            return

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore an error.

        The method of `logging` would print a traceback to standard error, in the middle of the
        command's own output.
        """


def start(*, verbose: bool) -> None:
    """Start logging for this command.

    Args:
        verbose: Log details, and print the records to standard error.
    """
    logger = logging.getLogger("lorafleet")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    stop()
    # The command finds its run only after it has started to log. No level flushes the records, so
    # they wait for `attach`.
    early_records = MemoryHandler(_MAX_EARLY_RECORDS, flushLevel=logging.CRITICAL + 1)
    _EARLY_RECORDS[:] = [early_records]
    logger.addHandler(early_records)
    if verbose:
        printer = logging.StreamHandler()
        printer.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        printer.addFilter(lambda record: not getattr(record, "printed", False))
        logger.addHandler(printer)


def attach(run: Path) -> None:
    """Write the records of this command to the run's logs/client.log from now on.

    The file is created with the first record. Nothing happens if the command does not log, or if
    the run is not this user's own.
    """
    from lorafleet.jobs.runs.trust import find_distrust_reason

    if not _EARLY_RECORDS or not run.is_dir() or find_distrust_reason(run) is not None:
        return
    early_records = _EARLY_RECORDS[0]
    path = run / "logs" / NAME
    current = early_records.target
    if isinstance(current, logging.FileHandler) and Path(current.baseFilename) == path.absolute():
        return
    log_file = _ClientLogHandler(path, encoding="utf-8", errors="replace", delay=True)
    log_file.setFormatter(logging.Formatter(_FORMAT))
    early_records.setTarget(log_file)
    early_records.flush()
    early_records.capacity = 1  # write every record at once


def stop() -> None:
    """Close the log of this command. Do nothing if there is none."""
    logger = logging.getLogger("lorafleet")
    for early_records in _EARLY_RECORDS:
        if early_records.target is not None:
            early_records.target.close()
    _EARLY_RECORDS.clear()
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
