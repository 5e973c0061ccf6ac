"""Start a local Ray on loopback, with a token that only this user can read.

Ray executes whatever code a client with access sends, so other users of the machine
must not reach it. Some steps use Ray's private functions, because it has no public
setting for them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafleet.jobs.errors import RunError
from lorafleet.tuning.ray_temp_dir import TOKEN_FILE, create_ray_temp_dir, save_ray_logs

_START_SECONDS = (30, 120, 240)
"""Seconds that Ray's processes have to start, for the first and each further try."""
_AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)


def remove_aws_keys_from_tune() -> None:
    """Stop Tune from writing AWS keys to each actor's runtime environment.

    From there they would get into logs and command lines. Trials still see the keys if they
    are in the environment that Ray was started in.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_AWS_VARIABLES)


@contextlib.contextmanager
def start_local_ray(
    options: Mapping[str, Any], logs: Path, say: Callable[[str], None]
) -> Iterator[Any]:
    """Start Ray and yield what `ray.init` returns; on exit, stop it and delete its files.

    After an error, Ray's logs are copied to `logs`. Never joins a Ray that runs already.

    Args:
        options: Keyword arguments of `ray.init`.
        logs: Folder for Ray's logs; created only if they are saved.
        say: Receives messages for the log.

    Raises:
        RunError: Ray did not start in three tries, each with more time.
    """
    for number, seconds in enumerate(_START_SECONDS):
        # A new folder for each try, because processes of a failed one may still use the old.
        with create_ray_temp_dir() as temp_dir:
            try:
                context = _start_ray(options, temp_dir, seconds)
            except Exception as error:  # Ray raises Exception itself
                save_ray_logs(temp_dir, logs)
                _stop_ray()
                if number + 1 == len(_START_SECONDS):
                    raise RunError(
                        f"Ray did not start on this machine in {len(_START_SECONDS)} tries "
                        f"({_get_first_line(error)}; load {os.getloadavg()[0]:.0f}). Ray's logs "
                        f"are in {logs}. Run `lorafleet resume` when the machine is less busy"
                    ) from error
                say(
                    f"Ray did not start within {seconds} s ({_get_first_line(error)}): trying "
                    "again, with more time"
                )
                continue
            try:
                yield context
            # Stopped first, so that the logs are complete.
            except BaseException:
                _stop_ray()
                save_ray_logs(temp_dir, logs)
                raise
            _stop_ray()
            return


def _start_ray(options: Mapping[str, Any], temp_dir: Path, seconds: int) -> Any:
    """Start Ray with token authentication and return what `ray.init` returns."""
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(temp_dir / TOKEN_FILE),
        # Ray runs as a single machine only on macOS and Windows, where its processes listen on
        # loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_gcs_server_port_wait_time_s": str(seconds),
    }
    # A token in the environment would take precedence over the file.
    os.environ.pop("RAY_AUTH_TOKEN", None)
    import ray
    from ray._private import ray_constants, services
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray reads the variable only when it is imported
    Config.initialize("")  # re-read the authentication mode
    AuthenticationTokenLoader.instance().reset_cache()
    original_get_node = services.get_node

    def get_node_patiently(gcs_address: str, node_id: str) -> Any:
        """Retry until the raylet is known: Ray's own limit of 30 s is fixed."""
        return _retry_for(seconds, lambda: original_get_node(gcs_address, node_id))

    services.get_node = get_node_patiently
    try:
        # Without `local`, Ray joins any cluster that it finds on this machine.
        return ray.init(
            address="local",
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=str(temp_dir / "ray"),
            **options,
        )
    finally:
        services.get_node = original_get_node


def _retry_for(seconds: int, call: Callable[[], Any]) -> Any:
    """Call `call` until it returns, and return its result.

    Raises its RuntimeError after `seconds`.
    """
    import time

    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _stop_ray() -> None:
    """Stop Ray."""
    import ray

    ray.shutdown()


def _get_first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
