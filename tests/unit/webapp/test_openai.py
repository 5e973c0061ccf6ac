"""An exported model behind OpenAI's addresses: a real server, with a model that counts."""

from __future__ import annotations

import gc
import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from lorafleet.commands.serve import build_vllm_command
from lorafleet.deployment.chat_template import render_conversation as framed_by
from lorafleet.deployment.runtime import LoadedModel
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.export_result import Artefact
from lorafleet.webapp.guard import create_server
from lorafleet.webapp.local import open_socket
from lorafleet.webapp.openai import create_serving_app
from lorafleet.webapp.request_queue import Limits
from tests.conftest import lorafleet_here
from tests.unit.deployment.test_export import ABOUT, Counting

TOKEN = "a-word"
USUAL = Limits()


class Letters:
    """The letter a is token 0, and so on."""

    special: tuple[int, ...] = ()

    def encode(self, text: str, add_special_tokens: bool = False) -> Any:
        class Encoded:
            ids = [
                *(self.special if add_special_tokens else []),
                *(ord(letter) - ord("a") for letter in text),
            ]

        return Encoded()

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(ord("a") + token) for token in ids)

    def enable_truncation(self, _: int) -> None: ...


class Slow(Counting):
    """Takes its time."""

    def __init__(self) -> None:
        super().__init__(26)
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()

    def step(self, *given: Any) -> Any:
        self.begun.set()
        self.go.wait(60)
        return super().step(*given)


class Lengths:
    """The class of a text is whether it is long."""

    def logits(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        long_B = mask_BT.sum(axis=1) > 3
        return np.stack([~long_B * 5.0, long_B * 5.0], axis=1).astype(np.float32)


def loaded(model: Any, **about: object) -> LoadedModel:
    made = LoadedModel(
        Path("x"), ABOUT.model_copy(update={"positions": 60, "ends": [25], **about}), model
    )
    made.__dict__["tokenizer"] = Letters()  # a cached property
    return made


def framed(turns: list[dict[str, str]]) -> str:
    if turns[0]["role"] == "system":
        raise UserError("the model's chat template refuses these messages: no system")
    return "".join(turn["content"] for turn in turns)


@contextmanager
def running(app_of: Callable[[int], FastAPI], *, at_once: bool = False) -> Iterator[int]:
    """Serve the app of a port; `at_once` does not wait for open connections at the end."""
    listening = open_socket(0)
    port = listening.getsockname()[1]
    server = create_server(app_of(port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit, server.force_exit = True, at_once
        thread.join(20)
        listening.close()


@contextmanager
def served(model: LoadedModel, limits: Limits = USUAL) -> Iterator[int]:
    with running(
        lambda port: create_serving_app(model, "tiny", TOKEN, port, limits, framed)
    ) as port:
        yield port


def ask(port: int, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | headers
    text = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    connection.request("GET" if text is None else "POST", path, text, sent)
    answer = connection.getresponse()
    said = answer.read().decode()
    connection.close()
    return answer.status, json.loads(said) if said.startswith("{") else said


def test_answers_as_openais_clients_expect_them() -> None:
    with served(loaded(Counting(26))) as port:
        assert ask(port, "/v1/models")[1]["data"][0]["id"] == "tiny"
        code, said = ask(
            port,
            "/v1/completions",
            {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0},
        )
        assert (code, said["object"], said["model"]) == (200, "text_completion", "tiny")
        assert said["choices"] == [
            {"index": 0, "text": "defg", "finish_reason": "length", "logprobs": None}
        ]
        assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        both = ask(
            port, "/v1/completions", {"prompt": ["ab", "wx"], "temperature": 0, "stop": "fg"}
        )[1]
        assert [(one["text"], one["finish_reason"]) for one in both["choices"]] == [
            ("cde", "stop"),
            ("y", "stop"),
        ]
        one = {
            "messages": [{"role": "user", "content": "ab"}],
            "temperature": 0,
            "max_tokens": 2,
            "user": "somebody",
        }
        said = ask(port, "/v1/chat/completions", one)[1]
        assert said["choices"][0]["message"] == {"role": "assistant", "content": "cd"}
        turns = [
            {"role": role, "content": text}
            for role, text in (("user", "a"), ("assistant", "b"), ("user", "g"))
        ]
        said = ask(
            port,
            "/v1/chat/completions",
            {"messages": turns, "temperature": 0, "max_completion_tokens": 1},
        )[1]
        assert said["choices"][0]["message"]["content"] == "h"
        one["messages"] = [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ]
        assert ask(port, "/v1/chat/completions", one)[1]["choices"][0]["message"]["content"] == "cd"
        cold = {"prompt": "ab", "temperature": 1e-310, "seed": -1, "max_tokens": 1}
        assert ask(port, "/v1/completions", cold)[1]["choices"][0]["text"] == "c"
        drawn = {"prompt": "ab", "temperature": 2, "seed": 5, "max_tokens": 8}
        assert (
            ask(port, "/v1/completions", drawn)[1]["choices"]
            == ask(port, "/v1/completions", drawn)[1]["choices"]
        )
        assert ask(port, "/v1/classify", {"input": "a"})[0] == 404  # it writes


def test_answers_stream() -> None:
    with served(loaded(Counting(26))) as port:
        asked = {
            "messages": [{"role": "user", "content": "ab"}],
            "temperature": 0,
            "max_tokens": 3,
            "stream": True,
        }
        code, said = ask(port, "/v1/chat/completions", asked)
        lines = [line.removeprefix("data: ") for line in said.split("\n\n") if line]
        assert (code, lines[-1]) == (200, "[DONE]")
        parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"]["content"] for part in parts) == "cde"
        assert parts[-1]["finish_reason"] == "length"
        asked["stream_options"] = {"include_usage": True}
        last = json.loads(
            ask(port, "/v1/chat/completions", asked)[1].split("\n\n")[-3].removeprefix("data: ")
        )
        assert (
            last["choices"],
            last["usage"]["completion_tokens"],
            last["usage"]["total_tokens"],
        ) == ([], 3, 5)
        code, said = ask(port, "/v1/completions", {"prompt": "x", "temperature": 0, "stream": True})
        assert [json.loads(line[6:])["choices"][0]["text"] for line in said.split("\n\n")[:-2]] == [
            "y",
            "",
        ]


def test_what_would_change_an_answer_is_refused_and_not_ignored() -> None:
    with served(loaded(Counting(26)), Limits(body_kb=4, new_tokens=8)) as port:

        def refused(path: str, body: Any, **headers: str) -> tuple[int, str]:
            code, said = ask(port, path, body, **headers)
            return code, said["error"]["message"] if isinstance(said, dict) else said

        good = {"prompt": "ab"}
        assert refused("/v1/completions", good | {"presence_penalty": 0.5}) == (
            400, "presence_penalty is not supported",
        )  # fmt: skip
        for nothing in (
            {"presence_penalty": 0, "logit_bias": {}},
            {"best_of": 1, "response_format": {"type": "text"}},
        ):
            assert ask(port, "/v1/completions", good | nothing)[0] == 200
        assert refused("/v1/completions", good | {"logprobs": 0}) == (
            400,
            "logprobs is not supported",
        )
        assert refused("/v1/nothing", good) == (404, "Not Found")
        assert ask(port, "/v1/models/tiny")[1]["id"] == "tiny"
        assert ask(port, "/v1/models/other")[0] == 404
        assert refused("/v1/completions", good | {"n": 2})[0] == 400
        assert refused("/v1/completions", good | {"max_tokens": 9}) == (
            400, "max_tokens is 9, but this server allows at most 8",
        )  # fmt: skip
        assert refused("/v1/completions", good | {"model": "gpt-5"}) == (
            404, "there is no model 'gpt-5'; this server has 'tiny'",
        )  # fmt: skip
        assert (
            refused("/v1/completions", good | {"temperature": "hot"})[1]
            == "temperature is 'hot', but must be a number"
        )
        assert refused("/v1/completions", {"prompt": "a" * 60})[1].startswith(
            "the prompt has 60 tokens, but"
        )
        assert (
            refused("/v1/completions", {"prompt": "a" * 60, "stream": True})[0] == 400
        )  # before it streams
        assert (
            refused("/v1/completions", {"prompt": ["a", "b"], "stream": True})[1]
            == "stream supports only one prompt"
        )
        assert "surrogate" in refused("/v1/completions", {"prompt": "\ud800"})[1]
        assert refused("/v1/completions", b"{")[0] == 400
        assert refused("/v1/chat/completions", {"messages": []})[0] == 400
        system = {
            "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        }
        assert refused("/v1/chat/completions", system)[1].endswith(
            "refuses these messages: no system"
        )
        assert refused("/v1/completions", {"prompt": "a" * 5000}) == (
            413,
            "the request is larger than 4 KB",
        )
        assert refused("/v1/completions", good, Authorization="Bearer no")[0] == 401
        assert (
            refused("/v1/completions", good, Authorization="Bearer é".encode().decode("latin-1"))[0]
            == 401
        )
        assert refused("/v1/completions", good, Origin="http://elsewhere")[0] == 403
        assert refused("/v1/completions", good, Host="elsewhere")[0] == 403


def test_a_body_of_unknown_length_ends_as_well() -> None:
    with served(loaded(Counting(26)), Limits(body_kb=4)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        chunks = iter([b"x" * 1000] * 50)
        headers = {"Authorization": f"Bearer {TOKEN}", "Transfer-Encoding": "chunked"}
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have hung up already
            connection.request("POST", "/v1/completions", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_so_many_at_once_and_so_many_that_wait() -> None:
    model = Slow()
    with served(loaded(model), Limits(at_once=1, waiting=1)) as port:
        model.go.clear()
        codes: list[int] = []
        asked = {"prompt": "ab", "max_tokens": 2, "temperature": 0}
        threads = [
            threading.Thread(target=lambda: codes.append(ask(port, "/v1/completions", asked)[0]))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        until = time.time() + 15
        while len(codes) < 4 and time.time() < until:
            time.sleep(0.01)
        assert codes == [429] * 4  # nobody was answered yet: one is in work, one waits
        model.go.set()
        for thread in threads:
            thread.join(20)
        assert sorted(codes) == [200, 200, 429, 429, 429, 429]
        assert ask(port, "/v1/completions", asked)[0] == 200  # turns were given back


class Sleepy(Counting):
    """Half a second a token, and more than a minute for a whole answer."""

    def step(self, *given: Any) -> Any:
        time.sleep(0.5)
        return super().step(*given)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_turn_back(stream: bool) -> None:
    with served(loaded(Sleepy(26), positions=1000, ends=[]), Limits(at_once=1, waiting=0)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"prompt": "a", "max_tokens": 200, "temperature": 0, "stream": stream})
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        time.sleep(1)
        if stream:
            answer = connection.getresponse()
            answer.read(10)
            answer.close()
        connection.close()
        asked, until = {"prompt": "ab", "max_tokens": 1, "temperature": 0}, time.time() + 20
        while (code := ask(port, "/v1/completions", asked)[0]) != 200 and time.time() < until:
            assert code == 429
            time.sleep(0.05)
        assert code == 200


def begin(port: int, **asked: object) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request(
        "POST", "/v1/completions", json.dumps({"prompt": "a", "temperature": 0, **asked}), headers
    )
    return connection


def test_a_client_that_leaves_before_the_first_word_gives_its_turn_back() -> None:
    """The collector of garbage, which would find what was forgotten one day, has nothing to do with
    it.
    """
    with served(loaded(Sleepy(26), positions=1000, ends=[]), Limits(at_once=1, waiting=0)) as port:
        gc.disable()
        try:
            for _ in range(3):
                connection = begin(port, max_tokens=200, stream=True)
                time.sleep(0.2)
                connection.close()
                until = time.time() + 10
                while (
                    code := ask(port, "/v1/completions", {"prompt": "a", "max_tokens": 1})[0]
                ) == 429:
                    assert time.time() < until, "the turn was never given back"
                    time.sleep(0.05)
                assert code == 200
        finally:
            gc.enable()


def test_a_client_that_leaves_while_it_waits_gives_its_place_back() -> None:
    model = Slow()
    with served(loaded(model), Limits(at_once=1, waiting=1)) as port:
        model.go.clear()
        working = begin(port, max_tokens=2)
        assert model.begun.wait(20)
        begin(port, max_tokens=2).close()
        until = time.time() + 20
        while True:  # who is turned away is told at once; who waits, is told nothing yet
            waits = begin(port, max_tokens=2)
            assert waits.sock is not None
            waits.sock.settimeout(1)
            try:
                assert waits.getresponse().status == 429
            except TimeoutError:
                break
            assert time.time() < until, "the place was never given back"
        model.go.set()
        assert working.getresponse().status == 200
        working.close()
        waits.close()


def test_a_fault_of_ours_has_the_form_of_an_error() -> None:
    class Broken:
        def logits(self, *_: object) -> None:
            raise IndexError("argmax")

    about = {"task": "classification", "labels": ["short", "long"]}
    with served(loaded(Broken(), **about)) as port:
        code, said = ask(port, "/v1/classify", {"input": "a"})
        assert (code, said["error"]["message"]) == (500, "an error in lorafleet: IndexError")
        code, said = ask(port, "/v1/classify", {"input": ["a", ""]})
        assert (code, said["error"]["message"]) == (
            400,
            "a text is empty: it must have at least one token",
        )


def test_prompts_begin_as_training_and_the_tokenizer_have_them() -> None:
    """Training's system message in a conversation of several turns; a raw text gets the tokenizer's
    own beginning.
    """
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "g"))
    ]
    asked = {"messages": turns, "temperature": 0, "max_tokens": 1}
    with served(loaded(Counting(26), system="pqr")) as port:
        code, said = ask(port, "/v1/chat/completions", asked)
        assert (code, said["error"]["message"]) == (
            400,
            "the model's chat template refuses these messages: no system",
        )
    beginning = loaded(Counting(26), start=[])
    beginning.tokenizer.special = (0,)  # type: ignore[attr-defined]
    with served(beginning) as port:
        assert (
            ask(port, "/v1/completions", {"prompt": "ab"})[1]["usage"]["prompt_tokens"] == 3
        )  # one is special
    with served(loaded(Counting(26), start=[1, 2])) as port:
        assert ask(port, "/v1/completions", {"prompt": "ab"})[1]["usage"]["prompt_tokens"] == 4
        odd = {"messages": [{"role": "user", "content": "a", "name": "ann"}]}
        assert (
            ask(port, "/v1/chat/completions", odd)[1]["error"]["message"]
            == "messages: name is not supported"
        )
        odd["messages"] = [{"role": "user", "content": "a", "tool_calls": None}]
        assert ask(port, "/v1/chat/completions", odd)[0] == 200


def test_classes_as_vllm_names_them() -> None:
    about = {"task": "classification", "labels": ["short", "long"]}
    with served(loaded(Lengths(), **about)) as port:
        said = ask(port, "/v1/classify", {"input": ["ab", "abcdef"]})[1]
        assert [one["label"] for one in said["data"]] == ["short", "long"]
        assert said["data"][0]["probs"] == pytest.approx([0.9933, 0.0067], abs=1e-4)
        assert said["data"][1]["num_classes"] == 2
        assert ask(port, "/classify", {"input": "ab"})[1]["data"][0]["label"] == "short"
        assert ask(port, "/v1/completions", {"prompt": "a"})[0] == 404


def test_a_conversation_is_framed_by_the_models_own_template(
    tiny_llama: Path, tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    for name in ("plain", "chat", "strict"):
        folder = tmp_path / name
        folder.mkdir()
        for path in tiny_llama.glob("tokenizer*"):
            shutil.copy(path, folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no chat template: send a single user message"):
        framed_by(tmp_path / "plain", turns)
    said = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(
        said + "{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert framed_by(tmp_path / "chat", turns) == "<u>a<a>b<u>c<a>"
    (tmp_path / "strict" / "chat_template.jinja").write_text(
        "{{ raise_exception('one turn alone') }}"
    )
    with pytest.raises(UserError, match="refuses these messages: one turn alone"):
        framed_by(tmp_path / "strict", turns)


def test_what_serves_it_in_production(tmp_path: Path) -> None:
    merged = ABOUT.model_copy(update={"target": "merged"})
    assert (
        build_vllm_command(merged, Path("/m y/merged"))
        == "vllm serve '/m y/merged' --max-model-len 12"
    )
    classes = merged.model_copy(update={"task": "classification", "positions": None})
    assert build_vllm_command(classes, Path("/m")) == "vllm serve /m --runner pooling"
    other = build_vllm_command(
        ABOUT.model_copy(update={"task": "classification"}), tmp_path / "onnx"
    )
    assert other.startswith("`lorafleet export r:t --to merged`")
    assert other.endswith("vllm serve MERGED --runner pooling --max-model-len 12")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "artefact.json").write_text(merged.model_dump_json())
    assert (
        build_vllm_command(ABOUT, tmp_path / "onnx")
        == f"vllm serve {tmp_path}/merged --max-model-len 12"
    )
    another = {
        "source": {"run": "other", "trial_id": "t9"},
        "task": "classification",
        "positions": 99,
    }
    (tmp_path / "merged" / "artefact.json").write_text(
        merged.model_copy(update=another).model_dump_json()
    )
    said = build_vllm_command(ABOUT, tmp_path / "onnx")
    assert (
        said
        == "`lorafleet export r:t --to merged`, then run vLLM on its folder: vllm serve MERGED --max-model-len 12"
    )
    (tmp_path / "merged" / "artefact.json").write_text('{"of": "another version"}')
    assert build_vllm_command(ABOUT, tmp_path / "onnx") == said


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    done = lorafleet_here("serve", tmp_path, cwd=tmp_path)
    assert (done.returncode, "has no artefact.json" in done.stderr) == (2, True)


def test_an_artefact_is_what_it_was_when_it_was_written() -> None:
    assert Artefact.model_validate_json(ABOUT.model_dump_json()) == ABOUT
