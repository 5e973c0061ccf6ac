"""Real parts, small: a BERT and a Llama of a few thousand weights made here, and rows that can be
learnt.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from lorafleet.jobs.loading.job_file import LoadedJob, load_text
from lorafleet.jobs.runs.run import Run, Trial

WORDS = (
    """the a film plot actor scene very quite rather story it was is and but with of in""".split()
)
GOOD = ["good", "great", "fine", "lovely", "superb"]
BAD = ["bad", "poor", "awful", "dull", "weak"]
ROOT = Path(__file__).parent.parent
ASSETS = os.environ.get("LORAFLEET_TEST_ASSETS", str(Path.home() / ".cache" / "lorafleet"))

settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile("quick")  # `make test-all` takes the other


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens of tests stay out of the user's cache; W&B, the hub and clusters are never asked."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LORAFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    patch.setenv(
        "KUBECONFIG", "/nonexistent/kubeconfig"
    )  # no cluster of the developer's is ever asked
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("WANDB_MODE", "offline")
    patch.delenv("WANDB_API_KEY", raising=False)
    yield
    patch.undo()


def opinions(count: int, seed: int) -> list[dict[str, str]]:
    """Sentences with one telling word: a classifier can learn them, in the time that a test has."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(["good", "bad"])
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 14))]
        words.insert(draw.randrange(len(words) + 1), draw.choice(GOOD if label == "good" else BAD))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def opinion_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("opinions")
    return {
        name: write_rows(folder / f"{name}.jsonl", opinions(count, seed))
        for name, count, seed in (("train", 256, 1), ("validation", 64, 2), ("test", 64, 3))
    }


@pytest.fixture(scope="session")
def question_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("questions")
    files = {}
    for name, count, seed in (("train", 96, 1), ("validation", 32, 2), ("test", 32, 3)):
        rows = [
            {"prompt": f"is it {row['text']}", "completion": row["label"]}
            for row in opinions(count, seed)
        ]
        files[name] = write_rows(folder / f"{name}.jsonl", rows)
    return files


def word_tokenizer(folder: Path, **special: str) -> int:
    """A word-level tokenizer of the tests' words; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special.values(), *WORDS, *GOOD, *BAD]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, with random weights, in a local folder."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    size = word_tokenizer(
        folder, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def _decoder(folder: Path, kind: str, **shape: Any) -> Path:
    """A causal LM with random weights in a folder, with a tokenizer of the tests' words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = word_tokenizer(
        folder, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=size, pad_token_id=0, bos_token_id=2, eos_token_id=3, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers."""
    return _decoder(
        tmp_path_factory.mktemp("tiny-llama"), "llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=128,
    )  # fmt: skip


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads have 64 numbers: with smaller ones that share keys, ONNX Runtime 1.32
    attends wrongly.
    """
    return _decoder(
        tmp_path_factory.mktemp("wide-llama"), "llama", hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=128, max_position_embeddings=128,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers; its matrices are transposed Conv1D layers."""
    return _decoder(
        tmp_path_factory.mktemp("tiny-gpt2"), "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=128,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_gpt_neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-Neo of two layers, one with local attention."""
    return _decoder(
        tmp_path_factory.mktemp("tiny-gpt-neo"), "gpt_neo", hidden_size=64, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], window_size=16, max_position_embeddings=128,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


JobMaker = Callable[..., LoadedJob]


@pytest.fixture
def bert_job(tiny_bert: Path, opinion_files: dict[str, Path], tmp_path: Path) -> JobMaker:
    """A job on the tiny BERT; keyword arguments are overrides with `__` for the dots."""

    def make(search: str = "", **overrides: object) -> LoadedJob:
        text = f"""
name: tiny
task: classification
model: {{model_name_or_path: "{tiny_bert}", max_length: 32}}
data: {{train_file: "{opinion_files["train"]}", validation_file: "{opinion_files["validation"]}",
       test_file: "{opinion_files["test"]}"}}
lora: {{lora_r: 4, lora_alpha: "2*lora_r"}}
train: {{per_device_train_batch_size: 8, learning_rate: 1e-2, max_steps: 8}}
resources: {{pack: off}}  # trials together: tests/processes/test_packed.py
{search}
"""
        return load_text(text, tmp_path / "job.yaml", as_overrides(overrides))

    return make


@pytest.fixture
def llama_job(tiny_llama: Path, question_files: dict[str, Path], tmp_path: Path) -> JobMaker:
    def make(search: str = "", **overrides: object) -> LoadedJob:
        text = f"""
name: tiny-lm
task: generation
model: {{model_name_or_path: "{tiny_llama}", max_length: 48}}
data: {{train_file: "{question_files["train"]}", validation_file: "{question_files["validation"]}",
       test_file: "{question_files["test"]}"}}
lora: {{lora_r: 4}}
train: {{per_device_train_batch_size: 4, learning_rate: 1e-2, max_steps: 6}}
resources: {{pack: off}}
{search}
"""
        return load_text(text, tmp_path / "job.yaml", as_overrides(overrides))

    return make


def read_step(trial: Trial) -> int:
    """Return the step in a trial's heartbeat, or 0 without a heartbeat."""
    progress = Run(trial.path.parent.parent).read_progress().get(trial.id)
    return progress.step if progress is not None else 0


def hears_ctrl_c() -> None:
    """Before a program begins: what a shell starts in the background ignores Ctrl-C, what `nohup`
    starts ignores the end of the terminal, and their children do too.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def as_overrides(values: dict[str, object]) -> tuple[str, ...]:
    return tuple(f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items())


def lorafleet(
    *words: str | Path, cwd: Path, check: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the real command line in a process of its own."""
    command = [str(Path(sys.executable).with_name("lorafleet")), *map(str, words)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=900,
        check=check,
    )


def lorafleet_here(*words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything already: for tests of what a command
    says.
    """
    from lorafleet.commands.cli import main

    said, told, code = io.StringIO(), io.StringIO(), 0
    before, here, argv = dict(os.environ), Path.cwd(), sys.argv
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["lorafleet", *map(str, words)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
        logging.disable(logging.NOTSET)
    return subprocess.CompletedProcess(sys.argv, code, said.getvalue(), told.getvalue())
