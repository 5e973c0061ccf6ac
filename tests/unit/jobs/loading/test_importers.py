"""Configs of other tools as jobs: their defaults, their `false`, and what is done otherwise here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafleet.jobs.loading.import_sweep import translate_sweep
from lorafleet.jobs.loading.importers import Translation, translate_config
from lorafleet.jobs.loading.job_file import load_job, load_text
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.trials import arms
from tests.conftest import lorafleet_here

PUBLISHED = {
    "axolotl-llama-3-lora-1b": """
base_model: NousResearch/Llama-3.2-1B
strict: false
datasets: [{path: teknium/GPT4-LLM-Cleaned, type: alpaca}]
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
wandb_project:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
""",
    "axolotl-llama-3-instruct-lora-8b": """
base_model: NousResearch/Meta-Llama-3-8B-Instruct
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: true
load_in_4bit: false
chat_template: llama3
datasets:
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    field_messages: messages
    message_property_mappings: {role: role, content: content}
    roles: {user: [user], assistant: [assistant]}
val_set_size: 0.05
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
weight_decay: 0.0
""",
    "axolotl-llama-3-fft-8b": """
base_model: NousResearch/Meta-Llama-3.1-8B
datasets: [{path: tatsu-lab/alpaca, type: alpaca}]
val_set_size: 0.05
sequence_len: 8192
sample_packing: true
pad_to_sequence_len: true
gradient_accumulation_steps: 8
micro_batch_size: 1
num_epochs: 1
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-5
bf16: auto
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
flash_attention: true
warmup_steps: 100
weight_decay: 0.0
""",
    "llamafactory-llama3_lora_sft": """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
""",
    "llamafactory-llama3_lora_sft_bnb_npu": """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
double_quantization: false
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
""",
    "llamafactory-qwen3_full_sft": """
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
stage: sft
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: identity,alpaca_en_demo
template: qwen3_nothink
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
""",
    "trl-example_config": """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: stanfordnlp/imdb
report_to: none
learning_rate: 0.0001
lr_scheduler_type: cosine
""",
}
"""Keys and values of example configs of axolotl (examples/llama-3), LLaMA-Factory (examples) and
TRL (cli_configs).
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_makes_a_job_that_plan_accepts(name: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(PUBLISHED[name])
    tool = name.partition("-")[0]
    done = lorafleet_here("import", "--from", tool, "theirs.yaml", "-o", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    planned = lorafleet_here("plan", "job.yaml", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    job, theirs = load_job(tmp_path / "job.yaml").job, yaml.safe_load(PUBLISHED[name])
    rows = theirs.get("micro_batch_size", theirs.get("per_device_train_batch_size", 8))
    assert job.train.compute_effective_batch_size(1) == rows * theirs.get(
        "gradient_accumulation_steps", 1
    )
    assert job.train.learning_rate == float(theirs["learning_rate"])
    assert job.train.lr_scheduler_type == "cosine"
    assert job.train.warmup_steps == theirs.get("warmup_steps")
    assert job.train.packing == bool(theirs.get("sample_packing"))
    full = theirs.get("finetuning_type") == "full" or (
        tool != "llamafactory" and "lora_r" not in theirs
    )
    quantised = theirs.get("load_in_8bit") or theirs.get("quantization_bit")
    assert job.method == ("full" if full else "qlora" if quantised else "lora")


def _of(tool: str, **config: Any) -> Translation:
    least = {
        "axolotl": {
            "base_model": "a/b",
            "adapter": "lora",
            "datasets": [{"path": "x.jsonl", "type": "chat_template"}],
        },
        "llamafactory": {
            "model_name_or_path": "a/b",
            "finetuning_type": "lora",
            "dataset": "x.jsonl",
        },
        "trl": {"model_name_or_path": "a/b", "dataset_name": "a/c", "use_peft": True},
    }
    return translate_config(tool, least[tool] | config, "x")


@pytest.mark.parametrize(
    ("tool", "defaults"),
    [
        (
            "axolotl",
            {
                "train.num_train_epochs": 1,
                "train.per_device_train_batch_size": 1,
                "train.lr_scheduler_type": "cosine",
                "train.warmup_ratio": 0.03,
                "train.group_by_length": False,
            },
        ),
        (
            "llamafactory",
            {
                "lora.lora_r": 8,
                "lora.lora_alpha": "2*lora_r",
                "train.learning_rate": 5e-5,
                "train.per_device_train_batch_size": 8,
                "model.max_length": 2048,
                "train.warmup_ratio": 0.0,
                "train.gradient_checkpointing": True,
            },
        ),
        (
            "trl",
            {
                "train.learning_rate": 2e-5,
                "train.per_device_train_batch_size": 8,
                "model.max_length": 1024,
                "lora.lora_dropout": 0.05,
                "train.warmup_ratio": 0.0,
            },
        ),
    ],
)
def test_what_a_tool_does_where_nothing_is_said(tool: str, defaults: dict[str, Any]) -> None:
    made = _of(tool)
    for path, value in defaults.items():
        assert fields.get_value(made.tree, path) == value, path
    assert len(made.assumed) >= len(defaults)
    assert fields.get_value(made.tree, "data.train_on_turns") in (None, "all")


@pytest.mark.parametrize(
    ("tool", "said", "path", "value"),
    [
        (
            "llamafactory",
            {"quantization_bit": 4, "double_quantization": False},
            "qlora.use_double_quant",
            False,
        ),
        ("llamafactory", {"mask_history": False}, "data.train_on_turns", "all"),
        ("llamafactory", {"mask_history": True}, "data.train_on_turns", "last"),
        (
            "llamafactory",
            {"enable_thinking": False},
            "data.chat_template_kwargs",
            {"enable_thinking": False},
        ),
        ("llamafactory", {"train_on_prompt": True}, "data.assistant_only_loss", False),
        ("llamafactory", {"warmup_steps": 20}, "train.warmup_steps", 20),
        ("llamafactory", {"warmup_steps": 0.1}, "train.warmup_ratio", 0.1),
        ("llamafactory", {"neat_packing": True}, "train.packing", True),
        (
            "llamafactory",
            {"disable_gradient_checkpointing": True},
            "train.gradient_checkpointing",
            False,
        ),
        ("llamafactory", {"report_to": "none"}, "tracking.mode", "disabled"),
        ("llamafactory", {"report_to": "wandb"}, "tracking.mode", None),
        ("axolotl", {"train_on_inputs": True}, "data.assistant_only_loss", False),
        ("axolotl", {"warmup_steps": 10, "warmup_ratio": 0.2}, "train.warmup_steps", 10),
        ("axolotl", {"warmup_steps": 10, "warmup_ratio": 0.2}, "train.warmup_ratio", None),
        ("axolotl", {"group_by_length": True}, "train.group_by_length", True),
        ("axolotl", {"early_stopping_patience": 3}, "train.early_stopping_patience", 3),
        ("axolotl", {"sample_packing": False}, "train.packing", None),
        ("axolotl", {"test_datasets": [{"path": "v.jsonl"}]}, "data.validation_file", "v.jsonl"),
        ("trl", {"assistant_only_loss": True}, "data.assistant_only_loss", True),
        ("trl", {"completion_only_loss": False}, "data.assistant_only_loss", False),
        ("trl", {"load_in_4bit": True}, "qlora.use_double_quant", False),
        (
            "trl",
            {"load_in_4bit": True, "use_bnb_nested_quant": True},
            "qlora.use_double_quant",
            True,
        ),
        ("trl", {"use_peft": False}, "method", "full"),
        ("trl", {"max_steps": -1}, "train.max_steps", None),
        ("trl", {"packing": True}, "train.packing", True),
        ("trl", {"env": {"NCCL_DEBUG": "INFO"}}, "environment", {"NCCL_DEBUG": "INFO"}),
    ],
)
def test_what_is_said_is_carried_over(
    tool: str, said: dict[str, Any], path: str, value: Any
) -> None:
    made = _of(tool, **said)
    assert fields.get_value(made.tree, path) == value
    assert not any(line.startswith(tuple(said)) for line in made.lost), made.lost


@pytest.mark.parametrize(
    ("turns", "lost"),
    [
        (
            {
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
            None,
        ),
        ({"message_field_role": "from", "message_field_content": "value"}, None),
        ({"message_property_mappings": {"role": "role"}}, None),
        (
            {"message_property_mappings": {"role": "speaker", "content": "text"}},
            "must have role and content",
        ),
        ({"roles": {"user": ["human", "user"], "assistant": ["gpt"]}}, None),
        ({"roles": {"user": ["client"]}}, "client is not supported as user"),
        ({"roles_to_train": ["assistant"], "train_on_eos": "turn"}, None),
        ({"roles_to_train": ["assistant", "user"]}, "datasets.roles_to_train"),
        ({"train_on_eos": "all"}, "datasets.train_on_eos"),
        ({"split": "train", "name": "main"}, None),
        ({"split": "train[:10%]"}, "datasets.split"),
    ],
)
def test_axolotls_conversations(turns: dict[str, Any], lost: str | None) -> None:
    made = _of("axolotl", datasets=[{"path": "x.jsonl", "type": "chat_template"} | turns])
    assert made.lost == [] if lost is None else any(lost in line for line in made.lost), made.lost
    assert made.tree["data"]["format"] == "messages"
    if "field_messages" in turns:
        assert made.tree["data"]["messages_column"] == "conversations"


def test_what_is_done_otherwise_is_said() -> None:
    assert any("trains on all rows" in line for line in _of("axolotl").otherwise)
    assert not any(
        "trains on all rows" in line for line in _of("axolotl", val_set_size=0.1).otherwise
    )
    assert any(
        "axolotl drops them, lorafleet truncates them" in line for line in _of("axolotl").otherwise
    )
    assert any(
        "do not attend to each other" in line
        for line in _of("llamafactory", packing=True).otherwise
    )
    assert any("TRL learns every token" in line for line in _of("trl").otherwise)
    assert _of("axolotl", val_set_size=0).lost == []


def test_secrets_of_a_config_are_not_shown() -> None:
    (line,) = _of("llamafactory", hf_hub_token="hf_abc").lost
    assert "hf_abc" not in line
    assert "128" in _of("axolotl", eval_max_new_tokens=128).lost[0]


SWEEP = {
    "program": "train.py",
    "method": "bayes",
    "metric": {"name": "val_accuracy", "goal": "maximize"},
    "run_cap": 6,
    "project": "mine",
    "parameters": {
        "lr": {"distribution": "log_uniform", "min": -9.0, "max": -4.0},
        "weight_decay": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
        "r": {"values": [4, 8]},
        "lora_dropout": {"min": 0.0, "max": 0.2},
        "optimizer": {"values": ["sgd", "adamw_torch_fused"]},
        "epochs": {"value": 2},
        "layers": {"values": [1, 2]},
    },
    "early_terminate": {"type": "hyperband", "s": 2, "eta": 3, "max_iter": 27},
    "command": ["${program}"],
}


def test_a_sweep_of_wandb_is_a_search(tmp_path: Path) -> None:
    made = translate_sweep(SWEEP, "x")
    search = made.tree["search"]
    assert (search["method"], search["num_samples"], search["metric"]["name"]) == (
        "tpe",
        6,
        "accuracy",
    )
    rate = search["parameters"]["train.learning_rate"]
    assert (rate["distribution"], rate["min"], rate["max"]) == (
        "log_uniform_values",
        math.exp(-9),
        math.exp(-4),
    )
    assert search["parameters"]["train.weight_decay"]["min"] == 1e-4
    assert search["parameters"]["train.optim"] == {"values": ["adamw_torch"]}
    assert made.tree["train"]["num_train_epochs"] == 2
    scheduler = {
        "type": "asha",
        "time_attr": "epoch",
        "reduction_factor": 3,
        "max_t": 27,
        "grace_period": 3,
    }
    assert search["scheduler"] == scheduler
    for words in ("program:", "command:", "parameters.layers:", "'sgd' is not a valid value"):
        assert any(words in line for line in made.lost), words
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    done = lorafleet_here("import", "--from", "wandb", "sweep.yaml", "-o", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "those of the quickstart are used" in done.stderr
    assert lorafleet_here("plan", "job.yaml", cwd=tmp_path).returncode == 0
    assert load_job(tmp_path / "job.yaml").job.tracking.project == "mine"


@pytest.mark.parametrize(
    ("said", "scheduler"),
    [
        ({"type": "hyperband", "min_iter": 2}, {"grace_period": 2, "reduction_factor": 3}),
        (
            {"type": "hyperband", "min_iter": 1, "eta": 2, "max_iter": 8},
            {"grace_period": 1, "max_t": 8},
        ),
        ({"type": "hyperband", "max_iter": 9, "s": 1, "eta": 3}, {"grace_period": 3, "max_t": 9}),
        (None, {"type": "none"}),
    ],
)
def test_early_terminate(said: Any, scheduler: dict[str, Any]) -> None:
    found = translate_sweep(SWEEP | {"early_terminate": said}, "x").tree["search"]["scheduler"]
    assert {key: found[key] for key in scheduler} == scheduler


def test_a_sweep_goes_on_the_users_own_job(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    own = (
        "name: own\ntask: classification\nmodel: {model_name_or_path: org/m}\ndata: {train_file: "
        "x.jsonl}\n"
    )
    (tmp_path / "own.yaml").write_text(own + "search: {parameters: {train.seed: [1]}}\n")
    done = lorafleet_here(
        "import", "--from", "wandb", "sweep.yaml", "--job", "own.yaml", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    tree = yaml.safe_load(done.stdout)
    assert (tree["name"], tree["model"]) == ("own", {"model_name_or_path": "org/m"})
    assert "train.seed" not in tree["search"]["parameters"]


@pytest.mark.parametrize(
    ("tool", "text", "words"),
    [
        (
            "wandb",
            "method: grid\nparameters: {layers: {values: [1]}}\n",
            "there is nothing to search",
        ),
        (
            "trl",
            "model_name_or_path: a/b\n",
            "translates to a job that cannot run: data is missing",
        ),
    ],
)
def test_what_makes_no_job_is_an_error(tool: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    done = lorafleet_here("import", "--from", tool, "x.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("tool", "said", "path", "value"),
    [
        ("axolotl", {"load_in_4bit": "no"}, "method", "lora"),
        ("axolotl", {"load_in_8bit": "false"}, "method", "lora"),
        ("axolotl", {"sample_packing": "yes"}, "train.packing", True),
        ("axolotl", {"gradient_checkpointing": "on"}, "train.gradient_checkpointing", True),
        ("axolotl", {"train_on_inputs": "off"}, "data.assistant_only_loss", None),
        ("trl", {"use_peft": "no"}, "method", "full"),
        ("llamafactory", {"mask_history": "True"}, "data.train_on_turns", "last"),
        ("llamafactory", {"warmup_steps": 0, "warmup_ratio": 0.1}, "train.warmup_ratio", 0.1),
        ("llamafactory", {"warmup_ratio": 0.1, "warmup_steps": 0}, "train.warmup_steps", None),
        ("axolotl", {"max_steps": -1}, "train.num_train_epochs", 1),
        ("axolotl", {"max_steps": 0}, "train.max_steps", None),
        ("trl", {"bnb_4bit_quant_type": "fp4", "load_in_4bit": True}, "qlora.quant_type", "fp4"),
        ("trl", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "qlora.quant_type", "fp4"),
        ("trl", {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, "qlora.quant_type", "int8"),
        (
            "llamafactory",
            {"quantization_type": "fp4", "quantization_bit": 8},
            "qlora.quant_type",
            "int8",
        ),
        ("llamafactory", {"quantization_bit": "4"}, "qlora.quant_type", "nf4"),
        ("llamafactory", {"pissa_init": True}, "lora.init_lora_weights", "pissa"),
        ("llamafactory", {"dataset": ["x.jsonl", "v.jsonl"]}, "data.train_file", "x.jsonl"),
        (
            "axolotl",
            {"datasets": [{"path": "json", "data_files": "a.jsonl"}]},
            "data.train_file",
            "a.jsonl",
        ),
    ],
)
def test_words_numbers_and_orders_of_other_tools(
    tool: str, said: dict[str, Any], path: str, value: Any
) -> None:
    assert fields.get_value(_of(tool, **said).tree, path) == value


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ("axolotl", {"optimizer": ["adamw_torch"]}),
        ("axolotl", {"load_in_4bit": "maybe"}),
        ("axolotl", {"lora_target_modules": r"model.layers.[\d]+.mlp.up_proj"}),
        ("llamafactory", {"quantization_bit": [4, 8]}),
        ("trl", {"assistant_only_loss": True, "completion_only_loss": False}),
        ("trl", {"datasets": [{"path": "a/b", "split": "train[:5%]"}]}),
        ("axolotl", {"test_datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}),
        ("axolotl", {"datasets": [{"path": "x.jsonl", "message_property_mappings": ["role"]}]}),
        (
            "axolotl",
            {
                "datasets": [
                    {"path": "x.jsonl", "type": "chat_template", "roles": {"user": [1, "human"]}}
                ]
            },
        ),
    ],
)
def test_what_is_not_understood_is_said(tool: str, said: dict[str, Any]) -> None:
    assert _of(tool, **said).lost


def test_nested_secrets_are_not_shown() -> None:
    made = _of("axolotl", auth={"token": "s3cr3t"}, mlflow_tracking_uri="https://u:pw@h")
    assert not any("s3cr3t" in line or "pw@" in line for line in made.lost)


@pytest.mark.parametrize(
    "said",
    [
        *(
            "none",
            False,
            "bayesian",
            {"type": "envelope"},
            {"type": "hyperband", "eta": 0, "max_iter": 9},
        ),
        *({"type": "hyperband", "max_iter": [9]}, {"type": "hyperband", "eta": 1, "max_iter": 9}),
    ],
)
def test_no_trial_is_stopped_by_what_was_not_carried_over(said: Any) -> None:
    made = translate_sweep(SWEEP | {"early_terminate": said}, "x")
    assert made.tree["search"]["scheduler"] == {"type": "none"}
    assert said in ("none", False) or any("no trial is stopped early" in line for line in made.lost)


@pytest.mark.parametrize(
    ("parameters", "lost"),
    [
        ({"lr": {"distribution": "log_uniform", "min": None, "max": 1}}, "parameters.lr"),
        ({"lr": {"distribution": ["uniform"], "min": 0.1, "max": 1}}, "parameters.lr"),
        ({"lr": {"values": [0.1]}, "learning_rate": {"values": [0.2]}}, "is set twice"),
    ],
)
def test_parameters_that_are_not_understood(parameters: dict[str, Any], lost: str) -> None:
    made = translate_sweep({"method": "grid", "parameters": parameters}, "x")
    assert any(lost in line for line in made.lost), made.lost


def test_exponents_of_whole_numbers_are_whole() -> None:
    rank = {"distribution": "q_log_uniform", "min": 1, "max": 4, "q": 1}
    made = translate_sweep({"method": "random", "parameters": {"r": rank}}, "x")
    assert made.tree["search"]["parameters"]["lora.lora_r"]["min"] == 3  # e
    assert made.tree["search"]["parameters"]["lora.lora_r"]["max"] == 54  # e ** 4
    assert any(
        "run_cap" in line
        for line in translate_sweep({"method": "grid", "run_cap": 1}, "x").otherwise
    )


def test_the_users_own_job_is_blamed_for_its_own_faults(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    (tmp_path / "own.yaml").write_text(
        "name: own\ntask: classification\nmodel: {model_name_or_path: org/m}\n"
    )
    done = lorafleet_here(
        "import", "--from", "wandb", "sweep.yaml", "--job", "own.yaml", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "own.yaml: data is missing" in done.stderr
    elsewhere = ("--job", "own.yaml", "-o", "sub/job.yaml")
    done = lorafleet_here("import", "--from", "wandb", "sweep.yaml", *elsewhere, cwd=tmp_path)
    assert "must be in the folder of --job" in done.stderr


AXOLOTL = """
base_model: org/model
load_in_8bit: true
datasets:
  - path: data.jsonl
    type: alpaca
val_set_size: 0.1
sequence_len: 1024
sample_packing: true
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
output_dir: ./out
"""


def test_imports_say_what_they_carry_and_what_they_lose(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(AXOLOTL)
    done = lorafleet_here("import", "--from", "axolotl", "a.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = load_text(done.stdout, tmp_path / "job.yaml").job
    assert (job.lora.lora_r, job.lora.lora_alpha, job.train.learning_rate) == (32, 16, 2e-4)
    assert (job.model.max_length, job.train.gradient_accumulation_steps, job.data.format) == (
        1024,
        4,
        "instruction",
    )
    assert (job.method, job.qlora.quant_type, job.train.optim) == ("qlora", "int8", "adamw_8bit")
    assert job.train.packing
    assert not any(f"not translated: {key}" in done.stderr for key in ("load_in_8bit", "optimizer"))
    made = translate_config(
        "llamafactory",
        yaml.safe_load(PUBLISHED["llamafactory-llama3_lora_sft"])
        | {"lora_target": "q_proj,v_proj"},
        "x",
    )
    assert made.tree["lora"] == {
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_r": 8,
        "lora_alpha": "2*lora_r",
    }
    assert any("lora_alpha: twice the rank" in line for line in made.assumed)
    assert made.tree["train"]["mixed_precision"] == "bf16"
    four = translate_config(
        "llamafactory", {"finetuning_type": "lora", "quantization_bit": 4}, "x"
    ).tree
    assert (four["method"], four["qlora"]) == ("qlora", {"quant_type": "nf4"})
    assert (
        "quantization_bit: 3"
        in translate_config("llamafactory", {"quantization_bit": 3}, "x").lost[0]
    )
    assert translate_config("axolotl", {"adapter": None}, "x").tree["method"] == "full"
    assert (
        translate_config("axolotl", {"adapter": "lora", "optimizer": "lion"}, "x")
        .lost[0]
        .startswith("optimizer: 'lion'")
    )
    assert any("only 'identity' of identity, alpaca_en_demo" in line for line in made.lost)
    assert (
        translate_config("llamafactory", {"stage": "dpo"}, "x")
        .lost[0]
        .startswith("stage: 'dpo' is not supported")
    )
    (tmp_path / "b.yaml").write_text(
        AXOLOTL + "eval_steps: 0.05\ngradient_checkpointing: unsloth\ntf32: false\n"
    )
    done = lorafleet_here("import", "--from", "axolotl", "b.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not translated: train.eval_steps is 0.05, but must be a whole number" in done.stderr
    assert "not translated: tf32" not in done.stderr


_LORA_EXPERIMENT = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none",
    "fan_in_fan_out": False, "inference_mode": False, "init_lora_weights": True, "loftq_config": {}, "lora_alpha": 64,
    "lora_bias": False, "lora_dropout": 0.0, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "r": 32, "rank_pattern": {}, "target_modules": None, "task_type": "CAUSAL_LM",
    "use_dora": False, "use_rslora": False,
}  # fmt: skip
_PROMPT_EXPERIMENT = {
    "num_attention_heads": 24, "num_layers": 28, "num_transformer_submodules": 1, "num_virtual_tokens": 200,
    "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "task_type": "CAUSAL_LM", "token_dim": 3072,
}  # fmt: skip


def write_experiment(
    root: Path, name: str, adapter: dict[str, Any] | None, training: dict[str, Any] | None = None
) -> Path:
    """Write an experiment in the layout of PEFT's method comparison; return its folder."""
    folder = root / "MetaMathQA" / "experiments" / "kind" / name
    folder.mkdir(parents=True)
    if adapter is not None:
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    if training is not None:
        (folder / "training_params.json").write_text(json.dumps(training))
    return folder


def test_experiments_of_pefts_comparison_are_arms(tmp_path: Path) -> None:
    """Every number of the original stands in the job: as a field, as an arm's own, or in a remark."""
    lora = write_experiment(tmp_path, "llama-3.2-3B-rank32", _LORA_EXPERIMENT)
    mlp = _LORA_EXPERIMENT | {
        "r": 10,
        "lora_alpha": 20,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    other = write_experiment(tmp_path, "rank10-mlp", mlp | {"use_dora": True})
    prompt = write_experiment(
        tmp_path,
        "prompt",
        _PROMPT_EXPERIMENT,
        {"optimizer_kwargs": {"lr": 1e-3, "weight_decay": 0.1}},
    )
    full = write_experiment(tmp_path, "full", None, {"optimizer_kwargs": {"lr": 1e-5}})
    done = lorafleet_here(
        "import",
        "--from",
        "peft-comparison",
        lora,
        other / "adapter_config.json",
        prompt,
        full,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    job = load_text(done.stdout, tmp_path / "job.yaml").job
    assert job.compare is not None
    assert list(job.compare.arms) == ["base", "llama-3-2-3b-rank32", "rank10-mlp", "prompt", "full"]
    assert (job.model.model_name_or_path, job.model.dtype) == (
        "meta-llama/Llama-3.2-3B",
        "bfloat16",
    )
    assert (job.model.max_length, job.train.max_steps, job.train.eval_steps) == (768, 5000, 250)
    assert (job.train.per_device_train_batch_size, job.train.gradient_accumulation_steps) == (4, 1)
    assert (job.train.lr_scheduler_type, job.train.warmup_ratio, job.train.max_grad_norm) == (
        "cosine",
        0.1,
        1.0,
    )
    configured = {name: arms.build_arm_job(job, name) for name in job.compare.arms}
    first = configured["llama-3-2-3b-rank32"]
    assert (first.lora.lora_r, first.lora.lora_alpha, first.lora.lora_dropout) == (32, 64, 0.0)
    assert first.lora.lora_target_modules == ("q_proj", "v_proj")
    assert (first.train.learning_rate, first.train.weight_decay) == (1e-4, 0.1)
    assert configured["rank10-mlp"].lora.lora_target_modules == (
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    assert configured["rank10-mlp"].lora.use_dora
    assert configured["prompt"].prompt_tuning.num_virtual_tokens == 200
    assert configured["prompt"].train.learning_rate == 1e-3
    assert (configured["full"].method, configured["full"].train.learning_rate) == ("full", 1e-5)
    assert (
        configured["full"].train.weight_decay == 0.01
    )  # its optimizer_kwargs replace the default ones
    assert "query_template" in done.stderr
    assert "GSM8K" in done.stderr


def test_the_comparisons_own_defaults_are_read(tmp_path: Path) -> None:
    lora = write_experiment(tmp_path, "a", _LORA_EXPERIMENT, {"max_steps": 20, "eval_steps": 10})
    (tmp_path / "MetaMathQA" / "default_training_params.json").write_text(
        json.dumps({"max_seq_length": 512})
    )
    done = lorafleet_here("import", "--from", "peft-comparison", lora, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = load_text(done.stdout, tmp_path / "job.yaml").job
    assert (job.model.max_length, job.train.max_steps) == (512, 20)


@pytest.mark.parametrize(
    ("adapter", "training", "words"),
    [
        (_LORA_EXPERIMENT | {"bias": "all"}, {}, "bias: lorafleet does not train biases"),
        (
            _LORA_EXPERIMENT | {"rank_pattern": {"q": 4}},
            {},
            "rank_pattern: {'q': 4} has no counterpart",
        ),
        (
            _LORA_EXPERIMENT | {"init_lora_weights": "eva"},
            {},
            "init_lora_weights: 'eva' is not one of",
        ),
        (_LORA_EXPERIMENT, {"grad_norm_clip": 0}, "grad_norm_clip: 0"),
        (
            _LORA_EXPERIMENT,
            {"optimizer_type": "lora-fa"},
            "optimizer_type: 'lora-fa'; AdamW is used",
        ),
        (
            _LORA_EXPERIMENT,
            {"optimizer_kwargs": {"lr": 1e-4, "betas": [0.9, 0.9]}},
            "optimizer_kwargs.betas",
        ),
        (
            _LORA_EXPERIMENT,
            {"model_id": "org/unheard-of"},
            "PEFT's default for org/unheard-of is not known",
        ),
        (
            _PROMPT_EXPERIMENT | {"prompt_tuning_init": "SAMPLE_VOCAB"},
            {},
            "lorafleet starts from random values",
        ),
    ],
)
def test_what_an_experiment_loses_is_reported(
    adapter: dict[str, Any], training: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write_experiment(tmp_path, "a", adapter, training)
    done = lorafleet_here("import", "--from", "peft-comparison", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert words in done.stderr
    load_text(done.stdout, tmp_path / "job.yaml")


def test_experiments_that_make_no_comparison(tmp_path: Path) -> None:
    def error_of(*folders: Path) -> str:
        done = lorafleet_here("import", "--from", "peft-comparison", *folders, cwd=tmp_path)
        assert done.returncode == 2, done.stdout
        return done.stderr

    ia3 = write_experiment(tmp_path, "ia3", {"peft_type": "IA3"})
    assert "peft_type is IA3, but lorafleet can only train LORA and PROMPT_TUNING" in error_of(ia3)
    quantised = write_experiment(tmp_path, "q", _PROMPT_EXPERIMENT, {"dtype": "int4"})
    assert "only LoRA can be trained on a quantised base" in error_of(quantised)
    long = write_experiment(tmp_path, "long", _LORA_EXPERIMENT, {"max_steps": 10})
    short = write_experiment(tmp_path, "short", _LORA_EXPERIMENT)
    assert "max_steps is 10 in long, 5000 in short" in error_of(long, short)
    assert "is not an experiment" in error_of(tmp_path)


def test_a_quantised_experiment_has_the_defaults_of_bitsandbytes(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, "q", _LORA_EXPERIMENT, {"dtype": "int4"})
    done = lorafleet_here("import", "--from", "peft-comparison", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = load_text(done.stdout, tmp_path / "job.yaml").job
    own = arms.build_arm_job(job, "q")
    assert (own.method, own.qlora.quant_type, own.qlora.use_double_quant) == ("qlora", "fp4", False)
    assert own.qlora.compute_dtype == "float32"
