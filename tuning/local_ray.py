"""A Ray of our own on this machine: on loopback, behind a token that no other user can read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafleet.jobs.errors import RunError
from lorafleet.tuning.ray_temp_dir import TOKEN, keep_logs, scratch_folder

_START_SECONDS = (30, 120, 240)
"""How long Ray's processes may take to come up, in the first try and in those after it."""
_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


def keep_secrets_out_of_tune() -> None:
    """Stop Tune from writing AWS's keys into the runtime environment of each actor, and so into logs and commands.

    Trials have them all the same where they are in the environment that Ray was started in.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_AWS)


@contextlib.contextmanager
def local_ray(options: Mapping[str, Any], logs: Path, say: Callable[[str], None]) -> Iterator[Any]:
    """Start Ray, and yield what `ray.init` returns; its processes and their files go at the end.

    After an error what they said is copied to `logs`. Raises RunError where Ray does not come up, in three tries with
    more time each.
    """
    for number, seconds in enumerate(_START_SECONDS):
        with scratch_folder() as scratch:
            try:
                context = _started(options, scratch, seconds)
            except Exception as error:  # Ray raises Exception itself
                keep_logs(scratch, logs)
                _stopped()
                if number + 1 == len(_START_SECONDS):
                    raise RunError(
                        f"Ray did not come up on this machine in {len(_START_SECONDS)} tries ({_first_line(error)}; "
                        f"load {os.getloadavg()[0]:.0f}): `lorafleet resume` goes on when the machine is less busy; "
                        f"what Ray said is in {logs}"
                    ) from error
                say(f"Ray did not come up in {seconds} s ({_first_line(error)}): tried again, with more time")
                continue
            try:
                yield context
            except BaseException:
                _stopped()
                keep_logs(scratch, logs)
                raise
            _stopped()
            return


def _started(options: Mapping[str, Any], scratch: Path, seconds: int) -> Any:
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(scratch / TOKEN),
        # Ray knows a machine of its own on macOS and Windows alone; there its processes listen on loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_gcs_server_port_wait_time_s": str(seconds),
    }
    os.environ.pop("RAY_AUTH_TOKEN", None)
    import ray
    from ray._private import ray_constants, services
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported
    Config.initialize("")  # the mode
    AuthenticationTokenLoader.instance().reset_cache()
    asked = services.get_node

    def patient(gcs_address: str, node_id: str) -> Any:
        """Ask until the raylet is known: Ray's own limit of 30 s is fixed."""
        return _until(seconds, lambda: asked(gcs_address, node_id))

    services.get_node = patient
    try:
        return ray.init(
            address="local", log_to_driver=False, configure_logging=False, _temp_dir=str(scratch / "ray"), **options
        )
    finally:
        services.get_node = asked


def _until(seconds: int, look: Callable[[], Any]) -> Any:
    """Call until it returns. Raises its RuntimeError after so many seconds."""
    import time

    until = time.monotonic() + seconds
    while True:
        try:
            return look()
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _stopped() -> None:
    import ray

    ray.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
