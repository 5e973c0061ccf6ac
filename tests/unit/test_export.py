"""Gates, the writing loop and what an export refuses: without exporting anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deployment import extras
from deployment.decoding import Sampling, left_padded, positions_of, probabilities, write
from deployment.export import prompt_frame
from deployment.merge import Source
from deployment.parity import HeldOut
from deployment.runtime import check_provider, read_artefact
from deployment.unavailable import why_not
from evaluation.shipped import Shipped
from jobs.errors import JobFileError, UserError
from jobs.export import Gate, Judged, gate_of, metric_drop, verdict
from jobs.rows import Row
from jobs.run import Run
from tests.conftest import JobMaker, lorafleet


class Counting:
    """Says the token after the last one; knows rows by their cache."""

    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def step(self, ids_BT, mask_BS, positions_BT, cache):
        self.seen.append((ids_BT, mask_BS, positions_BT))
        logits_BTV = np.zeros((*ids_BT.shape, self.size), np.float32)
        rows, places = np.indices(ids_BT.shape)
        logits_BTV[rows, places, (ids_BT + 1) % self.size] = 5.0
        return logits_BTV, (cache or 0) + ids_BT.shape[1]


def test_answers_end_where_they_end() -> None:
    decoder = Counting()
    assert write(decoder, [[1, 2], [5]], 4, ends=[8], pad_id=0) == [[3, 4, 5, 6], [6, 7]]
    ids, mask, positions = decoder.seen[0]
    assert ids.tolist() == [[1, 2], [0, 5]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert positions.tolist() == [[0, 1], [0, 0]]
    assert [step[2].ravel().tolist() for step in decoder.seen[1:]] == [[2, 1], [3, 2], [4, 3]]
    assert decoder.seen[-1][1].shape == (2, 5)
    with pytest.raises(ValueError, match="at least one token"):
        write(decoder, [[]], 1, [], 0)


def test_a_rows_draws_are_its_own() -> None:
    hot = Sampling(temperature=5.0, seed=3)
    both = write(Counting(), [[1, 2], [5]], 6, [], 0, hot)
    assert write(Counting(), [[1, 2]], 6, [], 0, hot) == both[:1]
    assert both != write(Counting(), [[1, 2], [5]], 6, [], 0, Sampling(temperature=5.0, seed=4))
    assert write(Counting(), [[1], [5]], 3, [], 0, Sampling(top_p=0.1)) == [[2, 3, 4], [6, 7, 8]]


def test_what_a_token_is_drawn_by() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert probabilities(logits, Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert probabilities(logits, Sampling(top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0])
    assert probabilities(logits, Sampling(top_p=0.5)) == pytest.approx([1, 0, 0, 0])
    assert probabilities(logits, Sampling(top_p=0.0)) == pytest.approx([1, 0, 0, 0])
    assert probabilities(logits, Sampling(temperature=0.5))[0] == pytest.approx(0.25 / 0.365)


def test_padding_is_not_counted() -> None:
    _, mask = left_padded([[1], [1, 2, 3]], 0)
    assert positions_of(mask).tolist() == [[0, 0, 0], [0, 1, 2]]


# ---- gates ----


def judged(**given: object) -> Judged:
    found = {"rows": 8, "positions": 80, "max_logit_difference": 1e-5, "mean_logit_difference": 1e-6, "agreement": 1.0}
    found |= {"metric": "perplexity", "before": 10.0, "before_interval": (9.0, 11.0), "after": 10.0}
    return Judged(**(found | {"after_interval": (9.0, 11.0)} | given))


def test_a_gate_says_what_is_wrong() -> None:
    gate = Gate(max_logit_difference=1e-3, min_agreement=0.99, max_metric_drop=0.01)
    assert verdict(gate, judged()) == []
    assert verdict(gate, judged(max_logit_difference=0.5)) == ["a logit differs by 0.5, and may by 0.001"]
    assert verdict(gate, judged(steps=8, step_logit_difference=0.25)) == ["a logit differs by 0.25, and may by 0.001"]
    late = judged(steps=8, step_logit_difference=0.0, step_agreement=0.5)
    assert verdict(gate, late) == ["token by token 0.500 of likeliest tokens agree, and 0.89 must"]
    assert verdict(gate, judged(agreement=0.98)) == ["0.980 of likeliest tokens agree, and 0.99 must"]
    assert verdict(gate, judged(after=10.2)) == ["perplexity goes from 10 to 10.2, and may get worse by 0.01 of it"]
    assert verdict(gate, judged(after=9.0)) == []
    assert verdict(gate, judged(metric="accuracy", before=0.9, after=0.89)) == []  # exactly as much as may be
    worse = judged(metric="accuracy", before=0.9, after=0.88)
    assert metric_drop(worse) == pytest.approx(0.02)
    assert verdict(gate, worse) == ["accuracy goes from 0.9 to 0.88, and may get worse by 0.01"]
    for nothing in ({"max_logit_difference": None}, {"after": None}, {"steps": 3, "step_logit_difference": None}):
        assert "no number" in verdict(Gate(), judged(**nothing))[0]


def test_a_job_moves_the_gates(bert_job: JobMaker) -> None:
    spec = bert_job("export: {rows: 10, parity: {onnx-int8: {min_agreement: 0.5}}}").job.export
    gate = gate_of(spec, "onnx-int8", generates=False)
    assert (gate.min_agreement, gate.max_metric_drop) == (0.5, 0.02)
    assert gate_of(spec, "onnx", generates=True).max_logit_difference == 1e-3
    assert gate_of(spec, "onnx", generates=True, int8_base=True).max_logit_difference is None
    with pytest.raises(JobFileError, match=r"export\.parity.*onnx-int9"):
        bert_job("export: {parity: {onnx-int9: {min_agreement: 0.5}}}")


# ---- refusals ----


def test_a_learnt_prompt_is_no_weight(bert_job: JobMaker, tmp_path: Path) -> None:
    given = Shipped(Run(tmp_path), bert_job(method="prompt_tuning").job, tmp_path, "aaaa")
    with pytest.raises(UserError, match="only weights can be merged and exported"):
        Source(given)


def test_words_that_are_no_target(tmp_path: Path) -> None:
    done = lorafleet("export", "x", "--to", "onxx", cwd=tmp_path)
    assert done.returncode == 2
    known = "merged, onnx, onnx-fp16, onnx-int8, or all"
    assert f"--to has 'onxx', but must be some of {known}; did you mean onnx?" in done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else True)
    assert why_not("onnx-int8") == "onnx-int8 needs onnxruntime: pip install 'lorafleet[onnx]'"
    assert why_not("merged") is None


def test_another_provider_is_not_taken_for_the_one(tmp_path: Path) -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    check_provider(Session(), ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="asked for TensorrtExecutionProvider and fell back to CPUExecutionProvider"):
        check_provider(Session(), [("TensorrtExecutionProvider", {})])
    with pytest.raises(UserError, match=r"holds no artefact\.json: `lorafleet export` makes such folders"):
        read_artefact(tmp_path)


def test_the_frame_of_a_prompt() -> None:
    class Chat:
        chat_template, bos_token_id = "x", 7

        def apply_chat_template(self, messages, **_):
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<a>"

    class Shouting(Chat):
        def apply_chat_template(self, messages, **_):
            return messages[-1]["content"].upper()

    class Plain:
        chat_template, bos_token_id = None, 7

    asked = Row(messages=(("user", "is it?"), ("assistant", "yes")))
    told = Row(messages=(("system", "be short"), *asked.messages))
    assert prompt_frame(Chat(), asked) == ("<user>", "<a>", [])
    assert prompt_frame(Chat(), told) == ("<system>be short<user>", "<a>", [])
    assert prompt_frame(Plain(), asked) == ("", "\n\n", [7])
    assert prompt_frame(Chat(), Row(text="a text alone")) == ("", "", [7])
    with pytest.raises(UserError, match="chat template changes what is asked"):
        prompt_frame(Shouting(), asked)


def test_rows_that_are_given_in_steps_are_of_unequal_length() -> None:
    rows = tuple(tuple(range(length)) for length in (3, 4, 30, 30, 12, 20))
    chosen, steps = HeldOut(rows, (1,) * 6, 0).stepped()
    assert ([len(row) for row in chosen], steps) == ([12, 20, 30], 8)
    chosen, steps = HeldOut(rows[:2], (1,) * 2, 0).stepped()
    assert ([len(row) for row in chosen], steps) == ([3, 4], 1)
    places = [HeldOut(rows * times, (1,) * 6 * times, 0).places(2) for times in (1, 20, 500)]
    assert [len(found) for found in places] == [29, 8, 2]  # all of them, an equal share, the fewest
