"""Site files: found by name, laid over an administrator's, and refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.jobs.errors import JobFileError
from lorafleet.jobs.loading.site_file import load_site
from lorafleet.jobs.schema.base import Spec, describe_fields
from lorafleet.jobs.sites.slurm import SlurmSite, parse_slurm_time

PLAIN = """
kind: slurm
partition: gpu
cpus_per_node: 64
memory_gb_per_node: 500
gpus_per_node: 4
gpu_memory_gb: 80
time_limit: 1-00:00:00
setup: ["module load cuda/12.8", "source ~/venv/bin/activate"]
"""


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def load(tmp_path: Path, text: str) -> SlurmSite:
    return load_site(str(write(tmp_path, "here", text))).site


def test_a_site_is_found_where_it_is_looked_for_first(tmp_path: Path) -> None:
    places = (tmp_path / "mine", tmp_path / "etc", tmp_path / "sites")
    write(places[1], "alpha", PLAIN.replace("gpu\n", "theirs\n"))
    write(places[2], "alpha", PLAIN)
    write(places[2], "beta", PLAIN)
    found = load_site("alpha", places)
    assert (found.site.partition, found.site.name, found.files) == (
        "theirs",
        "alpha",
        (places[1] / "alpha.yaml",),
    )
    with pytest.raises(
        JobFileError, match=r"there is no site file of this name in .*; did you mean alpha"
    ):
        load_site("alpah", places)


def test_an_administrators_file_gives_defaults_and_locks_keys(tmp_path: Path) -> None:
    fixed = "requeue: {policy: chain}\nlocked: [partition, requeue.policy]\n"
    admin = write(tmp_path / "etc", "cluster", PLAIN + fixed)
    mine = (
        f"extends: ../etc/{admin.name}\naccount: proj42\nrequeue: {{max_restarts: 7}}\ntime_limit: "
        "2:00:00\n"
    )
    found = load_site(str(write(tmp_path / "mine", "own", mine)))
    assert (found.site.account, found.site.partition, found.site.time_limit_seconds) == (
        "proj42",
        "gpu",
        7200,
    )
    assert (found.site.requeue.policy, found.site.requeue.max_restarts) == ("chain", 7)
    assert found.locked == ("partition", "requeue.policy")
    assert [path.name for path in found.files] == ["own.yaml", "cluster.yaml"]
    for line, key in (
        ("partition: other", "partition"),
        ("requeue: {policy: none}", "requeue.policy"),
    ):
        wrong = write(tmp_path / "mine", "wrong", f"extends: ../etc/{admin.name}\n{line}\n")
        with pytest.raises(JobFileError, match=rf"wrong.yaml:2: {key} is fixed by .*cluster.yaml"):
            load_site(str(wrong))
    same = write(tmp_path / "mine", "same", f"extends: ../etc/{admin.name}\npartition: gpu\n")
    assert load_site(str(same)).site.partition == "gpu"  # the same value says nothing new


def test_files_that_extend_each_other_are_noticed(tmp_path: Path) -> None:
    write(tmp_path, "a", "extends: b.yaml\n")
    write(tmp_path, "b", "extends: a.yaml\n")
    with pytest.raises(JobFileError, match="refers back to a file that is being read"):
        load_site(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("kind: slrum", "kind is 'slrum', but must be slurm"),
        ("partiton: gpu", "here.yaml:10: partiton is not a known key; did you mean 'partition'?"),
        (
            "requeue: {max_restart: 2}",
            "requeue.max_restart is not a known key; did you mean 'requeue.max_restarts'?",
        ),
        ("account: 'a b'", "account is 'a b', but must be one word, without spaces"),
        ('account: "a\\nb"', "account is"),
        ("qos: '$(reboot)\t'", "qos is"),
        ('setup: ["ok\\nnot"]', "but must be one line of text"),
        ("environment: {WANDB_API_KEY: x}", "WANDB_API_KEY may hold a secret"),
        ("environment: {my_token: x}", "my_token may hold a secret"),
        ("environment: {'A B': x}", "'A B' is not a valid name of a variable"),
        ("time_limit: UNLIMITED", "'UNLIMITED' is not a time"),
        ("time_limit: 0", "time_limit is 0, but must be a text"),
        (
            "time_limit: '1:00'",
            "requeue.signal_seconds is 120, but must be below the time limit of 1:00 (60 s)",
        ),
        ("extra_sbatch: [--gres=gpu:1]", "--gres is set from other fields of the site"),
        ("extra_sbatch: [mail]", "'mail' is not an option of sbatch"),
        ("gpu_request: both", "gpu_request is 'both', but must be"),
        ("nodes: 4\nmax_nodes: 2", "nodes is 4, but must not exceed max_nodes = 2"),
        ("scratch_dir: relative", "scratch_dir is 'relative', but must be an absolute path"),
        ("gpus_per_node: 0\ngpu_type: a100", "gpu_type is a100, but gpus_per_node is 0"),
        ("locked: partition", "locked is 'partition', but must be a list of keys"),
    ],
)
def test_what_is_wrong_is_said(line: str, sentence: str, tmp_path: Path) -> None:
    key = line.split(":")[0]
    kept = "".join(f"{row}\n" for row in PLAIN.splitlines() if not row.startswith(f"{key}:"))
    with pytest.raises(JobFileError) as caught:
        load(tmp_path, kept + line + "\n")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:30", 172_830),
    ],
)
def test_slurms_times(text: str, seconds: int) -> None:
    assert parse_slurm_time(text) == seconds


def test_what_fits_is_judged_by_the_smallest_kind_of_node(tmp_path: Path) -> None:
    kinds = (
        "node_types:\n  old: {cpus_per_node: 32, memory_gb_per_node: 800, gpus_per_node: 8, "
        "gpu_memory_gb: 40}\n"
    )
    site = load(tmp_path, PLAIN + kinds)
    least = site.smallest_node
    assert (
        least.cpus_per_node,
        least.memory_gb_per_node,
        least.gpus_per_node,
        least.gpu_memory_gb,
    ) == (32, 500, 4, 40)
    first, second = site.build_allocation(2).nodes
    assert (first.cpus, first.gpus, second.name) == (32, 4, "node 2")
    assert first.memory_gib == pytest.approx(465.7, abs=0.1)


def test_every_field_of_a_site_has_a_sentence() -> None:
    def walk(model: type[Spec]) -> None:
        for name, field in model.model_fields.items():
            assert describe_fields(model).get(name), f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Spec):
                walk(field.annotation)

    walk(SlurmSite)
