"""What is written is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from jobs.load import load_text
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_of_the_job_file_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "scripts/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_job_loads() -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    assert load_text(block[1], Path("job.yaml")).notes == ()
    assert set(yaml.safe_load(block[1])) == set(yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())) - {
        "method"
    }


def test_every_command_of_the_readme_exists() -> None:
    from commands.cli import app

    known = {command.name for command in app.registered_commands}
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    used = set(re.findall(r"^lorafleet ([a-z]+)", blocks, re.MULTILINE))
    assert used
    assert used <= known


def test_the_changelog_speaks_of_what_is_not_released() -> None:
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
