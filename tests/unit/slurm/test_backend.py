"""Where a run is, from what Slurm and its own files say; what a cluster's own words make of a site
file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from lorafleet.cluster.backends import create_cluster_backend
from lorafleet.cluster.submission import SubmissionRecord, write_record
from lorafleet.jobs.data.assets import get_cache_dir
from lorafleet.jobs.data.hub import get_hub_cache
from lorafleet.jobs.errors import JobFileError, PlacementRefused, UserError
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.loading.site_file import load_site
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.sites.slurm import SlurmSite
from lorafleet.slurm import client
from lorafleet.slurm.accounting import JobRecord, parse_sacct, parse_squeue
from lorafleet.slurm.backend import SlurmBackend, compute_exit_code, derive_status
from lorafleet.slurm.discover import Hardware, parse_hardware, render_site_file


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run.create(tmp_path, "x")
    (made.path / "slurm").mkdir()
    (made.path / "slurm" / "9.out").write_text(
        "first\nmodule: command not found\nlorafleet: command not found\n"
    )
    return made


def record(state: str, **more: object) -> JobRecord:
    return JobRecord(job_id="9", state=state, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("records", "state", "sentence", "code"),
    [
        (
            [record("PENDING", reason="Priority")],
            RunState.PENDING,
            "job 9 waits in the queue: jobs with a higher",
            None,
        ),
        (
            [record("PENDING", reason="BeginTime", restarts=2)],
            RunState.PENDING,
            "again (restart 2): its begin",
            None,
        ),
        ([record("RUNNING", nodes="a[1-2]")], RunState.RUNNING, "job 9 runs on a[1-2]", None),
        (
            [record("FAILED", exit_code=127)],
            RunState.FAILED,
            "(code 127); last output: module: comm",
            127,
        ),
        (
            [record("TIMEOUT", exit_code=0)],
            RunState.STOPPED,
            "reached its time limit; continue it with `lorafleet resume x-",
            130,
        ),
        (
            [record("PREEMPTED", exit_code=0)],
            RunState.STOPPED,
            "was preempted by a job of higher priority",
            130,
        ),
        (
            [record("OUT_OF_MEMORY", exit_code=0)],
            RunState.FAILED,
            "used more memory than it requested",
            1,
        ),
        (
            [],
            RunState.FAILED,
            "Slurm does not know job 9 any more, and the run did not record how it ended",
            1,
        ),
        (
            [record("CANCELLED", exit_code=0, nodes="a1"), record("CANCELLED")],
            RunState.STOPPED,
            "was cancelled",
            130,
        ),
    ],
)
def test_where_a_run_is(
    run: Run, records: list[JobRecord], state: RunState, sentence: str, code: int | None
) -> None:
    said = derive_status(run, "9", records)
    assert said.state is state
    assert sentence in said.message
    if code is not None:
        assert compute_exit_code(run, records) == code


def test_what_the_driver_wrote_itself_holds(run: Run) -> None:
    run.set_state(RunState.RUNNING)
    run.set_state(RunState.FINISHED, reason="1 of 3 trials failed")
    assert derive_status(run, "9", []).state is RunState.FINISHED
    assert compute_exit_code(run, []) == 0
    assert compute_exit_code(run, [record("FAILED", exit_code=4)]) == 4
    assert (
        derive_status(run, "9", [record("FAILED", exit_code=4)]).message == "1 of 3 trials failed"
    )


def test_a_job_that_failed_before_its_driver_is_not_what_an_earlier_one_was(run: Run) -> None:
    run.set_state(RunState.RUNNING)
    run.set_state(RunState.STOPPED, reason="interrupted: `lorafleet resume` goes on")
    said = derive_status(run, "9", [record("FAILED", exit_code=127)])
    assert said.state is RunState.FAILED
    assert "(code 127); last output: module" in said.message
    assert derive_status(run, "9", [record("FAILED", exit_code=85)]).state is RunState.STOPPED


def test_short_forms_that_every_version_prints() -> None:
    (waits,) = parse_squeue("17|PENDING|Resources|\n")
    assert (waits.job_id, waits.state, waits.reason, waits.nodes) == (
        "17",
        "PENDING",
        "Resources",
        "",
    )
    text = (
        "17|CANCELLED by 1000|0:15|None|node[1-2]|1\n18|COMPLETED|0:0|None|None assigned|0\nnoise\n"
    )
    cancelled, fine = parse_sacct(text)
    assert (cancelled.state, cancelled.signal, cancelled.restarts, cancelled.nodes) == (
        "CANCELLED",
        15,
        1,
        "node[1-2]",
    )
    assert (fine.state, fine.exit_code, fine.nodes) == ("COMPLETED", 0, "")


def answer(monkeypatch: pytest.MonkeyPatch, **said: object) -> None:
    """Slurm's commands answer so; a number is an exit code, an exception is raised."""

    def ask(command: list[str], *_: object, **__: object) -> client.CommandOutput:
        given = said.get(command[0], 1)
        if isinstance(given, Exception):
            raise given
        if isinstance(given, client.CommandOutput):
            return given
        return (
            client.CommandOutput(given, "", "no")
            if isinstance(given, int)
            else client.CommandOutput(0, str(given), "")
        )

    monkeypatch.setattr(client, "run_command", ask)


def test_who_is_asked_in_which_order(monkeypatch: pytest.MonkeyPatch) -> None:
    down = client.SlurmError("squeue did not answer within 20 s")
    shown = (
        "JobId=9 JobName=x JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0 Restarts=0 "
        "NodeList=a"
    )
    answer(monkeypatch, squeue="9|RUNNING|None|a\n", sacct=down, scontrol=down)
    assert client.find_job("9").state == "RUNNING"  # type: ignore[union-attr]
    answer(monkeypatch, squeue="9|FAILED|NonZeroExitCode|a\n", scontrol=shown)
    assert client.find_job("9").exit_code == 3  # type: ignore[union-attr]
    answer(monkeypatch, squeue=down, sacct="9|TIMEOUT|0:0|None|a|0\n", scontrol=down)
    assert client.find_job("9").state == "TIMEOUT"  # type: ignore[union-attr]
    gone = client.CommandOutput(1, "", "slurm_load_jobs error: Invalid job id specified")
    answer(monkeypatch, squeue=gone, scontrol=gone)
    assert client.find_job("9") is None
    answer(monkeypatch)  # refused for another reason: the controller restarts
    with pytest.raises(client.SlurmError, match="Slurm did not answer the query: no"):
        client.find_job("9")
    two = "12_[4-9%2]|PENDING|Resources|\n12_3|RUNNING|None|a\n"
    answer(monkeypatch, squeue=two)
    assert client.find_job("12").state == "RUNNING"  # type: ignore[union-attr]
    answer(monkeypatch, squeue=down, sacct=down, scontrol=down)
    with pytest.raises(client.SlurmError, match="did not answer within 20 s"):
        client.find_job("9")


def test_many_jobs_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = "9|RUNNING|None|a\n12_[4-9]|PENDING|Resources|\n12_3|RUNNING|None|b\n13|FAILED|x|a\n"
    sacct = "13|FAILED|3:0|None|a|0\n14+0|CANCELLED by 0|0:0|None|a|0\n14+1|CANCELLED|0:0|None||0\n"
    commands: list[list[str]] = []

    def ask(command: list[str], *_: object, **__: object) -> client.CommandOutput:
        commands.append(command)
        return client.CommandOutput(0, {"squeue": squeue, "sacct": sacct}.get(command[0], ""), "")

    monkeypatch.setattr(client, "run_command", ask)
    records = client.find_jobs(["9", "12", "13", "14", "15"])
    states = {job: (record.state, record.exit_code) for job, record in records.items()}
    assert states == {
        "9": ("RUNNING", None),
        "12": ("RUNNING", None),
        "13": ("FAILED", 3),
        "14": ("CANCELLED", 0),
    }
    assert [command[0] for command in commands] == ["squeue", "sacct", "scontrol"]
    assert "--jobs=9,12,13,14,15" in commands[0]
    assert "--jobs=13,14,15" in commands[1]
    assert commands[2][-1] == "15"


def test_a_finished_run_does_not_wait_for_what_is_left_in_the_queue(run: Run) -> None:
    run.set_state(RunState.RUNNING)
    run.set_state(RunState.FINISHED)
    waits = [record("PENDING", reason="BeginTime")]
    assert derive_status(run, "9", waits).state is RunState.PENDING  # submitted again
    write_record(run, SubmissionRecord(kind="slurm", site={}, submission=2))
    (run.path / "slurm" / "over-1").touch()
    assert derive_status(run, "9", waits).state is RunState.PENDING
    (run.path / "slurm" / "over-2").touch()
    assert derive_status(run, "9", waits).state is RunState.FINISHED


def test_a_restart_that_squeue_does_not_tell(run: Run) -> None:
    """The job's own history counts it."""
    history = run.path / "slurm" / "history.jsonl"
    began = {"job": "9", "restart": 0, "submission": "1", "event": "began", "code": 0}
    history.write_text(json.dumps(began) + "\n")
    status = derive_status(run, "9", [record("PENDING", reason="BeginTime")])
    assert "waits in the queue again (restart 1)" in status.message
    with history.open("a") as lines:
        lines.write(json.dumps(began | {"restart": 1}) + "\n")
    assert (
        "runs on a again (restart 1)"
        in derive_status(run, "9", [record("RUNNING", nodes="a")]).message
    )


@pytest.mark.parametrize(
    ("partition", "limit", "problem"),
    [
        ("a", "2:00:00", None),
        ("a", "2-00:00:00", "partition a allows only 1-00:00:00: the job would never start"),
        ("a,b", "2-00:00:00", None),  # it starts in b
        (
            "a,c",
            "2-00:00:00",
            "partition a allows only 1-00:00:00 and partition c allows only 30:00: the job",
        ),
        ("a,unknown", "2-00:00:00", None),
    ],
)
def test_a_time_limit_is_compared_with_each_partition(
    partition: str, limit: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"a": "1-00:00:00", "b": "UNLIMITED", "c": "30:00"}
    monkeypatch.setattr(
        client, "get_partition_limit", lambda name: (name, limits[name]) if name in limits else None
    )
    values = {"cpus_per_node": 4, "memory_gb_per_node": 8, "name": "x"}
    site = SlurmSite.model_validate(values | {"partition": partition, "time_limit": limit})
    found = SlurmBackend(site)._check_time_limit(cast(Any, None))
    assert (found is None) if problem is None else (problem in (found or ""))


def test_commands_that_are_not_there_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        client.SlurmError,
        match="no-such-sbatch is not installed on this machine: run the command on a login node",
    ):
        client.run_command(["no-such-sbatch"])
    with pytest.raises(client.SlurmError, match=r"sleep did not answer within 0\.1 s"):
        client.run_command(["sleep", "5"], 0.1)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert "WANDB_API_KEY" not in client.build_job_environment()


NODES = [
    {
        "NodeName": "g1",
        "Partitions": "gpu,all",
        "CPUTot": "64",
        "RealMemory": "515000",
        "Gres": "gpu:a100:4(S:0-1)",
    },
    {
        "NodeName": "g2",
        "Partitions": "gpu,all",
        "CPUTot": "64",
        "RealMemory": "515000",
        "Gres": "gpu:a100:4(S:0-1)",
    },
    {
        "NodeName": "g3",
        "Partitions": "gpu,all",
        "CPUTot": "32",
        "RealMemory": "250000",
        "Gres": "gpu:v100:2,shard:8",
    },
    {
        "NodeName": "c1",
        "Partitions": "cpu,all",
        "CPUTot": "16",
        "RealMemory": "64000",
        "Gres": "(null)",
    },
]
PARTITIONS = [
    {"PartitionName": "cpu", "Default": "YES", "MaxTime": "UNLIMITED"},
    {"PartitionName": "gpu", "Default": "NO", "MaxTime": "12:00:00"},
]


def test_a_site_file_from_what_the_cluster_says(tmp_path: Path) -> None:
    for partition, cpus, gpus, smallest, limit in (
        ("gpu", 64, 4, 2, "12:00:00"),
        (None, 16, 0, 0, "4:00:00"),
    ):
        path = tmp_path / "made.yaml"
        path.write_text(render_site_file(PARTITIONS, NODES, partition))
        site = load_site(str(path)).site
        assert (site.cpus_per_node, site.gpus_per_node, site.smallest_node.gpus_per_node) == (
            cpus,
            gpus,
            smallest,
        )
        assert (site.partition, site.time_limit) == (partition or "cpu", limit)
    assert parse_hardware(
        {"CPUTot": "8", "RealMemory": "1000", "Gres": "gpu:3090:4(S:0)"}
    ) == Hardware(8, 1000, 4, "3090")
    assert parse_hardware(NODES[2]) == Hardware(32, 250000, 2, "v100")
    with pytest.raises(UserError, match="there is no partition gpus; the cluster has cpu, gpu"):
        render_site_file(PARTITIONS, NODES, "gpus")


def test_a_chain_that_an_administrator_has_forbidden(tmp_path: Path) -> None:
    base = "kind: slurm\ncpus_per_node: 4\nmemory_gb_per_node: 8\n"
    (tmp_path / "admin.yaml").write_text(
        f"{base}requeue: {{policy: none}}\nlocked: [requeue.policy]\n"
    )
    (tmp_path / "mine.yaml").write_text("extends: admin.yaml\naccount: a\n")
    (tmp_path / "free.yaml").write_text(base)
    with pytest.raises(
        UserError, match=r"--max-walltime-chain is 3, but .*admin.yaml fixes requeue.policy"
    ):
        load_site(str(tmp_path / "mine.yaml")).apply_chain(3)
    chained = load_site(str(tmp_path / "free.yaml")).apply_chain(3).site.requeue
    assert (chained.policy, chained.max_walltime_chain) == ("chain", 3)


def test_options_of_sbatch_that_are_ours_however_they_are_spelt(tmp_path: Path) -> None:
    base = "kind: slurm\ncpus_per_node: 4\nmemory_gb_per_node: 8\n"
    for option in ("-p gpu", "--part=gpu2", "--gpus-per-task=1", "--gre=gpu:1"):
        (tmp_path / "x.yaml").write_text(f'{base}extra_sbatch: ["{option}"]\n')
        with pytest.raises(JobFileError, match="extra_sbatch"):
            load_site(str(tmp_path / "x.yaml"))
    (tmp_path / "x.yaml").write_text(f'{base}extra_sbatch: ["--mail-type=FAIL", "--exclusive"]\n')
    assert load_site(str(tmp_path / "x.yaml")).site.extra_sbatch == (
        "--mail-type=FAIL",
        "--exclusive",
    )


def test_a_folder_whose_variable_is_not_set_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "kind: slurm\ncpus_per_node: 4\nmemory_gb_per_node: 8\nruns_dir: $NO_SUCH_FOLDER/runs\n"
    (tmp_path / "x.yaml").write_text(text)
    backend = SlurmBackend(load_site(str(tmp_path / "x.yaml")).site)
    with pytest.raises(
        PlacementRefused,
        match=r"runs_dir of site x is .NO_SUCH_FOLDER/runs, but that variable is not",
    ):
        backend.resolve_runs_dir(tmp_path)
    monkeypatch.setenv("NO_SUCH_FOLDER", "/there")
    assert backend.resolve_runs_dir(tmp_path) == Path("/there/runs")


def test_the_caches_of_a_site_are_used_when_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making a backend changes nothing; choosing one for a command does."""
    monkeypatch.setenv("LORAFLEET_CACHE", "/before")
    monkeypatch.setenv("HF_HUB_CACHE", "/before/hub")
    text = f"kind: slurm\ncpus_per_node: 4\nmemory_gb_per_node: 8\ncache_dir: {tmp_path}/c\n"
    (tmp_path / "x.yaml").write_text(text)
    site = load_site(str(tmp_path / "x.yaml"))
    SlurmBackend(site.site)
    assert (get_cache_dir(), get_hub_cache()) == (Path("/before"), Path("/before/hub"))
    create_cluster_backend(site)
    assert (get_cache_dir(), get_hub_cache()) == (tmp_path / "c", tmp_path / "c" / "hub")


def test_locks_are_not_passed_by_the_block_around_them(tmp_path: Path) -> None:
    base = "kind: slurm\ncpus_per_node: 4\nmemory_gb_per_node: 8\nnodes: 2\n"
    container = "container: {kind: apptainer, image: /a.sif}\nlocked: [container.image, nodes]\n"
    (tmp_path / "admin.yaml").write_text(base + container)
    (tmp_path / "mine.yaml").write_text("extends: admin.yaml\ncontainer: null\n")
    with pytest.raises(
        JobFileError, match=r"mine.yaml\S* container.image is fixed by .*admin.yaml"
    ):
        load_site(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("extends: admin.yaml\ncontainer: {mounts: [/x:/x]}\n")
    loaded = load_site(str(tmp_path / "mine.yaml"))
    loaded.check_nodes(2)
    with pytest.raises(UserError, match=r"--nodes is 3, but .*admin.yaml fixes nodes at 2"):
        loaded.check_nodes(3)


def test_variables_of_a_job(tmp_path: Path) -> None:
    text = (
        "name: a\ntask: classification\nmodel: {model_name_or_path: a/b}\ndata: {dataset_name: "
        "a/b}\n"
    )
    job = load_text(f"{text}environment: {{NCCL_DEBUG: INFO}}\n", tmp_path / "j.yaml").job
    assert job.environment == {"NCCL_DEBUG": "INFO"}
    for name, why in (
        ("HF_TOKEN", "may hold a secret"),
        ("RAY_ADDRESS", "is set by lorafleet"),
        ("LF_RUN", "is set by"),
    ):
        with pytest.raises(JobFileError, match=rf"j.yaml:5: environment: .*{name} {why}"):
            load_text(f"{text}environment: {{{name}: x}}\n", tmp_path / "j.yaml")
