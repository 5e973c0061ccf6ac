"""What `validate` and `plan` say before anything runs: every problem at once, in the user's own
words.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.planning.refusals import refuse_attention
from lorafleet.commands.plan import describe_plan
from lorafleet.jobs.errors import JobFileError, UserError
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.loading.unused_fields import collect_unused_notes
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.aliases import FIELD_ALIASES, HF_ARGUMENTS
from lorafleet.jobs.schema.job import TrainSpec
from lorafleet.jobs.schema.precision import describe_planned_formats
from lorafleet.jobs.sites.base import LocalSite
from lorafleet.jobs.trials.arms import build_arm_job
from lorafleet.jobs.trials.sampling import UNSEARCHABLE_REASONS
from lorafleet.training.evaluation import resolve_autocast_dtype
from lorafleet.training.model import check_number_formats, describe_missing_bfloat16
from lorafleet.training.optim import compute_rate_factor
from tests.conftest import JobMaker, lorafleet_here, write_rows
from tests.unit.training.test_session import finish, session

HEAD = (
    "name: x\ntask: classification\nmodel: {model_name_or_path: asset:minilm-l6}\ndata: "
    "{train_file: x.jsonl}\n"
)
CPU_SITE = LocalSite(cpus=4, memory_gib=16.0)
GPU_SITE = LocalSite(cpus=4, memory_gib=16.0, gpus=1, gpu_memory_gib=80.0)


def _job(text: str, *overrides: str, head: str = HEAD) -> Any:
    return load_text(head + text, Path("/nowhere/job.yaml"), overrides)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Of the file's keys and values, of fields that contradict each other, of names, and of arms
    and searches.
    """
    (tmp_path / "job.yaml").write_text(
        "name: BAD NAME\n"
        "task: classification\n"
        "model: {model_name_or_path: ./nosuch, max_length: 32}\n"
        "data: {train_file: nosuch.jsonl}\n"
        "lora: {lora_r: 0, lora_alhpa: 3}\n"
        "train: {learning_rate: abc, packing: true, per_device_train_batch_size: 3, "
        "global_batch_size: 16}\n"
        "search: {parameters: {lora.lora_r: 8, train.sed: [1]}}\n"
    )
    said = lorafleet_here("validate", "job.yaml", cwd=tmp_path).stderr
    for words in (
        "job.yaml:1: name is 'BAD NAME'",
        "job.yaml:5: lora.lora_r is 0",
        "lora.lora_alhpa is not a known key; did you mean 'lora_alpha'?",
        "job.yaml:6: train.learning_rate is 'abc'",
        "train.global_batch_size is 16, but must be a multiple",
        "train.packing is true, but must be false for classification",
        "search.parameters.lora.lora_r is 8, but must list the values to try: {values: [8]}",
        "search.parameters has 'train.sed'",
        "model.model_name_or_path is",
        "job.yaml:4: data.train_file is",
    ):
        assert words in said, words
    assert len(said.splitlines()) == 10
    listed = json.loads(
        lorafleet_here("validate", "job.yaml", "--format", "json", cwd=tmp_path).stdout
    )
    assert len(listed["problems"]) == 10


def test_validate_reads_the_data_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": "x"}, {"text": "b"}])
    (tmp_path / "job.yaml").write_text(HEAD)
    done = lorafleet_here("validate", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "x.jsonl:2: " in done.stderr
    assert lorafleet_here("validate", "job.yaml", "--no-data", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_needs_a_gpu(name: str, bert_job: JobMaker, tmp_path: Path) -> None:
    loaded = bert_job(model__attn_implementation=name)
    with pytest.raises(
        JobFileError, match=f"is {name}, which trains only on a GPU, .* runs on CPU; use sdpa"
    ):
        make_plan(loaded, CPU_SITE, "train")
    with pytest.raises(JobFileError, match="runs on CPU"):
        refuse_attention(
            bert_job(model__attn_implementation=name, resources__device="cpu").job,
            GPU_SITE,
            "job.yaml",
        )
    refuse_attention(
        bert_job(model__attn_implementation="flex_attention").job, GPU_SITE, "job.yaml"
    )


def test_attention_of_a_search_and_of_an_arm(bert_job: JobMaker) -> None:
    search = (
        "search: {method: grid, parameters: {model.attn_implementation: [sdpa, flash_attention_2]}}"
    )
    arms = (
        "compare: {arms: {a: {method: lora}, b: {method: lora, set: {model.attn_implementation: "
        "flex_attention}}}}"
    )
    for text in (search, arms):
        with pytest.raises(JobFileError, match="trains only on a GPU"):
            refuse_attention(bert_job(text).job, CPU_SITE, "job.yaml")


def test_a_package_for_attention_that_is_not_installed(
    bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JobFileError, match="flash-attn is not installed"):
        refuse_attention(
            bert_job(model__attn_implementation="flash_attention_2").job, GPU_SITE, "job.yaml"
        )


def test_bfloat16_that_the_gpu_does_not_have(
    bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says that a V100 has it, since it emulates it."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    gpu = torch.device("cuda")
    check_number_formats(bert_job().job, gpu)
    for field, value in (("train__mixed_precision", "bf16"), ("model__dtype", "bfloat16")):
        with pytest.raises(
            UserError, match=f"is {value}, but Tesla V100 does not support bfloat16"
        ):
            check_number_formats(bert_job(**{field: value}).job, gpu)
    assert describe_missing_bfloat16(bert_job().job, gpu) == (
        "Tesla V100 does not support bfloat16, so the trial computes in float32: "
        "train.mixed_precision=fp16 is faster there, and must be asked for"
    )
    with_fp16 = bert_job(train__mixed_precision="fp16").job
    assert describe_missing_bfloat16(with_fp16, gpu) is None
    assert resolve_autocast_dtype(with_fp16, gpu) is torch.float16
    assert describe_missing_bfloat16(bert_job().job, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("overrides", "cuda", "line"),
    [
        ({}, False, "weights float32; arithmetic float32"),
        (
            {"train__mixed_precision": "bf16"},
            False,
            "weights float32; arithmetic bfloat16 (autocast)",
        ),
        ({"model__dtype": "bfloat16"}, False, "weights bfloat16; arithmetic bfloat16 (autocast)"),
        ({"method": "qlora"}, False, "weights nf4, the rest float32; arithmetic float32"),
        (
            {},
            True,
            "weights bfloat16; arithmetic bfloat16 (autocast), if the GPU supports bfloat16; "
            "else float32 (train.mixed_precision: fp16 must be asked for)",
        ),
        (
            {"method": "full"},
            True,
            "weights float32; arithmetic bfloat16 (autocast), if the GPU supports bfloat16; "
            "else float32 (train.mixed_precision: fp16 must be asked for)",
        ),
        (
            {"train__mixed_precision": "no", "model__dtype": "float32"},
            True,
            "weights float32; arithmetic float32",
        ),
    ],
)
def test_number_formats_are_said(
    overrides: dict[str, Any], cuda: bool, line: str, bert_job: JobMaker
) -> None:
    loaded = bert_job(**overrides, train__max_steps=1)
    assert describe_planned_formats(loaded.job, cuda=cuda) == line
    if not cuda:
        made = make_plan(loaded, CPU_SITE, "train")
        assert f"number format   {line}" in describe_plan(made)
        trained = session(loaded.job)
        finish(trained)
        assert trained.number_formats == line  # what it was is what the plan said


@pytest.mark.parametrize(
    ("text", "command", "words"),
    [
        (
            "evaluate: {folds: 3}\n",
            "train",
            "evaluate.folds is set, but not used: `lorafleet train` trains once",
        ),
        ("evaluate: {folds: 3}\n", "sweep", None),
        (
            "qlora: {quant_type: fp4}\n",
            "train",
            "qlora.quant_type is set, but not used: method is lora",
        ),
        (
            "method: full\nlora: {lora_r: 4, lora_alpha: 8}\n",
            "train",
            "lora.lora_r and lora.lora_alpha are set, but",
        ),
        (
            "train: {lr_scheduler_type: constant, warmup_steps: 4}\n",
            "train",
            "constant has no warm-up",
        ),
        (
            "train: {decay_ratio: 0.3}\n",
            "train",
            "only lr_scheduler_type warmup_stable_decay uses it",
        ),
        ("evaluate: {temperature: 0.5}\n", "train", "evaluate.do_sample is false"),
        ("evaluate: {max_new_tokens: 5}\n", "train", "a classifier generates no answers"),
        (
            "train: {num_train_epochs: 2, max_steps: 5}\n",
            "train",
            "train.max_steps takes precedence",
        ),
        ("lora: {lora_r: 4}\n", "train", None),
    ],
)
def test_what_nothing_looks_at_is_said(text: str, command: str, words: str | None) -> None:
    notes = collect_unused_notes(_job(text), command)
    assert notes == [] if words is None else any(words in note for note in notes), notes


def test_what_some_trials_use_is_used() -> None:
    searched = _job(
        "qlora: {quant_type: int8}\nsearch: {parameters: {method: [lora, qlora]}, method: grid}\n"
    )
    assert collect_unused_notes(searched, "sweep") == []


ALIASES = sorted(
    name for name, ours in FIELD_ALIASES.items() if ours.startswith(("lora.", "train."))
)


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_is_understood_everywhere(name: str) -> None:
    ours = FIELD_ALIASES[name]
    block = ours.split(".")[0]
    words = {
        "lora_target_modules": "[query]",
        "lr_scheduler_type": "cosine",
        "optim": "adamw_8bit",
        "learning_rate": "2",
    }
    value = words.get(ours.split(".")[1], "32")
    said = fields.get_value(_job(f"{ours.replace('.', ': {')}: {value}}}\n").job.model_dump(), ours)
    for text in (f"{name}: {value}\n", f"{block}: {{{name}: {value}}}\n"):
        assert fields.get_value(_job(text).job.model_dump(), ours) == said
    for override in (f"{name}={value}", f"{block}.{name}={value}"):
        assert fields.get_value(_job("", override).job.model_dump(), ours) == said
    quoted = '"query"' if value == "[query]" else value
    for key in (name, f"{block}.{name}"):
        if ours not in UNSEARCHABLE_REASONS:
            searched = _job(
                f"search: {{method: grid, parameters: {{{key}: [{quoted}]}}}}\n"
            ).job.search
            assert list(searched.parameters) == [ours]
        arm = (
            f"compare: {{arms: {{a: {{method: lora}}, b: {{method: lora, set: {{{key}: "
            f"{value}}}}}}}}}\n"
        )
        if ours != "train.num_train_epochs":  # the budget of all arms
            assert fields.get_value(build_arm_job(_job(arm).job, "b").model_dump(), ours) == said


def test_aliases_in_arithmetic() -> None:
    assert _job('lora: {r: 8, alpha: "2*rank"}\n').job.lora.lora_alpha == 16
    searched = _job('search: {parameters: {r: [4, 8], lora.alpha: "2*r"}, method: grid}\n')
    assert searched.job.search.parameters["lora.lora_alpha"].expression == "2*lora.lora_r"
    assert _job("lora: {r: 8}\nlinked: {lora.alpha: 3*r}\n").job.lora.lora_alpha == 24


def test_words_of_other_tools_in_a_search() -> None:
    searched = _job(
        "search: {parameters: {optimizer: [adamw_torch_fused, adamw_bnb_8bit]}, method: grid}\n"
    )
    assert searched.job.search.parameters["train.optim"].values == ("adamw_torch", "adamw_8bit")
    assert sum("is read as" in note for note in searched.notes) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("search: {parameters: {lora.lora_r: 8}}\n", "must list the values to try: {values: [8]}"),
        (
            "search: {parameters: {lora.lora_target_modules: [[query, value], [query]]}}\n",
            'To use a list as one value, write it as "query,value"',
        ),
        (
            "compare: {arms: {a: {method: base, quantization: fp16}, b: {method: lora}}}\n",
            "for 16-bit weights use `set: {model.dtype: float16}`",
        ),
        (
            "train: {adam_beta1: 0.8}\n",
            "train.adam_beta1 is not a known key; it is an argument of Hugging Face's Trainer or TRL without a counter",
        ),
        (
            "fp16: true\n",
            "fp16 is not a known key; its counterpart in lorafleet is train.mixed_precision: fp16",
        ),
        ("train: {save_steps: 5}\n", "its counterpart in lorafleet is train.checkpoint_minutes"),
        (
            "train: {metric_for_best_model: f1}\n",
            "its counterpart in lorafleet is search.metric.name",
        ),
        ("search: {parameters: {train.adam_beta2: [0.9]}}\n", "without a counterpart in lorafleet"),
    ],
)
def test_hints_name_what_works(text: str, words: str) -> None:
    with pytest.raises(JobFileError) as error:
        _job(text)
    assert words in str(error.value)


def test_a_list_in_a_search_works_as_the_hint_says() -> None:
    job = _job(
        'search: {method: grid, parameters: {lora.lora_target_modules: ["query,value", query]}}\n'
    ).job
    assert job.search.parameters["lora.lora_target_modules"].values == ("query,value", "query")


def test_every_argument_of_the_trainer_is_known_here_or_hinted_at() -> None:
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig

    leaves = {path.rpartition(".")[2] for path in fields.get_leaf_fields()}
    for config in (TrainingArguments, SFTConfig, ModelConfig):
        for field in dataclass_fields(config):
            assert field.name in leaves | set(FIELD_ALIASES) | set(HF_ARGUMENTS), field.name
    for name in HF_ARGUMENTS:
        assert name not in leaves | set(FIELD_ALIASES), name


@pytest.mark.parametrize(
    ("name", "words"),
    [("nosuch.jsonl", "no such file"), (".", "a folder"), ("x.txt", "end in one")],
)
def test_evaluate_names_the_users_own_option(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x\n")
    write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    (tmp_path / "job.yaml").write_text(HEAD)
    done = lorafleet_here(
        "evaluate", "asset:minilm-l6", "--job", "job.yaml", "--data", name, cwd=tmp_path
    )
    assert done.returncode == 2
    assert f"--data is {name}, but" in done.stderr
    assert words in done.stderr
    assert "evaluate.yaml" not in done.stderr


def test_init_names_the_users_own_options(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "x.jsonl", [{"text": f"a {number}", "label": number % 2} for number in range(20)]
    )
    for option, words in (("--validation-file", "no such file"), ("--model", "does not exist")):
        value = "./Nosuch.jsonl"
        done = lorafleet_here("init", "--train-file", "x.jsonl", option, value, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"{option} is "), done.stderr
        assert words in done.stderr


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (
            ("--task", "generation", "--prompt-column", "a", "--text-column", "b"),
            "does not use --text-column",
        ),
        (("--prompt-column", "a"), "--task classification does not use --prompt-column"),
        (
            ("--task", "summarization", "--label-column", "a"),
            "--task summarization does not use --label-column",
        ),
    ],
)
def test_init_refuses_columns_that_it_would_not_read(
    words: tuple[str, ...], refused: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "x.jsonl", [{"text": "a", "a": "b", "b": "c", "label": "d"}])
    done = lorafleet_here("init", "--train-file", "x.jsonl", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert refused in done.stderr


@pytest.mark.parametrize("text", ["data: {train_file: x.jsonl, labels: [true, false]}\n"])
def test_one_type_is_named_once(text: str) -> None:
    with pytest.raises(JobFileError) as error:
        _job(text, head=HEAD.replace("data: {train_file: x.jsonl}\n", ""))
    assert "a text or a text" not in str(error.value)


def test_a_warm_up_longer_than_a_trial_is_said(bert_job: JobMaker) -> None:
    notes = make_plan(
        bert_job(train__warmup_steps=1000, train__max_steps=8), CPU_SITE, "train"
    ).notes
    assert any(
        "warmup_steps is 1,000, but a trial has only 8 steps: the learning rate does" in note
        for note in notes
    )


@pytest.mark.parametrize(
    ("terminate", "scheduler"),
    [
        ("{type: hyperband, min_iter: 1, eta: 2}", ("epoch", 1, None, 2)),
        ("{type: hyperband, s: 2, eta: 3, max_iter: 27}", ("epoch", 3, 27, 3)),
        ("{type: hyperband, max_iter: 9}", ("epoch", 3, 9, 3)),
        ("{type: hyperband, min_iter: 2, reduction_factor: 4}", ("epoch", 2, None, 4)),
    ],
)
def test_early_terminate_of_wandb_in_a_job(terminate: str, scheduler: tuple[Any, ...]) -> None:
    job = _job(
        "search: {parameters: {lora.lora_r: [4, 8]}, method: grid, early_terminate: "
        f"{terminate}}}\n"
    ).job
    found = job.search.scheduler
    assert (found.time_attr, found.grace_period, found.max_t, found.reduction_factor) == scheduler
    assert found.type == "asha"


@pytest.mark.parametrize(
    "words", ["min_iter: 2, grace_period: 3", "max_iter: many", "min_iter: 1, eta: 1"]
)
def test_words_of_hyperband_that_make_no_sense(words: str) -> None:
    with pytest.raises(JobFileError, match=r"search\.scheduler"):
        _job(
            "search: {parameters: {lora.lora_r: [4, 8]}, early_terminate: {type: hyperband, "
            f"{words}}}}}\n"
        )


def test_whole_numbers_that_may_be_left_out_are_drawn_whole() -> None:
    parameter = "{distribution: int_uniform, min: 0, max: 100}"
    assert _job(f"search: {{parameters: {{train.warmup_steps: {parameter}}}}}\n").job.search


@pytest.mark.parametrize("text", ["data: {train_file: x.jsonl, split_seed: 4294967295}\n"])
def test_a_seed_that_no_generator_takes(text: str) -> None:
    with pytest.raises(JobFileError, match="split_seed is 4294967295, but must be below"):
        _job(text, head=HEAD.replace("data: {train_file: x.jsonl}\n", ""))


def test_a_quantization_that_is_a_list_is_a_sentence() -> None:
    with pytest.raises(JobFileError, match="quantization is"):
        _job("compare: {arms: {a: {method: base, quantization: [1]}, b: {method: lora}}}\n")


def test_what_a_search_decides_is_not_called_unused() -> None:
    text = (
        "train: {decay_ratio: 0.3}\nsearch: {method: grid, parameters: {train.lr_scheduler_type: "
        "[linear, cosine]}}\n"
    )
    assert collect_unused_notes(_job(text), "sweep") == []


def test_arms_that_pack_and_arms_that_do_not_are_not_compared_by_rows(llama_job: JobMaker) -> None:
    arms = (
        "compare: {arms: {a: {method: lora}, b: {method: lora, set: {train.packing: true}}}, "
        "budget: {samples: 100}}"
    )
    with pytest.raises(
        JobFileError, match=r"must be tokens or device_seconds if arms differ in train.packing"
    ):
        llama_job(arms)
    llama_job(arms.replace("samples", "tokens"))


def test_an_override_of_a_comparison_stays_in_it() -> None:
    arms = (
        "compare: {arms: {a: {method: lora}, b: {method: full}}, scheduler: {type: asha}, budget: "
        "{samples: 100}}\n"
    )
    assert _job(arms, "compare.scheduler.eta=2").job.compare.scheduler.reduction_factor == 2


def test_a_warm_up_into_the_decay_has_no_step_between() -> None:
    train = TrainSpec.model_validate(
        {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 90, "decay_ratio": 0.2}
    )
    factors = [compute_rate_factor(step, 100, train) for step in range(100)]
    assert max(abs(one - other) for one, other in itertools.pairwise(factors)) < 0.06


CODE = (
    "PYTHONPATH PYTHONSTARTUP PYTHONHOME PYTHONWARNINGS PYTHONBREAKPOINT PYTHONUSERBASE "
    "PYTHONPYCACHEPREFIX LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT DYLD_INSERT_LIBRARIES BASH_ENV ENV "
    "PATH HOME SHELLOPTS PS4 IFS GCONV_PATH OMP_TOOL_LIBRARIES NCCL_NET_PLUGIN NCCL_TUNER_PLUGIN "
    "NCCL_CONF_FILE RAY_RUNTIME_ENV_HOOK RAY_START_HOOK CUDA_HOME CC CXX NVCC_PREPEND_FLAGS CFLAGS "
    "TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR HF_MODULES_CACHE HF_HOME "
    "XDG_CACHE_HOME MPLBACKEND GIT_SSH_COMMAND OPENSSL_CONF NODE_OPTIONS JAVA_TOOL_OPTIONS PAGER "
    "KUBECONFIG CUDA_INJECTION64_PATH UCX_MODULE_DIR DS_ENV_FILE LORAFLEET_CACHE TRITON_PTXAS_PATH "
    "RAY_preload_python_modules PERL5LIB LIBRARY_PATH RAY_JOB_CONFIG_JSON_ENV_VAR https_proxy "
    "ALL_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE NETRC COVERAGE_PROCESS_START "
    "OMPI_MCA_plm_rsh_agent TRITON_OVERRIDE_DIR HF_DATASETS_TRUST_REMOTE_CODE "
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD WANDB_BASE_URL"
).split()
HARMLESS = (
    "NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA OMP_NUM_THREADS MKL_NUM_THREADS TZ LANG "
    "CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING PYTORCH_CUDA_ALLOC_CONF MALLOC_MMAP_THRESHOLD_ "
    "HF_HUB_OFFLINE MY_SETTING WANDB_MODE WANDB_PROJECT TORCH_DISTRIBUTED_DEBUG GLOO_SOCKET_IFNAME "
    "PYTHONHASHSEED PYTHONUNBUFFERED DATA_DIR"
).split()


def test_a_job_does_not_change_which_code_runs(bert_job: JobMaker) -> None:
    loaded = bert_job(environment=dict.fromkeys(CODE, "/tmp/theirs"))
    with pytest.raises(JobFileError) as caught:
        make_plan(loaded, CPU_SITE, "train", allowed=CODE[:3])
    assert [problem.path.removeprefix("environment.") for problem in caught.value.problems] == CODE[
        3:
    ]
    make_plan(loaded, CPU_SITE, "train", allowed=CODE)


def test_a_job_sets_what_is_harmless(bert_job: JobMaker) -> None:
    make_plan(bert_job(environment=dict.fromkeys(HARMLESS, "1")), CPU_SITE, "train")
