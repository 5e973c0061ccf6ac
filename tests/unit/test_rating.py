"""People rate blind: on a page in a real browser and in the terminal, and nothing they have clicked is ever lost."""

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

import numpy as np
import pytest

from cluster.machine import site_here
from cluster.planning import make_plan
from evaluation.rating import CRITERIA, Notebook, alpha, checked_rater, folder_of, ratings_of, sheet, sheet_of_run
from evaluation.render import html, markdown
from evaluation.report import build_report
from jobs import files
from jobs.errors import RunError, UserError
from jobs.run import Run, RunState, TrialState
from tests.conftest import JobMaker, lorafleet

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ROWS = [{"prompt": f"is it <b>row {row}</b>?", "reference": "good"} for row in range(6)]


@pytest.fixture
def answered(tmp_path: Path, llama_job: JobMaker) -> Run:
    """A run whose base and trial have answered five of six held-out rows."""
    loaded = llama_job()
    run = Run.create(tmp_path / "runs", "tiny-lm")
    files.write_json(run.path / "plan.json", make_plan(loaded, site_here(None), "train").model_dump(mode="json"))
    files.write_json(run.path / "facts.json", {"chosen_on_test": False})
    files.write_jsonl(run.rows_file("test"), ROWS)
    trial = run.add_trial("aaaa", 0, {})
    trial.add_row({"step": 1, "samples": 4, "loss": 1.0, "evaluated": True, "train_seconds": 1.0, "eval_seconds": 0.0})
    trial.set_state(TrialState.FINISHED)
    trial.weights.mkdir()
    for record, path, word in (
        (run.path / "report" / "base.json", run.base_predictions("test"), "plain"),
        (trial.path / "test.json", trial.predictions("test"), "tuned"),
    ):
        files.write_json(record, {"test": {"metrics": {"loss": 1.0}, "intervals": {}}})
        rows = [
            {"row": row, "loss": 1.0, "tokens": 2, "answer": f"{word} {row}" if row < 5 else None} for row in range(6)
        ]
        files.write_jsonl(path, rows)
    run.set_state(RunState.RUNNING)
    run.set_state(RunState.FINISHED)
    return run


# ---- arithmetic ----


def test_alpha_is_krippendorffs() -> None:
    """The worked example of Krippendorff (2011): four observers, twelve units, interval data: 0.849."""
    _ = np.nan
    values = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
            [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
        ]
    )
    assert alpha(values) == pytest.approx(0.849, abs=5e-4)
    assert alpha(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])) == 1.0
    assert alpha(np.array([[1.0, _], [_, 2.0]])) is None  # no unit has two ratings
    assert alpha(np.array([[2.0, 2.0], [2.0, 2.0]])) is None  # and where all gave the same, nothing was told apart


# ---- the sheet ----


def test_a_sheet_says_nothing_of_whose_an_answer_is() -> None:
    answers = {"base": [f"a{row}" for row in range(40)], "lora": [f"b{row}" for row in range(40)]}
    rows = [{"prompt": "p", "reference": "r"}] * 40
    items = sheet(rows, answers, "ann", 40)
    assert sheet(rows, answers, "ann", 40) == items  # the same after a restart
    assert [item.row for item in items] != sorted(item.row for item in items)
    firsts = [item.arms[0] for item in items]
    assert 8 < firsts.count("base") < 32  # as often first as second
    other = sheet(rows, answers, "ben", 40)
    assert [item.arms for item in other] != [item.arms for item in items]
    few = [{item.row for item in sheet(rows, answers, name, 7)} for name in ("ann", "ben")]
    assert few[0] == few[1]  # what two have rated can be compared
    assert "base" not in json.dumps([item.shown() for item in items])


def test_what_is_rated_is_kept_and_taken_back(answered: Run) -> None:
    path = folder_of(answered) / "ann.jsonl"
    items = sheet_of_run(answered, "ann", 20)
    assert len(items) == 5  # the sixth was not answered
    book = Notebook.open(path, items)
    row = items[0].row
    book.rate(row, "A", "fluency", 4)
    book.rate(row, "A", "fluency", 2)
    book.note(row, "short")
    again = Notebook.open(path, items)
    assert again.shown()["scores"] == {f"{row}/A/fluency": 2}
    again.undo()
    assert again.shown()["scores"] == {f"{row}/A/fluency": 4}
    again.undo()
    again.undo()
    assert Notebook.open(path, items).scores == {}
    assert Notebook.open(path, items).notes == {row: "short"}
    for wrong in ((99, "A", "fluency", 1), (row, "C", "fluency", 1), (row, "A", "beauty", 1), (row, "A", "fluency", 6)):
        with pytest.raises(UserError):
            book.rate(*wrong)


def test_two_raters_go_into_the_report(answered: Run) -> None:
    for name, shift in (("ann", 0), ("ben", 1)):
        items = sheet_of_run(answered, name, 3)
        book = Notebook.open(folder_of(answered) / f"{name}.jsonl", items)
        for item in items:
            for slot, arm in zip("AB", item.arms, strict=True):
                for criterion in CRITERIA:
                    book.rate(item.row, slot, criterion, (4 if arm == "aaaa" else 1) + shift)
    found = ratings_of(answered)
    assert found is not None
    means = {(one.arm, one.criterion): one.mean for one in found.judgements}
    assert means["aaaa", "fluency"] == 4.5
    assert means["base", "coherence"] == 1.5
    assert found.judgements[0].interval[0] <= found.judgements[0].mean <= found.judgements[0].interval[1]
    assert found.judgements[0].alpha == pytest.approx(alpha(np.array([[4.0, 1.0] * 3, [5.0, 2.0] * 3])))
    report = build_report(answered)
    assert report.ratings == found
    assert "4.50 [4.50, 4.50] (3)" in html(report)
    assert "Krippendorff" in markdown(report)


def test_names_and_runs_that_cannot_be_rated(answered: Run) -> None:
    for name in ("../x", "", "a b", "x" * 65):
        with pytest.raises(UserError, match="--rater"):
            checked_rater(name)
    shutil.rmtree(answered.trial("aaaa").path)
    with pytest.raises(RunError, match="has the answers of 1 models"):
        sheet_of_run(answered, "ann", 3)


# ---- the terminal ----


def test_rating_in_the_terminal(answered: Run) -> None:
    command = [str(Path(sys.executable).with_name("lorafleet")), "rate", "tiny-lm", "--terminal", "--rater", "ann"]
    words = ["5", "4", "x", "u", "3", "n odd", "q"]
    done = subprocess.run(
        command, cwd=answered.path.parent.parent, input="\n".join(words) + "\n", text=True, capture_output=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert "'x' is none of 0-5" in done.stderr
    assert "2 ratings of ann" in done.stderr
    book = Notebook.open(folder_of(answered) / "ann.jsonl", sheet_of_run(answered, "ann", 20))
    assert list(book.scores.values()) == [5, 3]
    assert list(book.notes.values()) == ["odd"]


# ---- the page ----


class Server:
    """`lorafleet rate` as a user starts it."""

    def __init__(self, run: Run, port: int = 0) -> None:
        command = [str(Path(sys.executable).with_name("lorafleet")), "rate", "tiny-lm", "--rater", "ann"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=run.path.parent.parent, stderr=subprocess.PIPE, text=True
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
def server(answered: Run) -> Iterator[Server]:
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
    status, answer = server.ask("/api/rate", {"row": 99, "slot": "A", "criterion": "fluency", "score": 3})
    assert (status, "row 99" in json.loads(answer)["error"]) == (400, True)
    assert server.ask("/api/rate", {"row": "0"})[0] == 422
    assert server.ask("/api/note", {"row": 0, "text": "x" * 70_000})[0] == 413
    shown = server.ask("/api/sheet")[1].decode()
    assert "aaaa" not in shown
    assert "base" not in shown


def test_one_rater_rates_once_at_a_time(server: Server, answered: Run) -> None:
    server.ask("/api/sheet")
    done = lorafleet("rate", "tiny-lm", "--rater", "ann", cwd=answered.path.parent.parent)
    assert done.returncode == 2
    assert "ann is rating" in done.stderr


@pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no chromedriver (apt-get install chromium-driver)")
def test_a_rater_in_a_browser_and_a_server_that_is_killed(answered: Run, tmp_path: Path) -> None:
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
            return page.find_element(By.ID, "progress").text + page.find_element(By.ID, "error").text

        try:
            wait.until(lambda page: text in told(page))
        except TimeoutException:
            raise AssertionError(f"{text!r} was waited for, and the page says {told(browser)!r}") from None

    def press(*keys: str) -> None:
        for key in keys:
            browser.find_element(By.TAG_NAME, "body").send_keys(key)
            time.sleep(0.15)

    server = Server(answered)
    try:
        server.ask("/api/sheet")
        browser.get(server.address)
        says("row 1 of 5, 0 of 30 rated")
        assert "<b>row" in browser.find_element(By.ID, "prompt").text  # what a model or a user wrote is text
        shown = {box.text.split("\n")[1].split()[0] for box in browser.find_elements(By.TAG_NAME, "article")}
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
        path = folder_of(answered) / "ann.jsonl"
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
        if os.environ.get("LORAFLEET_KEEP_SCREENS"):
            shutil.copy(tmp_path / "rate.png", os.environ["LORAFLEET_KEEP_SCREENS"])
        server.end(signal.SIGINT)
    finally:
        browser.quit()
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
    found = ratings_of(answered)
    assert found is not None
    first = sheet_of_run(answered, "ann", 20)[0]
    assert {one.arm: one.mean for one in found.judgements if one.criterion == "fluency"} == dict(
        zip(first.arms, (4.0, 1.0), strict=True)
    )
    assert found.notes == [f"ann, row {sheet_of_run(answered, 'ann', 20)[1].row}: reads well"]
