"""Let only one driver at a time write a run.

Each attempt has a number, and a newer attempt revokes the right to write.
`attempts/N.json` is created with a hard link, which succeeds for exactly one process on
every file system that nodes share. While its driver is alive, `attempts/N.beat` changes;
a driver that ends by itself writes `attempts/N.end`. Clocks of different machines are
never compared, and flock is not used: network file systems apply it on one machine only.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.processes import get_machine_id, get_process_start
from lorafleet.jobs.runs.records import AttemptRecord, read_typed

_BEAT_SECONDS = 5.0
_WATCH_SECONDS = 40.0
"""Seconds to watch a driver on another machine for a heartbeat."""
_REPLACED_SECONDS = 180.0
"""Seconds that the driver of an earlier submission has to save and end after `resume`."""


class HasDriver(RunError):
    """Error: another driver of the run is alive."""


class StaleAttempt(HasDriver):
    """Error: a newer attempt writes this run, so the older attempt must not write any more."""


def find_newest_attempt(run: Path) -> int:
    """Return the number of the newest attempt at a run; 0 if there is none.

    Only this attempt may write the run, whether its driver still lives or not.
    """
    return max(
        (int(path.stem) for path in (run / "attempts").glob("*.json") if path.stem.isdigit()),
        default=0,
    )


def check_current(run: Path, attempt: int) -> None:
    """Raise StaleAttempt if there is a newer attempt.

    Every writer of a run calls this before it writes.
    """
    folder = run / "attempts"
    try:  # opening the folder makes a network file system refresh its list of files
        os.close(os.open(folder, os.O_RDONLY))
    except FileNotFoundError:
        raise StaleAttempt(
            f"attempt {attempt} of {run.name} was replaced by another one, and stops writing"
        ) from None
    except OSError:
        return
    if (folder / f"{attempt + 1}.json").exists():
        raise StaleAttempt(
            f"attempt {attempt} of {run.name} was replaced by attempt {find_newest_attempt(run)}, "
            "and stops writing"
        )


def read_attempts(run: Path) -> list[AttemptRecord]:
    """Return the records of all attempts at a run, oldest first."""
    return [
        read_typed(run / "attempts" / f"{number}.json", AttemptRecord)
        for number in range(1, find_newest_attempt(run) + 1)
    ]


@dataclass
class Lease:
    """The right to write a run, from `acquire` to `release`.

    The driver acquires it, starts the heartbeat, gives `attempt` to everything that writes
    the run, and releases it at its end. If it is killed instead, the next driver must find
    out that it is gone (docs/development/locking.md).
    """

    run: Path
    attempt: int
    ended: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def acquire(
        cls,
        run: Path,
        metadata: AttemptRecord,
        *,
        say: Callable[[str], None] = lambda _: None,
        seconds: float = _WATCH_SECONDS,
    ) -> Lease:
        """Become the driver of a run.

        This waits if the previous driver ran on another machine and did not record its end: for
        `seconds` of silence, and up to three minutes longer if that driver belongs to an
        earlier submission and is still saving.

        Args:
            run: Folder of the run.
            metadata: Stored in the attempt's file, with this process added. Its submission
                and job are compared with those of the previous attempt.
            say: Called with messages for the user.
            seconds: How long a driver on another machine is watched for a heartbeat.

        Returns:
            The lease of a new attempt, without a heartbeat yet.

        Raises:
            HasDriver: Another driver of the run is alive.
        """
        (run / "attempts").mkdir(exist_ok=True)
        # Another process may create the next attempt first. Its driver is then the one to check.
        while True:
            previous = find_newest_attempt(run)
            if previous:
                _check_driver_ended(run, previous, metadata, say, seconds)
            if _create_attempt_file(run, previous + 1, metadata):
                return cls(run, previous + 1)

    def start_heartbeat(self, on_stale: Callable[[str], None]) -> None:
        """Start a thread that writes a heartbeat every few seconds.

        The thread ends with `release`, or with the process.

        Args:
            on_stale: Called once, in that thread, with a message if a newer attempt appears;
                the heartbeat ends then. The driver must not write the run any more.
        """
        threading.Thread(
            target=self._send_heartbeats, args=(on_stale,), name="lease", daemon=True
        ).start()

    def _send_heartbeats(self, on_stale: Callable[[str], None]) -> None:
        number = 0
        while not self.ended.wait(_BEAT_SECONDS if number else 0):
            number += 1
            try:
                check_current(self.run, self.attempt)
                files.overwrite(_get_beat_file(self.run, self.attempt), str(number).encode())
            except StaleAttempt as error:
                on_stale(str(error))
                return
            except OSError:  # full or slow disk: watchers wait for longer than one heartbeat
                continue

    def release(self) -> None:
        """Record that this driver has ended, so that the next one need not watch it."""
        self.ended.set()
        files.overwrite(_get_end_file(self.run, self.attempt), b"")


def find_silent_runs(
    runs: list[Path], say: Callable[[str], None], *, seconds: float = _WATCH_SECONDS
) -> set[Path]:
    """Return the runs whose last driver did not record its end and gives no heartbeat.

    All runs are watched at the same time, for `seconds` seconds. Drivers on this machine are
    not watched.
    """
    unended_runs = [
        run
        for run in runs
        if find_newest_attempt(run) and not _get_end_file(run, find_newest_attempt(run)).exists()
    ]
    # A driver on this machine need not be watched: its process id tells whether it is alive.
    unended_runs = [
        run
        for run in unended_runs
        if _read_attempt(run, find_newest_attempt(run)).machine != get_machine_id()
    ]
    if not unended_runs:
        return set()
    say(
        f"{len(unended_runs)} of {len(runs)} drivers did not record their end: watching them for "
        f"{seconds:.0f} s"
    )
    first_beats = {
        run: _read_text_or_empty(_get_beat_file(run, find_newest_attempt(run)))
        for run in unended_runs
    }
    time.sleep(seconds)
    return {
        run
        for run, beat in first_beats.items()
        if _read_text_or_empty(_get_beat_file(run, find_newest_attempt(run))) == beat
    }


def _get_beat_file(run: Path, attempt: int) -> Path:
    return run / "attempts" / f"{attempt}.beat"


def _get_end_file(run: Path, attempt: int) -> Path:
    return run / "attempts" / f"{attempt}.end"


def _create_attempt_file(run: Path, attempt: int, metadata: AttemptRecord) -> bool:
    """Create the complete file of an attempt. Return False if another process was first."""
    target = run / "attempts" / f"{attempt}.json"
    scratch = target.with_name(
        f".{attempt}-{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"
    )
    identity = {
        "attempt": attempt,
        "machine": get_machine_id(),
        "pid": os.getpid(),
        "pid_started": get_process_start(os.getpid()),
    }
    files.write_json(scratch, identity | metadata.to_dict())
    try:
        # Creating a link fails if the target exists, also on NFS, so one process succeeds.
        os.link(scratch, target)
    except FileExistsError:
        return (
            scratch.stat().st_nlink == 2
        )  # NFS repeated a request whose first reply was lost: the link is ours
    # No hard links on this file system: O_EXCL also excludes others, but the file is briefly empty.
    except OSError:
        try:
            with target.open("x") as file:
                file.write(scratch.read_text())
        except FileExistsError:
            return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _check_driver_ended(
    run: Path, attempt: int, metadata: AttemptRecord, say: Callable[[str], None], seconds: float
) -> None:
    """Raise HasDriver while the driver of an attempt is alive or may be alive."""
    if _get_end_file(run, attempt).exists():
        return
    holder = _read_attempt(run, attempt)
    # On this machine the process table answers at once, so a killed run can be resumed without
    # waiting.
    if holder.machine == get_machine_id():
        if get_process_start(holder.pid) == holder.pid_started:
            raise HasDriver(
                f"{run.name} already has a driver, which is still running (process {holder.pid})"
            )
        return
    job = holder.slurm_job
    if job and metadata.slurm_job == job and metadata.slurm_restart > holder.slurm_restart:
        return  # Slurm restarted the same job, and has ended the previous driver
    host = holder.host or "another machine"
    fail_after = time.monotonic()
    if metadata.submission_number > holder.submission_number > 0:
        # `resume` stops the earlier job before it submits a new one. Its driver may still be
        # saving.
        fail_after += _REPLACED_SECONDS
        say(
            f"attempt {attempt} of an earlier submission may still be saving on {host}: waiting "
            f"until it ends (at most {_REPLACED_SECONDS:.0f} s), or until it is silent for "
            f"{seconds:.0f} s"
        )
    else:
        say(
            f"attempt {attempt} started on {host} and did not record its end: watching it for "
            f"{seconds:.0f} s"
        )
    beat = _get_beat_file(run, attempt)
    last, since = _read_text_or_empty(beat), time.monotonic()
    while time.monotonic() < since + seconds:
        time.sleep(min(1.0, seconds))
        if _get_end_file(run, attempt).exists():
            return
        if (now := _read_text_or_empty(beat)) == last:
            continue
        if time.monotonic() >= fail_after:
            location = f"{host}, job {job}" if job else host
            raise HasDriver(f"{run.name} already has a driver, which is still running ({location})")
        last, since = now, time.monotonic()


def _read_attempt(run: Path, attempt: int) -> AttemptRecord:
    """Return the record of an attempt.

    It is empty if its writer was killed on a file system without hard links.
    """
    try:
        return read_typed(run / "attempts" / f"{attempt}.json", AttemptRecord)
    except RunError:
        return AttemptRecord()


def _read_text_or_empty(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
