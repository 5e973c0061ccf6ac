"""Commands on a machine or container that mounts a remote storage, and transfers through them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorafleet.cluster.backend import Say, WeightSelection
from lorafleet.cluster.remote.transfer import (
    Unpacker,
    UploadItem,
    collect_file_stats,
    iterate_frames,
)
from lorafleet.jobs import files
from lorafleet.jobs.errors import CommandFailed, RunError
from lorafleet.jobs.runs.run import Run

if TYPE_CHECKING:
    pass


class CommandRunner(Protocol):
    """Runs commands on a machine or container that mounts the storage.

    `RemoteBackend.open_storage` yields one. Kubernetes implements it with `exec` in a pod,
    Ray with short jobs.
    """

    def run(
        self, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()
    ) -> None:
        """Run a command: `feed` goes to its input, and `take` gets its output.

        Raises:
            UserError: The command fails.
        """


def run_json_command(runner: CommandRunner, command: list[str], request: Any) -> Any:
    """Run a command that reads one line of JSON and prints JSON; return the parsed output.

    Raises:
        UserError: The command fails, or its output is not JSON.
    """
    output = bytearray()
    runner.run(command, output.extend, [json.dumps(request).encode() + b"\n"])
    try:
        return json.loads(output)
    except ValueError as error:
        raise CommandFailed(
            f"the output of {' '.join(command)} is not JSON: {bytes(output[:200])!r}"
        ) from error


def download_record(
    runner: CommandRunner,
    remote_folder: str,
    run: Run,
    weights: WeightSelection = "none",
    *,
    include_wandb: bool = False,
    wait: bool = True,
) -> int:
    """Download the new and changed files of the run in `remote_folder`.

    Only one transfer runs at a time: an older one that ends later would restore outdated
    files. Nothing changes here if the download is cut off.

    Args:
        weights: Which trials' weights to download.
        include_wandb: Download W&B's files too.
        wait: If False, return at once while another transfer is running.

    Returns:
        The number of files.

    Raises:
        UserError: The command fails, or the download is cut off.
    """
    options = ["--weights", weights, *(["--whole"] if include_wandb else [])]
    with files.hold_lock(run.path / ".record", wait=wait) as has_lock:
        if not has_lock:
            return 0
        unpacker = Unpacker(run.path)
        try:
            # The other side sends only files with another size or modification time.
            request = json.dumps(collect_file_stats(run.path)).encode() + b"\n"
            runner.run(
                ["lorafleet", "node", "send", remote_folder, *options],
                unpacker.add_block,
                [request],
            )
            return unpacker.finish()
        finally:
            unpacker.discard()


def download_new_record(runner: CommandRunner, remote_folder: str, folder: Path) -> None:
    """Download the record of a run into a new folder, completely or not at all.

    Raises:
        UserError: The download fails, or the remote folder holds no run.
    """
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        unpacker = Unpacker(scratch, texts=True)
        try:
            runner.run(
                ["lorafleet", "node", "send", remote_folder, "--texts"],
                unpacker.add_block,
                [b"{}\n"],
            )
            unpacker.finish()
        finally:
            unpacker.discard()
        if not (scratch / "plan.json").is_file():
            raise RunError(f"there is no run in {remote_folder} on the storage")
        # As every run folder: it contains held-out texts.
        scratch.chmod(0o700)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def upload_items(runner: CommandRunner, items: Iterable[UploadItem], say: Say) -> None:
    """Upload files and folders to the storage, except those already present. Raises UserError.

    One request asks for all of them; then each missing one is sent and checked by its
    digest.

    Args:
        say: Receives a message for each item.
    """
    items = list(items)
    requests = [{"target": item.target, "digest": item.digest} for item in items]
    # By digest and not by name: a branch of the hub may have moved on.
    missing = set(run_json_command(runner, ["lorafleet", "node", "lacks"], requests))
    for item in items:
        if item.target not in missing:
            say(f"{item.source} is already on the storage, as {item.target}")
            continue
        say(f"uploading {item.source} ({item.bytes / 1e6:,.1f} MB) to {item.target}")
        kind = ["--file"] if item.source.is_file() else []
        command = ["lorafleet", "node", "receive", item.target, item.digest, *kind]
        runner.run(command, lambda _: None, iterate_frames(item.source))
