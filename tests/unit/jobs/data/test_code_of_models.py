"""Code that a model's folder brings runs where the job says so and names what is in it; nowhere
else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorafleet.cluster.planning.preflight import find_name_problems
from lorafleet.evaluation.tokenizer import load_chat_format
from lorafleet.jobs.data.adapters import find_adapter_refusal
from lorafleet.jobs.data.hub import compute_code_digest, find_code_refusal
from lorafleet.jobs.errors import AssetError
from lorafleet.training.model import load_base, load_tokenizer
from tests.conftest import JobMaker

CPU = torch.device("cpu")

BAIT = """
from pathlib import Path
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Own(LlamaForCausalLM):
    pass
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def bait(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a folder whose model and tokenizer bring code, the file that appears when it runs)."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder, marker = tmp_path / "bait", tmp_path / "it-ran"
    shutil.copytree(tiny_llama, folder)
    (folder / "own.py").write_text(BAIT.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}})
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    map_of_tokenizer = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | map_of_tokenizer))
    return folder, marker


def test_without_the_jobs_word_nothing_runs(bait: tuple[Path, Path], llama_job: JobMaker) -> None:
    folder, marker = bait
    job = llama_job(model__model_name_or_path=str(folder)).job
    load_chat_format(job)
    load_base(job, 2, CPU)
    assert not marker.exists()


@pytest.mark.parametrize("revision", ["0" * 40, "0" * 64])
def test_any_hash_is_not_enough(
    bait: tuple[Path, Path], llama_job: JobMaker, revision: str
) -> None:
    folder, marker = bait
    loaded = llama_job(
        model__model_name_or_path=str(folder),
        model__trust_remote_code=True,
        model__revision=revision,
    )
    assert [
        compute_code_digest(folder) in problem.sentence for problem in find_name_problems(loaded)
    ] == [True]
    for read in (
        lambda: load_chat_format(loaded.job),
        lambda: load_base(loaded.job, 2, CPU),
        lambda: load_tokenizer(str(folder), revision, trust_remote_code=True),
    ):
        with pytest.raises(AssetError, match=r"read its code, and set model\.revision"):
            read()
    assert not marker.exists()


def test_what_was_read_runs_until_it_changes(bait: tuple[Path, Path], llama_job: JobMaker) -> None:
    folder, marker = bait
    loaded = llama_job(
        model__model_name_or_path=str(folder),
        model__trust_remote_code=True,
        model__revision=compute_code_digest(folder),
    )
    assert find_name_problems(loaded) == []
    assert type(load_base(loaded.job, 2, CPU).model).__name__ == "Own"
    assert marker.exists()
    marker.unlink()
    (folder / "helper.py").write_text("evil = True")
    with pytest.raises(AssetError, match="is true and model"):
        load_base(loaded.job, 2, CPU)


@pytest.mark.parametrize("code", ["evil/other--own.Own", "/tmp/x/evil.Own", "../evil.Own", "own"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_place_is_pinned_by_nothing(
    bait: tuple[Path, Path], llama_job: JobMaker, file: str, code: str
) -> None:
    folder, _ = bait
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(said | {"auto_map": {"AutoTokenizer": [code, None]}}))
    loaded = llama_job(
        model__model_name_or_path=str(folder),
        model__trust_remote_code=True,
        model__revision=compute_code_digest(folder),
    )
    assert "loads code from another repository" in find_name_problems(loaded)[0].sentence


def test_what_can_change_is_not_pinned(
    bait: tuple[Path, Path], llama_job: JobMaker, tmp_path: Path
) -> None:
    """A folder that a link leads to, and one that others can write; of the hub a branch that looks
    like a hash.
    """
    folder, _ = bait
    (tmp_path / "elsewhere").mkdir()
    (folder / "package").symlink_to(tmp_path / "elsewhere")
    assert "is a link to a folder" in str(
        find_code_refusal(str(folder), compute_code_digest(folder))
    )
    (folder / "package").unlink()
    folder.chmod(0o777)
    assert "can be written by every user" in str(
        find_code_refusal(str(folder), compute_code_digest(folder))
    )


def test_weights_do_not_count_and_every_other_file_does(tmp_path: Path) -> None:
    for name in ("config.json", "own.py", "inner/own.py", "vocab.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = compute_code_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert compute_code_digest(tmp_path) == before
    seen = {before}
    for name in ("inner/own.py", "vocab.txt", "new.so"):
        (tmp_path / name).write_text("changed")
        seen.add(compute_code_digest(tmp_path))
    assert len(seen) == 4


@pytest.mark.parametrize("key", ["megatron_config", "tokenizer_kwargs"])
def test_an_adapter_names_no_code(tmp_path: Path, key: str) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", key: {"trust_remote_code": True}})
    )
    sentence = find_adapter_refusal(tmp_path, "lora", None, "train.init_adapter", generates=True)
    assert sentence is not None
    assert "could run code" in sentence
