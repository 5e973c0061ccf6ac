"""The report's page in a real browser: nothing of the data runs, nothing is fetched, and what it
says is there.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lorafleet.evaluation.render.forms import render_html
from lorafleet.evaluation.report.build import build_report
from lorafleet.jobs.runs.run import Run
from tests.unit.evaluation.report.test_search import finished  # noqa: F401 - a fixture

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt-get install chromium)")
def test_a_browser_shows_the_page_and_runs_nothing_of_the_data(
    finished: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    report = build_report(finished)
    evil = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
    page = tmp_path / "report.html"
    page.write_text(
        render_html(
            report.model_copy(
                update={"data": evil, "warnings": [evil], "facts": {"labels": [evil]}}
            )
        )
    )
    # What would happen without escaping and without the policy, to know that this browser would
    # show it.
    bare = tmp_path / "bare.html"
    bare.write_text(f"<html><title>kept</title><body>{evil}</body></html>")
    assert "hacked" in _dom(bare, tmp_path).partition("</title>")[0]
    shown = _dom(page, tmp_path)
    title, _, rest = shown.partition("</title>")
    assert "hacked" not in title
    assert report.run in title
    assert report.recommendation.sentence.split(":")[0] in rest
    assert "&lt;script&gt;" in rest
    assert rest.count("<img") == 3


def _dom(page: Path, folder: Path) -> str:
    """The document as the browser has it after its scripts have run."""
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout
