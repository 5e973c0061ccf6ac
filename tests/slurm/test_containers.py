"""Jobs in pyxis' containers. pyxis cannot be had here: a stand-in for srun records and drops its
options, so what is shown is which steps share a container and where they run, not that they can.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import JobMaker
from tests.slurm.conftest import Login

pytestmark = pytest.mark.ray

STAND_IN = """#!/bin/bash
printf '%s\\n' "$(printf '%q ' "$@")" >>LOG
arguments=()
for argument in "$@"; do
    case $argument in --container-*) ;; *) arguments+=("$argument") ;; esac
done
exec SRUN "${arguments[@]}"
"""


def test_steps_share_one_container_a_node_and_whole_nodes_go_to_ray(
    login: Login, bert_job: JobMaker
) -> None:
    folder, real = login.home / "bin", Path(sys.executable).parent
    folder.mkdir()
    steps, starts = login.home / "steps", login.home / "starts"
    stand_in = STAND_IN.replace("LOG", str(steps)).replace("SRUN", str(shutil.which("srun")))
    (folder / "srun").write_text(stand_in)
    (folder / "ray").write_text(f'#!/bin/bash\necho "$@" >>{starts}\nexec {real}/ray "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    login.write_site(
        setup=[f"export PATH={folder}:{real}:$PATH"],
        container={"kind": "pyxis", "image": "registry/lorafleet:1"},
        extra_sbatch=["--exclusive"],
    )
    path = login.home / "job.yaml"
    path.write_text(bert_job(train__max_steps=8).text)
    planned = login.lorafleet("plan", path, "train.max_steps=8", "--on", "rig", "--train")
    assert (
        "site rig requests whole nodes (--exclusive): Ray gets all cores of a node, and the plan "
        "counts on 2 CPU cores (cpus_per_node)" in " ".join(planned.stderr.split())
    )
    run = login.submit(bert_job(train__max_steps=8), command="train")
    assert login.ended(run).state == "COMPLETED"

    calls = [shlex.split(line) for line in steps.read_text().splitlines()]
    names = {re.findall(r"--job-name=(\S+)", " ".join(call))[-1]: call for call in calls}
    assert set(names) == {"lf-look", "lf-token", "lf-ray", "lf-driver", "lf-clean"}
    job = login.job(run)
    inside = [call for call in calls if "--job-name=lf-clean" not in call]
    assert all("--container-image=registry/lorafleet:1" in call for call in inside)
    assert all(f"--container-name=lf-{job}-0" in call for call in inside)
    # What runs beside the batch script needs its token: not just any node of the job.
    beside = [call for call in calls if "--job-name=lf-driver" in call]
    assert len(beside) >= 3
    assert all("--nodelist=node1" in call for call in beside)
    assert not any(word.startswith("--container") for word in names["lf-clean"])
    assert names["lf-clean"][-2:] == ['enroot remove -f "pyxis_$0"', f"lf-{job}-0"]

    cores = re.findall(r"--num-cpus=(\d+)", starts.read_text())
    assert cores == [str(login.rig.cpus)] * login.rig.nodes
    assert login.left_behind() == []
