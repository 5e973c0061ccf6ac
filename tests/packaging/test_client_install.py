"""What `pip install lorafleet` brings: a client without torch and ray, from the built wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ASSETS, ROOT
from tests.unit.jobs.runs.test_older_runs import unpack

MAX_MEGABYTES = 300


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy of the tracked files, as it would be published."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Install the wheel into a fresh environment; yields its folder."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run(pip, check=True)
    yield folder


def run(client: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the client's lorafleet."""
    variables = {"PATH": os.environ["PATH"], "HOME": str(cwd), "LORAFLEET_CACHE": ASSETS}
    return subprocess.run(
        [str(client / "bin" / "lorafleet"), *words],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_the_wheel_holds_the_packages_and_their_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "lorafleet/__init__.py",
        "lorafleet/py.typed",
        "lorafleet/jobs/runs/run.py",
        "lorafleet/slurm/templates/job.sbatch.j2",
        "lorafleet/evaluation/templates/report.html.j2",
        "lorafleet/webapp/static/rate.js",
        "lorafleet/deployment/runners/write.py",
    } <= names
    assert not {name for name in names if name.startswith(("lorafleet/tests", "tests", "jobs/"))}


def test_the_client_is_small_and_without_torch_and_ray(client: Path) -> None:
    packages = client / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    installed = {path.name for path in packages.iterdir()}
    assert not installed & {"torch", "ray", "transformers", "scipy", "pyarrow", "sklearn"}
    own = [
        path
        for path in packages.rglob("*")
        if path.is_file() and path.relative_to(packages).parts[0] not in ("pip", "setuptools")
    ]
    assert sum(path.stat().st_size for path in own) <= MAX_MEGABYTES * 1e6


@pytest.mark.parametrize(
    "words",
    [
        ("--version",),
        ("validate", "examples/quickstart.yaml"),
        ("plan", "examples/quickstart.yaml"),
        ("plan", "examples/quickstart.yaml", "--format", "json"),
        ("render", "examples/quickstart.yaml"),
        ("schema",),
        ("methods",),
        ("list",),
        (
            "plan",
            "examples/quickstart.yaml",
            "--on",
            "examples/sites/kubernetes-gpu.yaml",
            "--format",
            "yaml",
        ),
    ],
    ids=" ".join,
)
def test_the_clients_commands_work(client: Path, place: Path, words: tuple[str, ...]) -> None:
    done = run(client, *words, cwd=place)
    refused = 3 if "--on" in words else 0  # its paths and the cluster are not here
    assert done.returncode in (0, refused), done.stdout + done.stderr
    assert "bug in lorafleet" not in done.stderr


def test_what_needs_a_tokenizer_is_skipped_with_a_sentence(client: Path, place: Path) -> None:
    rows = [{"prompt": f"what is {number}?", "completion": str(number)} for number in range(40)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "job.yaml").write_text(
        "name: x\ntask: generation\nmodel: {model_name_or_path: asset:smollm2-135m}\n"
        "data: {train_file: rows.jsonl}\n"
    )
    for command in ("validate", "plan"):
        done = run(client, command, "job.yaml", cwd=place)
        assert "bug in lorafleet" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_runs_are_read(client: Path, place: Path) -> None:
    for name in ("sweep", "compare", "stopped"):
        unpack(name, place / "runs")
    assert "finished" in run(client, "list", cwd=place).stdout
    assert "stopped" in run(client, "status", "stopped", cwd=place).stdout
    done = run(client, "report", "sweep", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_what_is_missing_is_named_with_the_command_that_installs_it(
    client: Path, place: Path
) -> None:
    done = run(client, "sweep", "examples/quickstart.yaml", cwd=place)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("pip install 'lorafleet[train]'")
    assert not (place / "runs").exists()
    done = run(client, "data", "examples/quickstart.yaml", cwd=place)
    assert "pip install 'lorafleet[train]'; tokenization was not checked" in done.stdout
    (place / "exported").mkdir()
    (place / "exported" / "artefact.json").write_text("{}")
    done = run(client, "serve", "exported", cwd=place)
    assert done.returncode == 2, done.stderr
    assert done.stderr.rstrip().endswith("pip install 'lorafleet[train]'")
