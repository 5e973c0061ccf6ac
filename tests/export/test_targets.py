"""From an adapter to files: merged, ONNX, float16, INT8; each compared with its source, by the real
ONNX Runtime.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from lorafleet.cluster.local_site import detect_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.commands.execute import _convert_exit_code
from lorafleet.deployment import export as exporting
from lorafleet.deployment.decoding import generate_answers
from lorafleet.deployment.driver import DeliveryDriver
from lorafleet.deployment.export import export
from lorafleet.deployment.merge import Source
from lorafleet.deployment.parity import collect_outputs, compare_outputs
from lorafleet.deployment.runtime import TorchDecoder, open_artefact
from lorafleet.evaluation.report.model_of_run import select_model
from lorafleet.jobs import files
from lorafleet.jobs.errors import DiskFull
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.export_result import ExportRequest, find_gate_violations
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.schema.export import TARGETS, Gate, Target, resolve_gate
from tests.conftest import JobMaker, lorafleet, opinions
from tests.unit.training.test_session import finish, session


def trained(loaded: LoadedJob, folder: Path) -> Run:
    """A run of one trial, as a driver leaves it, without Ray."""
    run = Run.create(folder / "runs", loaded.job.name)
    files.write_json(
        run.path / "plan.json",
        make_plan(loaded, detect_site(None), "train").model_dump(mode="json"),
    )
    trial = run.add_trial("aaaa", 0, {})
    made = session(loaded.job)
    finish(made)
    made.save_weights(trial.get_weights_folder(loaded.job.method))
    trial.add_rows(
        MetricsRow.model_validate(
            {
                "step": 1,
                "samples": 8,
                "loss": 1.0,
                "accuracy": 0.9,
                "evaluated": True,
                "train_seconds": 1.0,
            }
        )
    )
    trial.set_state(TrialState.FINISHED)
    return run


EDGE: list[Target] = ["executorch"] if importlib.util.find_spec("executorch") else []
"""ExecuTorch is large, and not among what the tests install."""


def exact(how: dict[str, object]) -> bool:
    return how.get("qlora__quant_type") != "int8"


def quiet(_: str) -> None:
    """Nobody listens."""


LONG = pytest.mark.long


@LONG
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_packed_matrices_of_gpt2_are_unpacked_as_they_were(
    quant_type: str, llama_job: JobMaker, tiny_gpt2: Path, tmp_path: Path
) -> None:
    """transformers turns them over before it packs them."""
    how = {
        "model__model_name_or_path": str(tiny_gpt2),
        "method": "qlora",
        "qlora__quant_type": quant_type,
    }
    run = trained(llama_job(**how, train__max_steps=30), tmp_path)
    merged = export(select_model(run), ["merged"], tmp_path / "out", quiet)[0]
    assert merged.parity is not None
    assert merged.accepted, merged.parity.reasons
    assert quant_type == "int8" or merged.parity.judged.max_logit_difference < 1e-4


@pytest.mark.parametrize(
    "model",
    ["tiny_gpt2", pytest.param("tiny_llama", marks=LONG), pytest.param("tiny_gpt_neo", marks=LONG)],
)
def test_a_writer_through_every_target(
    model: str, llama_job: JobMaker, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = request.getfixturevalue(model)
    run = trained(llama_job(model__model_name_or_path=str(place), train__max_steps=30), tmp_path)
    out = tmp_path / "out"
    outcomes = {
        outcome.target: outcome for outcome in export(select_model(run), TARGETS, out, quiet)
    }
    assert list(outcomes) == list(TARGETS)
    if model != "tiny_llama":
        assert outcomes["onnx-int4"].unavailable is not None
        assert "has no INT4 builder for models of type" in outcomes["onnx-int4"].unavailable
    exact_ones: list[Target] = ["merged", "onnx", *EDGE]
    for name in exact_ones:
        parity = outcomes[name].parity
        assert parity is not None
        assert parity.accepted, parity.reasons
        assert parity.judged.max_logit_difference < 1e-4
        assert parity.judged.step_logit_difference < 1e-4
        assert parity.judged.after == pytest.approx(parity.judged.before, rel=1e-4)
    loaded = {
        name: open_artefact(Path(outcome.folder), 1)
        for name, outcome in outcomes.items()
        if outcome.folder
    }
    about = loaded["onnx"].artefact
    prompts = [loaded["onnx"].encode_prompt(text) for text in ("is it a good film", "is it bad")]
    answers = [
        generate_answers(found.model, prompts, 6, about.ends, about.pad_id)
        for found in loaded.values()
    ]
    assert answers[0] == answers[1] == answers[2]
    alone = [
        generate_answers(loaded["onnx"].model, [prompt], 6, about.ends, about.pad_id)[0]
        for prompt in prompts
    ]
    assert alone == answers[1]  # what stands beside a row does not change it
    assert not list(out.glob(".*"))
    assert json.loads((out / "export.json").read_text())["targets"]["onnx"]["accepted"] is True
    whole = loaded["onnx"].decode(answers[1][0])
    told = lorafleet(
        "chat", out / "onnx", "--max-new-tokens", "6", "-p", "is it a good film", cwd=tmp_path
    )
    assert told.stdout == f"{whole}\n"
    drawn = ("chat", out / "onnx", "--temperature", "2", "--seed", "1", "-p", "is it bad")
    assert lorafleet(*drawn, cwd=tmp_path).stdout == lorafleet(*drawn, cwd=tmp_path).stdout
    long = lorafleet("chat", out / "onnx", "-p", "good " * 200, cwd=tmp_path)
    assert (long.returncode, "but the model has 128 positions" in long.stderr) == (2, True)
    assert floats_of(out / "onnx-int8") == []
    asked_over_http(out / "onnx", "is it a good film", whole, tmp_path)
    everything_in_one_table(run, out, tmp_path)
    said = subprocess.run(
        [sys.executable, "run.py", "is it a good film"],
        cwd=out / "onnx",
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip().startswith(
        whole.strip()
    )  # it goes on to 128 tokens, or to the end of the positions


def floats_of(folder: Path) -> list[str]:
    """The matrices of an ONNX file that are in float32."""
    import onnx

    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return [
        one.name
        for one in graph.initializer
        if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1
    ]


def asked_over_http(folder: Path, prompt: str, answer: str, place: Path) -> None:
    """`lorafleet serve`, as the line that it prints says.

    The key of an empty variable is a new one.
    """
    process = subprocess.Popen(
        [Path(sys.executable).with_name("lorafleet"), "serve", folder, "--port", "0"],
        cwd=place, stderr=subprocess.PIPE, text=True, env=os.environ | {"LORAFLEET_API_KEY": ""},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = ""
        while "curl" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert f"vllm serve {folder.parent}/merged" in said
        key = re.search(r"export LORAFLEET_API_KEY=(\S+)", said).group(1)  # type: ignore[union-attr]
        address = re.search(r"at (http://127\.0\.0\.1:\d+/v1)", said).group(1)  # type: ignore[union-attr]
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 6,
        }
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as found:
            assert json.load(found)["choices"][0]["message"]["content"] == answer
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def everything_in_one_table(run: Run, out: Path, place: Path) -> None:
    """Measured, and what is not there says why."""
    known = json.loads((out / "export.json").read_text())
    known["targets"]["onnx-fp16"] |= {"folder": None, "unavailable": "no room"}
    (out / "onnx-fp16").rename(place / "away")
    (out / "export.json").write_text(json.dumps(known))
    gone = lorafleet("export", run.id, "--to", "tensorrt", "-o", place / "trt", cwd=place)
    assert gone.returncode == 2
    assert "pip install 'lorafleet[tensorrt]'" in " ".join(
        gone.stdout.split()
    )  # not as markup, which ends there
    few = (
        "--rounds",
        "1",
        "--rows",
        "2",
        "--new-tokens",
        "4",
        "--batch-sizes",
        "1,3",
        "--format",
        "json",
    )
    done = lorafleet("benchmark", run.id, "--export", out, *few, cwd=place)
    assert done.returncode == 0, done.stderr
    arms = {arm["arm"]: arm for arm in json.loads(done.stdout)["arms"]}
    assert list(arms) == ["base", "adapter", *TARGETS]
    assert arms["onnx-fp16"]["remarks"] == ["unavailable: no room"]
    assert arms["onnx-fp16"]["inference"] is None
    for name in ("base", "adapter", "merged", "onnx", "onnx-int8"):
        speed = arms[name]["inference"]
        assert speed["ttft_ms"] > 0
        assert speed["tokens_per_second"] > 0
        assert speed["load_seconds"] > 0
        assert speed["peak_memory_gib"] > speed["begun_gib"] > 0
    for name in ("base", "adapter", "merged", "onnx"):
        assert [(one["batch_size"], one["length"]) for one in arms[name]["batches"]] == [
            (1, 64),
            (3, 64),
        ]
        assert all(one["tokens_per_second"] > 0 for one in arms[name]["batches"])
    assert (
        (out / "benchmark" / "batches.csv").read_text().startswith("arm,batch_size,length,ttft_ms")
    )
    assert "By size of the batch" in (out / "benchmark" / "report.html").read_text()
    assert list((run.path / "wandb").glob("wandb/offline-run-*-benchmark"))
    far = lorafleet("benchmark", run.id, "--export", out, "--lengths", "125", cwd=place)
    assert (
        far.returncode,
        "but the model has only 128 positions, of which an answer needs 32" in far.stderr,
    ) == (2, True)
    assert arms["base"]["metrics"]["perplexity"] > arms["onnx"]["metrics"]["perplexity"] > 1
    assert "unavailable: no room" in (out / "benchmark" / "report.html").read_text()


def test_a_llama_in_int4(llama_job: JobMaker, wide_llama: Path, tmp_path: Path) -> None:
    job = llama_job(
        "export: {parity: {onnx-int4: {min_agreement: 0.9}}}",
        model__model_name_or_path=str(wide_llama), train__max_steps=60,
    )  # fmt: skip
    run, out = trained(job, tmp_path), tmp_path / "out"
    done = lorafleet(
        "export", run.id, "--to", "merged,onnx-int4", "-o", out, "--budget-mb", "50", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is the best target that fits" in done.stdout
    loaded = open_artefact(out / "onnx-int4", 1)
    about = loaded.artefact
    prompts = [loaded.encode_prompt(text) for text in ("is it a good film", "is it bad")]
    alike = [
        prompts[1],
        [*prompts[1][:-1], prompts[0][-2]],
    ]  # of one length: side by side; others go one by one
    both = generate_answers(loaded.model, prompts, 6, about.ends, about.pad_id)
    for given in (prompts, alike):
        alone = [
            generate_answers(loaded.model, [prompt], 6, about.ends, about.pad_id)[0]
            for prompt in given
        ]
        assert generate_answers(loaded.model, given, 6, about.ends, about.pad_id) == alone
    said = subprocess.run(
        [sys.executable, "run.py", "is it bad"],
        cwd=out / "onnx-int4",
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip().startswith(loaded.decode(both[1]).strip())
    assert "ms per token" in (out / "onnx-int4" / "README.md").read_text()


@pytest.mark.skipif(
    not EDGE, reason="executorch is not installed: pip install 'lorafleet[executorch]'"
)
def test_a_writer_on_a_small_device(llama_job: JobMaker, tiny_llama: Path, tmp_path: Path) -> None:
    run = trained(
        llama_job(model__model_name_or_path=str(tiny_llama), train__max_steps=30), tmp_path
    )
    merged, edge = export(
        select_model(run), ["merged", "executorch"], tmp_path / "out", quiet, threads=1
    )
    assert edge.accepted, edge
    assert edge.inference is not None
    assert edge.inference.tokens_per_second > 0
    prompt = ("-p", "is it a good film", "--max-new-tokens", "6")
    both = [
        lorafleet("chat", str(outcome.folder), *prompt, cwd=tmp_path).stdout
        for outcome in (merged, edge)
    ]
    assert both[0] == both[1] != ""
    assert "docs.pytorch.org/executorch" in (Path(str(edge.folder)) / "README.md").read_text()


@pytest.mark.parametrize(
    "how",
    [
        {"method": "qlora"},
        pytest.param({"method": "full", "train__learning_rate": 3e-3}, marks=LONG),
        pytest.param({"lora__use_dora": True}, marks=LONG),
        pytest.param(
            {"lora__init_lora_weights": "pissa", "train__learning_rate": 3e-3}, marks=LONG
        ),
        pytest.param({"method": "qlora", "qlora__quant_type": "int8"}, marks=LONG),
    ],
)
def test_a_classifier_through_every_target(
    how: dict[str, object], bert_job: JobMaker, tmp_path: Path
) -> None:
    run = trained(
        bert_job(**{"train__max_steps": 150, "train__learning_rate": 1e-2, **how}), tmp_path
    )
    done = lorafleet("export", run.id, "--to", "all", "-o", "out", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)["targets"]
    assert list(found) == list(TARGETS)
    assert found["onnx-int4"]["unavailable"] == (
        "onnxruntime-genai builds INT4 models only for text generation, but this model is a classifier"
    )
    assert found["tensorrt"]["unavailable"].startswith("tensorrt needs an NVIDIA GPU")
    assert found["onnx-int8"]["inference"]["latency_ms"] > 0
    if EDGE:
        assert found["executorch"]["parity"]["judged"]["max_logit_difference"] < (
            1e-4 if exact(how) else 10
        )
    for name in ("merged", "onnx") if exact(how) else ():
        assert found[name]["parity"]["judged"]["max_logit_difference"] < 1e-4
    out = tmp_path / "out"
    loaded = open_artefact(out / "onnx-int8", 1)
    assert loaded.artefact.labels == ["bad", "good"]
    texts = [str(row["text"]) for row in opinions(16, 5)]
    merged = open_artefact(out / "merged", 1)
    assert (
        loaded.compute_probabilities(texts).argmax(1)
        == merged.compute_probabilities(texts).argmax(1)
    ).mean() > 0.9
    said = subprocess.run(
        [sys.executable, "run.py", *texts[:2]],
        cwd=out / "onnx-int8",
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split("\t")[0] for line in said.stdout.splitlines()] == [
        ["bad", "good"][index] for index in loaded.compute_probabilities(texts[:2]).argmax(1)
    ]
    piped = subprocess.run(
        [Path(sys.executable).with_name("lorafleet"), "chat", out / "onnx-int8"],
        input="\n".join(texts[:2]), capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert [line.split("\t")[0] for line in piped.stdout.splitlines()] == [
        line.split("\t")[0] for line in said.stdout.splitlines()
    ]
    card = (out / "onnx-int8" / "README.md").read_text()
    assert "Accepted" in card
    if how.get("method") == "qlora":
        assert "merged into the" in card
    config = json.loads((out / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert "quantization_config" not in config


@pytest.mark.parametrize("model", ["tiny_gpt2", pytest.param("tiny_llama", marks=LONG)])
def test_a_decoder_that_names_classes(
    model: str, bert_job: JobMaker, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It looks at the last token that is no padding, in every target."""
    place = request.getfixturevalue(model)
    job = bert_job(
        model__model_name_or_path=str(place), train__max_steps=60, train__learning_rate=1e-2
    )
    run = trained(job, tmp_path)
    wanted: list[Target] = ["merged", "onnx", "onnx-fp16", "onnx-int8"]
    made = {one.target: one for one in export(select_model(run), wanted, tmp_path / "out", quiet)}
    for name in wanted:
        assert made[name].accepted, (name, made[name])
    assert made["onnx"].parity.judged.max_logit_difference < 1e-4
    texts = [
        str(row["text"]) for row in opinions(12, 5)
    ]  # of different lengths: the shorter ones are padded
    opened = [open_artefact(tmp_path / "out" / name, 1) for name in ("merged", "onnx")]
    together = [one.compute_probabilities(texts) for one in opened]
    assert together[0] == pytest.approx(together[1], abs=1e-4)
    alone = [float(opened[1].compute_probabilities([text])[0, 0]) for text in texts]
    assert alone == pytest.approx(together[1][:, 0].tolist(), abs=1e-4)
    assert 0 < together[1][:, 0].min() < 0.5 < together[1][:, 0].max() < 1


# ---- what is wrong is caught ----


class OneTooFar(TorchDecoder):
    """Counts positions wrongly once there is a cache."""

    def step(self, ids_BT, mask_BS, positions_BT, cache):
        return super().step(ids_BT, mask_BS, positions_BT + (cache is not None), cache)


def test_planted_faults_are_caught(llama_job: JobMaker, tiny_gpt2: Path, tmp_path: Path) -> None:
    job = llama_job(
        model__model_name_or_path=str(tiny_gpt2), train__max_steps=60, train__learning_rate=1e-2
    )
    run = trained(job, tmp_path)
    source = Source(select_model(run))
    held_out = exporting.load_held_out(source)
    seen = collect_outputs(TorchDecoder(source.model), held_out)
    gates = {name: resolve_gate(job.job.export, name, generates=True) for name in TARGETS}
    assert (
        find_gate_violations(
            gates["onnx"],
            compare_outputs(seen, collect_outputs(TorchDecoder(source.model), held_out)),
        )
        == []
    )

    late = compare_outputs(seen, collect_outputs(OneTooFar(source.model), held_out))
    assert late.max_logit_difference < 1e-4  # whole rows do not show it
    assert "a logit differs" in find_gate_violations(gates["onnx"], late)[0]
    assert late.step_logit_difference > 0.01

    with source.model.disable_adapter():
        bare = compare_outputs(seen, collect_outputs(TorchDecoder(source.model), held_out))
    assert all(find_gate_violations(gate, bare) for gate in gates.values())

    block = source.model.get_base_model().transformer.h[0].mlp
    with torch.no_grad():  # a matrix that was turned
        weight = (
            block.c_fc.base_layer.weight if hasattr(block.c_fc, "base_layer") else block.c_fc.weight
        )
        weight.copy_(weight.flip(0))
    swapped = compare_outputs(seen, collect_outputs(TorchDecoder(source.model), held_out))
    assert all(find_gate_violations(gates[name], swapped) for name in ("merged", "onnx"))

    with torch.no_grad():
        weight.fill_(float("nan"))
    broken = compare_outputs(seen, collect_outputs(TorchDecoder(source.model), held_out))
    assert broken.max_logit_difference is None
    assert "NaN or infinite" in find_gate_violations(Gate(), broken)[0]


def test_a_target_that_cannot_be_made_costs_itself_and_what_is_made_from_it(
    bert_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such_operator(*_: object, **__: object) -> None:
        raise RuntimeError("no operator for this\nand much more")

    monkeypatch.setattr(exporting, "export_onnx", no_such_operator)
    run, out = trained(bert_job(train__max_steps=8), tmp_path), tmp_path / "out"
    made = {outcome.target: outcome for outcome in export(select_model(run), TARGETS, out, quiet)}
    assert made["merged"].accepted
    assert (
        made["onnx"].failure == f"RuntimeError: no operator for this (see {out}/onnx-traceback.txt)"
    )
    assert made["onnx-int8"].failure == "it is built from onnx, which failed"
    assert "no_such_operator" in (out / "onnx-traceback.txt").read_text()
    assert (
        "no operator"
        in json.loads((out / "export.json").read_text())["targets"]["onnx"]["unavailable"]
    )
    # An older one of this model stays where it cannot be made again; one of another model is not
    # taken for it.
    ours, theirs = made["merged"].folder, {"run": "another"}
    (out / "onnx").mkdir()
    shutil.copy(Path(str(ours)) / "artefact.json", out / "onnx")
    export(select_model(run), ["onnx"], out, quiet)
    assert (out / "onnx").is_dir()
    about = json.loads((out / "onnx" / "artefact.json").read_text()) | {"source": theirs}
    (out / "onnx" / "artefact.json").write_text(json.dumps(about))
    export(select_model(run), ["onnx"], out, quiet)
    assert not (out / "onnx").exists()


def test_a_full_disk_is_no_fault_of_a_target(
    bert_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "export_onnx", full)
    job = bert_job(train__max_steps=8)
    run, out = trained(job, tmp_path), tmp_path / "out"
    with pytest.raises(
        DiskFull, match="free some space, then run the export again: accepted targets are kept"
    ):
        export(select_model(run), ["merged", "onnx"], out, quiet)
    assert (out / "merged" / "model.safetensors").is_file()
    assert not list(out.glob(".building-*"))
    delivery = delivery_of(
        run, job, ("onnx",)
    )  # as a job: its last words have the room that was kept for them
    with pytest.raises(DiskFull):
        DeliveryDriver(delivery).execute()
    assert (delivery.state, (delivery.path / ".reserve").exists()) == (RunState.FAILED, False)
    assert "export again" in str(delivery.read_status().reason)


def spoilt(source: Path, out: Path, scratch: Path) -> None:
    """Planted: a dynamic quantisation that turns the largest matrix over, as overflow would spoil
    it.
    """
    import onnx

    model = onnx.load(str(source / "model.onnx"))
    largest = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    largest.raw_data = bytes(reversed(largest.raw_data))
    out.mkdir(parents=True)
    onnx.save_model(
        model, str(out / "model.onnx"), save_as_external_data=True, location="model.onnx.data"
    )


def test_int8_is_made_another_way_where_the_fast_one_fails(
    llama_job: JobMaker, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "to_int8", spoilt)
    run = trained(
        llama_job(model__model_name_or_path=str(tiny_gpt2), train__max_steps=30), tmp_path
    )
    onnx, int8 = export(
        select_model(run), ["onnx", "onnx-int8"], tmp_path / "out", quiet, threads=1
    )
    assert int8.accepted, int8.parity
    assert "in INT8 by blocks, because dynamic quantisation did not pass" in int8.parity.remarks[-1]
    assert int8.parity.judged.agreement > 0.9
    assert int8.files_mb < 0.6 * onnx.files_mb
    assert int8.inference.tokens_per_second > 0
    assert "In INT8 by blocks" in (Path(str(int8.folder)) / "README.md").read_text()
    assert {path.name for path in Path(str(int8.folder)).iterdir()} >= {
        "model.onnx",
        "model.onnx.data",
        "run.py",
    }


def test_int8_that_no_way_makes_well_is_rejected(
    llama_job: JobMaker, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict on the fast way stands, and what the other one said is beside it."""

    def impossible(*_: object) -> None:
        raise RuntimeError("no blocks")

    monkeypatch.setattr(exporting, "to_int8", spoilt)
    monkeypatch.setattr(exporting, "to_int8_by_blocks", impossible)
    run, out = (
        trained(llama_job(model__model_name_or_path=str(tiny_gpt2)), tmp_path),
        tmp_path / "out",
    )
    (int8,) = export(select_model(run), ["onnx-int8"], out, quiet)
    assert (int8.accepted, int8.failure, int8.folder) == (
        False,
        None,
        str(out / "rejected" / "onnx-int8"),
    )
    assert int8.parity.reasons
    assert int8.parity.remarks[-1].startswith("building by blocks failed: RuntimeError: no blocks")
    assert "impossible" in (out / "onnx-int8-by-blocks-traceback.txt").read_text()


def delivery_of(run: Run, job: LoadedJob, targets: tuple[Target, ...]) -> Run:
    """An export as a run of its own, before its driver begins."""
    delivery = Run.create(run.path.parent, "export")
    wanted = ExportRequest(run=run.id, targets=targets, threads=0)
    plan = make_plan(job, detect_site(None), "export").model_copy(update={"delivery": wanted})
    files.write_json(delivery.path / "plan.json", plan.model_dump(mode="json"))
    return delivery


def test_who_asks_for_the_end_gets_it(bert_job: JobMaker, tmp_path: Path) -> None:
    """A stop is no failure of a target, and what was there before stays."""
    job = bert_job(train__max_steps=8)
    run = trained(job, tmp_path)
    out = run.path / "export"
    export(select_model(run), ["merged", "onnx"], out, quiet)
    before = (out / "export.json").read_text()
    delivery = delivery_of(run, job, ("merged", "onnx"))
    driver = DeliveryDriver(delivery)
    said: list[str] = []

    def stop_at(sentence: str) -> None:
        said.append(sentence)
        if sentence == "building onnx":
            driver.stop_file.write_text("a user")
        DeliveryDriver._report_progress(driver, sentence)

    driver._report_progress = stop_at
    assert driver.execute() == 130
    assert delivery.state is RunState.STOPPED
    assert said[-1] == "building onnx"
    assert (
        json.loads((out / "export.json").read_text())["targets"]["onnx"]
        == json.loads(before)["targets"]["onnx"]
    )
    assert not list(out.glob(".building-*"))
    driver.stop_file.unlink()
    assert DeliveryDriver(delivery).execute() == 0
    assert (delivery.state, _convert_exit_code(delivery, 3)) == (RunState.FINISHED, 0)
    assert (
        json.loads((delivery.path / "exported.json").read_text())["targets"][1]["accepted"] is True
    )
    shown = lorafleet("report", delivery.id, cwd=tmp_path)
    assert (shown.returncode, shown.stdout.count("accepted")) == (0, 2)


def test_what_is_refused_is_set_aside(bert_job: JobMaker, tmp_path: Path) -> None:
    """Exit code 3; what passed before and does not now is no longer where it would be taken for
    good.
    """
    block = "export: {parity: {onnx: {max_logit_difference: 1e-12}}}"
    run = trained(bert_job(block, train__max_steps=30), tmp_path)
    stale = tmp_path / "out" / "onnx"
    stale.mkdir(parents=True)
    (stale / "old").touch()
    foreign = lorafleet("export", run.id, "--to", "merged,onnx", "-o", "out", cwd=tmp_path)
    assert (foreign.returncode, (stale / "old").is_file()) == (2, True)
    assert "exists already and was not made by an export" in foreign.stderr
    (stale / "artefact.json").touch()
    done = lorafleet(
        "export", run.id, "--to", "merged,onnx", "--no-measure", "-o", "out", cwd=tmp_path
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "rejected: a logit differs by" in " ".join(done.stdout.split())
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    assert not stale.exists()
    rejected = tmp_path / "out" / "rejected" / "onnx"
    assert json.loads((rejected / "parity.json").read_text())["accepted"] is False
    assert "REJECTED" in (rejected / "README.md").read_text()
