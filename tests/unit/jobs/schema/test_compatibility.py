"""What runs under what: the table, what it refuses, and DeepSpeed's configuration around a user's
own.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lorafleet.cluster.planning.plan import choose_strategy, make_plan
from lorafleet.cluster.planning.preflight import check_names
from lorafleet.commands.plan import render_plan
from lorafleet.jobs.errors import JobFileError
from lorafleet.jobs.loading.job_file import LoadedJob, load_job
from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.schema.compatibility import build_support_table
from lorafleet.jobs.schema.deepspeed import build_engine_config, find_contradictions
from lorafleet.jobs.schema.types import METHODS, STRATEGIES
from lorafleet.jobs.sites.base import LocalSite, Node, RaySite
from tests.conftest import ROOT, JobMaker, lorafleet

TWO = {"resources__workers_per_node": 2}


def test_the_table_has_every_method_under_every_strategy(tmp_path: Path) -> None:
    assert {(cell.method, cell.strategy) for cell in build_support_table()} == {
        (m, s) for m in METHODS for s in STRATEGIES
    }
    printed = json.loads(lorafleet("methods", "--format", "json", cwd=tmp_path, check=True).stdout)
    assert len(printed["cells"]) == len(build_support_table())
    assert set(printed["cells"][0]) == {"method", "strategy", "devices", "supported", "reason"}
    shown = lorafleet("methods", cwd=tmp_path, check=True).stdout
    assert all(word in shown for word in (*METHODS, *STRATEGIES))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"resources__strategy": "zero2"}, "has nothing to shard"),
        (
            {**TWO, "resources__strategy": "fsdp", "method": "qlora", "qlora__quant_type": "int8"},
            "INT8 weights outside",
        ),
        (
            {**TWO, "resources__strategy": "zero1", "train__optim": "adamw_8bit"},
            "which is not supported with zero1",
        ),
        ({**TWO, "resources__strategy": "fsdp", "train__mixed_precision": "fp16"}, "use bf16"),
        (
            {**TWO, "resources__strategy": "ddp", "resources__deepspeed_config": "x"},
            "requires strategy zero1",
        ),
    ],
)
def test_what_does_not_run_is_refused_with_its_reason(
    overrides: dict[str, object], sentence: str, bert_job: JobMaker
) -> None:
    with pytest.raises(JobFileError, match=sentence):
        bert_job(**overrides)


def test_the_engine_gets_the_jobs_values_and_the_users_own(bert_job: JobMaker) -> None:
    job = bert_job(**TWO, resources__strategy="zero3", train__gradient_accumulation_steps=3).job
    own = {
        "zero_optimization": {"stage": "auto", "overlap_comm": False, "reduce_bucket_size": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": "auto",
        "wall_clock_breakdown": True,
    }
    assert find_contradictions(job, own) == []
    made = build_engine_config(job, own, bf16=False)
    assert made["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_accumulation_steps"] == 3
    assert made["gradient_clipping"] == 1.0
    assert made["wall_clock_breakdown"] is True
    assert "auto" not in json.dumps(made)  # DeepSpeed itself does not know the word
    assert made["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage = 2, but the job file sets it to 3",
        ),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5"),
        ({"optimizer": {"type": "Adam"}}, "has optimizer, but it is set by train.optim"),
        ({"train_batch_size": 64}, "has train_batch_size"),
        ({"fp16": {"enabled": True}}, "use train.mixed_precision: bf16"),
        ({"bf16": {"enabled": True}}, "set by model.dtype in the job file"),
        ({"zero_optimization": [3]}, "that must be an object"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_job_is_an_error(
    own: dict[str, object], sentence: str, bert_job: JobMaker, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(own))
    loaded = bert_job(**TWO, resources__strategy="zero3", resources__deepspeed_config="ds.json")
    with pytest.raises(JobFileError, match=sentence):
        check_names(loaded)


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_a_deepspeed_file_that_is_none(
    text: str | None, bert_job: JobMaker, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    loaded = bert_job(**TWO, resources__strategy="zero1", resources__deepspeed_config="ds.json")
    with pytest.raises(JobFileError, match=r"resources\.deepspeed_config is .*ds\.json"):
        check_names(loaded)


def test_olora_on_transposed_layers_is_refused(llama_job: JobMaker, tiny_gpt2: Path) -> None:
    olora = {"lora__init_lora_weights": "olora"}
    check_names(llama_job(**olora))
    with pytest.raises(JobFileError, match="Conv1D"):
        check_names(llama_job(model__model_name_or_path=str(tiny_gpt2), **olora))


def test_a_learnt_prompt_must_fit_and_leave_the_label_to_be_found(
    bert_job: JobMaker, tiny_gpt2: Path
) -> None:
    prompt = {"method": "prompt_tuning"}
    check_names(bert_job(**prompt))
    with pytest.raises(
        JobFileError, match=r"num_virtual_tokens is 40 and model\.max_length .* positions for both"
    ):
        check_names(bert_job(**prompt, prompt_tuning__num_virtual_tokens=40, model__max_length=60))
    with pytest.raises(JobFileError, match="predicts the label from the last token"):
        check_names(bert_job(**prompt, model__model_name_or_path=str(tiny_gpt2)))
    searched = "{method: {values: [lora, prompt_tuning]}, PROMPT: {values: [4, %d]}}"
    search = f"search: {{method: grid, parameters: {searched}}}"
    search = search.replace("PROMPT", "prompt_tuning.num_virtual_tokens")
    check_names(
        bert_job(search % 8, model__max_length=50)
    )  # of 64: the 20 of the default would be over
    with pytest.raises(
        JobFileError, match=r"is 30 and model\.max_length is 50, but .* has only 64 positions"
    ):
        check_names(bert_job(search % 30, model__max_length=50))


def test_without_a_compiler_zero_is_refused(
    bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(JobFileError, match="needs a C\\+\\+ compiler"):
        check_names(bert_job(**TWO, resources__strategy="zero1"))


@pytest.mark.parametrize(
    ("gib", "overrides", "chosen"),
    [
        (10.0, {}, "ddp"),
        (100.0, {}, "fsdp"),
        (100.0, {"method": "qlora", "qlora__quant_type": "int8"}, "ddp"),
        (100.0, {"train__optim": "adamw_8bit"}, "ddp"),
        (100.0, {"resources__workers_per_node": 1}, "ddp"),
        (10.0, {"resources__strategy": "zero2"}, "zero2"),
    ],
)
def test_auto_cuts_weights_up_only_where_they_do_not_fit(
    gib: float, overrides: dict[str, object], chosen: str, bert_job: JobMaker
) -> None:
    site = LocalSite(cpus=8, memory_gib=500, gpus=2, gpu_memory_gib=24)
    memory = MemoryEstimate(components={}, low=gib, expected=gib, high=gib, of="GPU memory")
    strategy, why = choose_strategy([bert_job(**TWO | overrides).job], site, memory, cuda=True)
    assert strategy == chosen
    assert why


def test_weights_that_write_answers_stay_whole(llama_job: JobMaker) -> None:
    site = LocalSite(cpus=8, memory_gib=500, gpus=2, gpu_memory_gib=24)
    memory = MemoryEstimate(components={}, low=99, expected=99, high=99, of="GPU memory")
    block = "evaluate: {metrics: [rouge1]}\nsearch: {metric: METRIC, parameters: {lr: [1e-3]}}"
    by_loss, by_rouge = (
        llama_job(block.replace("METRIC", name), **TWO) for name in ("loss", "rouge1")
    )
    assert choose_strategy([by_loss.job], site, memory, cuda=True)[0] == "fsdp"
    assert choose_strategy([by_rouge.job], site, memory, cuda=True)[0] == "ddp"
    with pytest.raises(
        JobFileError, match=r"search.metric.name is rouge1, .* sharded by zero3 cannot"
    ):
        llama_job(block.replace("METRIC", "rouge1"), **TWO, resources__strategy="zero3")


def test_auto_finds_what_every_trial_of_a_search_can_run_under(bert_job: JobMaker) -> None:
    site = LocalSite(cpus=8, memory_gib=500, gpus=2, gpu_memory_gib=24)
    memory = MemoryEstimate(components={}, low=99, expected=99, high=99, of="GPU memory")
    trials = [
        bert_job(**TWO, method="qlora", qlora__quant_type=kind).job for kind in ("nf4", "int8")
    ]
    assert choose_strategy(trials[:1], site, memory, cuda=True)[0] == "fsdp"
    assert choose_strategy(trials, site, memory, cuda=True)[0] == "ddp"


def planned(loaded: LoadedJob, width: int = 200) -> str:
    """What `lorafleet plan` prints."""
    text = io.StringIO()
    screen = Console(width=width, file=text)
    nodes = tuple(Node(name=name, cpus=4, memory_gib=50) for name in "ab")
    screen.print(
        render_plan(make_plan(loaded, RaySite(address="auto", nodes=nodes), "sweep"), screen.width)
    )
    return text.getvalue()


def test_a_narrow_screen_has_long_lines_go_on_below_their_names() -> None:
    lines = planned(load_job(ROOT / "examples" / "quickstart.yaml"), 80).splitlines()
    said = lines[lines.index("") + 1 :]
    assert max(map(len, lines)) <= 80
    assert len(said) > len([line for line in said if line[0] != " "])  # some did not fit
    assert all(line.startswith(" " * 16) for line in said if line[0] == " ")
    assert {line[13:16] for line in said if line[0] != " "} == {" " * 3}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_example_can_be_planned(path: Path) -> None:
    if path.stem == "my-data":
        pytest.skip("its data file is the user's own")
    assert "learning_rate" in planned(load_job(path))


def test_a_plan_shows_of_each_method_what_it_has(bert_job: JobMaker) -> None:
    search = "search: {method: grid, parameters: {method: {values: [lora, prompt_tuning, full]}}}"
    lines = {
        line.split()[2]: line.split()[3:] for line in planned(bert_job(search)).splitlines()[1:4]
    }
    assert lines["lora"][1:-1] == ["4", "8", "-", "8"]  # rank, alpha, no prompt, steps
    assert lines["prompt_tuning"][1:-1] == ["-", "-", "20", "8"]
    assert lines["full"][1:-1] == ["-", "-", "-", "8"]
