"""docs/slurm.md and the README's part on clusters, word for word, by a user of the rig."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from lorafleet.jobs.runs.run import Run
from tests.conftest import ASSETS, ROOT, opinions, write_rows
from tests.slurm.conftest import Login

pytestmark = pytest.mark.ray


def commands(page: Path, heading: str) -> list[str]:
    """The `lorafleet` lines of a part of a page."""
    part = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", part, re.DOTALL)
    return [
        line.split("#")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if "lorafleet" in line
    ]


@pytest.fixture
def newcomer(login: Login, monkeypatch: pytest.MonkeyPatch) -> Login:
    """A user without a site file, whose assets are those of other tests."""
    (login.home / "config" / "lorafleet" / "sites" / "rig.yaml").unlink()
    monkeypatch.setenv("LORAFLEET_CACHE", ASSETS)
    return login


def read_it_once(login: Login) -> None:
    """What a reader of the written site file changes: the rig's GPUs are names without devices."""
    path = login.home / "config" / "lorafleet" / "sites" / "rig.yaml"
    lines = [
        line for line in path.read_text().splitlines() if not line.startswith(("gpu", "memory_gb"))
    ]
    path.write_text(
        "\n".join([*lines, "memory_gb_per_node: 6", f"runs_dir: {login.runs}", "nodes: 2", ""])
    )


def check_following(login: Login, words: list[str]) -> None:
    """`logs -f` goes on while the job runs; it is left with Ctrl-C."""
    follower = login.begin(*words)
    time.sleep(8)
    assert follower.poll() is None
    follower.send_signal(signal.SIGINT)
    said, _ = follower.communicate(timeout=30)
    assert "Ray is up" in said


@pytest.mark.long
def test_the_page_takes_a_newcomer_to_a_running_sweep(newcomer: Login) -> None:
    (newcomer.home / "examples").symlink_to(ROOT / "examples")
    lines = commands(ROOT / "docs" / "slurm.md", "From an account to a running sweep")
    assert len(lines) == 11
    run: Run | None = None
    for line in lines:
        words = line.replace("NAME", "rig").replace("RUN", run.id if run else "RUN").split()[1:]
        if words[:2] == ["logs", "-f"]:
            check_following(newcomer, words)
            continue
        if words[0] == "sync":  # there is no account: the command that would be run
            words.append("--show")
        done = newcomer.lorafleet(*words)
        if words[0] == "init":
            read_it_once(newcomer)
        if words[0] == "sweep":
            run = Run(newcomer.runs / done.stdout.strip())
            newcomer.when(
                run, lambda made=run: any(trial.read_metrics() for trial in made.list_trials()), 120
            )
        if words[0] == "stop":
            assert run is not None
            newcomer.ended(run)
        if words[0] == "resume":
            assert re.search(r"^(Ship |Do not ship)", done.stdout, re.MULTILINE), done.stdout
    assert run is not None
    assert newcomer.record(run).state == "COMPLETED"
    assert newcomer.left_behind() == []


def test_the_readmes_part_on_clusters(newcomer: Login) -> None:
    write_rows(newcomer.home / "my.jsonl", opinions(120, 5))
    newcomer.lorafleet(
        "init", "--task", "classification", "--train-file", "my.jsonl", "--output", "job.yaml"
    )
    newcomer.lorafleet("fetch", "job.yaml")
    lines = commands(ROOT / "README.md", "On a cluster")
    assert len(lines) == 5
    name = ""
    for line in lines:
        words = line.replace("SITE", "rig").replace("RUN", name).split()[1:]
        if words[0] == "sweep":
            words += ["--quiet"]
        done = newcomer.lorafleet(*words)
        if words[0] == "init":
            read_it_once(newcomer)
        if words[0] == "sweep":
            name = done.stdout.strip()
    assert "waits in the queue" in done.stdout or "runs on node" in done.stdout
    newcomer.lorafleet("stop", name)
