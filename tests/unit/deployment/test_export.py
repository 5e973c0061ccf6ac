"""Gates, the writing loop and what an export refuses: without exporting anything."""

from __future__ import annotations

import ast
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from lorafleet.commands.common import Format, exit_on_signals
from lorafleet.commands.show import print_export
from lorafleet.deployment import extras, runtime, tensorrt
from lorafleet.deployment.answers import generate_pieces
from lorafleet.deployment.availability import find_unavailable_reason
from lorafleet.deployment.benchmark import select_fitting_points
from lorafleet.deployment.card import find_licence
from lorafleet.deployment.decoding import (
    RowByRowDecoder,
    Sampling,
    compute_positions,
    compute_probabilities,
    generate_answers,
    pad_left,
)
from lorafleet.deployment.export import PromptFrame, _remove_stale_scratch, build_prompt_frame
from lorafleet.deployment.extras import Unavailable
from lorafleet.deployment.merge import Source
from lorafleet.deployment.parity import HeldOut
from lorafleet.deployment.runtime import LoadedModel, check_provider, read_artefact
from lorafleet.evaluation.report.model_of_run import SelectedModel
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs import files
from lorafleet.jobs.data.answer_frame import AnswerFrame
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.errors import JobFileError, UserError
from lorafleet.jobs.runs.export_result import (
    Artefact,
    DeviceBudget,
    ExportResult,
    Parity,
    ParityMeasurement,
    TargetOffer,
    TargetResult,
    choose_target,
    compute_metric_drop,
    find_gate_violations,
)
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.export import Gate, resolve_gate
from tests.conftest import ROOT, JobMaker, lorafleet_here


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
    assert generate_answers(decoder, [[1, 2], [5]], 4, end_ids=[8], pad_id=0) == [
        [3, 4, 5, 6],
        [6, 7],
    ]
    ids, mask, positions = decoder.seen[0]
    assert ids.tolist() == [[1, 2], [0, 5]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert positions.tolist() == [[0, 1], [0, 0]]
    assert [step[2].ravel().tolist() for step in decoder.seen[1:]] == [[2, 1], [3, 2], [4, 3]]
    assert decoder.seen[-1][1].shape == (2, 5)
    with pytest.raises(ValueError, match="at least one token"):
        generate_answers(decoder, [[]], 1, [], 0)


def test_a_rows_draws_are_its_own() -> None:
    hot = Sampling(temperature=5.0, seed=3)
    both = generate_answers(Counting(), [[1, 2], [5]], 6, [], 0, hot)
    assert generate_answers(Counting(), [[1, 2]], 6, [], 0, hot) == both[:1]
    assert both != generate_answers(
        Counting(), [[1, 2], [5]], 6, [], 0, Sampling(temperature=5.0, seed=4)
    )
    assert generate_answers(Counting(), [[1], [5]], 3, [], 0, Sampling(top_p=0.1)) == [
        [2, 3, 4],
        [6, 7, 8],
    ]


def test_what_a_token_is_drawn_by() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert compute_probabilities(logits, Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert compute_probabilities(logits, Sampling(top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0])
    assert compute_probabilities(logits, Sampling(top_p=0.5)) == pytest.approx([1, 0, 0, 0])
    assert compute_probabilities(logits, Sampling(top_p=0.0)) == pytest.approx([1, 0, 0, 0])
    assert compute_probabilities(logits, Sampling(temperature=0.5))[0] == pytest.approx(
        0.25 / 0.365
    )


def test_padding_is_not_counted() -> None:
    _, mask = pad_left([[1], [1, 2, 3]], 0)
    assert compute_positions(mask).tolist() == [[0, 0, 0], [0, 1, 2]]


def test_rows_that_go_one_by_one_are_given_without_padding() -> None:
    decoder = Counting()
    assert generate_answers(RowByRowDecoder(decoder), [[1, 2], [5]], 3, end_ids=[8], pad_id=0) == [
        [3, 4, 5],
        [6, 7],
    ]
    given = [
        (ids.tolist(), mask.shape, positions.tolist()) for ids, mask, positions in decoder.seen[:4]
    ]
    assert given == [
        ([[1, 2]], (1, 2), [[0, 1]]),
        ([[5]], (1, 1), [[0]]),
        ([[3]], (1, 3), [[2]]),
        ([[6]], (1, 2), [[1]]),
    ]


# ---- answers as they grow ----

ABOUT = Artefact(
    target="onnx", task="generation", source={"run": "r", "trial_id": "t"}, max_length=16, positions=12, ends=[9],
    pad_id=0, layers=2, heads=3, head_size=4,
)  # fmt: skip


class Letters(LoadedModel):
    """Token n is the n-th of some texts; a half of a character waits for its other half."""

    TEXTS = ("a", "b", "c", "d", "e", "f\ufffd", "fé", "g", "h", "")

    def decode(self, tokens, skip_special_tokens=True):
        said = "".join(self.TEXTS[token] for token in tokens)
        return said.replace("f\ufffdfé", "fé")


def letters(size: int = 10) -> Letters:
    return Letters(Path("x"), ABOUT, Counting(size))


def test_an_answer_grows_by_whole_characters() -> None:
    found = list(generate_pieces(letters(), [3], 20, None))
    assert [(piece.text, piece.tokens, piece.end) for piece in found] == [
        ("e", 1, None), ("fé", 3, None), ("g", 4, None), ("h", 5, None), ("", 5, "stop"),
    ]  # fmt: skip
    assert [piece.text for piece in generate_pieces(letters(), [0], 2, None)] == ["b", "c", ""]
    assert list(generate_pieces(letters(), [0], 2, None))[-1].end == "length"
    with pytest.raises(UserError, match="has 12 tokens, but the model has 12 positions"):
        list(generate_pieces(letters(), [1] * 12, 5, None))
    assert (
        list(generate_pieces(letters(), [1] * 10, 5, None))[-1].tokens == 2
    )  # as many as there is room for
    with pytest.raises(UserError, match="the prompt is empty"):
        list(generate_pieces(letters(), [], 5, None))


def test_an_answer_ends_before_a_stop_text() -> None:
    whole = list(generate_pieces(letters(), [0], 9, None, ["cd"]))
    assert ("".join(piece.text for piece in whole), whole[-1].end) == ("b", "stop")
    assert [piece.text for piece in whole] == ["b", ""]  # nothing of the stop text was let out
    almost = list(generate_pieces(letters(), [0], 3, None, ["cx"]))
    assert "".join(piece.text for piece in almost) == "bcd"


class Thinking(LoadedModel):
    """A model that thinks before it answers: token n is the n-th of some texts."""

    TEXTS = ("Q", "<think>", "so", " it", "</think>", "\n\n", "city", " 9", "<|s|>", "")

    def decode(self, tokens, skip_special_tokens=True):
        said = "".join(self.TEXTS[token] for token in tokens)
        return said.replace("<|s|>", "") if skip_special_tokens else said


def test_a_frame_is_held_back_until_the_answer_begins() -> None:
    frame = AnswerFrame(special_tokens=("<|s|>",)).to_dict()
    about = ABOUT.model_copy(update={"answer_frame": frame})
    loaded = Thinking(Path("x"), about, Counting(10))
    whole = list(generate_pieces(loaded, [0], 9, None))
    assert [piece.text for piece in whole if piece.text] == ["city", " 9"]
    assert (whole[0].tokens, whole[-1].end) == (6, "stop")
    raw = "".join(piece.text for piece in generate_pieces(loaded, [0], 9, None, raw=True))
    assert raw == "<think>so it</think>\n\ncity 9"  # a text that is continued has no frame
    unfinished = list(generate_pieces(loaded, [0], 3, None))  # no answer yet, and none is made up
    assert ["".join(piece.text for piece in unfinished), unfinished[-1].end] == ["", "length"]
    inside = "".join(
        piece.text for piece in generate_pieces(loaded, [0, 1], 9, None)
    )  # the prompt ends in the block
    assert inside == "city 9"
    no_frame = Thinking(Path("x"), ABOUT, Counting(10))
    assert "".join(piece.text for piece in generate_pieces(no_frame, [0], 9, None)).startswith(
        "<think>so"
    )


def test_a_text_that_ends_a_turn_is_held_back() -> None:
    class Ending(Thinking):
        TEXTS = ("Q", "city", " 9", "\n", "##", "# End", "", "", "", "")

    about = ABOUT.model_copy(
        update={"answer_frame": AnswerFrame(strict=False, closing="### End").to_dict()}
    )
    texts = [
        piece.text
        for piece in generate_pieces(Ending(Path("x"), about, Counting(10)), [0], 9, None)
    ]
    assert "".join(texts) == "city 9"
    assert not any("#" in text for text in texts)


def test_a_prompt_that_brings_its_start_token_gets_no_other(tiny_llama: Path) -> None:
    about = ABOUT.model_copy(update={"start": [2]})  # [BOS]
    loaded = LoadedModel(tiny_llama, about, Counting(10))
    assert loaded.encode_prompt("film")[0] == 2
    assert loaded.encode_prompt("[BOS] film") == loaded.encode_prompt("film")


# ---- gates ----


def judged(**given: object) -> ParityMeasurement:
    found = {
        "rows": 8,
        "positions": 80,
        "max_logit_difference": 1e-5,
        "mean_logit_difference": 1e-6,
        "agreement": 1.0,
    }
    found |= {"metric": "perplexity", "before": 10.0, "before_interval": (9.0, 11.0), "after": 10.0}
    return ParityMeasurement(**(found | {"after_interval": (9.0, 11.0)} | given))


def test_a_gate_says_what_is_wrong() -> None:
    gate = Gate(max_logit_difference=1e-3, min_agreement=0.99, max_metric_drop=0.01)
    assert find_gate_violations(gate, judged()) == []
    assert find_gate_violations(gate, judged(max_logit_difference=0.5)) == [
        "a logit differs by 0.5, but at most 0.001 is allowed"
    ]
    assert find_gate_violations(gate, judged(steps=8, step_logit_difference=0.25)) == [
        "a logit differs by 0.25, but at most 0.001 is allowed"
    ]
    other_prompts = judged(called_rows=4, called_prompts=0.5, called_answers=0.5)
    assert find_gate_violations(gate, other_prompts) == [
        "only 0.500 of the user prompts are formatted as in training, but all must be"
    ]
    assert (
        find_gate_violations(gate, judged(called_rows=4, called_prompts=1.0, called_answers=0.5))
        == []
    )
    late = judged(steps=8, step_logit_difference=0.0, step_agreement=0.5)
    assert find_gate_violations(gate, late) == [
        "token by token, 0.500 of the most likely tokens agree, but at least 0.89 must"
    ]
    assert find_gate_violations(gate, judged(agreement=0.98)) == [
        "0.980 of the most likely tokens agree, but at least 0.99 must"
    ]
    assert find_gate_violations(gate, judged(after=10.2)) == [
        "perplexity changes from 10 to 10.2, but may get worse by at most 0.01 of it"
    ]
    assert find_gate_violations(gate, judged(after=9.0)) == []
    assert (
        find_gate_violations(gate, judged(metric="accuracy", before=0.9, after=0.89)) == []
    )  # exactly as much as may be
    worse = judged(metric="accuracy", before=0.9, after=0.88)
    assert compute_metric_drop(worse) == pytest.approx(0.02)
    assert find_gate_violations(gate, worse) == [
        "accuracy changes from 0.9 to 0.88, but may get worse by at most 0.01"
    ]
    for nothing in (
        {"max_logit_difference": None},
        {"after": None},
        {"steps": 3, "step_logit_difference": None},
    ):
        assert "NaN or infinite" in find_gate_violations(Gate(), judged(**nothing))[0]


def test_a_job_moves_the_gates(bert_job: JobMaker) -> None:
    spec = bert_job("export: {rows: 10, parity: {onnx-int8: {min_agreement: 0.5}}}").job.export
    gate = resolve_gate(spec, "onnx-int8", generates=False)
    assert (gate.min_agreement, gate.max_metric_drop) == (0.5, 0.02)
    assert resolve_gate(spec, "onnx", generates=True).max_logit_difference == 1e-3
    assert resolve_gate(spec, "onnx", generates=True, int8_base=True).max_logit_difference is None
    with pytest.raises(JobFileError, match=r"export\.parity.*onnx-int9"):
        bert_job("export: {parity: {onnx-int9: {min_agreement: 0.5}}}")


# ---- a device's budget ----


def test_the_best_that_fits_is_picked() -> None:
    def offer(target, files_mb, ms, value, metric="perplexity"):
        return TargetOffer(target=target, files_mb=files_mb, ms=ms, value=value, metric=metric)

    three = [
        offer("onnx", 500, 20, 12.0),
        offer("onnx-fp16", 250, 21, 12.001),
        offer("onnx-int8", 163.04, 7, 12.4),
    ]
    found, said = choose_target(three, DeviceBudget(files_mb=300))
    assert found is three[1]
    assert (
        said
        == "onnx-fp16 is the best target that fits: 250.0 MB of 300, 21.0 ms per token, perplexity 12."
    )
    assert (
        choose_target(three, DeviceBudget(ms=30))[0] is three[1]
    )  # as good as float32, and smaller
    assert choose_target(three, DeviceBudget(files_mb=600, ms=10))[0] is three[2]
    found, said = choose_target(three, DeviceBudget(files_mb=200, ms=5))
    assert found is None
    assert (
        "onnx has 500.0 MB, 300.0 more than 200, takes 20.0 ms per token, 15.0 more than 5" in said
    )
    assert said.endswith("onnx-int8 takes 7.0 ms per token, 2.0 more than 5.")
    classes = [
        offer("onnx", 90, 3, 0.81, "accuracy"),
        offer("onnx-int8", 30, None, 0.80, "accuracy"),
    ]
    assert choose_target(classes, DeviceBudget(files_mb=100))[0] is classes[0]
    assert choose_target(classes, DeviceBudget(files_mb=50, ms=9))[1] == (
        "No target fits: onnx has 90.0 MB, 40.0 more than 50; onnx-int8 was not measured."
    )
    assert (
        choose_target([], DeviceBudget(ms=1))[1]
        == "No target passed its gate, so none can be selected."
    )


def test_words_of_a_budget_that_do_not_go_together(tmp_path: Path) -> None:
    done = lorafleet_here("export", "x", "--max-ms-per-token", "3", "--no-measure", cwd=tmp_path)
    assert (
        done.returncode,
        "needs the measurement that --no-measure turns off" in done.stderr,
    ) == (2, True)
    done = lorafleet_here("benchmark", "x", "--batch-sizes", "1,two", cwd=tmp_path)
    assert done.returncode == 2
    assert "--batch-sizes has 'two', but must be whole numbers above 0" in done.stderr


# ---- refusals ----


def test_a_learnt_prompt_is_no_weight(bert_job: JobMaker, tmp_path: Path) -> None:
    given = SelectedModel(Run(tmp_path), bert_job(method="prompt_tuning").job, tmp_path, "aaaa")
    with pytest.raises(UserError, match="only adapters in weights can be merged and exported"):
        Source(given)


def test_words_that_are_no_target(tmp_path: Path) -> None:
    done = lorafleet_here("export", "x", "--to", "onxx", cwd=tmp_path)
    assert done.returncode == 2
    known = "merged, onnx, onnx-fp16, onnx-int8, onnx-int4, tensorrt, executorch, or all"
    assert f"--to has 'onxx', but must be some of {known}; did you mean onnx?" in done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else True
    )
    assert (
        find_unavailable_reason("onnx-int8")
        == "onnx-int8 needs onnxruntime: pip install 'lorafleet[onnx]'"
    )
    assert find_unavailable_reason("merged") is None
    assert (
        find_unavailable_reason("onnx-int4")
        == "onnx-int4 needs onnxruntime: pip install 'lorafleet[int4]'"
    )
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    assert (
        find_unavailable_reason("executorch")
        == "executorch needs executorch: pip install 'lorafleet[executorch]'"
    )
    assert (
        find_unavailable_reason("onnx")
        == "onnx needs onnx, onnxscript, onnxruntime: pip install 'lorafleet[onnx]'"
    )


def test_tensorrt_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    install = "pip uninstall onnxruntime, then pip install 'lorafleet[tensorrt]'"
    none = f"tensorrt needs an NVIDIA GPU, but this machine has none. On a machine with a GPU: {install}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_unavailable_reason("tensorrt") == none
    with pytest.raises(UserError, match="needs an NVIDIA GPU, but this machine has none"):
        runtime.open_tensorrt(tmp_path, ABOUT, 0)
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: True
    )  # there is no GPU here: what it would say then
    assert find_unavailable_reason("tensorrt") == (
        f"tensorrt needs an onnxruntime built with TensorRT, but the installed one is not: {install}"
    )


def test_a_session_that_tensorrt_takes_no_part_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="could not compile any part of this model"):
        tensorrt.check_engines(tmp_path)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "whole.engine").touch()
    tensorrt.check_engines(tmp_path)


def test_tensorrts_engines_are_for_one_token_as_for_a_prompt(tmp_path: Path) -> None:
    shapes = tensorrt.build_profiles(ABOUT)
    assert shapes["min"]["past_key_values.1.value"] == (1, 3, 0, 4)
    assert shapes["min"]["attention_mask"] == (1, 1)
    assert shapes["max"]["input_ids"] == (8, 12)  # as far as its positions go
    assert shapes["max"]["attention_mask"] == (8, 24)
    (name, options), second = tensorrt.build_providers(tmp_path, ABOUT)
    assert (name, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options["trt_profile_opt_shapes"].startswith(
        "input_ids:1x1,attention_mask:1x13,position_ids:1x1,"
    )
    classes = tensorrt.build_profiles(ABOUT.model_copy(update={"task": "classification"}))
    assert classes["max"] == {"input_ids": (64, 16), "attention_mask": (64, 16)}


def test_another_provider_is_not_taken_for_the_one(tmp_path: Path) -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    check_provider(Session(), ["CPUExecutionProvider"])
    with pytest.raises(
        UserError,
        match="cannot use TensorrtExecutionProvider and fell back to CPUExecutionProvider",
    ):
        check_provider(Session(), [("TensorrtExecutionProvider", {})])
    with pytest.raises(
        UserError, match=r"has no artefact\.json: name a folder that `lorafleet export` wrote"
    ):
        read_artefact(tmp_path)


def test_the_frame_of_a_prompt() -> None:
    class Chat:
        chat_template, bos_token_id, eos_token_id = "x", 7, 8

        def get_chat_template(self):
            return self.chat_template

        def apply_chat_template(self, messages, **_):
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<a>"

    class Trimming(Chat):
        def apply_chat_template(self, messages, **_):
            return "".join(f"<{m['role']}>{m['content'].strip()}" for m in messages) + "<a>"

    class Shouting(Chat):
        def apply_chat_template(self, messages, **_):
            return messages[-1]["content"].upper()

    class Plain:
        chat_template, bos_token_id, eos_token_id = None, 7, 8

    def frame(tokenizer, system=None, conversations=True):
        marks = AnswerFrame() if conversations else None
        data = TokenData({}, (), (), False, 0, Path(), {}, frame=marks, system=system)
        return build_prompt_frame(ChatFormat(tokenizer), data)

    assert frame(Chat()) == PromptFrame("<user>", "<a>")
    short, none = Message("system", "be short"), Message("developer", "")
    assert frame(Chat(), short) == PromptFrame("<system>be short<user>", "<a>", system=short)
    assert frame(Chat(), none) == PromptFrame("<developer><user>", "<a>", system=none)
    assert frame(Trimming()) == PromptFrame("<user>", "<a>", strip=True)
    assert frame(Plain()) == PromptFrame("", "\n\n", [7])
    assert frame(Plain(), short) == PromptFrame("be short\n\n", "\n\n", [7], short)
    assert frame(Chat(), conversations=False) == PromptFrame(start=[7])
    with pytest.raises(UserError, match="chat template changes the user's text"):
        frame(Shouting())


def test_rows_that_are_given_in_steps_are_of_unequal_length() -> None:
    rows = tuple(tuple(range(length)) for length in (3, 4, 30, 30, 12, 20))
    chosen, steps = HeldOut(rows, (1,) * 6, 0).select_stepped_rows()
    assert ([len(row) for row in chosen], steps) == ([12, 20, 30], 8)
    chosen, steps = HeldOut(rows[:2], (1,) * 2, 0).select_stepped_rows()
    assert ([len(row) for row in chosen], steps) == ([3, 4], 1)
    places = [
        HeldOut(rows * times, (1,) * 6 * times, 0).select_positions(2) for times in (1, 20, 500)
    ]
    assert [len(found) for found in places] == [29, 8, 2]  # all of them, an equal share, the fewest


def test_a_program_ends_where_it_ends() -> None:
    points = [(1, 64), (4, 64), (1, 200)]
    assert select_fitting_points(None, 100, 32, points) == (points, "")
    assert select_fitting_points(300, 100, 32, points) == (points, "")
    assert select_fitting_points(192, 100, 32, points) == (
        points[:2], "batches of 200 tokens are not possible: it supports at most 192",
    )  # fmt: skip
    assert select_fitting_points(96, 80, 32, points) == (
        None,
        "it supports at most 96 tokens, but the longest row needs 112",
    )


def test_what_a_killed_export_left_is_swept_up(tmp_path: Path) -> None:
    for name in ("held", "killed", "begun", "old"):
        (tmp_path / f".building-{name}").mkdir()
    (tmp_path / ".building-killed" / "merged").mkdir()
    os.utime(tmp_path / ".building-old", (0, 0))
    with files.hold_lock(tmp_path / ".building-held" / "held"):
        _remove_stale_scratch(tmp_path)
    assert {path.name for path in tmp_path.glob(".building-*")} == {
        ".building-held",
        ".building-begun",
    }
    _remove_stale_scratch(tmp_path)
    assert {path.name for path in tmp_path.glob(".building-*")} == {".building-begun"}


def test_a_signal_ends_an_export_as_an_error_does() -> None:
    before, cleared = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as ended, exit_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleared.append(True)
    assert (ended.value.code, cleared, signal.getsignal(signal.SIGTERM)) == (143, [True], before)


def test_a_licence_is_what_a_card_says(tmp_path: Path) -> None:
    assert find_licence("asset:smollm2-135m-instruct") == "Apache-2.0"
    assert (
        find_licence("org/model", tmp_path)
        == find_licence("org/model")
        == "unknown: see its own page"
    )
    for text, said in (
        ("---\nlicense: mit\ntags: [x]\n---\n# A model\n", "mit (according to its card)"),
        (
            "---\nlicense: other\nlicense_name: a-licence\n---\n",
            "a-licence (according to its card)",
        ),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0 (according to its card)"),
        ("# A model\n\n---\nlicense: mit\n---\n", "unknown: see its own page"),
        ("---\n{broken: [\n---\n", "unknown: see its own page"),
    ):
        (tmp_path / "README.md").write_text(text)
        assert find_licence("org/model", tmp_path) == said


def test_runners_need_three_packages_alone() -> None:
    """Of the folder that somebody takes away: onnxruntime, numpy, tokenizers, and Python's own."""
    for runner in (ROOT / "deployment" / "runners").glob("[a-z]*.py"):
        nodes = list(ast.walk(ast.parse(runner.read_text())))
        named = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        foreign = {name.partition(".")[0] for name in named} - sys.stdlib_module_names
        beside = {"answer_frame"} if runner.name == "write.py" else set()
        assert foreign - beside == {"onnxruntime", "numpy", "tokenizers"}, runner
    frame = ast.parse(
        (ROOT / "jobs" / "data" / "answer_frame.py").read_text()
    )  # is copied beside them
    modules = {
        str(node.module).partition(".")[0]
        for node in ast.walk(frame)
        if isinstance(node, ast.ImportFrom)
    }
    assert modules <= sys.stdlib_module_names
    assert not any(isinstance(node, ast.Import) for node in ast.walk(frame))


def test_an_exports_table_has_its_reasons_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    def made(accepted: bool, reasons: list[str]) -> Parity:
        remarks = ["unpacked to float32"] if accepted else []
        return Parity(
            target="onnx",
            accepted=accepted,
            reasons=reasons,
            gate=Gate(),
            judged=judged(),
            remarks=remarks,
        )

    found = ExportResult(
        output="/out",
        targets=[
            TargetResult(
                target="onnx",
                accepted=True,
                folder="/out/onnx",
                parity=made(True, []),
                files_mb=12.34,
            ),
            TargetResult(
                target="onnx-int8",
                folder="/out/rejected",
                parity=made(False, ["a logit differs by 9"]),
                files_mb=1,
            ),
            TargetResult(
                target="tensorrt", unavailable="needs a GPU: pip install 'lorafleet[tensorrt]'"
            ),
            TargetResult(target="executorch", failure="RuntimeError: no operator"),
        ],
    )
    print_export(found, Format.TEXT)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[:2] for line in lines if line.startswith(("onnx", "tensorrt", "executorch"))][:4] == [
        ["onnx", "accepted"], ["onnx-int8", "rejected"], ["tensorrt", "unavailable"], ["executorch", "failed"],
    ]  # fmt: skip
    assert "12.3" in next(line for line in lines if line.startswith("onnx "))
    assert lines[-4:] == [
        "onnx: unpacked to float32",
        "onnx-int8: rejected: a logit differs by 9",
        "tensorrt: unavailable: needs a GPU: pip install 'lorafleet[tensorrt]'",
        "executorch: failed: RuntimeError: no operator",
    ]
    assert found.code == 3  # one was rejected, whatever else went wrong
    assert found.model_copy(update={"targets": [found.targets[0], found.targets[3]]}).code == 1
    assert found.model_copy(update={"targets": found.targets[:3]}).code == 3
    assert found.model_copy(update={"targets": found.targets[2:3]}).code == 2
    assert found.model_copy(update={"targets": [found.targets[0], found.targets[2]]}).code == 0
    nothing = {"targets": found.targets[:1], "sentence": "Nothing fits: it is too large."}
    assert found.model_copy(update=nothing).code == 3
