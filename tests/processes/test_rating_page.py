"""The page on which people rate, in a real browser: others are kept out, and what was clicked
outlives the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafleet.evaluation.report.human_rating import get_ratings_folder, load_ratings
from lorafleet.evaluation.report.rating_sheet import build_run_sheet
from lorafleet.jobs.runs.run import Run
from tests.conftest import lorafleet
from tests.unit.evaluation.report.test_human_rating import answered  # noqa: F401 - a fixture

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Server:
    """`lorafleet rate` as a user starts it."""

    def __init__(self, run: Run, port: int = 0) -> None:
        command = [
            str(Path(sys.executable).with_name("lorafleet")),
            "rate",
            "tiny-lm",
            "--rater",
            "ann",
        ]
        self.process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=run.path.parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/#(\S+)", line)
        assert found, line + self.process.stderr.read()
        self.port, self.token, self.address = int(found[1]), found[2], found[0]

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        given = {"X-Lorafleet-Token": self.token, "Content-Type": "application/json", **headers}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, given)
        for _ in range(100):
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()
            except urllib.error.URLError:
                time.sleep(0.1)  # it has the port, and begins to listen
        raise AssertionError("the server never answered")

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=30)


@pytest.fixture
def server(answered: Run) -> Iterator[Server]:  # noqa: F811
    started = Server(answered)
    yield started
    if started.process.poll() is None:
        started.end(signal.SIGKILL)


def test_others_on_a_login_node_are_kept_out(server: Server) -> None:
    assert server.ask("/api/sheet")[0] == 200
    assert server.ask("/api/sheet", **{"X-Lorafleet-Token": "guess"})[0] == 403
    assert server.ask("/api/sheet", Host=f"evil.example:{server.port}")[0] == 403
    assert server.ask("/api/undo", {}, Origin="http://evil.example")[0] == 403
    assert server.ask("/api/undo", {}, Origin=f"http://127.0.0.1:{server.port}")[0] == 200
    assert server.ask("/", **{"X-Lorafleet-Token": ""})[0] == 200  # the page itself says nothing
    status, answer = server.ask(
        "/api/rate", {"row": 99, "slot": "A", "criterion": "fluency", "score": 3}
    )
    assert (status, "row 99" in json.loads(answer)["error"]) == (400, True)
    assert server.ask("/api/rate", {"row": "0"})[0] == 422
    assert server.ask("/api/note", {"row": 0, "text": "x" * 70_000})[0] == 413
    shown = server.ask("/api/sheet")[1].decode()
    assert "aaaa" not in shown
    assert "base" not in shown


def test_one_rater_rates_once_at_a_time(server: Server, answered: Run) -> None:  # noqa: F811
    server.ask("/api/sheet")
    done = lorafleet("rate", "tiny-lm", "--rater", "ann", cwd=answered.path.parent.parent)
    assert done.returncode == 2
    assert "ann is already rating" in done.stderr


@pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="no chromedriver (apt-get install chromium-driver)"
)
def test_a_rater_in_a_browser_and_a_server_that_is_killed(answered: Run, tmp_path: Path) -> None:  # noqa: F811
    from selenium import webdriver
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900"):  # fmt: skip
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    wait = WebDriverWait(browser, 20)

    def says(text: str) -> None:
        def told(page: webdriver.Chrome) -> str:
            return (
                page.find_element(By.ID, "progress").text + page.find_element(By.ID, "error").text
            )

        try:
            wait.until(lambda page: text in told(page))
        except TimeoutException:
            raise AssertionError(
                f"{text!r} was waited for, and the page says {told(browser)!r}"
            ) from None

    def press(*keys: str) -> None:
        for key in keys:
            browser.find_element(By.TAG_NAME, "body").send_keys(key)
            time.sleep(0.15)

    server = Server(answered)
    try:
        server.ask("/api/sheet")
        browser.get(server.address)
        says("row 1 of 5, 0 of 30 rated")
        assert (
            "<b>row" in browser.find_element(By.ID, "prompt").text
        )  # what a model or a user wrote is text
        shown = {
            box.text.split("\n")[1].split()[0]
            for box in browser.find_elements(By.TAG_NAME, "article")
        }
        assert shown == {"plain", "tuned"}
        browser.find_element(By.CSS_SELECTOR, "[data-rate='A/fluency/4']").click()
        says("1 of 30 rated")
        press("3", "5")  # goes on by itself: coherence and correctness of A
        says("3 of 30 rated")
        press("u")
        says("2 of 30 rated")
        press("5", "1", "1", "1")  # the last rating of a row leads to the next
        says("row 2 of 5, 6 of 30 rated")
        press("n")
        browser.find_element(By.ID, "note").send_keys("reads well", Keys.ENTER)
        path = get_ratings_folder(answered) / "ann.jsonl"
        wait.until(lambda _: "reads well" in path.read_text())
        server.end(signal.SIGKILL)
        press("2")
        wait.until(lambda page: "does not answer" in page.find_element(By.ID, "error").text)
        assert "6 of 30" in browser.find_element(By.ID, "progress").text

        server = Server(answered)  # another port, another token
        server.ask("/api/sheet")
        browser.get(server.address)
        browser.refresh()
        says("row 2 of 5, 6 of 30 rated")
        assert browser.find_element(By.ID, "note").get_attribute("value") == "reads well"
        press(Keys.ARROW_LEFT)
        says("row 1 of 5")
        pressed = browser.find_elements(By.CSS_SELECTOR, "[aria-pressed='true']")
        assert [button.get_attribute("data-rate") for button in pressed] == [
            "A/fluency/4", "A/coherence/3", "A/correctness/5", "B/fluency/1", "B/coherence/1", "B/correctness/1",
        ]  # fmt: skip
        browser.save_screenshot(str(tmp_path / "rate.png"))
        press(Keys.ARROW_RIGHT)
        says("row 2 of 5")
        assert not browser.find_element(By.ID, "done").is_displayed()
        press(*"3" * 24)
        says("30 of 30 rated")
        wait.until(lambda page: "2.60" in page.find_element(By.ID, "means").text)  # (1 + 4 * 3) / 5
        assert {"aaaa", "base"} <= set(browser.find_element(By.ID, "means").text.split())
        if os.environ.get("LORAFLEET_KEEP_SCREENS"):
            shutil.copy(tmp_path / "rate.png", os.environ["LORAFLEET_KEEP_SCREENS"])
        server.end(signal.SIGINT)
    finally:
        browser.quit()
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
    found = load_ratings(answered)
    assert found is not None
    first = build_run_sheet(answered, "ann", 20)[0]
    fluency = {one.arm: one.mean for one in found.judgements if one.criterion == "fluency"}
    assert fluency == pytest.approx(
        dict(zip(first.arms, ((4 + 4 * 3) / 5, (1 + 4 * 3) / 5), strict=True))
    )
    assert found.notes == [f"ann, row {build_run_sheet(answered, 'ann', 20)[1].row}: reads well"]
