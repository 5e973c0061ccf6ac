"""One driver at a time: an attempt's number is its right to write, and a newer number ends that right.

`attempts/N.json` is made by one hard link, which succeeds for one process alone on every file system that nodes share.
While its driver lives, `attempts/N.beat` changes; a driver that ends of itself leaves `attempts/N.end`. No clock of one
machine is compared with another's, and no flock is used, which network file systems keep on one machine only.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError

_BEAT_SECONDS = 5.0
_WATCH_SECONDS = 40.0
"""How long a driver on another machine is watched for a sign of life."""
_REPLACED_SECONDS = 180.0
"""Time for the driver of an earlier submission to save and end, after `resume`."""


class HasDriver(RunError):
    """Another driver has the run, and lives."""


class StaleAttempt(HasDriver):
    """A newer attempt writes this run: the older one must not any more."""


def machine() -> list[str]:
    """Where a process's number means something: containers and machines may share a folder."""
    try:
        return [os.uname().nodename, str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        return [os.uname().nodename]


def started(pid: int) -> int | None:
    """When a process began (clock ticks since boot, field 22 of /proc/PID/stat): a reused pid has another."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _started_elsewhere(pid)
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _started_elsewhere(pid: int) -> int | None:
    """The same without /proc (macOS)."""
    if Path("/proc/self").is_dir():
        return None
    import psutil

    try:
        return int(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def newest(run: Path) -> int:
    """The number of the newest attempt at a run; 0 before the first."""
    return max((int(path.stem) for path in (run / "attempts").glob("*.json") if path.stem.isdigit()), default=0)


def check_current(run: Path, attempt: int) -> None:
    """Raise StaleAttempt when there is a newer attempt. Every writer of a run asks before it writes."""
    folder = run / "attempts"
    try:  # opening the folder makes a network file system ask its server what is in it now
        os.close(os.open(folder, os.O_RDONLY))
    except FileNotFoundError:
        raise StaleAttempt(f"attempt {attempt} at {run.name} was taken over, and writes no more") from None
    except OSError:
        return
    if (folder / f"{attempt + 1}.json").exists():
        raise StaleAttempt(
            f"attempt {attempt} at {run.name} was overtaken by attempt {newest(run)}, and writes no more"
        )


def attempts(run: Path) -> list[dict[str, Any]]:
    """What each attempt said of itself, oldest first."""
    return [files.read_json(run / "attempts" / f"{number}.json") for number in range(1, newest(run) + 1)]


@dataclass
class Lease:
    """The right to write a run, from `take` to `release`."""

    run: Path
    attempt: int
    ended: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def take(
        cls,
        run: Path,
        facts: Mapping[str, Any],
        *,
        say: Callable[[str], None] = lambda _: None,
        seconds: float = _WATCH_SECONDS,
    ) -> Lease:
        """Become the run's driver, with `facts` in the attempt's file. Raises RunError when another one lives."""
        (run / "attempts").mkdir(exist_ok=True)
        while True:
            before = newest(run)
            if before:
                _check_gone(run, before, facts, say, seconds)
            if _create(run, before + 1, dict(facts)):
                return cls(run, before + 1)

    def keep(self, on_stale: Callable[[str], None]) -> None:
        """Give a sign of life every few seconds, in a thread, and call `on_stale` once if a newer attempt appears."""
        threading.Thread(target=self._beat, args=(on_stale,), name="lease", daemon=True).start()

    def _beat(self, on_stale: Callable[[str], None]) -> None:
        number = 0
        while not self.ended.wait(_BEAT_SECONDS if number else 0):
            number += 1
            try:
                check_current(self.run, self.attempt)
                files.overwrite(_beat_file(self.run, self.attempt), str(number).encode())
            except StaleAttempt as error:
                on_stale(str(error))
                return
            except OSError:  # a full or slow disk: those who watch wait longer than one beat
                continue

    def release(self) -> None:
        """Say that this driver has ended, so that the next need not watch it."""
        self.ended.set()
        files.overwrite(_end_file(self.run, self.attempt), b"")


def watch(runs: list[Path], say: Callable[[str], None], *, seconds: float = _WATCH_SECONDS) -> set[Path]:
    """Of runs whose last driver did not say that it ended, those that give no sign of life: watched all at once."""
    open_ones = [run for run in runs if newest(run) and not _end_file(run, newest(run)).exists()]
    # Of a driver on this machine its process tells at once.
    open_ones = [run for run in open_ones if _holder(run, newest(run)).get("machine") != machine()]
    if not open_ones:
        return set()
    say(f"{len(open_ones)} of {len(runs)} drivers did not say that they ended: watched for {seconds:.0f} s")
    before = {run: _read(_beat_file(run, newest(run))) for run in open_ones}
    time.sleep(seconds)
    return {run for run, beat in before.items() if _read(_beat_file(run, newest(run))) == beat}


def _beat_file(run: Path, attempt: int) -> Path:
    return run / "attempts" / f"{attempt}.beat"


def _end_file(run: Path, attempt: int) -> Path:
    return run / "attempts" / f"{attempt}.end"


def _create(run: Path, attempt: int, facts: dict[str, Any]) -> bool:
    """Make an attempt's file, whole; False when somebody was first."""
    target = run / "attempts" / f"{attempt}.json"
    scratch = target.with_name(f".{attempt}-{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}")
    own = {"attempt": attempt, "machine": machine(), "pid": os.getpid(), "pid_started": started(os.getpid())}
    files.write_json(scratch, own | facts)
    try:
        os.link(scratch, target)
    except FileExistsError:
        return scratch.stat().st_nlink == 2  # a repeated request whose first answer was lost (NFS): it is ours
    except OSError:  # no hard links here: O_EXCL says as much, though the file is empty for a moment
        try:
            with target.open("x") as file:
                file.write(scratch.read_text())
        except FileExistsError:
            return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _check_gone(run: Path, attempt: int, facts: Mapping[str, Any], say: Callable[[str], None], seconds: float) -> None:
    """Raise RunError while the driver of an attempt lives, or may."""
    if _end_file(run, attempt).exists():
        return
    holder = _holder(run, attempt)
    if holder.get("machine") == machine():
        if started(int(holder["pid"])) == holder["pid_started"]:
            raise HasDriver(f"{run.name} has another driver, which is still running (process {holder['pid']})")
        return
    job, restart = holder.get("slurm_job"), int(holder.get("slurm_restart") or 0)
    if job and facts.get("slurm_job") == job and int(facts.get("slurm_restart") or 0) > restart:
        return  # the same job, started again by Slurm: it has ended the one before
    host = (holder.get("machine") or ["another machine"])[0]
    give_up = time.monotonic()
    if _submission(facts) > _submission(holder) > 0:
        # `resume` ends the earlier job before it submits a new one. Its driver may still be saving.
        give_up += _REPLACED_SECONDS
        say(
            f"attempt {attempt} of an earlier submission may still be saving on {host}: waiting until "
            f"it ends, for at most {_REPLACED_SECONDS:.0f} s, or gives no sign of life for {seconds:.0f} s"
        )
    else:
        say(f"attempt {attempt} began on {host} and did not say that it ended: watched for {seconds:.0f} s")
    beat = _beat_file(run, attempt)
    last, since = _read(beat), time.monotonic()
    while time.monotonic() < since + seconds:
        time.sleep(min(1.0, seconds))
        if _end_file(run, attempt).exists():
            return
        if (now := _read(beat)) == last:
            continue
        if time.monotonic() >= give_up:
            where = f"{host}, job {job}" if job else host
            raise HasDriver(f"{run.name} has another driver, which is still running ({where})")
        last, since = now, time.monotonic()


def _submission(facts: Mapping[str, Any]) -> int:
    """Return the number of the submission that a driver belongs to; 0 if it is unknown."""
    text = str(facts.get("submission") or "")
    return int(text) if text.isdecimal() else 0


def _holder(run: Path, attempt: int) -> dict[str, Any]:
    """What an attempt said of itself; empty where its writer was killed on a file system without hard links."""
    try:
        return files.read_json(run / "attempts" / f"{attempt}.json")
    except RunError:
        return {}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
