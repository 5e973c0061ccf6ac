"""The inputs of a job are listed in one place, and its rows are read and hashed once a command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lorafleet.cluster.local_site import detect_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.jobs import files
from lorafleet.jobs.data import rows as data_rows
from lorafleet.jobs.data.hub import get_hub_cache
from lorafleet.jobs.data.inputs import JobInput, resolve_inputs
from lorafleet.jobs.data.rows import forget_rows, load_rows
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.trial_id import _resolve_revisions
from tests.conftest import JobMaker

FOUR_ARMS = """
compare:
  seeds: 1
  arms:
    untrained: {method: base}
    lora: {method: lora, parameters: {train.learning_rate: {values: [1e-3, 1e-2]}}}
    prompt: {method: prompt_tuning}
    full: {method: full, set: {train.learning_rate: 1e-4}}
"""


def test_every_kind_of_input_is_listed(bert_job: JobMaker, tmp_path: Path) -> None:
    job = bert_job(
        "compare: {arms: {a: {method: lora}, b: {method: base, set: {model.model_name_or_path: "
        "org/b, model.revision: r2}}, c: {method: lora, weights: /weights/c}}}\n"
        "evaluate: {custom_metrics: {mine: {function: /metrics.py:score, goal: maximize}}}",
        train__learning_rate=1e-3,
    ).job
    inputs = resolve_inputs(job)
    listed = [(item.field, item.source, item.role) for item in inputs.items]
    assert ("data.train_file", "path", "data_file") in listed
    assert ("compare.arms.c.weights", "path", "adapter") in listed
    assert ("evaluate.custom_metrics.mine.function", "path", "metric") in listed
    assert [str(model) for model in inputs.models] == [
        job.model.model_name_or_path,
        "org/b@r2",
    ]
    assert [str(item) for item in inputs.fetched] == ["org/b@r2"]
    with pytest.raises(AssetError, match="org/b@r2, which is not on this machine"):
        _ = inputs.models[1].path


class Reads:
    """Counts the files that are parsed and hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parsed, self.hashed = Counter[str](), Counter[str]()
        read_split, compute_sha256 = data_rows._read_split, files.compute_sha256

        def read(path: Path, *args: object) -> object:
            self.parsed[path.name] += 1
            return read_split(path, *args)

        def hash_file(path: Path) -> str:
            self.hashed[path.name] += 1
            return compute_sha256(path)

        monkeypatch.setattr(data_rows, "_read_split", read)
        monkeypatch.setattr(files, "compute_sha256", hash_file)
        forget_rows()
        files._compute_digest_once.cache_clear()


def test_a_comparison_of_four_arms_reads_its_rows_once(
    bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = bert_job(FOUR_ARMS)
    names = [Path(str(loaded.job.data.train_file)).name]
    names += [Path(str(loaded.job.data.validation_file)).name]
    names += [Path(str(loaded.job.data.test_file)).name]
    reads = Reads(monkeypatch)
    plan = make_plan(loaded, detect_site(), "compare")
    assert {trial.arm for trial in plan.trials} == {"lora", "prompt", "full"}
    assert reads.parsed == dict.fromkeys(names, 1)
    assert {name: reads.hashed[name] for name in names} == dict.fromkeys(names, 1)


def _copy_data(bert_job: JobMaker, folder: Path) -> tuple[JobSpec, Path]:
    """Return a job whose training file may be changed."""
    path = folder / "mine.jsonl"
    shutil.copy(str(bert_job().job.data.train_file), path)
    return bert_job(data__train_file=str(path)).job, path


def test_a_file_that_changed_is_read_again(
    bert_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, path = _copy_data(bert_job, tmp_path)
    reads = Reads(monkeypatch)
    first = load_rows(job)
    assert load_rows(job) is first
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    second = load_rows(job)
    assert len(second.train) == len(first.train) + 1
    assert second.sha256["train"] != first.sha256["train"]
    assert reads.parsed[path.name] == reads.hashed[path.name] == 2
    other_limit = job.model_copy(
        update={"data": job.data.model_copy(update={"max_train_samples": 3})}
    )
    assert len(load_rows(other_limit).train) == 3


def test_bad_rows_that_are_collected_are_not_kept(bert_job: JobMaker, tmp_path: Path) -> None:
    job, path = _copy_data(bert_job, tmp_path)
    path.write_text(path.read_text() + "[]\n")
    problems: list[str] = []
    load_rows(job, problems)
    load_rows(job, problems)
    assert len(problems) == 2


def test_revisions_of_one_model_have_names_of_their_own(
    bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one without a revision, which is that of the hub's main branch."""
    monkeypatch.setattr(
        "lorafleet.jobs.data.inputs.resolve_model_revision",
        lambda name, revision: f"commit of {revision}",
    )
    models = [JobInput("f", "org/x", "model", revision) for revision in ("r1", None, "r2")]
    assert _resolve_revisions(models) == {
        "org/x": "commit of r1",
        "org/x@None": "commit of None",
        "org/x@r2": "commit of r2",
    }


def test_the_hub_cache_is_where_the_client_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for value, folder in (("~/hub", "/home/ann/hub"), ("$SCRATCH/hub", "/scratch/hub")):
        monkeypatch.setenv("HF_HUB_CACHE", value)
        code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
        client = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert str(get_hub_cache()) == folder == client.stdout.strip()
